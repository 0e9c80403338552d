"""Turn scores into rows, and rows into ``results.json``, ``results.csv`` and the tables of ``results.md``.

A number is at the floor within two of the floor's standard deviations.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass

import numpy as np
import pandas as pd

from eval.comparison.floor import FLOOR
from eval.comparison.protocols import CHALLENGES, FEW_CELLS, PROTOCOLS, Score, repeated_scores
from eval.metrics.by_name import metric_label, model_label

FEW_MARK = f"(under {FEW_CELLS} cells)"
HOW_TO_READ = (
    "Mean ± standard deviation over seeds or draws; n: cells on each side. Floor: real training cells against the real "
    "test cells, as many in each condition: no generator can be expected to do better. Distances are not 0 between "
    "samples of one distribution, and fall with n."
)
AT_FLOOR = "within two standard deviations of the floor; a distance further below it means cells too much alike"
ROW_KEYS = ("model", "protocol", "grouping", "condition", "metric", "mean", "std", "n", "seeds")

Row = dict[str, str | float | int | None]
Unlike = Set[tuple[object, object]]  # pairs of model and metric


def summary_rows(
    model: str, protocol: str, repeats: Sequence[Sequence[Score]], *, test_cells: dict[str, int]
) -> list[Row]:
    """Return one row per grouping, condition and metric: mean and standard deviation over the repeats.

    Args:
        model: the row's name; ``floor`` for real training cells.
        protocol: the protocol's name.
        repeats: the scores of each file, draw or seed.
        test_cells: real test cells of each condition; one with fewer than 20 is marked in the row's ``condition``.

    Returns:
        Rows with ``ROW_KEYS``: ``n`` the smallest number of cells a side, ``seeds`` the number of repeats with a finite
        value, ``std`` (n - 1) None for a single one, ``mean`` None without any; both have six digits.
    """
    rows = []
    for (grouping, condition, metric), scores in repeated_scores(repeats).items():
        values = [score.value for score in scores if math.isfinite(score.value)]
        if condition is not None and test_cells[condition] < FEW_CELLS:
            condition = f"{condition} {FEW_MARK}"
        mean = float(f"{np.mean(values):.6g}") if values else None
        std = float(f"{np.std(values, ddof=1):.6g}") if len(values) > 1 else None
        n = min(score.n for score in scores)
        rows.append(dict(zip(ROW_KEYS, (model, protocol, grouping, condition, metric, mean, std, n, len(values)))))
    return rows


def results_json(header: dict[str, object], rows: Iterable[Row]) -> str:
    """Write ``header`` (dataset, split, checkpoint, versions, command) and ``rows`` as JSON, one row to a line.

    Raises:
        ValueError: a number that JSON has no word for.
    """
    lines = ",\n".join("    " + json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
    top = json.dumps(header, indent=2, ensure_ascii=False, allow_nan=False)
    return f'{top[:-2]},\n  "rows": [\n{lines}\n  ]\n}}\n'


def results_csv(header: dict[str, object], rows: Iterable[Row]) -> str:
    """Write the rows as a table with commas, each with its data set and split; empty where there is no number."""
    place = {"dataset": header["dataset"], "split": header["split"]}
    return pd.DataFrame([place | row for row in rows]).to_csv(index=False)


@dataclass(frozen=True)
class Section:
    """What a report says of one protocol: its recipe, and tables: the words above one, its rows, and the models and
    metrics that are not beside the floor."""

    protocol: str
    description: str
    tables: list[tuple[str, list[Row], Unlike]]


def sections(rows: Sequence[Row]) -> list[Section]:
    """Return one section per protocol: all cells pooled, means over conditions and strata, where there are any."""
    found = []
    for protocol in dict.fromkeys(row["protocol"] for row in rows):
        ours = [row for row in rows if row["protocol"] == protocol]
        pooled, means = ([row for row in ours if row["grouping"] == name] for name in ("pooled", "per_condition"))
        tables = [("All cells pooled", pooled, frozenset()), (_averaged_over(ours), means, _not_beside_floor(ours))]
        strata = [row for row in ours if row["grouping"] == "stratum"]
        for name in dict.fromkeys(row["condition"] for row in strata):
            tables.append((f"Perturbations with {name}", [r for r in strata if r["condition"] == name], frozenset()))
        description = (PROTOCOLS | CHALLENGES)[protocol].description
        found.append(Section(protocol, description, [table for table in tables if table[1]]))
    return found


def header_notes(header: dict[str, object]) -> list[tuple[str, str]]:
    """What a reader must know first of an evaluation, each with the words that open it."""
    words = {"training": "Training:", "genes": "Compared on", "floor": "Floor:"}
    return [(word, str(header[name])) for name, word in words.items() if header.get(name)]


def results_markdown(header: dict[str, object], rows: Sequence[Row]) -> str:
    """Write the numbers for a reader: one section per protocol, the floor first."""
    parts = [
        f"# {header['dataset']}, {header['split']} cells",
        f"Checkpoint: {header['checkpoint'] or 'not named'}. Command: `{header['command']}`",
        f"{HOW_TO_READ} **Bold**: {AT_FLOOR}.",
    ]
    parts += [f"{word} {note}." for word, note in header_notes(header)]
    for section in sections(rows):
        parts.append(f"## Protocol `{section.protocol}`\n\nSpace and metrics: {section.description}.")
        parts += [f"{caption}:\n\n{summary_table(ours, unlike)}" for caption, ours, unlike in section.tables]
    return "\n\n".join(parts) + "\n"


def _in_mean(rows: Sequence[Row]) -> list[Row]:
    """Rows of one protocol's conditions that have enough cells for its mean over conditions."""
    known = PROTOCOLS.get(rows[0]["protocol"])
    any_size = known is None or known.fewest_cells == 1
    found = [row for row in rows if row["grouping"] == "condition"]
    return [row for row in found if any_size or not row["condition"].endswith(FEW_MARK)]


def _averaged_over(rows: Sequence[Row]) -> str:
    """Say over which conditions a protocol's mean is taken."""
    known = PROTOCOLS.get(rows[0]["protocol"])
    number = len({row["condition"] for row in _in_mean(rows)})
    what = "conditions" if known is None or known.group_by is None else f"values of {known.group_by}"
    enough = f" with {known.fewest_cells} or more test cells" if known is not None and known.fewest_cells > 1 else ""
    return f"Mean over the {number} {what}{enough} (n is their median)"


def _not_beside_floor(rows: Sequence[Row]) -> Unlike:
    """Models and metrics of one protocol averaged over other conditions, or numbers of cells, than the floor."""
    sizes: dict[tuple[object, object], dict[object, object]] = defaultdict(dict)
    for row in _in_mean(rows):
        sizes[row["model"], row["metric"]][row["condition"]] = (row["n"], row["mean"] is None)
    return {(model, metric) for (model, metric), found in sizes.items() if found != sizes.get((FLOOR, metric))}


def sample_sizes(rows: Sequence[Row], model: str) -> str:
    """Say how many cells a side, and how many seeds or draws, a model's numbers come from."""
    ours = [row for row in rows if row["model"] == model]
    repeats = max(row["seeds"] for row in ours)
    word = "draw" if model == FLOOR else "seed"
    return f"n = {ours[0]['n']:,}, {repeats} {word}{'' if repeats == 1 else 's'}"


def summary_table(rows: Sequence[Row], unlike: Unlike = frozenset()) -> str:
    """Return a Markdown table, metrics down and models across; bold at the floor, unless ``unlike``."""
    head = [f"{model_label(model)} ({sample_sizes(rows, model)})" for model in models_of(rows)]
    lines = [[*metric_label(metric), *map(_number, *zip(*found))] for metric, found in beside_floor(rows, unlike)]
    return markdown_table([["metric", "better", *head], *lines])


def terminal_table(rows: Sequence[Row], unlike: Unlike, width: int) -> str:
    """Return the same without spreads, for a terminal of ``width`` columns: models that do not fit stand below."""
    lines = {
        " ".join(metric_label(metric)): [_number(row and row | {"std": None}, marked) for row, marked in found]
        for metric, found in beside_floor(rows, unlike)
    }
    table = pd.DataFrame.from_dict(lines, orient="index", columns=list(map(model_label, models_of(rows))))
    return table.to_string(line_width=width)


def models_of(rows: Sequence[Row]) -> list[str]:
    """Return the models in their order."""
    return list(dict.fromkeys(row["model"] for row in rows))


def beside_floor(rows: Sequence[Row], unlike: Unlike) -> Iterator[tuple[str, list[tuple[Row | None, bool]]]]:
    """Yield each metric with every model's row (None if it has none), and whether that is at the floor."""
    found = {(row["model"], row["metric"]): row for row in rows}
    for metric in dict.fromkeys(row["metric"] for row in rows):
        floor, keys = found.get((FLOOR, metric)), [(model, metric) for model in models_of(rows)]
        yield metric, [(found.get(key), key not in unlike and at_floor(found.get(key), floor)) for key in keys]


def markdown_table(lines: Sequence[Sequence[str]], *, numbers: bool = False) -> str:
    """Return a Markdown table, padded so that it reads well as plain text; the first line is its head.

    With ``numbers`` all columns but the first are aligned right.
    """
    widths = [max(map(len, column)) for column in zip(*lines)]
    sides = "<" + (">" if numbers else "<") * (len(widths) - 1)
    padded = [[f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths)] for line in lines]
    rule = "|".join("-" * (width + 1) + ("-" if side == "<" else ":") for side, width in zip(sides, widths))
    head, *body = (f"| {' | '.join(line)} |" for line in padded)
    return "\n".join([head, f"|{rule}|", *body])


def at_floor(row: Row | None, floor: Row | None) -> bool:
    """Return whether a model's mean, of as many cells, is within two standard deviations of the floor's."""
    if None in (row, floor) or row["model"] == FLOOR or None in (row["mean"], floor["mean"], floor["std"]):
        return False
    return row["n"] == floor["n"] and abs(row["mean"] - floor["mean"]) <= 2 * floor["std"]


def _number(row: Row | None, marked: bool) -> str:
    if row is None or row["mean"] is None:
        return "-"
    text = f"{row['mean']:.4g}" + (f" ± {row['std']:.2g}" if row["std"] is not None else "")
    return f"**{text}**" if marked else text
