"""Score generated cells against held-out real ones, beside the real-vs-real floor and the baselines.

Takes any generator's h5ad with integer counts, or checkpoints, which are drawn from first. Writes ``results.json``
(every number), ``results.csv`` (the same), ``results.md`` (the tables), ``figure.png`` and ``report.html`` (tables and
figures in one file). Reads test cells only to score.

    dcm-evaluate generated.h5ad --real shards/test.h5ad --train shards/train.h5ad --out results/
    dcm-evaluate checkpoint/ scvi.h5ad --real shards/test.h5ad --train shards/train.h5ad --out results/ --baselines all
"""

import dataclasses
import importlib.metadata
import inspect
import logging
import platform
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from scipy import sparse
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from eval.comparison import cell_eval_scores, scvi_baseline
from eval.comparison.baselines import Sampler, additive, independent_marginals, needs_control, perturbation_mean
from eval.comparison.cells import Cells, drawn_files, is_checkpoint, read_cells, warn_of_gaps
from eval.comparison.labelled_counts import LabelledCounts
from eval.comparison.protocols import (
    FLOOR_DRAWS,
    PROTOCOLS,
    Protocol,
    Score,
    evaluate_pair,
    floor_draws,
    prepare_reference,
)
from eval.reports.html_report import html_report
from eval.reports.plots import comparison_figure
from eval.reports.tables import (
    FLOOR,
    Row,
    biased_floor_notes,
    results_csv,
    results_json,
    results_markdown,
    summary_rows,
    summary_table,
)
from training.data.command_line import run
from training.data.files import written_aside

logger = logging.getLogger(__name__)

BASELINE_DRAWS = 3
FIGURE_CELLS = 2000
PACKAGES = ("discrete-cell-models", "anndata", "numpy", "POT", "scipy", "torch")
SCVI_PACKAGE, CELL_EVAL_PACKAGE = "scvi-tools", "cell-eval"
MARGINALS = independent_marginals.__name__
BASELINES: dict[str, Callable[[LabelledCounts], Sampler]] = {
    fit.__name__: fit
    for fit in (
        independent_marginals,
        perturbation_mean,
        additive,
        scvi_baseline.scvi_prior,
        scvi_baseline.scvi_aggregated_posterior,
    )
}
FROM_CONTROL = (perturbation_mean.__name__, additive.__name__)
FROM_SCVI = (scvi_baseline.scvi_prior.__name__, scvi_baseline.scvi_aggregated_posterior.__name__)
RESERVED_NAMES = (FLOOR, *BASELINES, cell_eval_scores.MEAN_BASELINE, cell_eval_scores.CEILING)


def main(
    generated: tyro.conf.Positional[tuple[Path, ...]],
    real: Path,
    train: Path,
    out: Path,
    protocol: str = "paper,log",
    baselines: str = "default",
    per_condition: bool = True,
    cell_eval: bool = False,
    name: str | None = None,
    condition_keys: str | None = None,
    control: str | None = None,
    layer: str | None = None,
    genes: Literal["all", "shared"] = "all",
    dataset: str | None = None,
    split: str | None = None,
    checkpoint: str | None = None,
    sampling_seeds: int = 3,
    device: str | None = None,
    seed: int = 0,
    umap: bool = True,
) -> None:
    """Score generated cells against held-out real cells, with the floor and baselines.

    Several files of one generator are its sampling seeds. Writes results.json, results.csv, results.md, figure.png and
    report.html.

    Args:
        generated: h5ad files of generated cells with integer counts (genes are matched by name), or checkpoints
            (folders or ids on the Hub), from which the conditions of the real test cells are drawn first.
        real: h5ad of the real test cells.
        train: h5ad of the real training cells, for the floor and the baselines.
        out: folder to write to.
        protocol: names of protocols, with commas between: paper, log, scldm, cfgen.
        baselines: names with commas between (independent_marginals, perturbation_mean, additive, scvi_prior,
            scvi_aggregated_posterior), or default (those that need no other package), all, or none.
        per_condition: score each condition by itself, too.
        cell_eval: add the metrics of the cell-eval package, in each cell type, with its mean baseline and its ceiling.
        name: the generator's name, or one for each file with commas between; by default what each file says in
            uns["generator"], or the checkpoint's name.
        condition_keys: columns of obs that make up a condition, with commas between, or none for pooled scores only;
            by default what the real file says in uns["dcm_conditions"], else cell_type and perturbation where present.
        control: the label of control cells in the column perturbation; by default what the real file says in
            uns["dcm_control"].
        layer: layer of the generated files that holds the counts; by default X.
        genes: all: a file that lacks genes of the real cells is refused; shared: compare on the genes that every file
            has, and say in every result how many these are.
        dataset: the data set's name; by default that of the folder of the real file.
        split: the split's name; by default that of the real file.
        checkpoint: the checkpoint's name; by default the one that dcm-sample wrote into the files.
        sampling_seeds: how many samples are drawn from each checkpoint.
        device: where to multiply matrices, such as cuda; by default the CPU.
        seed: of every draw (floor, baselines, thinning).
        umap: embed by UMAP in the report (takes up to a minute) where umap-learn is installed, else by PCA.
    """
    command = _command(dict(locals()))
    protocols = _parse_protocols(protocol, per_condition=per_condition)
    _check_paths(generated, out)
    names = _parse_names(name, len(generated))
    chosen = _parse_baselines(baselines)
    if cell_eval:
        cell_eval_scores.check_installed()
    files, names = drawn_files(generated, names, real=real, out=out, seeds=sampling_seeds)
    cells = read_cells(
        files,
        real,
        train,
        names=names,
        reserved_names=RESERVED_NAMES,
        condition_keys=condition_keys,
        layer=layer,
        control=control,
        genes=genes,
    )
    warn_of_gaps(cells)
    used = [SCVI_PACKAGE] * bool(set(chosen) & set(FROM_SCVI)) + [CELL_EVAL_PACKAGE] * cell_eval
    header = {
        "dataset": dataset or real.resolve().parent.name,
        "split": split or real.stem,
        "checkpoint": checkpoint or cells.checkpoint,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in (*PACKAGES, *used)},
        "command": command,
    } | ({"genes": cells.genes_note()} if cells.genes_left_out else {})
    samplers = fitted_baselines(cells, chosen, required=baselines not in ("default", "all"))
    rows = evaluate(cells, protocols, samplers, seed=seed, device=device)
    if cell_eval:
        draws = {model: _baseline_draws(sample, cells.real, seed=seed) for model, sample in samplers.items()}
        rows += cell_eval_scores.rows(cells, draws, seed=seed)
    _write(out, header, rows, cells, samplers, umap=umap, seed=seed)
    _log_summary(rows, protocols)
    logger.info(
        "\nnumbers: %s\nreport:  %s\nfigure:  %s", out / "results.json", out / "report.html", out / "figure.png"
    )


def evaluate(
    cells: Cells,
    protocols: Sequence[Protocol],
    samplers: dict[str, Sampler],
    *,
    seed: int = 0,
    device: str | None = None,
) -> list[Row]:
    """Rows of every protocol: the floor first, then every generator, then the baselines.

    Raises:
        ValueError: fewer than two test cells, no training cell of any of their conditions, or a protocol that groups by
            a column that is none of the conditions.
    """
    sources: dict[str, Iterable[LabelledCounts]] = {
        FLOOR: floor_draws(cells.train, cells.real, seed=seed),
        **cells.generated,
        **{name: _baseline_draws(sample, cells.real, seed=seed) for name, sample in samplers.items()},
    }
    references = [prepare_reference(cells.real, protocol, seed=seed) for protocol in protocols]
    rows: dict[str, list[Row]] = {protocol.name: [] for protocol in protocols}
    repeats = FLOOR_DRAWS + BASELINE_DRAWS * len(samplers) + sum(len(files) for files in cells.generated.values())
    # most matrices are small (one condition): a second BLAS thread makes it slower, on a busy machine fivefold
    with (
        threadpool_limits(limits=1, user_api="blas"),
        tqdm(total=repeats * len(protocols), desc="scoring", unit="comparison", disable=None) as bar,
    ):
        for model, samples in sources.items():
            bar.set_postfix_str(model)
            scores: dict[str, list[list[Score]]] = {protocol.name: [] for protocol in protocols}
            for drawn in samples:
                for reference in references:
                    scores[reference.protocol.name].append(evaluate_pair(drawn, reference, seed=seed, device=device))
                    bar.update()
            for reference in references:
                protocol = reference.protocol.name
                test_cells = {group.condition: group.n for group in reference.groups if group.condition is not None}
                rows[protocol] += summary_rows(model, protocol, scores[protocol], test_cells=test_cells)
    return [row for found in rows.values() for row in found]


def fitted_baselines(cells: Cells, names: Sequence[str], *, required: bool) -> dict[str, Sampler]:
    """Fit baselines on the training cells; one that cannot be is an error if ``required``, else left out (logged)."""
    samplers = {}
    for name in names:
        reason = needs_control(cells.train) if name in FROM_CONTROL else None
        if reason is not None and not required:
            logger.info("baseline %s is left out: %s", name, reason)
            continue
        samplers[name] = BASELINES[name](cells.train)
    return samplers


def _baseline_draws(sample: Sampler, real: LabelledCounts, *, seed: int) -> Iterator[LabelledCounts]:
    for draw in range(BASELINE_DRAWS):
        yield baseline_cells(sample, real, seed=seed, draw=draw)


def baseline_cells(sample: Sampler, real: LabelledCounts, *, seed: int, draw: int) -> LabelledCounts:
    """One draw of a baseline, with the conditions of the test cells."""
    return LabelledCounts(sample(real.labels, np.random.default_rng([seed, draw])), real.labels, real.control)


def _parse_protocols(names: str, *, per_condition: bool) -> list[Protocol]:
    """Protocols by their names; without conditions only those groupings that are not a condition of their own."""
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    unknown = [name for name in wanted if name not in PROTOCOLS]
    if unknown or not wanted:
        raise ValueError(f"--protocol {names!r}: expected one or more of {', '.join(PROTOCOLS)}, with commas between")
    protocols = [PROTOCOLS[name] for name in wanted]
    if per_condition:
        return protocols
    return [
        dataclasses.replace(protocol, condition_metrics=()) if protocol.pooled_metrics else protocol
        for protocol in protocols
    ]


def _parse_baselines(names: str) -> list[str]:
    """Names of baselines; the words default, all and none stand for lists."""
    lists = {"default": [name for name in BASELINES if name not in FROM_SCVI], "all": list(BASELINES), "none": []}
    wanted = lists.get(names)
    if wanted is None:
        wanted = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
        unknown = [name for name in wanted if name not in BASELINES]
        if unknown or not wanted:
            known = ", ".join(BASELINES)
            raise ValueError(
                f"--baselines {names!r}: expected default, all, none, or some of {known}, with commas between"
            )
    if set(wanted) & set(FROM_SCVI) and not scvi_baseline.is_installed():
        raise ValueError(scvi_baseline.MISSING)
    return wanted


def _parse_names(name: str | None, number: int) -> list[str | None]:
    """One name for each generated file or checkpoint."""
    if name is None:
        return [None] * number
    names = [part.strip() for part in name.split(",")]
    if len(names) not in (1, number) or not all(names):
        raise ValueError(f"--name {name!r} holds {len(names)} names: expected one, or one for each of {number} files")
    taken = [part for part in names if part in RESERVED_NAMES]
    if taken:
        raise ValueError(f"--name {taken[0]!r} is the name of a row of every table; expected another name")
    return names if len(names) == number else names * number


def _check_paths(generated: Sequence[Path], out: Path) -> None:
    """Refuse an empty or repeated list of files, a file that is not there, and an ``--out`` that cannot be a folder."""
    if not generated:
        raise ValueError("no generated file given; expected one or more h5ad files or checkpoints")
    repeated = [path for path in generated if list(generated).count(path) > 1]
    if repeated:
        raise ValueError(f"{str(repeated[0])!r} is given more than once: each file counts as one sampling seed")
    absent = [path for path in generated if not path.exists() and not is_checkpoint(path)]
    if absent:
        raise FileNotFoundError(f"no file {str(absent[0])!r}; expected an h5ad file or a checkpoint")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {str(out)!r} is a file; expected the name of a folder to write to")


def _log_summary(rows: Sequence[Row], protocols: Sequence[Protocol]) -> None:
    """One table for each protocol: all cells pooled, or the mean over conditions where it pools none."""
    for protocol in protocols:
        shown = [row for row in rows if row["protocol"] == protocol.name and row["condition"] is None]
        grouping = "pooled" if any(row["grouping"] == "pooled" for row in shown) else "per_condition"
        shown = [row for row in shown if row["grouping"] == grouping]
        what = "all cells pooled" if grouping == "pooled" else "mean over conditions"
        logger.info("\nprotocol %s, %s (mean ± sd):\n%s", protocol.name, what, summary_table(shown))
    for note in biased_floor_notes(rows):
        logger.warning("%s", note)


def _write(
    out: Path,
    header: dict[str, object],
    rows: list[Row],
    cells: Cells,
    samplers: dict[str, Sampler],
    *,
    umap: bool,
    seed: int,
) -> None:
    """Write every file of the evaluation."""
    _write_text(out / "results.json", results_json(header, rows))
    _write_text(out / "results.csv", results_csv(header, rows))
    _write_text(out / "results.md", results_markdown(header, rows))
    marginals = samplers.get(MARGINALS) or independent_marginals(cells.train)
    baseline = baseline_cells(marginals, cells.real, seed=seed, draw=0)
    _write_figures(out, cells, baseline, str(header["dataset"]), seed=seed)
    page = html_report(header, rows, cells, baseline, baseline_name=MARGINALS, umap=umap, seed=seed)
    _write_text(out / "report.html", page)


def _write_figures(out: Path, cells: Cells, baseline: LabelledCounts, dataset: str, *, seed: int) -> None:
    """One figure per generator, of its first file: ``figure.png``, and ``figure_NAME.png`` from the second on."""
    rng = np.random.default_rng(seed)
    real, thinned = _thinned(cells.real.counts, rng), _thinned(baseline.counts, rng)
    for position, (model, files) in enumerate(cells.generated.items()):
        figure = comparison_figure(
            real, _thinned(files[0].counts, rng), thinned, dataset=dataset, model=model, baseline_name=MARGINALS
        )
        path = out / ("figure.png" if not position else f"figure_{re.sub(r'[^A-Za-z0-9._-]+', '_', model)}.png")
        with written_aside(path) as aside:
            figure.savefig(aside, format="png", dpi=130)


def _thinned(counts: sparse.csr_matrix, rng: np.random.Generator) -> sparse.csr_matrix:
    """At most ``FIGURE_CELLS`` random cells."""
    return counts[np.sort(rng.choice(counts.shape[0], min(counts.shape[0], FIGURE_CELLS), replace=False))]


def _write_text(path: Path, text: str) -> None:
    """Write a text file in one step."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def _version(package: str) -> str | None:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _command(arguments: dict[str, object]) -> str:
    """The command line that gives ``main`` these arguments; options at their default are left out."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(main).parameters.items()}
    words = ["dcm-evaluate", *map(str, arguments.pop("generated"))]
    for name, value in arguments.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words += [f"--{option}" if value else f"--no-{option}"] * (value != defaults[name])
        elif value != defaults[name]:
            words += [f"--{option}", str(value)]
    return shlex.join(words)


def cli() -> None:
    """Run the stage from the command line."""
    run(main)


if __name__ == "__main__":
    cli()
