"""Score generated cells against held-out real ones, beside the real-vs-real floor and the baselines.

Takes any generator's h5ad with integer counts (``dcm-sample --like`` draws those of a checkpoint). Writes
``results.json`` (every number), ``results.csv`` (the same), ``results.md`` (the tables), ``figure.png`` and
``report.html`` (tables and figures in one file). Reads test cells only to score.

    dcm-evaluate generated.h5ad --real shards/test.h5ad --train shards/train.h5ad --out results/
    dcm-evaluate submission.h5ad --real shards/test.h5ad --validate
    dcm-evaluate generated.h5ad scvi.h5ad --real test.h5ad --train train.h5ad --out results/ --baselines all
"""

import logging
import re
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from training.data.command_line import command_of, run, versions_of
from training.data.files import check_folder, write_text, written_aside

if TYPE_CHECKING:  # these import seconds of packages: only after the options are known to be right
    from eval.comparison.baselines import Sampler
    from eval.comparison.cells import Comparison
    from eval.comparison.protocols import Challenge, Protocol
    from eval.reports.tables import Row

logger = logging.getLogger(__name__)

PACKAGES = ("discrete-cell-models", "anndata", "numpy", "POT", "scipy", "torch")


def main(
    generated: tyro.conf.Positional[tuple[Path, ...]],
    real: Path,
    train: Path | None = None,
    out: Path | None = None,
    validate: bool = False,
    protocol: str = "paper,log",
    baselines: str = "default",
    vectors: Path | None = None,
    name: str | None = None,
    condition_keys: str | None = None,
    control: str | None = None,
    layer: str | None = None,
    dataset: str | None = None,
    seed: int = 0,
    umap: bool = True,
) -> None:
    """Score generated cells against held-out real cells, with the floor and baselines.

    Several files of one generator are its sampling seeds. Writes results.json, results.csv, results.md, figure.png and
    report.html.

    Args:
        generated: h5ad files of generated cells with integer counts; genes are matched by name.
        real: h5ad of the real test cells.
        train: h5ad of the real training cells, for the floor and the baselines.
        out: Folder to write to.
        validate: Only say what is wrong with the files as submissions to the Virtual Cell Challenge of 2026, every
            defect (exit code 2 if there is one); --train and --out are not needed.
        protocol: Names of protocols, with commas between: paper, log, scldm, cfgen, vcc2025, vcc2026 (the last two need
            the packages of the extra baselines).
        baselines: Names with commas between (independent_marginals, perturbation_mean, controls_scaled, additive,
            scvi_prior, scvi_aggregated_posterior, scvi_shift), or default (those that need no other package), all, or
            none.
        vectors: vectors of perturbations by name: then ridge regression and nearest neighbours are baselines, too.
        name: The generator's name, or one for each file with commas between; by default what each file says in
            uns["generator"].
        condition_keys: Columns of obs that make up a condition, with commas between, or none for pooled scores only;
            by default what the real file says in uns["dcm_conditions"], else cell_type and perturbation where present.
        control: The label of control cells in the column perturbation; by default what the real file says in
            uns["dcm_control"].
        layer: Layer of the generated files that holds the counts; by default X.
        dataset: The data set's name; by default that of the file which dcm-convert read, or else of the real file's
            folder.
        seed: Of every draw (floor, baselines, thinning).
        umap: Embed by UMAP in the report (takes up to a minute) where umap-learn is installed, else by PCA.
    """
    command = command_of("dcm-evaluate", main, locals())
    _check_files(generated, (real, *[train] * (train is not None)))
    if validate:
        _validate(generated, real, control=control, layer=layer)
        return
    needed = {"--train, the training cells for the floor": train, "--out, the folder to write to": out}
    if None in needed.values():
        raise ValueError(f"missing: {' and '.join(option for option, path in needed.items() if path is None)}")
    check_folder(out)
    from eval.comparison.baselines import FROM_SCVI, fitted_baselines, named_baselines
    from eval.comparison.floor import split_half_note
    from eval.comparison.protocols import Challenge, named_protocols
    from training.perturbations.vectors import read_vectors

    protocols, chosen = named_protocols(protocol), named_baselines(baselines)
    from eval.comparison.cells import read_comparison
    from eval.comparison.challenges import RESERVED_NAMES

    options = {"condition_keys": condition_keys, "layer": layer, "control": control, "reserved_names": RESERVED_NAMES}
    comparison = read_comparison(_named(generated, name), real, train, **options)
    header = {"dataset": dataset or comparison.dataset or real.resolve().parent.name, "split": real.stem}
    packages = ["scvi-tools"] * bool(set(chosen) & set(FROM_SCVI))
    packages += [protocol.package for protocol in protocols if isinstance(protocol, Challenge)]
    header |= {"checkpoint": comparison.checkpoint, "versions": versions_of((*PACKAGES, *packages)), "command": command}
    header |= comparison.notes() | split_half_note(comparison.train, comparison.real)
    if "floor" in header:
        logger.warning("floor: %s", header["floor"])
    required = baselines not in ("default", "all")
    samplers = fitted_baselines(comparison.train, chosen, required=required, vectors=vectors and read_vectors(vectors))
    rows = evaluate(comparison, protocols, samplers, seed=seed)
    _write(out, header, rows, comparison, samplers, umap=umap, seed=seed)
    _log_summary(rows)
    files = (out / name for name in ("results.json", "report.html", "figure.png"))
    logger.info("\nnumbers: %s\nreport:  %s\nfigure:  %s", *files)


def evaluate(
    comparison: "Comparison",
    protocols: Sequence["Protocol | Challenge"],
    samplers: dict[str, "Sampler"],
    *,
    seed: int = 0,
) -> list["Row"]:
    """Rows of every protocol: the floor first, then every generator, then the baselines.

    Raises as :func:`eval.comparison.floor.score_models` and :func:`eval.comparison.challenges.challenge_rows`.
    """
    from eval.comparison.challenges import challenge_rows
    from eval.comparison.floor import score_models
    from eval.comparison.protocols import Protocol
    from eval.reports.tables import summary_rows

    rows: list[Row] = []
    ours = [protocol for protocol in protocols if isinstance(protocol, Protocol)]
    for reference, scores in score_models(comparison, ours, samplers, seed=seed) if ours else ():
        test_cells = {group.condition: group.n for group in reference.groups if group.condition is not None}
        for model, samples in scores.items():
            rows += summary_rows(model, reference.protocol.name, samples, test_cells=test_cells)
    for challenge in (protocol for protocol in protocols if protocol not in ours):
        rows += challenge_rows(challenge, comparison, samplers, seed=seed)
    return rows


def _named(generated: Sequence[Path], name: str | None) -> dict[Path, str | None]:
    """Each generated file with its name, as far as ``name`` tells it."""
    names, number = [None] if name is None else [part.strip() for part in name.split(",")], len(generated)
    if len(names) not in (1, number) or "" in names:
        raise ValueError(f"--name {name!r} holds {len(names)} names: expected one, or one for each of {number} files")
    return dict(zip(generated, names if len(names) == number else names * number))


def _validate(generated: Sequence[Path], real: Path, **options: str | None) -> None:
    """Refuse all files that break the contract of vcc2026, and say of which there is nothing to say."""
    from eval.comparison.vcc2026 import refuse_defects

    found = []
    for path in generated:
        try:
            refuse_defects(path, real, **options)
            logger.info("%s: nothing is wrong with it beside %s", path, real)
        except ValueError as error:
            found.append(str(error))
    if found:
        raise ValueError("; ".join(found))


def _check_files(generated: Sequence[Path], real: Sequence[Path]) -> None:
    """Refuse an empty or repeated list of files, and a file that is not there."""
    repeated = [path for path in generated if list(generated).count(path) > 1]
    if repeated or not generated:
        given = f"{str(repeated[0])!r} is given more than once" if generated else "no generated file given"
        raise ValueError(f"{given}: expected one or more h5ad files, each of which counts as one sampling seed")
    for path in (*generated, *real):
        if not path.is_file():
            way_out = "; draw from a checkpoint first: dcm-sample CHECKPOINT --like REAL" if path in generated else ""
            raise FileNotFoundError(f"no file {str(path)!r}; expected an h5ad file of cells{way_out}")


def _log_summary(rows: Sequence["Row"]) -> None:
    """One table for each protocol: all cells pooled, or the mean over conditions where it pools none."""
    from eval.reports.tables import sections, terminal_table

    width = shutil.get_terminal_size((110, 24)).columns
    for section in sections(rows):
        for caption, shown, unlike in section.tables[:1]:
            table = terminal_table(shown, unlike, width)
            logger.info("\nprotocol %s. %s (**: at the floor):\n%s", section.protocol, caption, table)


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
    from eval.reports.figures import cells_to_draw, overview_figure

    name = independent_marginals.__name__
    sample = samplers.get(name) or independent_marginals(comparison.train)
    marginals = next(baseline_draws(sample, comparison.real, seed=seed))
    drawn = cells_to_draw(comparison, marginals, baseline_name=name, seed=seed)
    pages = {
        "results.json": tables.results_json(header, rows),
        "results.csv": tables.results_csv(header, rows),
        "results.md": tables.results_markdown(header, rows),
        "report.html": html_report.html_report(header, rows, comparison, drawn, umap=umap),
    }
    for file, text in pages.items():
        write_text(out / file, text)
    for position, (model, cells) in enumerate(drawn.items()):
        name = f"figure_{re.sub(r'[^A-Za-z0-9._-]+', '_', model)}.png" if position else "figure.png"
        with written_aside(out / name) as aside:
            overview_figure(cells, dataset=str(header["dataset"])).savefig(aside, format="png", dpi=130)


cli = partial(run, main)

if __name__ == "__main__":
    cli()
