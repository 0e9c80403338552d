"""Score cells of held-out perturbations, one perturbation at a time.

No training cell has a held-out condition, so the floor is one half of its real cells against the other
(:func:`eval.comparison.scoring.score_models`).
"""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from scipy import sparse

from eval.comparison.baselines import (
    FROM_VECTORS,
    Sampler,
    additive,
    cells_by_labels,
    controls_scaled,
    independent_marginals,
    perturbation_mean,
    training_rows,
)
from eval.comparison.cells import PERTURBATION, CellCounts, Comparison, together
from eval.comparison.protocols import FEW_CELLS, PROTOCOLS, Score, mean_scores
from eval.comparison.scoring import score_models
from eval.reports.tables import Row, summary_rows

logger = logging.getLogger(__name__)

METRICS = ("w2", "mmd2", "pearson_delta")
PROTOCOL = replace(PROTOCOLS["log"], pooled_metrics=(), condition_metrics=METRICS)


def control_cells(train: CellCounts) -> Sampler:
    """Predict that the perturbation does nothing: real control cells, of the same cell type and covariates."""
    source = training_rows(train, who=control_cells.__name__)

    def sample(conditions: pd.DataFrame, rng: np.random.Generator) -> sparse.csr_matrix:
        chosen = np.empty(len(conditions), dtype=np.int64)
        as_control = conditions.assign(**{PERTURBATION: train.control})
        for labels, rows in cells_by_labels(as_control[list(train.labels)]):
            known = source(labels)
            chosen[rows] = rng.choice(known, len(rows), replace=len(rows) > len(known))
        return train.counts[chosen]

    return sample


def marginals_of_all(train: CellCounts) -> Sampler:
    """Draw each gene by itself, from all training cells of the same cell type and covariates."""
    return independent_marginals(CellCounts(train.counts, train.labels.drop(columns=PERTURBATION)))


BASELINES = (perturbation_mean, additive, controls_scaled, control_cells, marginals_of_all)


def score_held_out(
    comparison: Comparison, *, vectors: Mapping[str, np.ndarray] | None = None, seed: int = 0
) -> list[Row]:
    """Score every model on each perturbation that no training cell has (or none of the cell type and covariates): W2,
    MMD^2 and Pearson delta of protocol `log`.

    A perturbation's score is the plain mean over its conditions (cell types, covariates) with 20 or more cells in a
    half. Control cells, which Pearson delta starts from, are those of training and test cells; test cells with
    perturbations that training cells have are not looked at.

    Returns:
        Rows as those of results.json: ``condition`` is a perturbation, or None for the mean over them.

    Raises:
        ValueError: no control cells, no held-out perturbation, or none with enough cells.
    """
    train, test = comparison.train, comparison.real
    samplers = {fit.__name__: fit(train) for fit in BASELINES}
    samplers |= {name: fit(train, vectors) for name, fit in FROM_VECTORS.items() if vectors}
    seen = pd.MultiIndex.from_frame(train.labels)
    held = test.take(np.flatnonzero(~pd.MultiIndex.from_frame(test.labels).isin(seen)))
    if not len(held):
        raise ValueError("every perturbation of the test cells has training cells: none is held out")
    test_cells = held.labels[PERTURBATION].value_counts().to_dict()
    label_of = {
        condition: held.labels[PERTURBATION].iloc[rows[0]]
        for condition, rows in held.rows_by_condition.items()
        if len(rows) >= 2 * FEW_CELLS
    }
    if not label_of:
        raise ValueError(f"no condition of a held-out perturbation has {2 * FEW_CELLS} test cells or more")
    left_out = sorted(set(test_cells) - set(label_of.values()))
    if left_out:
        few = f"no condition with {2 * FEW_CELLS} test cells or more"
        logger.warning("%d held-out perturbations are not scored, %s: %s", len(left_out), few, ", ".join(left_out))
    controls = [cells.take(np.flatnonzero(cells.labels[PERTURBATION] == cells.control)) for cells in (train, test)]
    beside_controls = replace(comparison, real=together([held, *controls]))
    ((_, scores),) = score_models(beside_controls, [PROTOCOL], samplers, seed=seed)
    rows = []
    for name, samples in scores.items():
        averaged = [_by_perturbation(found, label_of) for found in samples]
        rows += summary_rows(name, PROTOCOL.name, averaged, test_cells=test_cells)
    return rows


def _by_perturbation(scores: Sequence[Score], label_of: Mapping[str, str]) -> list[Score]:
    """Average the conditions of each perturbation; then the perturbations. ``n`` is the median number of cells."""
    grouped: dict[str, list[Score]] = defaultdict(list)
    for score in scores:
        if score.condition in label_of:
            grouped[label_of[score.condition]].append(score)
    means = [
        replace(mean, grouping="condition", condition=label)
        for label, found in sorted(grouped.items())
        for mean in mean_scores(found, METRICS)
    ]
    return means + mean_scores(means, METRICS)
