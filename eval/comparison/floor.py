"""The floor of an evaluation: real cells in the place of generated ones; no generator can be expected to do better.

They are training cells, as many in each condition as test cells. Where no training cell has a condition, its test cells
are halved: one half is compared with the other, and so is every model.
"""

import logging
from collections.abc import Iterator

import numpy as np

from eval.comparison.cells import CellCounts, together
from tokenization.labels_dcm import shortened

logger = logging.getLogger(__name__)

FLOOR = "floor"  # its name in every table
FLOOR_DRAWS = 10


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

    def floor(self, drawn: CellCounts) -> CellCounts:
        """A draw of :func:`floor_draws` with the other half of the conditions that it lacks."""
        return together([drawn, self.real.take(self.other)])

    def beside(self, drawn: CellCounts) -> CellCounts:
        """The drawn cells to compare.

        Where a sample has a cell for each test cell, those drawn for the other half are taken: no cell of a copy of the
        test cells is then compared with itself, and their copy is as near as the floor, not nearer.
        """
        rows = dict(drawn.rows_by_condition)
        for condition in self.conditions:
            there = self.real.rows_by_condition[condition]
            if condition in rows and rows[condition].size == there.size:
                rows[condition] = rows[condition][np.isin(there, self.other)]
        return drawn.take(np.sort(np.concatenate(list(rows.values())))) if self.conditions else drawn
