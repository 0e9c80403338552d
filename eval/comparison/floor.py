"""Score the floor, every generator and every baseline of a comparison by several protocols.

The floor are real cells in the place of generated ones; no generator can be expected to do better. They are training
cells, as many in each condition as test cells. Where no training cell has a condition, its test cells are halved: one
half is compared with the other, and so is every model.
"""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from eval.comparison.baselines import BASELINE_DRAWS, Sampler, baseline_draws
from eval.comparison.cells import CellCounts, Comparison, together
from eval.comparison.protocols import Protocol, Reference, Score, averaged_scores, evaluate_pair, prepare_reference
from eval.metrics.by_name import COPYING
from tokenization.labels_dcm import shortened

logger = logging.getLogger(__name__)

FLOOR = "floor"  # its name in every table
FLOOR_DRAWS = 10

Scores = dict[str, list[list[Score]]]  # by model, of each of its samples


def score_models(
    comparison: Comparison,
    protocols: Sequence[Protocol],
    samplers: dict[str, Sampler],
    *,
    seed: int = 0,
) -> list[tuple[Reference, Scores]]:
    """Return for each protocol what was compared with, and the scores: of the floor, generators, then baselines.

    Test cells of conditions without training cells are halved at random: one half is what everything is compared with,
    the other is the floor. In every draw of the floor each model is compared with the same half, its samples in turn;
    the score of a sample is the mean over its draws, the reference that of the last draw.

    Without training cells there is no floor, and nothing is halved.

    Raises:
        ValueError: fewer than two test cells, or a protocol that groups by a column that is none of the conditions.
    """
    real = comparison.real
    drawn = samples_of(comparison, samplers, seed=seed)
    numbers = dict.fromkeys(samplers, BASELINE_DRAWS) | {FLOOR: FLOOR_DRAWS}
    numbers = {model: len(comparison.generated.get(model, ())) or numbers[model] for model in drawn}
    halved = [] if comparison.train is None else without_training_cells(comparison.train, real)
    samples = {m: itertools.cycle(found) if halved and m != FLOOR else found for m, found in drawn.items()}
    scores = [{model: [[] for _ in range(number)] for model, number in numbers.items()} for _ in protocols]
    draws = max(numbers.values())
    comparisons = FLOOR_DRAWS + draws * (len(numbers) - 1) if halved else sum(numbers.values())
    # most matrices are small (one condition): a second BLAS thread makes it slower, on a busy machine fivefold
    with (
        threadpool_limits(limits=1, user_api="blas"),
        tqdm(total=comparisons * len(protocols), desc="scoring", unit="comparison", disable=None) as bar,
    ):
        for draw in range(draws):
            if halved or not draw:
                halves = Halves(comparison.train, real, np.random.default_rng([seed, draw]))
                options = {"train": comparison.train, "seed": seed}
                references = [prepare_reference(halves.compared, protocol, **options) for protocol in protocols]
            for model, number in numbers.items():
                cells = next(samples[model], None)
                if cells is None:
                    continue
                bar.set_postfix_str(model)
                cells = halves.compared_cells(model, cells)
                for reference, found in zip(references, scores):
                    pair = evaluate_pair(cells, reference, seed=seed)
                    if model == FLOOR:  # training cells are at no distance from themselves; it is 1 for test cells
                        pair = [replace(score, value=1.0) if score.metric == COPYING else score for score in pair]
                    found[model][draw % number].append(pair)
                    bar.update()
    means = [{model: [averaged_scores(s) for s in repeats] for model, repeats in found.items()} for found in scores]
    return list(zip(references, means))


def samples_of(
    comparison: Comparison, samplers: Mapping[str, Sampler], *, seed: int
) -> dict[str, Iterator[CellCounts]]:
    """Samples of the floor (where there are training cells), of every generator and of every baseline."""
    train, real = comparison.train, comparison.real
    return {
        **({} if train is None else {FLOOR: floor_draws(train, real, seed=seed)}),
        **{model: iter(files) for model, files in comparison.generated.items()},
        **{name: baseline_draws(sample, real, seed=seed) for name, sample in samplers.items()},
    }


# --- the floor --------------------------------------------------------------------------------------------------------


def floor_draws(
    train: CellCounts, real: CellCounts, *, draws: int = FLOOR_DRAWS, seed: int = 0
) -> Iterator[CellCounts]:
    """Yield samples of real training cells with as many cells in each condition as the test cells have.

    Drawn without replacement; with replacement only in a condition with fewer training than test cells, which is
    logged, as is a condition without any training cell: it has none here (see :class:`Halves`).
    """
    wanted = {condition: rows.size for condition, rows in real.rows_by_condition.items()}
    available, none = train.rows_by_condition, np.empty(0, dtype=np.int64)
    absent = [condition for condition in wanted if condition not in available]
    short = [condition for condition in wanted if 0 < available.get(condition, none).size < wanted[condition]]
    if absent:
        logger.warning("floor: %d conditions have no training cells (%s, ...)", len(absent), absent[0])
    if short:
        what = "floor: %d conditions have fewer training than test cells: drawn with replacement (%s, ...)"
        logger.warning(what, len(short), short[0])
    present = {condition: size for condition, size in wanted.items() if condition in available}
    for draw in range(draws):
        rng = np.random.default_rng([seed, draw])
        rows = [rng.choice(available[name], size, replace=name in short) for name, size in present.items()]
        yield train.take(np.concatenate([none, *rows]))


def without_training_cells(train: CellCounts, real: CellCounts) -> list[str]:
    """Conditions of the test cells that no training cell has: held-out ones, whose floor :class:`Halves` makes."""
    return [condition for condition in real.rows_by_condition if condition not in train.rows_by_condition]


def split_half_note(train: CellCounts, real: CellCounts) -> dict[str, str]:
    """Which conditions have the other floor, for whoever reads the numbers; none if there are none."""
    halved = without_training_cells(train, real)
    note = (
        f"in {len(halved):,} of {len(real.rows_by_condition):,} conditions no training cell is there to be the floor: "
        "one half of their real test cells is compared with the other, and so is every model, with as many cells "
        f"({shortened(halved)})"
    )
    return {"floor": note} if halved else {}


class Halves:
    """The test cells as one draw compares them: of the conditions without training cells one random half.

    The ``other`` half (rows) is the floor there. An odd cell is left out; without ``train`` nothing is halved.
    """

    def __init__(self, train: CellCounts | None, real: CellCounts, rng: np.random.Generator):
        self.real = real
        self.conditions = [] if train is None else without_training_cells(train, real)
        kept, other = [], [np.empty(0, dtype=np.int64)]
        for condition, rows in real.rows_by_condition.items():
            if condition in self.conditions:
                shuffled, half = rng.permutation(rows), len(rows) // 2
                rows = shuffled[:half]
                other.append(shuffled[half : 2 * half])
            kept.append(rows)
        self.compared, self.other = real.take(np.sort(np.concatenate(kept))), np.concatenate(other)

    def compared_cells(self, model: str, drawn: CellCounts) -> CellCounts:
        """The cells of a model's sample to compare; a draw of the floor gets the other half of conditions it lacks.

        Where a sample has a cell for each test cell, those drawn for the other half are taken: no cell of a copy of the
        test cells is then compared with itself, and their copy is as near as the floor, not nearer.
        """
        if model == FLOOR:
            return together([drawn, self.real.take(self.other)])
        rows = dict(drawn.rows_by_condition)
        for condition in self.conditions:
            there = self.real.rows_by_condition[condition]
            if condition in rows and rows[condition].size == there.size:
                rows[condition] = rows[condition][np.isin(there, self.other)]
        return drawn.take(np.sort(np.concatenate(list(rows.values())))) if self.conditions else drawn
