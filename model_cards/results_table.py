"""The evaluation table of a model card: metrics down, models across, the floor first.

Takes the rows of results.json as they are; knows nothing of how they were measured.
"""

import math
from collections.abc import Mapping, Sequence

LABELS = {
    "mmd2": "MMD² (lower)",
    "w2": "W2 (lower)",
    "w2_gaussian": "W2, Gaussian (lower)",
    "correlation_pearson": "gene-gene correlation (higher)",
    "correlation_slope": "its slope (1)",
    "mean_r2": "R² of means (higher)",
    "variance_r2": "R² of variances (higher)",
    "zero_fraction_error": "zero fraction error (lower)",
    "library_size_cv_ratio": "library-size CV ratio (1)",
    "nearest_neighbour_accuracy": "1-NN accuracy (0.5)",
    "nearest_neighbour_accuracy_real": "1-NN accuracy, real cells (0.5)",
}
GROUPINGS = {"pooled": "all cells pooled", "per_condition": "mean over conditions"}

Row = Mapping[str, object]


def evaluation_table(rows: Sequence[Row]) -> str:
    """Markdown: one table for each protocol and grouping (rows of single conditions are left to results.json)."""
    parts = []
    for protocol in dict.fromkeys(row["protocol"] for row in rows):
        for grouping, title in GROUPINGS.items():
            ours = [row for row in rows if row["protocol"] == protocol and row["grouping"] == grouping]
            if ours:
                parts.append(f"Protocol `{protocol}`, {title}:\n\n{_table(ours)}")
    return "\n\n".join(parts)


def labelled(metric: str) -> str:
    """What a reader calls a metric; its name in results.json where there is no better one."""
    return LABELS.get(metric, metric)


def row_value(row: Row) -> float | None:
    """The mean of a row; None where there is none."""
    mean = row["mean"]
    return mean if isinstance(mean, int | float) and math.isfinite(mean) else None


def _table(rows: Sequence[Row]) -> str:
    models = list(dict.fromkeys(row["model"] for row in rows))
    models.sort(key=lambda model: (model != "floor", model != "dcm"))
    by_place = {(row["metric"], row["model"]): row for row in rows}
    number = {row["model"]: row["n"] for row in rows}
    lines = [["metric (better)", *(f"{model}, n = {number[model]:,}" for model in models)], ["---"] * (1 + len(models))]
    for metric in dict.fromkeys(row["metric"] for row in rows):
        lines.append([labelled(metric), *(_cell(by_place.get((metric, model))) for model in models)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(row: Row | None) -> str:
    if row is None or row_value(row) is None:
        return "not measured"
    return f"{row['mean']:.4g}" + (f" ± {row['std']:.2g}" if row["std"] is not None else "")
