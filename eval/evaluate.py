"""Score generated cells against held-out real ones, beside the real-vs-real floor and the baselines.

Takes any generator's h5ad with integer counts, or checkpoints, which are drawn from first. Writes ``results.json``
(every number), ``results.csv`` (the same), ``results.md`` (the tables), ``figure.png`` and ``report.html`` (tables and
figures in one file). Reads test cells only to score.

    dcm-evaluate generated.h5ad --real shards/test.h5ad --train shards/train.h5ad --out results/
    dcm-evaluate checkpoint/ scvi.h5ad --real shards/test.h5ad --train shards/train.h5ad --out results/ --baselines all
"""

import logging
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from training.data.command_line import command_of, run, version_of
from training.data.files import written_aside

if TYPE_CHECKING:  # these import seconds of packages: only after the options are known to be right
    from eval.comparison.baselines import Sampler
    from eval.comparison.cells import CellCounts, Comparison
    from eval.comparison.protocols import Protocol
    from eval.reports.tables import Row

logger = logging.getLogger(__name__)

PACKAGES = ("discrete-cell-models", "anndata", "numpy", "POT", "scipy", "torch")


def main(
    generated: tyro.conf.Positional[tuple[Path, ...]],
    real: Path,
    train: Path,
    out: Path,
    protocol: str = "paper,log",
    baselines: str = "default",
    cell_eval: bool = False,
    name: str | None = None,
    condition_keys: str | None = None,
    control: str | None = None,
    layer: str | None = None,
    genes: Literal["all", "shared"] = "all",
    dataset: str | None = None,
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
        sampling_seeds: how many samples are drawn from each checkpoint.
        device: where to multiply matrices, such as cuda; by default the CPU.
        seed: of every draw (floor, baselines, thinning).
        umap: embed by UMAP in the report (takes up to a minute) where umap-learn is installed, else by PCA.
    """
    command = command_of("dcm-evaluate", main, locals())
    _check_paths(generated, (real, train), out)
    from eval.comparison.baselines import (
        FROM_SCVI,
        baseline_draws,
        fitted_baselines,
        named_baselines,
    )
    from eval.comparison.floor import split_half_note, without_training_cells
    from eval.comparison.protocols import named_protocols

    protocols, chosen = named_protocols(protocol), named_baselines(baselines)
    from eval.comparison.cell_eval import RESERVED_NAMES, cell_eval_rows, check_installed
    from eval.comparison.cells import drawn_files, read_comparison

    names = _names(name, len(generated), RESERVED_NAMES)
    if cell_eval:
        check_installed()
    files, names = drawn_files(generated, names, real=real, out=out, seeds=sampling_seeds)
    options = {"condition_keys": condition_keys, "layer": layer, "control": control, "genes": genes}
    comparison = read_comparison(files, real, train, names=names, reserved_names=RESERVED_NAMES, **options)
    packages = (*PACKAGES, *["scvi-tools"] * bool(set(chosen) & set(FROM_SCVI)), *["cell-eval"] * cell_eval)
    header = {
        "dataset": dataset or real.resolve().parent.name,
        "split": real.stem,
        "checkpoint": comparison.checkpoint,
        "versions": {"python": platform.python_version()} | {package: version_of(package) for package in packages},
        "command": command,
    } | ({"genes": comparison.genes_note()} if comparison.genes_left_out else {})
    halved = without_training_cells(comparison.train, comparison.real)
    if halved:
        header["floor"] = split_half_note(halved, comparison.real)
        logger.warning("floor: %s", header["floor"])
    samplers = fitted_baselines(comparison.train, chosen, required=baselines not in ("default", "all"))
    rows = evaluate(comparison, protocols, samplers, seed=seed, device=device)
    if cell_eval:
        draws = {model: baseline_draws(sample, comparison.real, seed=seed) for model, sample in samplers.items()}
        rows += cell_eval_rows(comparison, draws, seed=seed)
    _write(out, header, rows, comparison, samplers, umap=umap, seed=seed)
    _log_summary(rows)
    files = (out / name for name in ("results.json", "report.html", "figure.png"))
    logger.info("\nnumbers: %s\nreport:  %s\nfigure:  %s", *files)


def evaluate(
    comparison: "Comparison",
    protocols: Sequence["Protocol"],
    samplers: dict[str, "Sampler"],
    *,
    seed: int = 0,
    device: str | None = None,
) -> list["Row"]:
    """Rows of every protocol: the floor first, then every generator, then the baselines.

    Test cells of conditions without training cells are halved at random: one half is what everything is compared with,
    the other is the floor. In every draw of the floor each model is compared with the same half, its samples in turn;
    the score of a sample is the mean over its draws.

    Raises:
        ValueError: fewer than two test cells, or a protocol that groups by a column that is none of the conditions.
    """
    import itertools

    import numpy as np
    from threadpoolctl import threadpool_limits
    from tqdm import tqdm

    from eval.comparison.baselines import BASELINE_DRAWS, baseline_draws
    from eval.comparison.cells import together
    from eval.comparison.floor import (
        FLOOR,
        FLOOR_DRAWS,
        beside_half,
        floor_draws,
        split_half,
        without_training_cells,
    )
    from eval.comparison.metric_table import COPYING
    from eval.comparison.protocols import averaged_scores, evaluate_pair, prepare_reference
    from eval.reports.tables import summary_rows

    real = comparison.real
    sources: dict[str, Iterable[CellCounts]] = {
        FLOOR: floor_draws(comparison.train, real, seed=seed),
        **comparison.generated,
        **{name: baseline_draws(sample, real, seed=seed) for name, sample in samplers.items()},
    }
    halved = without_training_cells(comparison.train, real)
    is_whole = ~np.isin(np.arange(len(real)), np.concatenate([[], *(real.rows_by_condition[name] for name in halved)]))
    numbers = {FLOOR: FLOOR_DRAWS} | {model: len(files) for model, files in comparison.generated.items()}
    numbers |= dict.fromkeys(samplers, BASELINE_DRAWS)
    samples = {m: itertools.cycle(found) if halved and m != FLOOR else iter(found) for m, found in sources.items()}
    scores = {p.name: {model: [[] for _ in range(number)] for model, number in numbers.items()} for p in protocols}
    draws = max(numbers.values())
    repeats = FLOOR_DRAWS + draws * (len(numbers) - 1) if halved else sum(numbers.values())
    # most matrices are small (one condition): a second BLAS thread makes it slower, on a busy machine fivefold
    with (
        threadpool_limits(limits=1, user_api="blas"),
        tqdm(total=repeats * len(protocols), desc="scoring", unit="comparison", disable=None) as bar,
    ):
        for draw in range(draws):
            if halved:
                one, other = split_half(real, halved, np.random.default_rng([seed, draw]))
                compared = real.take(np.sort(np.concatenate([np.flatnonzero(is_whole), one])))
            if halved or not draw:
                of_draw = compared if halved else real
                references = [prepare_reference(of_draw, p, train=comparison.train, seed=seed) for p in protocols]
            for model, number in numbers.items():
                drawn = next(samples[model], None)
                if drawn is None:
                    continue
                bar.set_postfix_str(model)
                if halved and model == FLOOR:
                    drawn = together([drawn, real.take(other)])
                elif halved:
                    drawn = beside_half(drawn, real, halved, other)
                for reference in references:
                    found = evaluate_pair(drawn, reference, seed=seed, device=device)
                    if model == FLOOR:  # training cells lie at no distance from themselves
                        found = [score for score in found if score.metric != COPYING]
                    scores[reference.protocol.name][model][draw % number].append(found)
                    bar.update()
    rows: list[Row] = []
    for reference in references:
        test_cells = {group.condition: group.n for group in reference.groups if group.condition is not None}
        for model, found in scores[reference.protocol.name].items():
            repeats = [averaged_scores(of_sample) for of_sample in found]
            rows += summary_rows(model, reference.protocol.name, repeats, test_cells=test_cells)
    return rows


def _names(name: str | None, number: int, reserved_names: Sequence[str]) -> list[str | None]:
    """One name for each generated file or checkpoint."""
    if name is None:
        return [None] * number
    names = [part.strip() for part in name.split(",")]
    if len(names) not in (1, number) or not all(names):
        raise ValueError(f"--name {name!r} holds {len(names)} names: expected one, or one for each of {number} files")
    taken = [part for part in names if part in reserved_names]
    if taken:
        raise ValueError(f"--name {taken[0]!r} is the name of a row of every table; expected another name")
    return names if len(names) == number else names * number


def _check_paths(generated: Sequence[Path], real: Sequence[Path], out: Path) -> None:
    """Refuse an empty or repeated list of files, a file that is not there, and an ``--out`` that cannot be a folder."""
    from eval.comparison.cells import is_checkpoint

    if not generated:
        raise ValueError("no generated file given; expected one or more h5ad files or checkpoints")
    repeated = [path for path in generated if list(generated).count(path) > 1]
    if repeated:
        raise ValueError(f"{str(repeated[0])!r} is given more than once: each file counts as one sampling seed")
    absent = [path for path in generated if not path.exists() and not is_checkpoint(path)]
    if absent:
        raise FileNotFoundError(f"no file {str(absent[0])!r}; expected an h5ad file or a checkpoint")
    absent = [path for path in real if not path.is_file()]
    if absent:
        raise FileNotFoundError(f"no file {str(absent[0])!r}; expected an h5ad file of real cells")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {str(out)!r} is a file; expected the name of a folder to write to")


def _log_summary(rows: Sequence["Row"]) -> None:
    """One table for each named protocol: all cells pooled, or the mean over conditions where it pools none."""
    from eval.comparison.protocols import PROTOCOLS
    from eval.reports.tables import biased_floor_notes, not_beside_floor, summary_table

    for protocol in dict.fromkeys(row["protocol"] for row in rows if row["protocol"] in PROTOCOLS):
        for grouping, what in (("pooled", "all cells pooled"), ("per_condition", "mean over conditions")):
            shown = [row for row in rows if (row["protocol"], row["grouping"]) == (protocol, grouping)]
            if shown:
                table = summary_table(shown, not_beside_floor([row for row in rows if row["protocol"] == protocol]))
                logger.info("\nprotocol %s, %s (mean ± sd):\n%s", protocol, what, table)
                break
    for note in biased_floor_notes(rows):
        logger.warning("%s", note)


def _write(
    out: Path,
    header: dict[str, object],
    rows: list["Row"],
    comparison: "Comparison",
    samplers: dict[str, "Sampler"],
    *,
    umap: bool,
    seed: int,
) -> None:
    """Write every file of the evaluation; figures show real and generated cells, and independent marginals."""
    from eval.comparison.baselines import baseline_draws, independent_marginals
    from eval.reports import html_report, tables
    from eval.reports.figures import overview_figures

    name = independent_marginals.__name__
    sample = samplers.get(name) or independent_marginals(comparison.train)
    marginals = next(baseline_draws(sample, comparison.real, seed=seed))
    options = {"baseline_name": name, "seed": seed}
    pages = {
        "results.json": tables.results_json(header, rows),
        "results.csv": tables.results_csv(header, rows),
        "results.md": tables.results_markdown(header, rows),
        "report.html": html_report.html_report(header, rows, comparison, marginals, umap=umap, **options),
    }
    for file, text in pages.items():
        with written_aside(out / file) as aside:
            aside.write_text(text, encoding="utf-8")
    for file, figure in overview_figures(comparison, marginals, dataset=str(header["dataset"]), **options):
        with written_aside(out / file) as aside:
            figure.savefig(aside, format="png", dpi=130)


def cli() -> None:
    """Run the stage from the command line."""
    run(main)


if __name__ == "__main__":
    cli()
