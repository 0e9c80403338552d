"""The table over data sets: the page says what the committed results say, and rows that are lost are named."""

import json
from pathlib import Path

import pytest

from eval.reports.overview import MARKS, main, nearer, overview

ROOT = Path(__file__).parents[3]
COMMITTED = [
    ROOT / "eval" / "results" / f"{name}.json" for name in ("norman_mcfaline", "papalexi_eccite", "pbmc3k_cell_type")
]


def row(model: str, metric: str, mean: float, std: float = 0.1) -> dict:
    place = {"protocol": "log", "grouping": "pooled", "condition": None}
    return {"model": model, "metric": metric, "mean": mean, "std": std, "n": 50, "seeds": 3, **place}


def test_a_row_is_won_at_the_floor_or_nearer_to_it_and_lost_rows_are_named():
    rows = [row("floor", "w2", 5.0), row("dcm", "w2", 5.1), row("scvi", "w2", 5.05)]  # both at the floor
    rows += [row("floor", "mmd2", 0.0), row("dcm", "mmd2", 1.0), row("scvi", "mmd2", 0.9)]
    rows += [row("floor", "mean_r2", 1.0), row("dcm", "mean_r2", 0.5), row("scvi", "mean_r2", 1.6)]
    assert nearer(rows, "dcm", "scvi") == (["W2 (log)", "R² of means (log)"], ["MMD² (log)"])
    assert nearer(rows, "dcm", "nobody") is None


@pytest.mark.parametrize(("ours", "is_won"), [(1.0, True), (1.5, True), (0.9, True), (0.7, False), (2.2, False)])
def test_nothing_between_the_floor_and_the_right_value_is_far(ours, is_won):
    metric = "component_variance_11_20"
    rows = [row("floor", metric, 1.9), row("dcm", metric, ours), row("scvi", metric, 0.85)]
    won, lost = nearer(rows, "dcm", "scvi")
    assert (len(won), len(lost)) == ((1, 0) if is_won else (0, 1))


def test_the_readme_says_what_the_committed_results_say(tmp_path):
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    copy = tmp_path / "README.md"
    copy.write_text(page.split(MARKS[0])[0] + "\n".join([MARKS[0], "old", MARKS[1]]) + page.split(MARKS[1])[1])
    main(COMMITTED, write=copy)
    assert copy.read_text(encoding="utf-8") == page
    assert overview([json.loads(COMMITTED[0].read_text())]).count("floor") > 1


def test_a_page_without_the_marks_is_refused(tmp_path):
    (tmp_path / "page.md").write_text("nothing")
    with pytest.raises(ValueError, match="has no place for the table; expected the lines"):
        main(COMMITTED[:1], write=tmp_path / "page.md")


def test_the_figure_is_written(tmp_path):
    main(COMMITTED, figure=tmp_path / "why.png")
    assert (tmp_path / "why.png").read_bytes()[:4] == b"\x89PNG"
