"""The floor: training cells like the test cells, which score as a perfect generator does."""

import logging

import numpy as np
import pytest
from scipy import sparse

from eval.comparison.cells import CellCounts
from eval.comparison.floor import floor_draws, without_training_cells
from eval.comparison.protocols import evaluate_pair, prepare_reference
from tests.eval.comparison.test_protocols import LOG, by_key, cells


@pytest.fixture
def real() -> CellCounts:
    return cells({"a": 40, "b": 25, "c": 8}, seed=0)


def test_floor_has_the_conditions_of_the_test_cells_and_no_training_cell_twice(real):
    train = cells({"a": 120, "b": 70, "c": 30, "d": 50}, seed=2)
    train = CellCounts(train.counts + sparse.csr_matrix(np.eye(270, 8, k=-262) * 1000), train.labels)
    draws = list(floor_draws(train, real, draws=4, seed=0))
    assert len(draws) == 4
    for draw in draws:
        assert {name: rows.size for name, rows in draw.rows_by_condition.items()} == {"a": 40, "b": 25, "c": 8}
        assert (draw.counts.toarray() >= 1000).sum(axis=0).max() <= 1
    assert (draws[0].counts != draws[1].counts).nnz > 0


def test_floor_is_the_level_of_a_perfect_generator(real):
    """Fresh cells of the same distribution score as the floor does, independent ones do not."""
    reference = prepare_reference(real, LOG)
    train = cells({"a": 400, "b": 250, "c": 80}, seed=2)
    floor = [by_key(evaluate_pair(draw, reference))["pooled", None, "w2"].value for draw in floor_draws(train, real)]
    perfect = by_key(evaluate_pair(cells({"a": 40, "b": 25, "c": 8}, seed=3), reference))["pooled", None, "w2"].value
    assert abs(perfect - np.mean(floor)) < 4 * np.std(floor, ddof=1)
    worse = by_key(evaluate_pair(cells({"a": 40, "b": 25, "c": 8}, seed=3, level=5), reference))
    assert worse["pooled", None, "w2"].value > np.mean(floor) + 4 * np.std(floor, ddof=1)


def test_floor_says_where_it_repeats_cells_or_has_none(real, caplog):
    train = cells({"a": 100, "b": 10}, seed=2)
    with caplog.at_level(logging.WARNING):
        (draw,) = floor_draws(train, real, draws=1)
    assert {name: rows.size for name, rows in draw.rows_by_condition.items()} == {"a": 40, "b": 25}
    assert "1 conditions have fewer training than test cells: drawn with replacement (b, ...)" in caplog.text
    assert "1 conditions have no training cells (c, ...)" in caplog.text
    assert without_training_cells(train, real) == ["c"]
    assert not len(next(floor_draws(cells({"z": 5}, seed=0), real)))
