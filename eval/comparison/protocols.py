"""Compare generated with real cells by a named recipe: space, metrics, groups and number of cells.

Both samples always have the same number of cells in each condition, and whatever is fitted (kernel width, genes,
components) is fitted on the real test cells alone, once for every model.

Shapes: ``n`` and ``m`` cells, ``G`` genes, ``d`` components.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from eval.comparison.baselines import check_installed
from eval.comparison.cells import PERTURBATION, CellCounts
from eval.metrics.blocks import Matrix
from eval.metrics.by_name import BESIDE_TRAINING_CELLS, DELTAS, METRICS, POOLED_METRICS, Pair
from eval.metrics.distances import median_bandwidth
from eval.metrics.gene_agreement import leading_directions, principal_directions
from training.data.variable_genes import FEWEST_GENES, GeneTotals, seurat_v3_variances, top_genes

FEW_CELLS = 20
TRAINING_CELLS = 5000  # that principal components are fitted on, and among which the nearest is sought, at most
DISTANCES = ("mmd2", "w2", "w2_gaussian")
TARGET_SUM = 1e4
COMPONENTS = 30
VARIABLE_GENES = 2000

Projection = Callable[[sparse.csr_matrix], np.ndarray]


def log_cp10k(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """``log(1 + 10^4 c / sum_g c)`` over the genes given; a cell without counts stays zero."""
    counts = counts.astype(np.float64)
    totals = np.asarray(counts.sum(axis=1)).ravel()
    scale = np.divide(TARGET_SUM, totals, out=np.zeros_like(totals), where=totals > 0)
    return sparse.csr_matrix(sparse.diags_array(scale) @ counts).log1p()


def principal_components(values: sparse.csr_matrix, genes: np.ndarray | None = None) -> Projection:
    """Fit at most 30 principal components of real cells (n, G), of the columns ``genes`` or all.

    Return a function (m, G) -> (m, d), ``d = min(30, n - 1, genes)``, that centres any cells by *these* means and
    projects them. Signs are arbitrary, distances are not.
    """
    chosen = np.arange(values.shape[1]) if genes is None else genes
    dense = values[:, chosen].toarray().astype(np.float64)
    mean = dense.mean(axis=0)
    dense -= mean
    directions = leading_directions(dense, COMPONENTS)

    def project(cells: sparse.csr_matrix) -> np.ndarray:
        return np.asarray(cells[:, chosen] @ directions) - mean @ directions

    return project


def variable_genes(counts: sparse.csr_matrix, number: int = VARIABLE_GENES) -> np.ndarray:
    """Ascending columns of the ``number`` most variable genes by seurat_v3; all of them where there are no more.

    Where too few genes vary for its fit of variance on mean, the genes of largest variance.
    """
    if counts.shape[1] <= number:
        return np.arange(counts.shape[1])
    totals = GeneTotals(counts.shape[1])
    totals.add(counts)
    if (totals.variance > 0).sum() < FEWEST_GENES:
        return top_genes(totals.variance, number)
    return top_genes(seurat_v3_variances(totals, [counts]), number)


@dataclass(frozen=True)
class Protocol:
    """A recipe: what is compared, in which space, how many cells at most."""

    name: str  # as it stands in tables
    description: str  # one sentence for a reader of the table
    transform: Callable[[sparse.csr_matrix], sparse.csr_matrix]  # counts (n, G) -> values (n, G), each cell by itself
    pooled_metrics: tuple[str, ...]  # computed over all cells together
    condition_metrics: tuple[str, ...] = DISTANCES  # computed in each condition, then averaged
    max_cells: int | None = 2000  # of the real cells of a comparison; more are thinned by a draw, once for every model
    max_cells_per_perturbation: int | None = None  # a further cap, in the pooled comparison
    # (counts, values) of the real cells -> what projects values (n, G) to the space of the metrics
    fit: Callable[[sparse.csr_matrix, sparse.csr_matrix], Projection] | None = None
    bandwidths: tuple[float, ...] | None = None  # the kernels' sigmas; None: the median rule, for each comparison
    biased_mmd2: bool = False  # the V-statistic
    group_by: str | None = None  # the one condition column that makes the groups; None: every condition by itself
    fewest_cells: int = FEW_CELLS  # real cells that a condition must have to enter the mean over conditions


@dataclass(frozen=True)
class Score:
    """One number of one comparison; ``n`` is the number of cells on each side."""

    grouping: str
    condition: str | None
    metric: str
    value: float
    n: int


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="paper",
            description="all genes, counts as they are; MMD² (Eq. 7) unbiased with one RBF kernel, W2 by matching "
            "(Eq. 8) and between Gaussians (Eq. 9)",
            transform=lambda counts: counts.astype(np.float64),
            pooled_metrics=DISTANCES,
        ),
        Protocol(
            name="log",
            description="the same distances on log1p counts, so that a few loud genes do not rule, and the structure "
            "of the genes",
            transform=lambda counts: counts.astype(np.float64).log1p(),
            pooled_metrics=POOLED_METRICS,
            condition_metrics=(*DISTANCES, *DELTAS),
        ),
        Protocol(
            name="scldm",
            description="30 principal components, fitted on the real cells, of log1p(CP10k of the panel); all cells "
            "pooled, at most 1,000 a perturbation and 5,000 a side; MMD² biased, the sum of RBF kernels with sigma 1, "
            "2, 4, 8, 16; W2 by exact transport",
            transform=log_cp10k,
            pooled_metrics=("mmd2", "w2"),
            condition_metrics=(),
            max_cells=5000,
            max_cells_per_perturbation=1000,
            fit=lambda counts, values: principal_components(values),
            bandwidths=(1.0, 2.0, 4.0, 8.0, 16.0),
            biased_mmd2=True,
        ),
        Protocol(
            name="cfgen",
            description="30 principal components, fitted on the real cells, of log1p(CP10k of all genes) at the 2,000 "
            "genes that seurat_v3 finds most variable among them; each cell type by itself, then the plain mean; MMD² "
            "biased, the sum of RBF kernels with sigma .01, .1, 1, 10, 100; W2 by exact transport",
            transform=log_cp10k,
            pooled_metrics=(),
            condition_metrics=("mmd2", "w2"),
            max_cells=None,
            fit=lambda counts, values: principal_components(values, variable_genes(counts)),
            bandwidths=(0.01, 0.1, 1.0, 10.0, 100.0),
            biased_mmd2=True,
            group_by="cell_type",
            fewest_cells=1,
        ),
    )
}


@dataclass(frozen=True)
class Challenge:
    """A recipe that a package computes (:mod:`eval.comparison.challenges`)."""

    name: str  # as it stands in tables
    description: str
    package: str
    module: str


CHALLENGES = {
    challenge.name: challenge
    for challenge in (
        Challenge(
            name="vcc2025",
            description="the Virtual Cell Challenge's metrics of 2025 by the package cell-eval (profile vcc) on "
            "log1p(CP10k), each context (all labels but the perturbation's) by itself, disjoint halves of the real "
            "control cells on the two sides; beside the floor its own mean baseline, and its own ceiling: one half of "
            "the real test cells against the other, corrected to full depth where the package does that",
            package="cell-eval",
            module="cell_eval",
        ),
        Challenge(
            name="vcc2026",
            description="the Virtual Cell Challenge's metrics of 2026 by the package cell-eval2 (preset vcc2026) on "
            "raw counts, each context (all labels but the perturbation's) by itself; a score is 0 for its generic "
            "response and 1 for replicates, one half of the real test cells against the other; where the real effects "
            "give a metric no such scale it has no score; contexts weigh as their perturbations do",
            package="cell-eval2",
            module="cell_eval2",
        ),
    )
}


def named_protocols(names: str) -> list[Protocol | Challenge]:
    """Protocols by their names, with commas between.

    Raises:
        ValueError: no name, or one that is not known or whose package is not installed.
    """
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    known = {**PROTOCOLS, **CHALLENGES}
    if not wanted or not set(wanted) <= set(known):
        raise ValueError(f"--protocol {names!r}: expected one or more of {', '.join(known)}, with commas between")
    for challenge in (CHALLENGES[name] for name in wanted if name in CHALLENGES):
        check_installed(challenge.module, challenge.package, f"--protocol {challenge.name}")
    return [known[name] for name in wanted]


@dataclass(frozen=True)
class ReferenceGroup:
    """Real test cells of one comparison: rows by condition, kernel widths (nan below two cells), controls."""

    grouping: str
    condition: str | None
    rows: dict[str, np.ndarray]
    bandwidths: tuple[float, ...]
    control_rows: np.ndarray | None = None

    @property
    def n(self) -> int:
        return sum(rows.size for rows in self.rows.values())


@dataclass(frozen=True)
class Reference:
    """Real test cells made ready for one protocol: every model is compared with exactly these.

    ``train`` are training cells in the protocol's space, and ``directions`` their principal components.
    """

    real: CellCounts
    protocol: Protocol
    groups: tuple[ReferenceGroup, ...]
    projection: Projection | None = None
    train: Matrix | None = None
    directions: np.ndarray | None = None

    def space(self, counts: sparse.csr_matrix) -> Matrix:
        """Counts (n, G) in the space of the protocol."""
        values = self.protocol.transform(counts)
        return values if self.projection is None else self.projection(values)


def prepare_reference(
    real: CellCounts, protocol: Protocol, *, train: CellCounts | None = None, seed: int = 0
) -> Reference:
    """Fix the real test cells, the fitted space and the kernel widths: one pooled group and one per condition.

    Without ``train`` there are no metrics beside training cells: component variance and copying.

    Raises:
        ValueError: fewer than two test cells, or no condition column that the protocol groups by.
    """
    if len(real) < 2:
        raise ValueError(f"{len(real)} real test cells: expected two or more")
    if protocol.group_by is not None and protocol.group_by not in real.labels:
        raise ValueError(
            f"protocol {protocol.name!r} compares each {protocol.group_by} by itself, and the condition columns are "
            f"{', '.join(real.labels) or 'none'}: leave it out of --protocol, or name that column in --condition-keys"
        )
    rng = np.random.default_rng(seed)
    kept = _kept_rows(real, protocol, rng)
    pooled = {c: np.intersect1d(rows, kept) for c, rows in real.rows_by_condition.items()}
    projection = None
    if protocol.fit is not None:
        counts = real.counts[np.sort(np.concatenate(list(pooled.values())))]
        projection = protocol.fit(counts, protocol.transform(counts))
    fitted = Reference(real, protocol, (), projection)
    wanted = [("pooled", None, pooled)] if protocol.pooled_metrics else []
    if protocol.condition_metrics and real.labels.shape[1]:
        for name, rows in _groups(real, protocol).items():
            size = sum(found.size for found in rows.values())
            if protocol.max_cells is not None and size > protocol.max_cells:
                thinned = np.sort(rng.choice(np.concatenate(list(rows.values())), protocol.max_cells, replace=False))
                rows = {condition: np.intersect1d(found, thinned) for condition, found in rows.items()}
            wanted.append(("condition", name, rows))
    groups = [
        ReferenceGroup(grouping, condition, rows, _bandwidths(fitted, rows), real.control_rows(condition))
        for grouping, condition, rows in wanted
    ]
    if train is None or not set(protocol.pooled_metrics) & set(BESIDE_TRAINING_CELLS):
        return Reference(real, protocol, tuple(groups), projection)
    beside = fitted.space(train.thinned(TRAINING_CELLS, np.random.default_rng(seed)).counts)
    return Reference(real, protocol, tuple(groups), projection, beside, principal_directions(beside))


def _kept_rows(real: CellCounts, protocol: Protocol, rng: np.random.Generator) -> np.ndarray:
    """Rows of the pooled comparison, thinned to the protocol's caps."""
    rows = np.arange(len(real))
    if protocol.max_cells_per_perturbation is not None and PERTURBATION in real.labels:
        by_label = real.labels.reset_index(drop=True).groupby(PERTURBATION).indices
        cap = protocol.max_cells_per_perturbation
        rows = np.concatenate([rng.choice(found, min(found.size, cap), replace=False) for found in by_label.values()])
    cap = rows.size if protocol.max_cells is None else min(rows.size, protocol.max_cells)
    return np.sort(rng.choice(rows, cap, replace=False))


def _groups(real: CellCounts, protocol: Protocol) -> dict[str, dict[str, np.ndarray]]:
    """Name of each group -> its full conditions and their rows."""
    if protocol.group_by is None:
        return {condition: {condition: rows} for condition, rows in real.rows_by_condition.items()}
    label = real.labels[protocol.group_by].to_numpy()
    groups: dict[str, dict[str, np.ndarray]] = {}
    for condition, rows in real.rows_by_condition.items():
        groups.setdefault(str(label[rows[0]]), {})[condition] = rows
    return groups


def _bandwidths(reference: Reference, rows: dict[str, np.ndarray]) -> tuple[float, ...]:
    """The protocol's kernel widths, or the one of the median rule."""
    if reference.protocol.bandwidths is not None:
        return reference.protocol.bandwidths
    chosen = np.concatenate(list(rows.values()))
    if chosen.size < 2:
        return (float("nan"),)
    return (median_bandwidth(reference.space(reference.real.counts[chosen])),)


def evaluate_pair(generated: CellCounts, reference: Reference, *, seed: int = 0) -> list[Score]:
    """Compare generated cells with the real test cells, pooled and in each condition.

    In each condition both sides are thinned (by ``seed``) to the smaller number of cells; ``n`` tells what was
    compared. ``per_condition`` is the plain mean over the conditions with enough test cells (the protocol says how
    many: 20, or any), its ``n`` their median number of cells. Every metric of a condition with a single cell on a side
    is nan; Pearson delta is there only for perturbations beside which there are real control cells.
    """
    rng = np.random.default_rng(seed)
    protocol, real = reference.protocol, reference.real.counts
    scores = []
    for group in reference.groups:
        ours, theirs = _matched_rows(generated.rows_by_condition, group.rows, rng)
        names = protocol.pooled_metrics if group.grouping == "pooled" else protocol.condition_metrics
        if group.control_rows is None:
            names = tuple(name for name in names if name not in DELTAS)
        if reference.train is None:
            names = tuple(name for name in names if name not in BESIDE_TRAINING_CELLS)
        values = dict.fromkeys(names, float("nan"))
        if ours.size > 1:
            pair = Pair(
                x=reference.space(generated.counts[ours]),
                y=reference.space(real[theirs]),
                x_counts=generated.counts[ours],
                y_counts=real[theirs],
                bandwidths=group.bandwidths,
                biased=protocol.biased_mmd2,
                control=reference.space(real[group.control_rows]) if set(DELTAS) & set(names) else None,
                train=reference.train,
                directions=reference.directions,
            )
            values = {name: METRICS[name](pair) for name in names}
        scores += [Score(group.grouping, group.condition, name, values[name], ours.size) for name in names]
    fewest = protocol.fewest_cells
    large = {group.condition for group in reference.groups if group.grouping == "condition" and group.n >= fewest}
    return scores + mean_scores([score for score in scores if score.condition in large], protocol.condition_metrics)


def mean_scores(scores: Sequence[Score], metrics: Sequence[str]) -> list[Score]:
    """Plain mean over conditions of each metric's finite scores, ``n`` their median number of cells."""
    means = []
    for metric in metrics:
        found = [score for score in scores if score.metric == metric and np.isfinite(score.value)]
        if found:
            value, n = np.mean([score.value for score in found]), np.median([score.n for score in found])
            means.append(Score("per_condition", None, metric, float(value), round(float(n))))
    return means


def repeated_scores(repeats: Sequence[Sequence[Score]]) -> dict[tuple[str, str | None, str], list[Score]]:
    """Grouping, condition and metric -> its score in each of the repeats that has it."""
    found: dict[tuple[str, str | None, str], list[Score]] = {}
    for score in itertools.chain.from_iterable(repeats):
        found.setdefault((score.grouping, score.condition, score.metric), []).append(score)
    return found


def averaged_scores(repeats: Sequence[Sequence[Score]]) -> list[Score]:
    """Mean over repeats of each score that is finite there, ``n`` the smallest."""
    means = []
    for key, scores in repeated_scores(repeats).items():
        finite = [score.value for score in scores if np.isfinite(score.value)]
        means.append(Score(*key, float(np.mean(finite)) if finite else float("nan"), min(score.n for score in scores)))
    return means


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
