"""One table over several data sets, rendered from their results.json, and who is nearer the floor in how many rows.

    python -m eval.reports.overview eval/results/norman_mcfaline.json ... [--write README.md] [--figure why.png]

``--write`` puts the table between the two marks that stand in a page.
"""

import json
import logging
from pathlib import Path
from typing import Annotated

import tyro

from eval.comparison.floor import FLOOR
from eval.metrics.by_name import metric_label, model_label
from eval.reports.tables import Row, at_floor, markdown_table, models_of
from training.data.command_line import run
from training.data.files import write_text, written_aside

logger = logging.getLogger(__name__)

MARKS = ("<!-- results: rendered by python -m eval.reports.overview -->", "<!-- end of results -->")
SHOWN = (
    "w2",
    "mmd2",
    "correlation_pearson",
    "correlation_slope",
    "component_variance_6_10",
    "component_variance_21_40",
)
PAIRS = (  # like with like: what starts from a training cell, and what is drawn from a prior
    ("dcm", "scvi_aggregated_posterior"),
    ("dcm_prior", "scvi_prior"),
    ("dcm", "independent_marginals"),
    ("dcm", "additive"),
)
THOUSANDFOLD = "mmd2"
COUNTED = (
    "Rows of all protocols in which a model is at the floor, or no farther from it than another (a ratio between "
    "the floor and its right value is not far):"
)


def main(
    results: Annotated[list[Path], tyro.conf.Positional], *, write: Path | None = None, figure: Path | None = None
) -> None:
    """Print the table of several evaluations.

    Args:
        results: results.json files, in the order of the table.
        write: Page whose block between the two marks is replaced.
        figure: PNG file of W2 and the slope of correlations, each model beside the floor.
    """
    found = [json.loads(path.read_text(encoding="utf-8")) for path in results]
    if figure is not None:
        draw(found, figure)
    text = overview(found)
    if write is None:
        logger.info("%s", text)
        return
    write_between(write, MARKS, text)


def write_between(page: Path, marks: tuple[str, str], text: str) -> None:
    """Replace what stands between two lines of a page.

    Raises:
        ValueError: the page does not have both lines, once.
    """
    found = page.read_text(encoding="utf-8")
    if not all(found.count(mark) == 1 for mark in marks):
        raise ValueError(f"{str(page)!r} has no place for the table; expected the lines {marks[0]} and {marks[1]}")
    before, rest = found.split(marks[0])
    write_text(page, f"{before}{marks[0]}\n{text}\n{marks[1]}{rest.split(marks[1])[1]}")


def overview(results: list[dict]) -> str:
    """Return Markdown: protocol ``log``, pooled, each data set's floor first; then the rows won and lost, by name."""
    lines = [["data", "model", *(metric_label(m)[0] + " x 1000" * (m == THOUSANDFOLD) for m in SHOWN)]]
    verdicts = []
    for result in results:
        rows = _pooled(result)
        place = {(row["model"], row["metric"]): row for row in rows}
        for index, model in enumerate(models_of(rows)):
            cells = [_number(place.get((model, metric)), place.get((FLOOR, metric))) for metric in SHOWN]
            lines.append([result["dataset"] if not index else "", model_label(model), *cells])
        for ours, theirs in PAIRS:
            verdict = nearer(result["rows"], ours, theirs)
            if verdict is not None:
                won, lost = verdict
                pair = f"{model_label(ours)} beside {model_label(theirs)}"
                names = f"; farther: {', '.join(lost)}" if lost else ""
                verdicts.append(f"- {result['dataset']}: {pair}: {len(won)} of {len(won) + len(lost)}{names}")
    return "\n".join([markdown_table(lines), "", COUNTED, "", *verdicts])


def nearer(rows: list[Row], ours: str, theirs: str) -> tuple[list[str], list[str]] | None:
    """Rows, pooled and per condition, in which ``ours`` is at the floor or no farther from it than ``theirs``, and the
    others; None where a model is not there. Where the right value is known, as of ratios, nothing between it and the
    floor is far: along components of the training cells these themselves vary more than other cells."""
    place = {(row["model"], row["protocol"], row["grouping"], row["metric"]): row for row in rows}
    won, lost = [], []
    for row in rows:
        key = (row["protocol"], row["grouping"], row["metric"])
        floor, other = place.get((FLOOR, *key)), place.get((theirs, *key))
        if row["model"] != ours or row["grouping"] == "condition" or None in (floor, other):
            continue
        if None in (row["mean"], other["mean"], floor["mean"]):
            continue
        distance, of_other = (_distance(found["mean"], floor["mean"], row["metric"]) for found in (row, other))
        place_of_row = row["protocol"] + ", per condition" * (row["grouping"] == "per_condition")
        name = f"{metric_label(row['metric'])[0]} ({place_of_row})"
        (won if distance <= of_other or at_floor(row, floor) else lost).append(name)
    return (won, lost) if won or lost else None


def _distance(value: float, floor: float, metric: str) -> float:
    """How far a value is from the floor; of a metric whose right value is known, from all that is between the two."""
    better = metric_label(metric)[1]
    low, high = sorted((floor, float(better[1:]) if better.startswith("→") else floor))
    return max(low - value, value - high, 0.0)


def draw(results: list[dict], path: Path) -> None:
    """Draw W2 and the slope of correlations of every model; a line and a band of two deviations are the floor."""
    from matplotlib.figure import Figure

    metrics = ("w2", "correlation_slope")
    models = models_of([row for result in results for row in _pooled(result) if row["model"] != FLOOR])
    figure = Figure(figsize=(4.6 * len(results), 2.6 * len(metrics)), layout="constrained")
    axes = figure.subplots(len(metrics), len(results), squeeze=False)
    for column, result in enumerate(results):
        for line, metric in enumerate(metrics):
            rows = (row for row in _pooled(result) if row["metric"] == metric and row["mean"] is not None)
            rows = {row["model"]: row for row in rows}
            floor, axis = rows.pop(FLOOR), axes[line][column]
            axis.axvspan(floor["mean"] - 2 * floor["std"], floor["mean"] + 2 * floor["std"], color="0.85")
            axis.axvline(floor["mean"], color="0.4", label="floor")
            means, spread = [row["mean"] for row in rows.values()], [row["std"] or 0 for row in rows.values()]
            axis.errorbar(means, [models.index(model) for model in rows], xerr=spread, fmt="o", markersize=5)
            axis.set_yticks(range(len(models)), list(map(model_label, models)) if not column else [""] * len(models))
            axis.set_ylim(len(models) - 0.5, -0.5)
            axis.grid(axis="y", color="0.92")
            axis.locator_params(axis="x", nbins=6)
            axis.set_xlabel(metric_label(metric)[0])
            if not line:
                axis.set_title(result["dataset"])
    axes[0][0].legend(loc="lower right", frameon=False)
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=110)


def _pooled(result: dict) -> list[Row]:
    return [row for row in result["rows"] if (row["protocol"], row["grouping"]) == ("log", "pooled")]


def _number(row: Row | None, floor: Row | None) -> str:
    if row is None or row["mean"] is None:
        return "-"
    value = row["mean"] * (1000 if row["metric"] == THOUSANDFOLD else 1)
    text = f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"
    return f"**{text}**" if at_floor(row, floor) else text


if __name__ == "__main__":
    run(main)
