"""The metrics of a comparison by the names that stand in results.json: label, direction, and how to compute each.

Knows nothing of which protocol asks for which metric, nor of the cells' conditions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from scipy import sparse

from eval.metrics import distances as metrics


@dataclass(frozen=True)
class Sides:
    """Both sides of one comparison: ``x`` generated and ``y`` real in the space of the protocol, and their counts.

    ``control`` are real control cells of the same cell type and covariates, None where the comparison is not one
    perturbation's.
    """

    x: metrics.Matrix
    y: metrics.Matrix
    x_counts: sparse.csr_matrix
    y_counts: sparse.csr_matrix
    bandwidths: tuple[float, ...]
    biased: bool
    control: metrics.Matrix | None
    device: str | None

    @cached_property
    def correlation(self) -> tuple[float, float]:
        """Agreement of the gene-gene correlations and its slope: two rows of a table from one computation."""
        return metrics.correlation_agreement(self.x, self.y)

    @cached_property
    def neighbours(self) -> tuple[float, float]:
        """1-NN accuracy over all cells and over the real ones, from one search."""
        generated, real = metrics.nearest_neighbour_accuracies(self.x, self.y, device=self.device)
        n, m = self.x.shape[0], self.y.shape[0]
        return (generated * n + real * m) / (n + m), real


@dataclass(frozen=True)
class Metric:
    """A metric in a table: its label, which way is better, and how to compute it."""

    label: str
    better: str
    compute: Callable[[Sides], float]


METRICS = {
    "mmd2": Metric("MMD²", "↓", lambda s: _mmd2(s)),
    "w2": Metric("W2", "↓", lambda s: metrics.w2(s.x, s.y, device=s.device)),
    "w2_gaussian": Metric("W2, Gaussian", "↓", lambda s: metrics.w2_gaussian(s.x, s.y, device=s.device)),
    "correlation_pearson": Metric("gene-gene correlation", "↑", lambda s: s.correlation[0]),
    "correlation_slope": Metric("its slope", "→ 1", lambda s: s.correlation[1]),
    "mean_r2": Metric("mean R²", "↑", lambda s: metrics.mean_r2(s.x, s.y)),
    "variance_r2": Metric("variance R²", "↑", lambda s: metrics.variance_r2(s.x, s.y)),
    "zero_fraction_error": Metric("zero-fraction error", "↓", lambda s: metrics.zero_fraction_error(s.x, s.y)),
    "library_size_cv_ratio": Metric(
        "library-size CV ratio", "→ 1", lambda s: metrics.library_size_cv_ratio(s.x_counts, s.y_counts)
    ),
    "nearest_neighbour_accuracy": Metric("1-NN accuracy", "→ 0.5", lambda s: s.neighbours[0]),
    "nearest_neighbour_accuracy_real": Metric("1-NN accuracy, real cells only", "→ 0.5", lambda s: s.neighbours[1]),
    "pearson_delta": Metric(
        "Pearson delta",
        "↑",
        lambda s: metrics.pearson_delta(s.x, s.y, s.control),
    ),
}
POOLED_METRICS = tuple(name for name in METRICS if name != "pearson_delta")


def _mmd2(sides: Sides) -> float:
    return metrics.mmd2(sides.x, sides.y, bandwidths=sides.bandwidths, biased=sides.biased, device=sides.device)
