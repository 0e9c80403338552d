"""Measure a context by the rules of the Virtual Cell Challenge of 2026, by ``cell-eval2`` (preset ``vcc2026``).

Six metrics of raw counts. Each has a scale, measured on the real test cells of the context by the package: ``b`` of a
generic response, the same for every perturbation, and ``r`` of replicates, one half of the cells against the other,
each with its own controls (the mean of five halvings). A metric ``u`` has the score ``(u - b) / (r - b)``. A model's
own control cells are not looked at: as the preset has it, the real ones are the origin on both sides.
Reference: https://github.com/ArcInstitute/cell-eval2
"""

import importlib.util
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from eval.comparison.cells import PERTURBATION, CellCounts
from eval.comparison.challenges import GENERATED_GENES, REAL_GENES, Context, Values, as_anndata, quiet, whole_scores
from eval.comparison.protocols import Score

if TYPE_CHECKING:
    import anndata
    import polars
    from cell_eval2 import EvalConfig

logger = logging.getLogger(__name__)

PRESET = "vcc2026"
GENES = {"de_wilcoxon_nsig_counts_pred": GENERATED_GENES, "de_wilcoxon_nsig_counts_real": REAL_GENES}


class Rules:
    """Metrics and scores of the perturbations of a context, and of the context as a whole.

    ``folder`` keeps what the package computes of the real cells; the package seeds its halvings itself.
    """

    def __init__(self, contexts: Sequence[Context], train: CellCounts, genes: Sequence[str], folder: Path, seed: int):
        from cell_eval2.competition import competition_members

        self.contexts, self.genes = contexts, genes
        self.metrics = competition_members()
        self.configs = {c.name: _config(c, genes, folder / str(place)) for place, c in enumerate(contexts)}
        self.ends: dict[str, dict[str, tuple[float, float]]] = {}
        for context in contexts:
            real = as_anndata(genes, context.perturbed, context.controls)
            self.ends[context.name] = _ends(context.name, real, self.configs[context.name], self.metrics)

    def measure(self, context: Context, drawn: CellCounts, real: CellCounts) -> tuple[dict[str, Values], Values]:
        """Metrics of each perturbation; the scores of the context, and the metric that is a ratio of sums over it."""
        from cell_eval2 import compute_metrics

        config = replace(self.configs[context.name], metrics=[*self.metrics, *GENES])
        with quiet("cell_eval2"):
            sides = [as_anndata(self.genes, cells, context.controls) for cells in (drawn, real)]
            table = compute_metrics(*sides, config=config)
            means = _means(table, self.metrics)
        values: dict[str, Values] = {}
        for line in table.to_dicts():
            metric = GENES.get(line["metric"], line["metric"])
            if metric in (*self.metrics, *GENES.values()) and line["value"] is not None:
                values.setdefault(line["perturbation"], {})[metric] = float(line["value"])
        scores = _scores(means, self.ends[context.name], len(self.metrics))
        by_perturbation = {metric for found in values.values() for metric in found}
        return values, {m: mean for m, mean in means.items() if m not in by_perturbation} | scores

    def yardsticks(self) -> tuple[list[list[Score]], list[list[Score]]]:
        """The two ends of the scales: metrics of the generic response, whose scores are 0, and of replicates: 1."""
        ends = []
        for position in (0, 1):
            wholes = [
                (c, len(c.sizes), {m: pair[position] for m, pair in self.ends[c.name].items()}) for c in self.contexts
            ]
            ends.append([whole_scores(wholes)])
        return ends[0], ends[1]


def _config(context: Context, genes: Sequence[str], cache: Path) -> "EvalConfig":
    """The preset for these labels, on the CPU; combinations, and other labels that are no gene, have no target gene."""
    from cell_eval2 import EvalConfig

    config, known = EvalConfig.from_preset(PRESET), set(genes)
    targets = {name: name if name in known else None for name in context.sizes}
    backend = "pdex" if importlib.util.find_spec("pdex") else "scanpy"
    return replace(
        config,
        pert_col=PERTURBATION,
        control=context.controls.control,
        target_gene_map=None if all(targets.values()) else targets,
        device="cpu",
        de=replace(config.de, backend=backend),
        cache_real=str(cache),
    )


def _ends(
    name: str, real: "anndata.AnnData", config: "EvalConfig", metrics: Sequence[str]
) -> dict[str, tuple[float, float]]:
    """(b, r) of each metric that has both on these cells; which have not, too few cells or effects, is logged."""
    from cell_eval2 import build_generic_baseline
    from cell_eval2.anchor import compute_replicate_anchor

    config = replace(config, metrics=list(metrics))
    try:
        with quiet("cell_eval2"):
            baseline = build_generic_baseline(real, config=config, allow_degenerate=True)
            _, anchor = compute_replicate_anchor(real, config=config)
    except ValueError as error:
        if len(metrics) > 1:
            return {metric: ends for one in metrics for metric, ends in _ends(name, real, config, [one]).items()}
        logger.warning("%s: no scale of %s: %s", name, metrics[0], str(error).partition(". ")[0])
        return {}
    low = _means(baseline.results, metrics)
    high = {line["metric"]: line["replicate"] for line in anchor.to_dicts()}
    found = {}
    for metric in metrics:
        if _policy(low.get(metric), high.get(metric), metric) is None:
            what = "%s: no scale of %s: replicates (%.3g) are no better than the generic response (%.3g)"
            logger.warning(what, name, metric, high.get(metric, math.nan), low.get(metric, math.nan))
        else:
            found[metric] = (low[metric], high[metric])
    return found


def _policy(low: float | None, high: float | None, metric: str):
    """The package's rule for scores of a metric between these ends, None where they make no scale."""
    from cell_eval2.catalog import CATALOG
    from cell_eval2.scoring import is_degenerate

    if low is None or high is None:
        return None
    try:
        policy = replace(CATALOG[metric].scoring, anchor=high, allow_negative_baseline=False)
    except ValueError:
        return None
    return None if is_degenerate(low, policy) else policy


def _scores(means: Values, ends: dict[str, tuple[float, float]], number: int) -> Values:
    """Scores of the metrics that have a scale, as the package bounds them; their mean where all (``number``) have."""
    from cell_eval2.scoring import score_one

    scores = {f"score_{m}": score_one(means.get(m), low, _policy(low, high, m)) for m, (low, high) in ends.items()}
    return scores | ({"score": sum(scores.values()) / number} if len(scores) == number else {})


def _means(table: "polars.DataFrame", metrics: Sequence[str]) -> Values:
    """Each metric over all perturbations: a mean, or a ratio of sums where these have one."""
    from cell_eval2 import aggregate_metrics
    from cell_eval2.catalog import CATALOG

    try:
        found = aggregate_metrics(table, metrics=list(metrics))
    except ValueError:  # the real effects are not above their noise: there is nothing to divide by
        found = aggregate_metrics(table, metrics=[metric for metric in metrics if CATALOG[metric].derived is None])
    return {
        line["metric"]: line["mean"]
        for line in found.to_dicts()
        if line["metric"] in metrics and math.isfinite(line["mean"])
    }
