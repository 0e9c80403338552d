"""Write the tables and the dot plot of a study of held-out perturbations.

``study`` is the head of zero_shot.json: dataset, kind of split, vectors (None where only learned ones are there),
held_out labels of each split, trained models (the first is compared with all others), trainings, versions and
command. ``rows`` are those of results.json, each with its split.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.comparison.floor import FLOOR, FLOOR_DRAWS
from eval.reports.tables import Row, markdown_table

Study = Mapping[str, object]


@dataclass(frozen=True)
class Metric:
    """A metric of the study's tables: how its numbers are written, and whether less of it is better."""

    label: str
    factor: float
    digits: int
    less_is_better: bool

    def text(self, value: float, *, sign: str = "") -> str:
        return format(self.factor * value, f"{sign}.{self.digits}f")


METRICS = {
    "w2": Metric("W2", 1, 3, True),
    "mmd2": Metric("MMD² x 1000", 1000, 2, True),
    "pearson_delta": Metric("Pearson delta", 1, 3, False),
}
MEANING = {
    FLOOR: "the other half of the real cells of the same condition",
    "vectors": "trained with vectors",
    "shuffled": "trained with the same vectors, each given to another name",
    "learned": "trained with a free vector for each perturbation; one never seen is told the mean effect",
    "perturbation_mean": "real control cells moved to the mean of all training perturbations",
    "additive": "real control cells moved by the sum of the single perturbations' shifts; one never seen has none",
    "controls_scaled": "real control cells, genes scaled to the response; one never seen has the mean response",
    "ridge": "real control cells, genes scaled to the response that ridge regression on the vectors predicts",
    "knn": "real control cells, genes scaled to the mean response of the perturbations with the nearest vectors",
    "control_cells": "real control cells as they are",
    "marginals_of_all": "each gene drawn by itself from all training cells of the same cell type and covariates",
}
COLOURS = {"vectors": "#e8762d", "shuffled": "#8a5fb5", "learned": "#1f5fa8"}
BASELINE_COLOUR = "#777777"
MARKED = 2  # standard errors


def study_markdown(study: Study, rows: Sequence[Row]) -> str:
    """Write the tables with what a reader must know of them, and the values of each perturbation."""
    splits = "; ".join(f"split {number}: {', '.join(labels)}" for number, labels in enumerate(study["held_out"]))
    from_where = "" if study["vectors"] is None else f" Vectors: {study['vectors']}."
    sizes = [row["n"] for row in rows if row["grouping"] == "condition" and row["model"] == FLOOR]
    parts = [
        f"# {study['dataset']}: {study['kind']}",
        f"Command: `{study['command']}`",
        f"Held out ({len(study['held_out'])} splits; in each, every model is trained {study['trainings']} times): "
        f"{splits}.{from_where}",
        f"Protocol `log`, each condition by itself. The real cells of a condition were halved {FLOOR_DRAWS} times: "
        f"one half is what everything is compared with, the other is the floor. A sample of each training takes "
        f"turns. Cells on each side of a comparison: {min(sizes)} to {max(sizes)}, median "
        f"{np.median(sizes):.0f}. Control cells in Pearson delta are all real ones; as both shifts share their noise, "
        "predicting nothing is not exactly 0.",
        study_tables(study, rows),
    ]
    for name, metric in METRICS.items():
        values = _values(rows, name)
        lines = [["split", "held out", *values]]
        lines += [[str(split), label, *map(metric.text, found)] for (split, label), found in values.iterrows()]
        parts.append(f"{metric.label} of each:\n\n{markdown_table(lines)}")
    models = dict.fromkeys(row["model"] for row in rows)
    parts.append("\n".join(f"- **{model}**: {MEANING[model]}" for model in models))
    return "\n\n".join(parts) + "\n"


def study_tables(study: Study, rows: Sequence[Row]) -> str:
    """Write means over the held-out perturbations, and the first model's paired differences from all others."""
    values = {name: _values(rows, name) for name in METRICS}
    models, first = list(values["w2"]), study["models"][0]
    number, different = len(values["w2"]), len(values["w2"].index.unique("condition"))
    repeated = "" if different == number else f" ({different} different ones, some in several splits)"
    head = [f"{metric.label} {'↓' if metric.less_is_better else '↑'}" for metric in METRICS.values()]
    means, differences = [["model", *head]], [[f"{first} minus", *head]]
    for model in models:
        means.append([model, *(metric.text(values[name][model].mean()) for name, metric in METRICS.items())])
        if model not in (FLOOR, first):
            pairs = [(values[name][first] - values[name][model], metric) for name, metric in METRICS.items()]
            differences.append([model, *(_difference(*pair) for pair in pairs)])
    how = (
        f"*{first}* minus the other model, mean ± standard error over the {number} labels, and in how many of them "
        f"*{first}* is better. **Bold**: beyond {MARKED} standard errors."
    )
    of_labels = f"Mean over the {number} held-out labels{repeated}:"
    return "\n\n".join([of_labels, markdown_table(means), how, markdown_table(differences)])


def dot_plot(study: Study, rows: Sequence[Row]) -> Figure:
    """Draw the distance from the floor: a panel to each metric, a line to each model, a dot to each perturbation."""
    figure = Figure(figsize=(15, 5.6), dpi=100, layout="constrained")
    number, splits = sum(map(len, study["held_out"])), len(study["held_out"])
    what = f"{number} labels in {splits} split{'' if splits == 1 else 's'}"
    title = f"{study['dataset']}, {study['kind']}: {what} (dots), their mean and its standard error (diamonds)"
    figure.suptitle(title, fontsize=14)
    for axes, (name, metric) in zip(figure.subplots(1, len(METRICS), sharey=True), METRICS.items()):
        _panel(axes, _values(rows, name), metric)
    return figure


def _panel(axes: Axes, values: pd.DataFrame, metric: Metric) -> None:
    models = [model for model in values if model != FLOOR]
    for position, model in enumerate(models):
        colour = COLOURS.get(model, BASELINE_COLOUR)
        excess = metric.factor * (values[model] - values[FLOOR])
        height = position + np.linspace(-0.22, 0.22, len(excess)) if len(excess) > 1 else [position]
        axes.scatter(excess, height, s=26, color=colour, alpha=0.55, linewidths=0)
        diamond = {"fmt": "D", "ms": 8, "color": colour, "mec": "black", "capsize": 4, "zorder": 3}
        axes.errorbar(excess.mean(), position, xerr=np.nan_to_num(excess.sem()), **diamond)
    axes.axvline(0, color="black", lw=1.2)
    place, side = (4, "left") if metric.less_is_better else (-4, "right")
    at = {"xytext": (place, -4), "xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    axes.annotate(
        f"floor ({metric.text(values[FLOOR].mean())} in the mean)", (0, 1), ha=side, va="top", fontsize=9, **at
    )
    axes.set_yticks(range(len(models)), models)
    axes.set_ylim(len(models) - 0.5, -0.9)
    axes.set(title=f"{metric.label}: {side} is better", xlabel="value minus its floor")
    axes.grid(axis="x", alpha=0.25)


def _values(rows: Sequence[Row], metric: str) -> pd.DataFrame:
    """Return the values of each held-out perturbation (split, condition), a column to each model."""
    found = pd.DataFrame(rows).query("grouping == 'condition' and metric == @metric").dropna(subset="mean")
    return found.pivot(index=["split", "condition"], columns="model", values="mean")[found["model"].unique()]


def _difference(differences: pd.Series, metric: Metric) -> str:
    """Write the mean of the first model's differences from another, and how often it is better."""
    better = (differences < 0 if metric.less_is_better else differences > 0).sum()
    mean, error, number = differences.mean(), differences.sem(), len(differences)
    text = metric.text(mean, sign="+") + (f" ± {metric.text(error)}" if number > 1 else "")
    return f"{f'**{text}**' if abs(mean) > MARKED * error else text}; {better} of {number}"
