"""Rows and tables of an evaluation: what is null, what is at the floor, and what is said of a biased one."""

import json

import pytest

from eval.comparison.protocols import Score
from eval.reports.tables import at_floor, biased_floor_notes, results_json, summary_rows, summary_table


def test_rows_hold_null_for_what_is_not_a_number():
    scores = [[Score("condition", "a", "mmd2", float("nan"), 1)], [Score("condition", "a", "mmd2", float("nan"), 1)]]
    (row,) = summary_rows("dcm", "paper", scores, test_cells={"a": 1})
    assert (row["mean"], row["std"], row["seeds"], row["condition"]) == (None, None, 0, "a (under 20 cells)")
    assert json.loads(results_json({"dataset": "d"}, [row]))["rows"] == [row]


def test_at_the_floor_is_within_two_standard_deviations_and_bold():
    floor, near, far = (
        summary_rows(model, "log", [[Score("pooled", None, "w2", v, 9)] for v in values], test_cells={})[0]
        for model, values in (("floor", (1.0, 1.2)), ("near", (1.3,)), ("far", (2.0,)))
    )
    assert at_floor(near, floor)
    assert not at_floor(far, floor)
    table = summary_table([floor, near, far])
    assert "**1.3**" in table
    assert "**2**" not in table


@pytest.mark.parametrize(("model_value", "noted"), [(0.11, True), (0.9, False)])
def test_a_small_n_whose_biased_floor_dominates_is_said(model_value, noted):
    floor, model, unbiased = (
        summary_rows(name, protocol, [[Score("pooled", None, "mmd2", value, 50)]], test_cells={})[0]
        for name, protocol, value in (("floor", "scldm", 0.1), ("dcm", "scldm", model_value), ("dcm", "log", 0.11))
    )
    notes = biased_floor_notes([floor, model, unbiased])
    assert len(notes) == noted
    assert not noted or "scldm, pooled: the floor (0.1, n = 50) is most of the biased MMD² of dcm (0.11)" in notes[0]
