"""Score cells of held-out perturbations, one perturbation at a time, beside a floor that needs no training cells.

No training cell has a held-out condition, so the floor of the named protocols does not exist. Here the real cells of
each condition are halved at random: one half is what everything is compared with, the other is the floor. This is
repeated, and in each repeat every model is compared with the same half.
"""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from scipy import sparse
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from eval.comparison.baselines import (
    Sampler,
    additive,
    cells_by_labels,
    independent_marginals,
    perturbation_mean,
    training_rows,
)
from eval.comparison.cells import PERTURBATION, CellCounts, together
from eval.comparison.floor import FLOOR, split_half
from eval.comparison.protocols import FEW_CELLS, PROTOCOLS, Reference, Score, evaluate_pair, prepare_reference
from eval.reports.tables import Row, summary_rows

logger = logging.getLogger(__name__)

METRICS = ("w2", "mmd2", "pearson_delta")
PROTOCOL = replace(PROTOCOLS["log"], pooled_metrics=(), condition_metrics=METRICS)


def control_cells(train: CellCounts) -> Sampler:
    """Predict that the perturbation does nothing: real control cells, of the same cell type and covariates."""

    def sample(conditions: pd.DataFrame, rng: np.random.Generator) -> sparse.csr_matrix:
        chosen = np.empty(len(conditions), dtype=np.int64)
        as_control = conditions.assign(**{PERTURBATION: train.control})
        for labels, rows in cells_by_labels(as_control[list(train.labels)]):
            source = training_rows(train, labels, who=control_cells.__name__)
            chosen[rows] = rng.choice(source, len(rows), replace=len(rows) > len(source))
        return train.counts[chosen]

    return sample


def marginals_of_all(train: CellCounts) -> Sampler:
    """Draw each gene by itself, from all training cells of the same cell type and covariates."""
    return independent_marginals(CellCounts(train.counts, train.labels.drop(columns=PERTURBATION)))


BASELINES = (perturbation_mean, additive, control_cells, marginals_of_all)


def score_held_out(
    train: CellCounts,
    test: CellCounts,
    generated: Mapping[str, Sequence[CellCounts]],
    *,
    draws: int,
    seed: int = 0,
) -> list[Row]:
    """Score every model on each perturbation that no training cell has: W2, MMD^2 and Pearson delta of protocol `log`.

    In draw d a model is represented by its file number d modulo their number. A perturbation's score is the plain mean
    over its conditions (cell types, covariates) with 20 or more cells in a half. Control cells, which Pearson delta
    starts from, are those of both splits.

    Args:
        train: real training cells.
        test: real test cells; those with perturbations that training cells have are not looked at.
        generated: name of each model -> its samples, with the conditions of the test cells.
        draws: how often the cells are halved.
        seed: of the halves, of the baselines' draws and of what is left out of larger samples.

    Returns:
        Rows as those of results.json: ``condition`` is a perturbation, or None for the mean over them.

    Raises:
        ValueError: no control cells, no held-out perturbation, or none with enough cells.
    """
    samplers = {fit.__name__: fit(train) for fit in BASELINES}
    held = test.take(np.flatnonzero(~test.labels[PERTURBATION].isin(set(train.labels[PERTURBATION]))))
    if not len(held):
        raise ValueError("every perturbation of the test cells has training cells: none is held out")
    controls = together([_controls_of(train), _controls_of(test)])
    scores: dict[str, list[list[Score]]] = defaultdict(list)
    # most matrices are small: a second BLAS thread makes it slower
    with (
        threadpool_limits(limits=1, user_api="blas"),
        tqdm(total=draws, desc="scoring", unit="draw", disable=None) as bar,
    ):
        for draw in range(draws):
            rng = np.random.default_rng([seed, draw])
            ours, others = split_half(held, list(held.rows_by_condition), rng)
            real = held.take(ours)
            models = {FLOOR: held.take(others)}
            models |= {name: files[draw % len(files)] for name, files in generated.items()}
            for name, sample in samplers.items():
                models[name] = CellCounts(sample(real.labels, rng), real.labels, real.control)
            reference = _reference(real, controls, seed=draw)
            for name, cells in models.items():
                scores[name].append(_by_perturbation(evaluate_pair(cells, reference, seed=draw), held))
            bar.update()
    test_cells = held.labels[PERTURBATION].value_counts().to_dict()
    scored = {score.condition for score in scores[FLOOR][0]}
    if not scored:
        raise ValueError(f"no condition of a held-out perturbation has {2 * FEW_CELLS} test cells or more")
    left_out = sorted(set(test_cells) - scored)
    if left_out:
        few = f"no condition with {2 * FEW_CELLS} test cells or more"
        logger.warning("%d held-out perturbations are not scored, %s: %s", len(left_out), few, ", ".join(left_out))
    return [
        row
        for name, repeats in scores.items()
        for row in summary_rows(name, PROTOCOL.name, repeats, test_cells=test_cells)
    ]


def _controls_of(cells: CellCounts) -> CellCounts:
    return cells.take(np.flatnonzero(cells.labels[PERTURBATION] == cells.control))


def _reference(held: CellCounts, controls: CellCounts, *, seed: int) -> Reference:
    """Prepare one comparison for each held-out condition with enough cells, beside all control cells."""
    reference = prepare_reference(together([held, controls]), PROTOCOL, seed=seed)
    large = {name for name, rows in held.rows_by_condition.items() if len(rows) >= FEW_CELLS}
    return replace(reference, groups=tuple(group for group in reference.groups if group.condition in large))


def _by_perturbation(scores: Sequence[Score], held: CellCounts) -> list[Score]:
    """Average the conditions of each perturbation; then the perturbations. ``n`` is the median number of cells."""
    label_of = {name: held.labels[PERTURBATION].iloc[rows[0]] for name, rows in held.rows_by_condition.items()}
    grouped: dict[tuple[str, str], list[Score]] = defaultdict(list)
    for score in scores:
        if score.grouping == "condition":
            grouped[label_of[score.condition], score.metric].append(score)
    means = [_mean("condition", label, metric, found) for (label, metric), found in sorted(grouped.items())]
    by_metric = {metric: [score for score in means if score.metric == metric] for metric in METRICS}
    return means + [_mean("per_condition", None, metric, found) for metric, found in by_metric.items() if found]


def _mean(grouping: str, condition: str | None, metric: str, scores: Sequence[Score]) -> Score:
    value = float(np.mean([score.value for score in scores]))
    return Score(grouping, condition, metric, value, round(float(np.median([score.n for score in scores]))))
