"""The floor of an evaluation: real cells in the place of generated ones; no generator can be expected to do better.

They are training cells, as many in each condition as test cells. Where no training cell has a condition, its test cells
are halved: one half is compared with the other, and so is every model.
"""

import logging
from collections.abc import Iterator, Sequence

import numpy as np

from eval.comparison.cells import CellCounts
from tokenization.labels_dcm import shortened

logger = logging.getLogger(__name__)

FLOOR = "floor"  # its name in every table
FLOOR_DRAWS = 10


def floor_draws(
    train: CellCounts, real: CellCounts, *, draws: int = FLOOR_DRAWS, seed: int = 0
) -> Iterator[CellCounts]:
    """Yield samples of real training cells with as many cells in each condition as the test cells have.

    Drawn without replacement; with replacement only in a condition with fewer training than test cells, which is
    logged, as is a condition without any training cell: it has none here (see :func:`split_half`).
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
    """Conditions of the test cells that no training cell has: held-out ones, whose floor is :func:`split_half`."""
    return [condition for condition in real.rows_by_condition if condition not in train.rows_by_condition]


def split_half_note(train: CellCounts, real: CellCounts) -> str | None:
    """Which conditions have the other floor, for whoever reads the numbers; None if there are none."""
    halved = without_training_cells(train, real)
    if not halved:
        return None
    return (
        f"in {len(halved):,} of {len(real.rows_by_condition):,} conditions no training cell is there to be the floor: "
        "one half of their real test cells is compared with the other, and so is every model, with as many cells "
        f"({shortened(halved)})"
    )


def split_half(cells: CellCounts, conditions: Sequence[str], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rows of two random halves of equal size of each of these conditions; the odd cell is left out."""
    shuffled = [rng.permutation(cells.rows_by_condition[condition]) for condition in conditions]
    halves = [(rows[: len(rows) // 2], rows[len(rows) // 2 : 2 * (len(rows) // 2)]) for rows in shuffled]
    none = np.empty(0, dtype=np.int64)
    return np.concatenate([none, *(one for one, _ in halves)]), np.concatenate([none, *(two for _, two in halves)])


def compared_half(real: CellCounts, halved: Sequence[str], rng: np.random.Generator) -> tuple[CellCounts, np.ndarray]:
    """The test cells to compare with, those of the conditions ``halved`` by one half, and the rows of the other."""
    one, other = split_half(real, halved, rng)
    whole = [rows for condition, rows in real.rows_by_condition.items() if condition not in halved]
    return real.take(np.sort(np.concatenate([*whole, one]))), other


def beside_half(drawn: CellCounts, real: CellCounts, halved: Sequence[str], half: np.ndarray) -> CellCounts:
    """The drawn cells to compare with the test cells that are not in ``half``, rows of the conditions ``halved``.

    Where a sample has a cell for each test cell, those drawn for ``half`` are taken: no cell of a copy of the test
    cells is then compared with itself, and their copy is as near as the floor, not nearer.
    """
    rows = dict(drawn.rows_by_condition)
    for condition in halved:
        there = real.rows_by_condition[condition]
        if condition in rows and rows[condition].size == there.size:
            rows[condition] = rows[condition][np.isin(there, half)]
    return drawn.take(np.sort(np.concatenate(list(rows.values()))))
