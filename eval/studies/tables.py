"""Score cells of held-out perturbations, write the tables of such a study, and one table over several studies.

    python -m eval.studies.tables eval/results/zero_shot/norman_mcfaline.json ... [--write README.md]

``study`` is the head of zero_shot.json: dataset, kind of split, vectors (None where only learned ones are there),
held_out labels of each split, trained models (the first is compared with all others), trainings, versions and
command. ``rows`` are those of results.json, each with its split. No training cell has a held-out condition, so the
floor is one half of its real cells against the other (:func:`eval.comparison.floor.score_models`).
"""

import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import tyro

from eval.comparison.baselines import (
    FROM_VECTORS,
    ConditionMeans,
    Sampler,
    additive,
    controls_scaled,
    from_control_cells,
    independent_marginals,
    perturbation_mean,
)
from eval.comparison.cells import PERTURBATION, CellCounts, Comparison, together
from eval.comparison.floor import FLOOR, FLOOR_DRAWS, score_models
from eval.comparison.protocols import FEW_CELLS, PROTOCOLS, Score, mean_scores
from eval.metrics.by_name import metric_label, model_label
from eval.reports.overview import write_between
from eval.reports.tables import Row, markdown_table, summary_rows
from training.data.command_line import run

logger = logging.getLogger(__name__)

Study = Mapping[str, object]
MARKS = ("<!-- unseen: rendered by python -m eval.studies.tables -->", "<!-- end of unseen -->")


METRICS = {"w2": (1, 3), "mmd2": (1000, 2), "pearson_delta": (1, 3)}  # what they are multiplied by; digits
HEADS = {name: metric_label(name)[0] + f" x {factor}" * (factor > 1) for name, (factor, _) in METRICS.items()}
WITH_ARROWS = [f"{head} {metric_label(name)[1]}" for name, head in HEADS.items()]
PROTOCOL = replace(PROTOCOLS["log"], pooled_metrics=(), condition_metrics=tuple(METRICS))
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


# --- scores -----------------------------------------------------------------------------------------------------------


def control_cells(train: CellCounts) -> Sampler:
    """Predict that the perturbation does nothing: real control cells, of the same cell type and covariates."""
    return from_control_cells(train, ConditionMeans(train), lambda cells, *_: cells, lambda *_: None)


def marginals_of_all(train: CellCounts) -> Sampler:
    """Draw each gene by itself, from all training cells of the same cell type and covariates."""
    return independent_marginals(CellCounts(train.counts, train.labels.drop(columns=PERTURBATION)))


BASELINES = (perturbation_mean, additive, controls_scaled, control_cells, marginals_of_all)


def score_held_out(comparison: Comparison, *, vectors: Mapping[str, np.ndarray] | None = None) -> list[Row]:
    """Score every model on each perturbation that no training cell has (or none of the cell type and covariates): W2,
    MMD^2 and Pearson delta of protocol `log`.

    A perturbation's score is the plain mean over its conditions (cell types, covariates) with 20 or more cells in a
    half. Control cells, which Pearson delta starts from, are those of training and test cells; test cells with
    perturbations that training cells have are not looked at.

    Returns:
        Rows as those of results.json: ``condition`` is a perturbation, or None for the mean over them.

    Raises:
        ValueError: no control cells, no held-out perturbation, or none with enough cells.
    """
    train, test = comparison.train, comparison.real
    samplers = {fit.__name__: fit(train) for fit in BASELINES}
    samplers |= {name: fit(train, vectors) for name, fit in FROM_VECTORS.items() if vectors}
    seen = pd.MultiIndex.from_frame(train.labels)
    held = test.take(np.flatnonzero(~pd.MultiIndex.from_frame(test.labels).isin(seen)))
    if not len(held):
        raise ValueError("every perturbation of the test cells has training cells: none is held out")
    test_cells = held.labels[PERTURBATION].value_counts().to_dict()
    label_of = {
        condition: held.labels[PERTURBATION].iloc[rows[0]]
        for condition, rows in held.rows_by_condition.items()
        if len(rows) >= 2 * FEW_CELLS
    }
    if not label_of:
        raise ValueError(f"no condition of a held-out perturbation has {2 * FEW_CELLS} test cells or more")
    left_out = sorted(set(test_cells) - set(label_of.values()))
    if left_out:
        few = f"no condition with {2 * FEW_CELLS} test cells or more"
        logger.warning("%d held-out perturbations are not scored, %s: %s", len(left_out), few, ", ".join(left_out))
    controls = [cells.take(np.flatnonzero(cells.labels[PERTURBATION] == cells.control)) for cells in (train, test)]
    beside_controls = replace(comparison, real=together([held, *controls]))
    ((_, scores),) = score_models(beside_controls, [PROTOCOL], samplers)
    rows = []
    for name, samples in scores.items():
        averaged = [_by_perturbation(found, label_of) for found in samples]
        rows += summary_rows(name, PROTOCOL.name, averaged, test_cells=test_cells)
    return rows


def _by_perturbation(scores: Sequence[Score], label_of: Mapping[str, str]) -> list[Score]:
    """Average the conditions of each perturbation; then the perturbations. ``n`` is the median number of cells."""
    grouped: dict[str, list[Score]] = defaultdict(list)
    for score in scores:
        if score.condition in label_of:
            grouped[label_of[score.condition]].append(score)
    means = [
        replace(mean, grouping="condition", condition=label)
        for label, found in sorted(grouped.items())
        for mean in mean_scores(found, METRICS)
    ]
    return means + mean_scores(means, METRICS)


# --- tables -----------------------------------------------------------------------------------------------------------


def expectations(studies: Sequence[dict]) -> str:
    """Return a table: of each study the floor, its first model ± the deviation over trainings, and the baselines."""
    lines = [["held out", "model", *WITH_ARROWS]]
    for study in studies:
        rows, first = study["rows"], study["models"][0]
        values = {name: _values(rows, name) for name in METRICS}
        what = f"{study['dataset']}, {study['kind']}: {len(values['w2'])} labels, {study['trainings']} trainings"
        for model in (FLOOR, first, *(name for name in BESIDE if name in values["w2"])):
            numbers = [_text(name, values[name][model].mean()) for name in METRICS]
            if model == first:
                numbers = [f"{number} ± {_deviation(rows, first, name)}" for number, name in zip(numbers, METRICS)]
            lines.append([what, "dcm" if model == first else model_label(model), *numbers])
            what = ""
    return markdown_table(lines)


def _deviation(rows: Sequence[Row], model: str, metric: str) -> str:
    """Write a model's standard deviation over trainings, the mean of the splits'."""
    of_means = (row for row in rows if row["grouping"] != "condition")
    found = [row["std"] for row in of_means if (row["model"], row["metric"]) == (model, metric)]
    return _text(metric, np.mean(found))


def _text(metric: str, value: float, sign: str = "") -> str:
    factor, digits = METRICS[metric]
    return format(factor * value, f"{sign}.{digits}f")


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
    for name, head in HEADS.items():
        values = _values(rows, name)
        lines = [["split", "held out", *values]]
        lines += [[str(split), label, *(_text(name, v) for v in found)] for (split, label), found in values.iterrows()]
        parts.append(f"{head} of each:\n\n{markdown_table(lines)}")
    models = dict.fromkeys(row["model"] for row in rows)
    parts.append("\n".join(f"- **{model}**: {MEANING[model]}" for model in models))
    return "\n\n".join(parts) + "\n"


def study_tables(study: Study, rows: Sequence[Row]) -> str:
    """Write means over the held-out perturbations, and the first model's paired differences from all others."""
    values = {name: _values(rows, name) for name in METRICS}
    models, first = list(values["w2"]), study["models"][0]
    number, different = len(values["w2"]), len(values["w2"].index.unique("condition"))
    repeated = "" if different == number else f" ({different} different ones, some in several splits)"
    means, differences = [["model", *WITH_ARROWS]], [[f"{first} minus", *WITH_ARROWS]]
    for model in models:
        means.append([model, *(_text(name, values[name][model].mean()) for name in METRICS)])
        if model not in (FLOOR, first):
            differences.append([model, *(_difference(name, of[first] - of[model]) for name, of in values.items())])
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


def _difference(metric: str, differences: pd.Series) -> str:
    """Write the mean of the first model's differences from another, and how often it is better."""
    better = (differences < 0 if metric_label(metric)[1] == "↓" else differences > 0).sum()
    mean, error, number = differences.mean(), differences.sem(), len(differences)
    text = _text(metric, mean, "+") + (f" ± {_text(metric, error)}" if number > 1 else "")
    return f"{f'**{text}**' if abs(mean) > MARKED * error else text}; {better} of {number}"


if __name__ == "__main__":
    run(main)
