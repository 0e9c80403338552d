"""The table of metrics by the names that stand in results.json, and how each is computed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import sparse

from eval.metrics import distances, gene_agreement
from eval.metrics.blocks import Matrix


@dataclass(frozen=True)
class Pair:
    """Two samples to compare: ``x`` generated and ``y`` real in the space of the protocol, and their counts.

    ``control`` are real control cells of the same cell type and covariates, None where the comparison is not one
    perturbation's. ``train`` are training cells in that space and ``directions`` (G, d) their principal components;
    None where there are none to compare with.
    """

    x: Matrix
    y: Matrix
    x_counts: sparse.csr_matrix
    y_counts: sparse.csr_matrix
    bandwidths: tuple[float, ...]
    biased: bool
    control: Matrix | None
    train: Matrix | None = None
    directions: np.ndarray | None = None

    @cached_property
    def correlation(self) -> tuple[float, float]:
        """Agreement of the gene-gene correlations and its slope: two rows of a table from one computation."""
        return gene_agreement.correlation_agreement(self.x, self.y)

    @cached_property
    def neighbours(self) -> tuple[float, float]:
        """1-NN accuracy over all cells and over the real ones, from one search."""
        return distances.nearest_neighbour_accuracy(self.x, self.y)


def _mmd2(p: Pair) -> float:
    return distances.mmd2(p.x, p.y, bandwidths=p.bandwidths, biased=p.biased)


COPYING = "nearest_training_distance_ratio"


def _component_variance(band: str) -> Callable[[Pair], float]:
    return lambda p: gene_agreement.component_variance_ratio(p.x, p.y, p.directions, gene_agreement.BANDS[band])


METRICS: dict[str, Callable[[Pair], float]] = {
    "mmd2": _mmd2,
    "w2": lambda p: distances.w2(p.x, p.y),
    "w2_gaussian": lambda p: distances.w2_gaussian(p.x, p.y),
    "correlation_pearson": lambda p: p.correlation[0],
    "correlation_slope": lambda p: p.correlation[1],
    "mean_r2": lambda p: gene_agreement.mean_r2(p.x, p.y),
    "variance_r2": lambda p: gene_agreement.variance_r2(p.x, p.y),
    "zero_fraction_error": lambda p: gene_agreement.zero_fraction_error(p.x, p.y),
    "library_size_cv_ratio": lambda p: gene_agreement.library_size_cv_ratio(p.x_counts, p.y_counts),
    "nearest_neighbour_accuracy": lambda p: p.neighbours[0],
    "nearest_neighbour_accuracy_real": lambda p: p.neighbours[1],
    **{f"component_variance_{band}": _component_variance(band) for band in gene_agreement.BANDS},
    COPYING: lambda p: distances.nearest_distance_ratio(p.x, p.y, p.train),
    "pearson_delta": lambda p: gene_agreement.pearson_delta(p.x, p.y, p.control),
}
BESIDE_TRAINING_CELLS = (*(name for name in METRICS if name.startswith("component_")), COPYING)
POOLED_METRICS = tuple(name for name in METRICS if name != "pearson_delta")
