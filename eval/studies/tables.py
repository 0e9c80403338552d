"""Write the tables of a study of held-out perturbations, and one table over several studies.

    python -m eval.studies.tables eval/results/zero_shot/norman_mcfaline.json ... [--write README.md]

``study`` is the head of zero_shot.json: dataset, kind of split, vectors (None where only learned ones are there),
held_out labels of each split, trained models (the first is compared with all others), trainings, versions and
command. ``rows`` are those of results.json, each with its split.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import tyro

from eval.comparison.floor import FLOOR, FLOOR_DRAWS
from eval.metrics.table import model_label
from eval.reports.overview import write_between
from eval.reports.tables import Row, markdown_table
from training.data.command_line import run

logger = logging.getLogger(__name__)

Study = Mapping[str, object]
MARKS = ("<!-- unseen: rendered by python -m eval.studies.tables -->", "<!-- end of unseen -->")


@dataclass(frozen=True)
class Metric:
    """A metric of the study's tables: how its numbers are written, and whether less of it is better."""

    label: str
    factor: float
    digits: int
    less_is_better: bool

    @property
    def arrow(self) -> str:
        return "↓" if self.less_is_better else "↑"

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
BESIDE = ("perturbation_mean", "additive", "controls_scaled", "control_cells", "ridge", "knn")  # in expectations
MARKED = 2  # standard errors


def main(studies: Annotated[list[Path], tyro.conf.Positional], *, write: Path | None = None) -> None:
    """Print what is to be expected of unseen perturbations by several studies.

    Args:
        studies: zero_shot.json files, in the order of the table.
        write: Page whose block between the two marks is replaced.
    """
    text = expectations([json.loads(path.read_text(encoding="utf-8")) for path in studies])
    if write is None:
        logger.info("%s", text)
    else:
        write_between(write, MARKS, text)


def expectations(studies: Sequence[dict]) -> str:
    """Return a table: of each study the floor, its first model ± the deviation over trainings, and the baselines."""
    lines = [["held out", "model", *(f"{metric.label} {metric.arrow}" for metric in METRICS.values())]]
    for study in studies:
        rows, first = study["rows"], study["models"][0]
        values = {name: _values(rows, name) for name in METRICS}
        what = f"{study['dataset']}, {study['kind']}: {len(values['w2'])} labels, {study['trainings']} trainings"
        for model in (FLOOR, first, *(name for name in BESIDE if name in values["w2"])):
            numbers = [metric.text(values[name][model].mean()) for name, metric in METRICS.items()]
            if model == first:
                numbers = [f"{number} ± {_deviation(rows, first, name)}" for number, name in zip(numbers, METRICS)]
            lines.append([what, "dcm" if model == first else model_label(model), *numbers])
            what = ""
    return markdown_table(lines)


def _deviation(rows: Sequence[Row], model: str, metric: str) -> str:
    """Write a model's standard deviation over trainings, the mean of the splits'."""
    of_means = (row for row in rows if row["grouping"] != "condition")
    found = [row["std"] for row in of_means if (row["model"], row["metric"]) == (model, metric)]
    return METRICS[metric].text(np.mean(found))


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
    head = [f"{metric.label} {metric.arrow}" for metric in METRICS.values()]
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


if __name__ == "__main__":
    run(main)
