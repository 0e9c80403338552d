"""Rows and tables of an evaluation: what is null, and what is at the floor."""

import json

from eval.comparison.protocols import Score
from eval.reports.tables import (
    at_floor,
    results_json,
    results_markdown,
    summary_rows,
    summary_table,
    terminal_table,
)


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
    lines = terminal_table([floor, near, far], frozenset(), 30).splitlines()
    assert max(map(len, lines)) <= 30
    assert [word for line in lines for word in line.split() if word[0] in "*012"] == ["1.1", "**1.3**", "2"]


def test_nothing_is_bold_beside_a_floor_of_other_numbers_of_cells_or_other_conditions():
    def rows(model: str, n: int, conditions: str) -> list:
        scores = [Score("condition", name, "w2", 1.0, 30) for name in conditions]
        means = [Score("pooled", None, "w2", 1.0, n), Score("per_condition", None, "w2", 1.0, 30)]
        return summary_rows(model, "log", [scores + means] * 2, test_cells=dict.fromkeys("abc", 30))

    found = rows("floor", 90, "abc") + rows("alike", 90, "abc") + rows("fewer", 60, "ab")
    text = results_markdown({"dataset": "d", "split": "test", "checkpoint": "c", "command": "x"}, found)
    lines = [line for line in text.splitlines() if line.startswith("| W2") or "**1" in line]
    assert [[cell.strip() for cell in line.split("|")[3:-1]] for line in lines] == [["1 ± 0", "**1 ± 0**", "1 ± 0"]] * 2
