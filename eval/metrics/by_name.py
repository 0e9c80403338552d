"""What a reader sees of a metric or a model in every table, figure and card (results.json has the short names), and how
each metric is computed."""

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


def _component_variance(name: str, band: slice) -> tuple[str, str, Callable[[Pair], float]]:
    label = f"variance of components {name.replace('_', '-')}"
    return label, "→ 1", lambda p: gene_agreement.component_variance_ratio(p.x, p.y, p.directions, band)


def _delta_from_halves(p: Pair) -> float:
    """Pearson delta from disjoint halves of the control cells, each of which serves each side once; nan of one cell."""
    halves = p.control[::2], p.control[1::2]
    if not halves[1].shape[0]:
        return float("nan")
    return sum(gene_agreement.pearson_delta(p.x, p.y, *some) for some in (halves, halves[::-1])) / 2


COPYING = "nearest_training_distance_ratio"
TABLE: dict[str, tuple[str, str, Callable[[Pair], float]]] = {  # label, which way is better, and how it is computed
    "mmd2": ("MMD²", "↓", lambda p: distances.mmd2(p.x, p.y, bandwidths=p.bandwidths, biased=p.biased)),
    "w2": ("W2", "↓", lambda p: distances.w2(p.x, p.y)),
    "w2_gaussian": ("W2, Gaussian", "↓", lambda p: distances.w2_gaussian(p.x, p.y)),
    "correlation_pearson": ("gene-gene correlation", "↑", lambda p: p.correlation[0]),
    "correlation_slope": ("slope of gene-gene correlations", "→ 1", lambda p: p.correlation[1]),
    "mean_r2": ("R² of means", "↑", lambda p: gene_agreement.mean_r2(p.x, p.y)),
    "variance_r2": ("R² of variances", "↑", lambda p: gene_agreement.variance_r2(p.x, p.y)),
    "zero_fraction_error": ("zero-fraction error", "↓", lambda p: gene_agreement.zero_fraction_error(p.x, p.y)),
    "library_size_cv_ratio": (
        "library-size CV ratio",
        "→ 1",
        lambda p: gene_agreement.library_size_cv_ratio(p.x_counts, p.y_counts),
    ),
    "nearest_neighbour_accuracy": ("1-NN accuracy", "→ 0.5", lambda p: p.neighbours[0]),
    "nearest_neighbour_accuracy_real": ("1-NN accuracy, real cells", "→ 0.5", lambda p: p.neighbours[1]),
    **{f"component_variance_{name}": _component_variance(name, band) for name, band in gene_agreement.BANDS.items()},
    COPYING: ("distance to training cells", "→ 1", lambda p: distances.nearest_distance_ratio(p.x, p.y, p.train)),
    "pearson_delta": ("Pearson delta", "↑", lambda p: gene_agreement.pearson_delta(p.x, p.y, p.control)),
    "pearson_delta_halves": ("Pearson delta, each side from half of the controls", "↑", _delta_from_halves),
}
METRICS = {name: compute for name, (_, _, compute) in TABLE.items()}
BESIDE_TRAINING_CELLS = (*(name for name in METRICS if name.startswith("component_")), COPYING)
DELTAS = ("pearson_delta", "pearson_delta_halves")  # of one perturbation
POOLED_METRICS = tuple(name for name in METRICS if name not in DELTAS)
VCC2026_NAMES = {
    "pds_cosine": ("discrimination (PDS, cosine)", "↑"),
    "expr_mse_unbiased_capped_norm": ("error of expression", "↓"),
    "de_wilcoxon_direction_fidelity_yield_raw": ("direction fidelity", "↑"),
    "de_wilcoxon_direction_reach_raw": ("direction reach", "↑"),
    "de_wilcoxon_sig_jaccard": ("overlap of differential genes (Jaccard)", "↑"),
    "de_wilcoxon_lfc_nmae": ("error of fold changes", "↓"),
}
METRIC_NAMES = {
    **{name: (label, better) for name, (label, better, _) in TABLE.items()},
    "overlap_at_N": ("overlap of differential genes (DES)", "↑"),
    "discrimination_score_l1": ("discrimination of perturbations (PDS)", "↑"),
    "mae": ("mean absolute error", "↓"),
    "differential_genes": ("differential genes", ""),
    "differential_genes_real": ("differential genes, real cells", ""),
    **VCC2026_NAMES,
    **{f"score_{name}": (f"score: {label}", "↑") for name, (label, _) in VCC2026_NAMES.items()},
    "score": ("score: mean of the six", "↑"),
}


def metric_label(metric: str) -> tuple[str, str]:
    """Return a metric's name in a table, and which way is better (empty where that is not known)."""
    return METRIC_NAMES.get(metric, (metric, ""))


def model_label(model: str) -> str:
    """Return a model's name in a table: ``independent_marginals`` in words."""
    return model.replace("_", " ")
