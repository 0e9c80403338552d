"""Baselines that every generator is shown beside, all through one interface: ``fit(train) -> sample(conditions, rng)``.

``conditions`` is a data frame with one row per wanted cell and the training cells' condition columns; what comes back
are integer counts, one row per wanted cell. The two that predict means (of a perturbation, of a combination) move real
control cells to the predicted mean, so that they have a spread and gene-gene structure to be compared. Knows nothing of
files or metrics.
"""

import logging
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
from scipy import sparse

from eval.comparison.labelled_counts import PERTURBATION, SEPARATOR, LabelledCounts

logger = logging.getLogger(__name__)

Sampler = Callable[[pd.DataFrame, np.random.Generator], sparse.csr_matrix]
GENES_AT_ONCE = 512
CELLS_AT_ONCE = 1024
COMBINED = "+"  # joins the names of a combination, as in KLF1+TGFBR2


def independent_marginals(train: LabelledCounts) -> Sampler:
    """Draw every gene by itself from the training cells of the condition: right marginals, no gene-gene structure.

    A condition without training cells backs off to the cells that share its leading columns (its cell type, say), and
    at last to all of them; which conditions did is logged.
    """
    by_gene = train.counts.tocsc()

    def sample(conditions: pd.DataFrame, rng: np.random.Generator) -> sparse.csr_matrix:
        order, blocks = [], []
        for labels, rows in wanted_conditions(train, conditions):
            source = training_rows(train, labels, who="marginals")
            blocks.append(_resampled(by_gene[source], len(rows), rng))
            order.append(rows)
        return _in_order(blocks, order)

    return sample


def perturbation_mean(train: LabelledCounts) -> Sampler:
    """Predict the same for every perturbation: the mean over all of them, each weighing the same, in the cell type.

    What a model must beat to have learned anything about *which* perturbation it is. The control is its own mean.
    Reference: the baseline of cell-eval; Kernfeld et al., Genome Biology 26 (2025), 388.

    Raises:
        ValueError: no column of perturbations, or no control cells.
    """
    averages: dict[tuple[str, ...], np.ndarray] = {}

    def predicted(means: "_Means", context: tuple[str, ...], perturbation: str) -> np.ndarray:
        if perturbation == train.control:
            return means.control(context)
        if context not in averages:
            known = [means.of(context, name) for name in means.perturbations]
            found = [mean for mean in known if mean is not None]
            averages[context] = np.mean(found, axis=0) if found else means.control(context)
        return averages[context]

    return _moved_control_cells(train, predicted)


def additive(train: LabelledCounts) -> Sampler:
    """Predict a combination from its parts: their log fold changes add (pseudo-count 1 on the mean counts).

    A single perturbation is its own mean in the cell type; where it was not seen there, its average log fold change in
    the other cell types is applied to the control, and where it was seen nowhere, none (logged).
    Reference: Ahlmann-Eltze, Huber and Anders, Nature Methods 22 (2025), 1657-1661.

    Raises:
        ValueError: no column of perturbations, or no control cells.
    """
    shifts: dict[tuple[tuple[str, ...], str], np.ndarray] = {}
    unseen: set[str] = set()

    def shift(means: "_Means", context: tuple[str, ...], part: str) -> np.ndarray:
        if (context, part) not in shifts:
            contexts = [context] if means.of(context, part) is not None else means.contexts_with(part)
            if not contexts and part not in unseen:
                unseen.add(part)
                logger.log(
                    logging.WARNING if len(unseen) == 1 else logging.DEBUG,
                    "additive: no training cell of %s by itself; it, and any other such part, is taken to do nothing",
                    part,
                )
            log_changes = [np.log1p(means.of(c, part)) - np.log1p(means.control(c)) for c in contexts]
            shifts[context, part] = np.mean(log_changes, axis=0) if contexts else np.zeros(train.counts.shape[1])
        return shifts[context, part]

    def predicted(means: "_Means", context: tuple[str, ...], perturbation: str) -> np.ndarray:
        parts = [part for part in perturbation.split(COMBINED) if part != train.control]
        moved = np.log1p(means.control(context)) + sum(shift(means, context, part) for part in parts)
        return np.maximum(np.expm1(moved), 0.0)

    return _moved_control_cells(train, predicted)


def needs_control(train: LabelledCounts) -> str | None:
    """Why the baselines that start from control cells cannot be computed; None if they can."""
    if PERTURBATION not in train.labels:
        return f"the condition columns ({', '.join(train.labels) or 'none'}) have no {PERTURBATION!r}"
    if train.control is None:
        return "no label of control cells is known (uns['dcm_control'] of the real file); pass --control LABEL"
    if not (train.labels[PERTURBATION] == train.control).any():
        return f"no training cell is labelled {train.control!r} (control) in {PERTURBATION!r}"
    return None


def wanted_conditions(train: LabelledCounts, conditions: pd.DataFrame) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """Yield each distinct condition of a data frame, as its labels, and its rows."""
    columns = list(train.labels)
    wanted = conditions.reset_index(drop=True)[columns]
    groups = wanted.groupby(columns, sort=True).indices if columns else {(): np.arange(len(wanted))}
    for labels, rows in groups.items():
        yield labels if isinstance(labels, tuple) else (labels,), rows


def training_rows(train: LabelledCounts, labels: tuple[str, ...], *, who: str) -> np.ndarray:
    """Training cells of a condition, or of as many of its leading columns as some training cell shares (logged)."""
    matches = np.ones(len(train), dtype=bool)
    for position, column in enumerate(train.labels):
        narrower = matches & (train.labels[column] == labels[position]).to_numpy()
        if not narrower.any():
            logger.warning(
                "%s: no training cell of %s; drawn from the %d cells of %s",
                who,
                SEPARATOR.join(labels),
                matches.sum(),
                SEPARATOR.join(labels[:position]) or "the whole training file",
            )
            break
        matches = narrower
    return np.flatnonzero(matches)


class _Means:
    """Mean counts (G,) of the training cells by context (all labels but the perturbation's) and perturbation."""

    def __init__(self, train: LabelledCounts):
        self._train = train
        self._context_columns = list(train.labels.columns.drop(PERTURBATION))
        keys = train.labels[[*self._context_columns, PERTURBATION]].reset_index(drop=True)
        groups = keys.groupby(list(keys)).indices
        groups = {key if isinstance(key, tuple) else (key,): rows for key, rows in groups.items()}
        self._rows = {(key[:-1], key[-1]): rows for key, rows in groups.items()}
        self._known = {key: np.asarray(train.counts[rows].mean(axis=0)).ravel() for key, rows in self._rows.items()}
        self.perturbations = sorted({name for _, name in self._rows if name != train.control})

    def of(self, context: tuple[str, ...], perturbation: str) -> np.ndarray | None:
        """Mean counts, None where there are no such training cells."""
        return self._known.get((context, perturbation))

    def control_rows(self, context: tuple[str, ...]) -> np.ndarray:
        """Control cells of the context; where it has none, those that share its leading columns, at last all."""
        rows = self._rows.get((context, self._train.control))
        for kept in range(len(context) - 1, -1, -1):
            if rows is not None:
                break
            near = [
                found
                for (other, name), found in self._rows.items()
                if name == self._train.control and other[:kept] == context[:kept]
            ]
            rows = np.concatenate(near) if near else None
        return rows

    def control(self, context: tuple[str, ...]) -> np.ndarray:
        """Mean counts of the context's control cells."""
        known = self.of(context, self._train.control)
        if known is not None:
            return known
        return np.asarray(self._train.counts[self.control_rows(context)].mean(axis=0)).ravel()

    def contexts_with(self, perturbation: str) -> list[tuple[str, ...]]:
        """Contexts in which there are training cells of a perturbation."""
        return [context for context, name in self._rows if name == perturbation]


def _moved_control_cells(
    train: LabelledCounts, predicted: Callable[["_Means", tuple[str, ...], str], np.ndarray]
) -> Sampler:
    """Sampler that draws control cells of the context and moves them to the predicted mean counts."""
    reason = needs_control(train)
    if reason is not None:
        raise ValueError(f"this baseline starts from control cells, and {reason}")
    means = _Means(train)
    position = list(train.labels).index(PERTURBATION)

    def sample(conditions: pd.DataFrame, rng: np.random.Generator) -> sparse.csr_matrix:
        order, blocks = [], []
        for labels, rows in wanted_conditions(train, conditions):
            context = (*labels[:position], *labels[position + 1 :])
            controls = rng.choice(means.control_rows(context), len(rows))
            target = predicted(means, context, labels[position])
            blocks.append(_moved(train.counts[controls], means.control(context), target, rng))
            order.append(rows)
        return _in_order(blocks, order)

    return sample


def _moved(
    cells: sparse.csr_matrix, mean: np.ndarray, target: np.ndarray, rng: np.random.Generator
) -> sparse.csr_matrix:
    """Integer counts whose expectation is ``target`` where that of ``cells`` is ``mean``.

    Genes that fall are thinned (binomial), genes that rise are given Poisson counts in proportion to the library size.
    """
    keep = np.minimum(np.divide(target, mean, out=np.ones_like(mean), where=mean > 0), 1.0)
    more = np.maximum(target - mean, 0.0)
    sizes = np.asarray(cells.sum(axis=1), dtype=np.float64).ravel()
    size = mean.sum()
    sizes = sizes / size if size > 0 else np.ones_like(sizes)
    blocks = []
    for start in range(0, cells.shape[0], CELLS_AT_ONCE):
        rows = slice(start, start + CELLS_AT_ONCE)
        thinned = cells[rows].copy()
        thinned.data = rng.binomial(thinned.data, keep[thinned.indices]).astype(thinned.dtype)
        added = rng.poisson(sizes[rows, None] * more).astype(thinned.dtype)
        blocks.append((thinned + sparse.csr_matrix(added)).tocsr())
    moved = sparse.vstack(blocks, format="csr")
    moved.eliminate_zeros()
    return moved


def _in_order(blocks: list[sparse.csr_matrix], order: list[np.ndarray]) -> sparse.csr_matrix:
    """The blocks' cells, in the order of the rows they were asked for."""
    return sparse.vstack(blocks, format="csr")[np.argsort(np.concatenate(order), kind="stable")]


def _resampled(source: sparse.csc_matrix, num_cells: int, rng: np.random.Generator) -> sparse.csr_matrix:
    """(num_cells, G) counts, each gene drawn with replacement and independently from its column of ``source``."""
    blocks = []
    for start in range(0, source.shape[1], GENES_AT_ONCE):
        dense = source[:, start : start + GENES_AT_ONCE].toarray()
        drawn = rng.integers(dense.shape[0], size=(num_cells, dense.shape[1]))
        blocks.append(sparse.csr_matrix(np.take_along_axis(dense, drawn, axis=0)))
    return sparse.hstack(blocks, format="csr")
