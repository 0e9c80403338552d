"""Named recipes for comparing generated with real cells, and the floor that every number is read against.

A protocol fixes the space, the metrics and the number of cells. Both sides always have the same number of cells in each
condition, and the kernel width comes from the real test cells alone, once for every model. Knows nothing of files,
generators or how the numbers are shown.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from eval import metrics
from eval.labelled_counts import LabelledCounts

logger = logging.getLogger(__name__)

FLOOR_DRAWS = 10
FEW_CELLS = 20
DISTANCES = ("mmd2", "w2", "w2_gaussian")


@dataclass(frozen=True)
class Protocol:
    """A recipe: what is compared, in which space, how many cells at most.

    Attributes:
        name: as it stands in tables.
        description: one sentence for a reader of the table.
        transform: counts (n, G) -> the space of the metrics.
        pooled_metrics: computed over all cells together.
        condition_metrics: computed in each condition, then averaged.
        max_cells: cap on the real cells of a comparison; more are thinned by a seeded draw, the same for every model.
    """

    name: str
    description: str
    transform: Callable[[sparse.csr_matrix], sparse.csr_matrix]
    pooled_metrics: tuple[str, ...]
    condition_metrics: tuple[str, ...] = DISTANCES
    max_cells: int = 2000


@dataclass(frozen=True)
class Sides:
    """Both sides of one comparison: ``x`` generated and ``y`` real in the space of the protocol, and their counts."""

    x: sparse.csr_matrix
    y: sparse.csr_matrix
    x_counts: sparse.csr_matrix
    y_counts: sparse.csr_matrix
    bandwidth: float


@dataclass(frozen=True)
class Metric:
    """A metric in a table: its label, which way is better, and how to compute it."""

    label: str
    better: str
    compute: Callable[[Sides], float]


@dataclass(frozen=True)
class Score:
    """One number of one comparison; ``n`` is the number of cells on each side."""

    grouping: str
    condition: str | None
    metric: str
    value: float
    n: int


METRICS = {
    "mmd2": Metric("MMD²", "↓", lambda s: metrics.mmd2(s.x, s.y, bandwidths=[s.bandwidth])),
    "w2": Metric("W2", "↓", lambda s: metrics.w2(s.x, s.y)),
    "w2_gaussian": Metric("W2, Gaussian", "↓", lambda s: metrics.w2_gaussian(s.x, s.y)),
    "correlation_pearson": Metric("gene-gene correlation", "↑", lambda s: metrics.correlation_agreement(s.x, s.y)[0]),
    "correlation_slope": Metric("its slope", "→ 1", lambda s: metrics.correlation_agreement(s.x, s.y)[1]),
    "mean_r2": Metric("mean R²", "↑", lambda s: metrics.mean_r2(s.x, s.y)),
    "variance_r2": Metric("variance R²", "↑", lambda s: metrics.variance_r2(s.x, s.y)),
    "zero_fraction_error": Metric("zero-fraction error", "↓", lambda s: metrics.zero_fraction_error(s.x, s.y)),
    "library_size_cv_ratio": Metric(
        "library-size CV ratio", "→ 1", lambda s: metrics.library_size_cv_ratio(s.x_counts, s.y_counts)
    ),
    "nearest_neighbour_accuracy": Metric(
        "1-NN accuracy", "→ 0.5", lambda s: metrics.nearest_neighbour_accuracy(s.x, s.y)
    ),
    "nearest_neighbour_accuracy_real": Metric(
        "1-NN accuracy, real cells only", "→ 0.5", lambda s: metrics.nearest_neighbour_accuracies(s.x, s.y)[1]
    ),
}


def _as_counted(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    return counts.astype(np.float64)


def _log1p(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    return counts.astype(np.float64).log1p()


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="paper",
            description="all genes, counts as they are; MMD² (Eq. 7) unbiased with one RBF kernel, W2 by matching "
            "(Eq. 8) and between Gaussians (Eq. 9)",
            transform=_as_counted,
            pooled_metrics=DISTANCES,
        ),
        Protocol(
            name="log",
            description="the same distances on log1p counts, so that a few loud genes do not rule, and the structure "
            "of the genes",
            transform=_log1p,
            pooled_metrics=tuple(METRICS),
        ),
    )
}


@dataclass(frozen=True)
class ReferenceGroup:
    """Real test cells of one comparison: rows by condition, and the kernel width (nan below two cells)."""

    grouping: str
    condition: str | None
    rows: dict[str, np.ndarray]
    bandwidth: float

    @property
    def n(self) -> int:
        return sum(rows.size for rows in self.rows.values())


@dataclass(frozen=True)
class Reference:
    """Real test cells made ready for one protocol: every model is compared with exactly these."""

    real: LabelledCounts
    protocol: Protocol
    groups: tuple[ReferenceGroup, ...]


def prepare_reference(real: LabelledCounts, protocol: Protocol, *, seed: int = 0) -> Reference:
    """Fix the real test cells and the kernel widths of a protocol: one pooled group and one per condition.

    Raises:
        ValueError: fewer than two test cells.
    """
    if len(real) < 2:
        raise ValueError(f"{len(real)} real test cells: expected two or more")
    rng = np.random.default_rng(seed)
    kept = np.sort(rng.choice(len(real), min(len(real), protocol.max_cells), replace=False))
    wanted = [("pooled", None, {c: np.intersect1d(rows, kept) for c, rows in real.rows_by_condition.items()})]
    if real.labels.shape[1]:
        for condition, rows in real.rows_by_condition.items():
            thinned = np.sort(rng.choice(rows, min(rows.size, protocol.max_cells), replace=False))
            wanted.append(("condition", condition, {condition: thinned}))
    groups = []
    for grouping, condition, by_condition in wanted:
        rows = np.concatenate(list(by_condition.values()))
        cells = protocol.transform(real.counts[rows])
        bandwidth = metrics.median_bandwidth(cells) if rows.size > 1 else float("nan")
        groups.append(ReferenceGroup(grouping, condition, by_condition, bandwidth))
    return Reference(real, protocol, tuple(groups))


def evaluate_pair(generated: LabelledCounts, reference: Reference, *, seed: int = 0) -> list[Score]:
    """Compare generated cells with the real test cells, pooled and in each condition.

    In each condition both sides are thinned (by ``seed``) to the smaller number of cells; ``n`` tells what was
    compared. ``per_condition`` is the plain mean over the conditions with 20 or more test cells, its ``n`` their median
    number of cells. Every metric of a condition with a single cell on a side is nan.
    """
    rng = np.random.default_rng(seed)
    scores = []
    for group in reference.groups:
        ours, theirs = _matched_rows(generated.rows_by_condition, group.rows, rng)
        pooled = group.grouping == "pooled"
        names = reference.protocol.pooled_metrics if pooled else reference.protocol.condition_metrics
        sides = _sides(generated.counts[ours], reference.real.counts[theirs], reference.protocol, group.bandwidth)
        values = {name: METRICS[name].compute(sides) if ours.size > 1 else float("nan") for name in names}
        scores += [Score(group.grouping, group.condition, name, values[name], ours.size) for name in names]
    large = {group.condition for group in reference.groups if group.grouping == "condition" and group.n >= FEW_CELLS}
    for name in reference.protocol.condition_metrics:
        used = [s for s in scores if s.metric == name and s.condition in large and np.isfinite(s.value)]
        if used:
            mean, n = float(np.mean([s.value for s in used])), round(float(np.median([s.n for s in used])))
            scores.append(Score("per_condition", None, name, mean, n))
    return scores


def floor_draws(
    train: LabelledCounts, real: LabelledCounts, *, draws: int = FLOOR_DRAWS, seed: int = 0
) -> Iterator[LabelledCounts]:
    """Yield samples of real training cells with as many cells in each condition as the test cells have.

    Drawn without replacement; with replacement only in a condition with fewer training than test cells, which is
    logged, as is a condition without any training cell (it stays out of the floor).
    """
    wanted = {condition: rows.size for condition, rows in real.rows_by_condition.items()}
    available, none = train.rows_by_condition, np.empty(0, dtype=np.int64)
    absent = [condition for condition in wanted if condition not in available]
    short = [condition for condition in wanted if 0 < available.get(condition, none).size < wanted[condition]]
    if len(absent) == len(wanted):
        raise ValueError(
            f"no training cell has a condition of the test cells (test: {absent[0]!r}, training: "
            f"{next(iter(available))!r}, for example): there is no floor"
        )
    if absent:
        logger.warning("floor: %d conditions have no training cells and stay out (%s, ...)", len(absent), absent[0])
    if short:
        logger.warning(
            "floor: %d conditions have fewer training than test cells: drawn with replacement (%s, ...)",
            len(short),
            short[0],
        )
    for draw in range(draws):
        rng = np.random.default_rng([seed, draw])
        rows = [
            rng.choice(available[condition], size, replace=condition in short)
            for condition, size in wanted.items()
            if condition in available
        ]
        yield train.take(np.concatenate(rows))


def missing_cells(generated: LabelledCounts, real: LabelledCounts) -> tuple[int, list[str], list[str]]:
    """How a generated file falls short of the test cells.

    Returns:
        The number of test cells that have no generated partner, the conditions in which some have none, and the
        generated conditions that are not among the test cells (never compared).
    """
    found, wanted = generated.rows_by_condition, real.rows_by_condition
    lacking = {c: rows.size - found[c].size if c in found else rows.size for c, rows in wanted.items()}
    lacking = {condition: number for condition, number in lacking.items() if number > 0}
    return sum(lacking.values()), list(lacking), [condition for condition in found if condition not in wanted]


def _sides(generated: sparse.csr_matrix, real: sparse.csr_matrix, protocol: Protocol, bandwidth: float) -> Sides:
    """Both sides in the space of a protocol; the library size stays that of the counts."""
    return Sides(protocol.transform(generated), protocol.transform(real), generated, real, bandwidth)


def _matched_rows(
    generated: dict[str, np.ndarray], real: dict[str, np.ndarray], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of both sides with the same number of cells in each condition: the smaller of the two, drawn by ``rng``."""
    ours, theirs = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for condition, rows in real.items():
        found = generated.get(condition, np.empty(0, dtype=np.int64))
        size = min(found.size, rows.size)
        ours.append(found if found.size == size else np.sort(rng.choice(found, size, replace=False)))
        theirs.append(rows if rows.size == size else np.sort(rng.choice(rows, size, replace=False)))
    return np.concatenate(ours), np.concatenate(theirs)
