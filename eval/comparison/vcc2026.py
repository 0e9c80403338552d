"""Measure a context by the rules of the Virtual Cell Challenge of 2026, by ``cell-eval2`` (preset ``vcc2026``).

Six metrics of raw counts. Each has a scale, measured on the real test cells of the context by the package: ``b`` of a
generic response, the same for every perturbation, and ``r`` of replicates, one half of the cells against the other,
each with its own controls (the mean of five halvings). A metric ``u`` has the score ``(u - b) / (r - b)``. A model's
own control cells are not looked at: as the preset has it, the real ones are the origin on both sides.
Reference: https://github.com/ArcInstitute/cell-eval2

And say what is wrong with a file of predicted cells by the challenge's contract, and write one that is right. The
contract: raw counts, no cell above a million of them; the genes of the real file in its order; its labels, with control
cells; any number of cells. That needs no package of the challenge.
"""

import importlib.util
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import anndata
import numpy as np
import pandas as pd

from eval.comparison.cells import PERTURBATION, SEPARATOR, CellCounts, joined_labels
from eval.comparison.challenges import GENERATED_GENES, REAL_GENES, Context, Values, as_anndata, quiet, whole_scores
from eval.comparison.protocols import Score
from eval.drawing.read_cells import panel_columns
from tokenization.count_errors_dcm import library_size
from tokenization.labels_dcm import shortened
from training.data.files import written_aside
from training.data.formats import opened_counts
from training.data.h5ad import damage_named, open_h5ad, read_known, read_table, write_h5ad_in_blocks

if TYPE_CHECKING:
    import polars
    from cell_eval2 import EvalConfig

logger = logging.getLogger(__name__)

PRESET = "vcc2026"
MOST_COUNTS = 1_000_000  # of a cell
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
    name: str, real: anndata.AnnData, config: "EvalConfig", metrics: Sequence[str]
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


# --- files ------------------------------------------------------------------------------------------------------------


def defects(path: Path, real: Path, *, control: str | None = None, layer: str | None = None) -> list[str]:
    """Everything by which a file breaks the contract beside the real file; none if it is right.

    ``control`` is by default what the real file says in ``uns["dcm_control"]``.

    Raises:
        OSError, ValueError: a file that cannot be read at all, or a real one without labels of perturbations.
    """
    obs, genes, columns, control = _asked(real, control)
    found, largest, large = [], 0, 0
    with opened_counts(path, layer) as file:
        try:
            for _, counts in file.blocks(f"reading {path.name}", check=True):
                sizes = library_size(counts)
                largest, large = max(largest, int(sizes.max(initial=0))), large + int((sizes > MOST_COUNTS).sum())
        except ValueError as error:
            found.append(str(error))
        theirs, names = file.obs, list(map(str, file.var.index))
    if large:
        found.append(f"{large:,} cells have more than {MOST_COUNTS:,} counts (the most {largest:,})")
    return found + _wrong_genes(names, genes) + _wrong_labels(theirs, obs, columns, control)


def refuse_defects(path: Path, real: Path, **options: str | None) -> None:
    """Raise ValueError with the numbered list of all that is wrong.

    Raises as :func:`defects`, too.
    """
    found = defects(path, real, **options)
    if found:
        listed = "; ".join(f"({number}) {defect}" for number, defect in enumerate(found, start=1))
        raise ValueError(f"{str(path)!r} breaks the contract of vcc2026 beside {str(real)!r}: {listed}")


def rewrite_as_submission(path: Path, real: Path) -> None:
    """Give drawn cells the real file's genes, in its order, and its labels as they stand there.

    Raises:
        ValueError: the cells lack a gene, or break the contract otherwise.
    """
    _, genes, _ = annotations_of(real)
    obs, _, uns = annotations_of(path)
    as_they_stand = {name.removeprefix("source_"): obs.pop(name) for name in [*obs] if name.startswith("source_")}
    as_they_stand.pop("cell", None)
    annotations = anndata.AnnData(obs=obs.assign(**as_they_stand), var=pd.DataFrame(index=genes), uns=uns)
    with opened_counts(path) as file, written_aside(path) as aside:
        refuse_missing_genes([*file.var.index], real)
        blocks = ({"X": counts} for counts in file.panel_blocks(panel_columns(file, genes), f"ordering {path.name}"))
        write_h5ad_in_blocks(aside, annotations, blocks, {"X": np.int32})
    refuse_defects(path, real)


def refuse_missing_genes(known: Sequence[str], real: Path) -> None:
    """Raise ValueError where a real file has genes that a checkpoint, whose genes are ``known``, cannot draw, or no
    control cells."""
    genes = _asked(real, None)[1]
    absent = [gene for gene in genes if gene not in set(known)]
    if absent:
        raise ValueError(
            f"{str(real)!r} has {len(absent):,} genes of {len(genes):,} that the model does not know "
            f"({shortened(absent)}), and a submission needs all: train on all of them (dcm-convert without "
            "--n-top-genes)"
        )


def annotations_of(path: Path) -> tuple[pd.DataFrame, list[str], dict[str, object]]:
    """``obs``, the genes and ``uns`` of an h5ad file, whose counts are not looked at."""
    with open_h5ad(path) as file, damage_named(path):
        uns = read_known(file["uns"]) if "uns" in file else {}
        return read_table(file, "obs"), list(map(str, read_table(file, "var").index)), uns


def _asked(real: Path, control: str | None) -> tuple[pd.DataFrame, list[str], list[str], str]:
    """Labels, genes, columns of conditions and the label of control cells of the real file."""
    obs, genes, uns = annotations_of(real)
    control = str(uns.get("dcm_control") if control is None else control)
    if PERTURBATION not in obs or control not in set(obs[PERTURBATION]):
        raise ValueError(
            f"{str(real)!r} has no cells labelled {control!r} (control) in obs[{PERTURBATION!r}]: name its label with "
            "--control, or in uns['dcm_control'] as dcm-convert does"
        )
    return obs, genes, [str(name) for name in np.atleast_1d(uns.get("dcm_conditions", [PERTURBATION]))], control


def _wrong_genes(names: list[str], genes: list[str]) -> list[str]:
    expected, found = set(genes), []
    for what, wrong in (
        ("are missing", [gene for gene in genes if gene not in set(names)]),
        ("are not in the real file", [name for name in names if name not in expected]),
        ("stand there twice", sorted(set(pd.Index(names)[pd.Index(names).duplicated()]))),
    ):
        if wrong:
            found.append(f"{len(wrong):,} genes {what} ({shortened(wrong)})")
    if not found and names != genes:
        first = next(place for place, pair in enumerate(zip(names, genes)) if pair[0] != pair[1])
        found.append(f"genes are in another order (gene {first + 1} is {names[first]}, expected {genes[first]})")
    return found


def _wrong_labels(obs: pd.DataFrame, real: pd.DataFrame, columns: list[str], control: str) -> list[str]:
    absent = [column for column in columns if column not in obs]
    if absent:
        return [f"obs has no column {', '.join(absent)} (it has {shortened(obs.columns) or 'none'})"]
    found = []
    for column in columns:
        if obs[column].isna().any():
            found.append(f"{int(obs[column].isna().sum()):,} cells have no label in obs[{column!r}]")
    ours, theirs = ({*joined_labels(table[columns].dropna().astype(str))} for table in (obs, real))
    place = columns.index(PERTURBATION)
    lacking = sorted(theirs - ours)
    controls = [name for name in lacking if name.split(SEPARATOR)[place] == control]
    others = [name for name in lacking if name not in controls]
    for what, names in (
        ("conditions without control cells", controls),
        ("conditions of the real file are missing", others),
        ("conditions are not in the real file", sorted(ours - theirs)),
    ):
        if names:
            found.append(f"{len(names):,} {what} ({shortened(names)})")
    return found
