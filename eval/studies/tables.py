"""Tables and dot plot of a study of held-out perturbations, from its rows.

Knows nothing of cells, and nothing of how the rows came about but what a :class:`Study` says.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eval.reports.tables import FLOOR, Row, results_json

Values = dict[str, dict[tuple[int, str], float]]  # model -> (split, perturbation) -> value


@dataclass(frozen=True)
class Shown:
    """How a metric is shown: its label, factor and digits, and whether less of it is better."""

    label: str
    factor: float
    digits: int
    less_is_better: bool


METRICS = {
    "w2": Shown("W2", 1, 3, True),
    "mmd2": Shown("MMD² x 1000", 1000, 2, True),
    "pearson_delta": Shown("Pearson delta", 1, 3, False),
}
MEANING = {
    FLOOR: "the other half of the real cells of the same condition",
    "vectors": "trained with vectors",
    "shuffled": "trained with the same vectors, each given to another name",
    "learned": "trained with a free vector for each perturbation; one never seen has the mean of them",
    "perturbation_mean": "real control cells moved to the mean of all training perturbations",
    "additive": "real control cells moved by the sum of the single perturbations' shifts; one never seen has none",
    "control_cells": "real control cells as they are",
    "marginals_of_all": "each gene drawn by itself from all training cells of the same cell type and covariates",
}
COLOURS = {"vectors": "#e8762d", "shuffled": "#8a5fb5", "learned": "#1f5fa8"}
BASELINE_COLOUR = "#777777"
MARKED = 2  # standard errors


@dataclass(frozen=True)
class Study:
    """What a study was.

    Attributes:
        dataset: for the titles.
        kind: of the split, as dcm-convert calls it.
        vectors: where vectors come from; None where only learned ones were looked at.
        held_out: held-out labels of each split.
        models: the trained ones; the first is compared with all others.
        sampling_seeds: samples of each model.
        draws: how often the real cells were halved.
        versions: of the packages that the numbers depend on.
        command: what was run.
    """

    dataset: str
    kind: str
    vectors: str | None
    held_out: list[list[str]]
    models: list[str]
    sampling_seeds: int
    draws: int
    versions: dict[str, str | None]
    command: str


def study_json(study: Study, rows: Sequence[Row]) -> str:
    """The study and its rows as JSON, one row to a line."""
    return results_json(asdict(study), rows)


def study_markdown(study: Study, rows: Sequence[Row]) -> str:
    """The tables with what a reader must know of them, and the values of each perturbation."""
    listed = "; ".join(f"split {number}: {', '.join(labels)}" for number, labels in enumerate(study.held_out))
    models = list(dict.fromkeys(row["model"] for row in rows))
    from_where = "" if study.vectors is None else f" Vectors: {study.vectors}."
    parts = [
        f"# {study.dataset}: {study.kind}",
        f"Command: `{study.command}`",
        f"Held out ({len(study.held_out)} splits; in each, every model is trained anew, with the split's number as its "
        f"seed): {listed}.{from_where}",
        f"Protocol `log`, each condition by itself. The real cells of a condition were halved {study.draws} times: one "
        "half is what everything is compared with, the other is the floor. "
        f"{study.sampling_seeds} samples of each trained model take turns. {_cells(rows)} Control cells in Pearson "
        "delta are all real ones; as both shifts share their noise, predicting nothing is not exactly 0.",
        study_tables(study, rows),
    ]
    parts += [f"{METRICS[metric].label} of each:\n\n{_each(rows, metric)}" for metric in METRICS]
    parts.append("\n".join(f"- **{model}**: {MEANING[model]}" for model in models))
    return "\n\n".join(parts) + "\n"


def study_tables(study: Study, rows: Sequence[Row]) -> str:
    """Means over the held-out perturbations, and the first model's paired differences from all others, in Markdown."""
    values = {metric: _values(rows, metric) for metric in METRICS}
    number = len(values["w2"][FLOOR])
    different = len({label for _, label in values["w2"][FLOOR]})
    repeated = "" if different == number else f" ({different} different ones, some in several splits)"
    head = ["model", *(f"{shown.label} {'↓' if shown.less_is_better else '↑'}" for shown in METRICS.values())]
    means = [
        [model, *(_number(np.mean(list(values[metric][model].values())), metric) for metric in METRICS)]
        for model in values["w2"]
    ]
    first = study.models[0]
    others = [model for model in values["w2"] if model not in (FLOOR, first)]
    differences = [
        [model, *(_difference(values[metric], first, model, metric) for metric in METRICS)] for model in others
    ]
    return "\n\n".join(
        [
            f"Mean over the {number} held-out labels{repeated}:",
            _table([head, *means]),
            f"*{first}* minus the other model, mean ± standard error over the {number} labels, and in how many of them "
            f"*{first}* is better. **Bold**: beyond {MARKED} standard errors.",
            _table([[f"{first} minus", *head[1:]], *differences]),
        ]
    )


def dot_plot(study: Study, rows: Sequence[Row]) -> Figure:
    """Distance from the floor, one panel to a metric, one line to a model, one dot to a held-out perturbation."""
    figure = Figure(figsize=(15, 5.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    number, splits = sum(map(len, study.held_out)), len(study.held_out)
    what = f"{number} labels in {splits} split{'' if splits == 1 else 's'}"
    title = f"{study.dataset}, {study.kind}: {what} (dots), their mean and its standard error (diamonds)"
    figure.suptitle(title, fontsize=14)
    for axes, metric in zip(figure.subplots(1, len(METRICS), sharey=True), METRICS):
        _panel(axes, _values(rows, metric), metric)
    return figure


def _panel(axes: Axes, values: Values, metric: str) -> None:
    shown, floor = METRICS[metric], values[FLOOR]
    models = [model for model in values if model != FLOOR]
    for position, model in enumerate(models):
        colour = COLOURS.get(model, BASELINE_COLOUR)
        excess = shown.factor * np.array([value - floor[key] for key, value in values[model].items()])
        height = position + np.linspace(-0.22, 0.22, len(excess)) if len(excess) > 1 else [position]
        axes.scatter(excess, height, s=26, color=colour, alpha=0.55, linewidths=0)
        error = _standard_error(excess) or 0.0
        axes.errorbar(
            excess.mean(), position, xerr=error, fmt="D", ms=8, color=colour, mec="black", capsize=4, zorder=3
        )
    axes.axvline(0, color="black", lw=1.2)
    average = shown.factor * np.mean(list(floor.values()))
    axes.annotate(
        f"floor ({average:.{shown.digits}f} in the mean)",
        (0, 1),
        xycoords=("data", "axes fraction"),
        xytext=(4 if shown.less_is_better else -4, -4),
        textcoords="offset points",
        ha="left" if shown.less_is_better else "right",
        va="top",
        fontsize=9,
    )
    axes.set_yticks(range(len(models)), models)
    axes.set_ylim(len(models) - 0.5, -0.9)
    axes.set(
        title=f"{shown.label}: {'left' if shown.less_is_better else 'right'} is better", xlabel="value minus its floor"
    )
    axes.grid(axis="x", alpha=0.25)


def _values(rows: Sequence[Row], metric: str) -> Values:
    """Values of each held-out perturbation, by model."""
    values: Values = {}
    for row in rows:
        if row["grouping"] == "condition" and row["metric"] == metric and row["mean"] is not None:
            values.setdefault(row["model"], {})[row["split"], row["condition"]] = row["mean"]
    return values


def _cells(rows: Sequence[Row]) -> str:
    sizes = [row["n"] for row in rows if row["grouping"] == "condition" and row["model"] == FLOOR]
    return f"Cells on each side of a comparison: {min(sizes)} to {max(sizes)}, median {np.median(sizes):.0f}."


def _number(value: float, metric: str, *, sign: str = "") -> str:
    shown = METRICS[metric]
    return format(shown.factor * value, f"{sign}.{shown.digits}f")


def _difference(values: Values, first: str, other: str, metric: str) -> str:
    """The first model minus another, paired by perturbation."""
    differences = np.array([values[first][key] - values[other][key] for key in values[first]])
    better = int((differences < 0 if METRICS[metric].less_is_better else differences > 0).sum())
    error = _standard_error(differences)
    text = _number(differences.mean(), metric, sign="+")
    if error is not None:
        text += f" ± {_number(error, metric)}"
        text = f"**{text}**" if abs(differences.mean()) > MARKED * error else text
    return f"{text}; {better} of {len(differences)}"


def _standard_error(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None


def _each(rows: Sequence[Row], metric: str) -> str:
    values = _values(rows, metric)
    lines = [["split", "held out", *values]]
    for split, label in values[FLOOR]:
        lines.append([str(split), label, *(_number(values[model][split, label], metric) for model in values)])
    return _table(lines)


def _table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it reads well as plain text; the first line is its head."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    padded = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines]
    return "\n".join([padded[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *padded[1:]])
