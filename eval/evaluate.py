"""Score generated cells against held-out real ones, beside the real-vs-real floor and the marginals baseline.

Takes any generator's h5ad with integer counts. Writes ``results.json`` (every number), ``results.md`` (the tables) and
``figure.png``. Knows nothing of models or checkpoints, and reads test cells only to score.

    dcm-evaluate generated.h5ad --real shards/test.h5ad --train shards/train.h5ad --out results/
"""

import importlib.metadata
import inspect
import logging
import platform
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import tyro
from scipy import sparse
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from eval.baselines import Sampler, independent_marginals
from eval.labelled_counts import LabelledCounts, condition_columns, from_anndata
from eval.plots import comparison_figure
from eval.protocols import (
    FLOOR_DRAWS,
    PROTOCOLS,
    Protocol,
    Score,
    evaluate_pair,
    floor_draws,
    missing_cells,
    prepare_reference,
)
from eval.report import FLOOR, Row, results_json, results_markdown, summary_rows, summary_table
from tokenization.command_line import run
from tokenization.files import read_h5ad, written_aside

logger = logging.getLogger(__name__)

BASELINE_DRAWS = 3
FIGURE_CELLS = 2000
PACKAGES = ("discrete-cell-models", "anndata", "numpy", "POT", "scipy", "torch")
BASELINE = independent_marginals.__name__
RESERVED_NAMES = (FLOOR, BASELINE)


@dataclass(frozen=True)
class Cells:
    """Everything that is compared: genes and condition columns are the same in all of it."""

    real: LabelledCounts
    train: LabelledCounts
    generated: dict[str, list[LabelledCounts]]
    checkpoint: str | None


def main(
    generated: tyro.conf.Positional[tuple[Path, ...]],
    real: Path,
    train: Path,
    out: Path,
    protocol: str = "paper,log",
    name: str | None = None,
    condition_keys: str | None = None,
    layer: str | None = None,
    dataset: str | None = None,
    split: str | None = None,
    checkpoint: str | None = None,
    seed: int = 0,
) -> None:
    """Score generated cells against held-out real cells, with the floor and the marginals baseline.

    Several files of one generator are its sampling seeds. Writes results.json, results.md and figure.png.

    Args:
        generated: h5ad files of generated cells with integer counts; genes are matched by name.
        real: h5ad of the real test cells.
        train: h5ad of the real training cells, for the floor and the baseline.
        out: folder to write to.
        protocol: names of protocols, with commas between.
        name: the generator's name; by default what each file says in uns["generator"].
        condition_keys: columns of obs that make up a condition, with commas between, or none for pooled scores only;
            by default what the real file says in uns["dcm_conditions"], else cell_type and perturbation where present.
        layer: layer of the generated files that holds the counts; by default X.
        dataset: the data set's name; by default that of the folder of the real file.
        split: the split's name; by default that of the real file.
        checkpoint: the checkpoint's name; by default the one that dcm-sample wrote into the files.
        seed: of every draw (floor, baseline, thinning).
    """
    command = _command(dict(locals()))
    protocols = _parse_protocols(protocol)
    _check_paths(generated, out)
    cells = _read_cells(generated, real, train, name=name, condition_keys=condition_keys, layer=layer)
    _warn_of_gaps(cells)
    header = {
        "dataset": dataset or real.resolve().parent.name,
        "split": split or real.stem,
        "checkpoint": checkpoint or cells.checkpoint,
        "versions": {"python": platform.python_version()} | {package: _version(package) for package in PACKAGES},
        "command": command,
    }
    rows = evaluate(cells, protocols, seed=seed)
    _write_text(out / "results.json", results_json(header, rows))
    _write_text(out / "results.md", results_markdown(header, rows))
    figures = _write_figures(out, cells, header["dataset"], seed=seed)
    for chosen in protocols:
        pooled = [row for row in rows if row["protocol"] == chosen.name and row["grouping"] == "pooled"]
        logger.info("\nprotocol %s, all cells pooled (mean ± sd):\n%s", chosen.name, summary_table(pooled))
    logger.info("\nnumbers: %s\ntables:  %s\nfigure:  %s", out / "results.json", out / "results.md", figures[0])


def evaluate(cells: Cells, protocols: Sequence[Protocol], *, seed: int = 0) -> list[Row]:
    """Rows of every protocol: the floor first, then every generator, then the baseline.

    Raises:
        ValueError: fewer than two test cells, or no training cell of any of their conditions.
    """
    sample = independent_marginals(cells.train)
    sources: dict[str, Iterable[LabelledCounts]] = {
        FLOOR: floor_draws(cells.train, cells.real, seed=seed),
        **cells.generated,
        BASELINE: (_baseline_cells(sample, cells.real, seed=seed, draw=draw) for draw in range(BASELINE_DRAWS)),
    }
    test_cells = {condition: found.size for condition, found in cells.real.rows_by_condition.items()}
    references = [prepare_reference(cells.real, protocol, seed=seed) for protocol in protocols]
    rows: dict[str, list[Row]] = {protocol.name: [] for protocol in protocols}
    repeats = FLOOR_DRAWS + BASELINE_DRAWS + sum(len(files) for files in cells.generated.values())
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
                    scores[reference.protocol.name].append(evaluate_pair(drawn, reference, seed=seed))
                    bar.update()
            for protocol, found in scores.items():
                rows[protocol] += summary_rows(model, protocol, found, test_cells=test_cells)
    return [row for found in rows.values() for row in found]


def _baseline_cells(sample: Sampler, real: LabelledCounts, *, seed: int, draw: int) -> LabelledCounts:
    """One draw of the baseline, with the conditions of the test cells."""
    return LabelledCounts(sample(real.labels, np.random.default_rng([seed, draw])), real.labels)


def _parse_protocols(names: str) -> list[Protocol]:
    """Protocols by their names."""
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    unknown = [name for name in wanted if name not in PROTOCOLS]
    if unknown or not wanted:
        raise ValueError(f"--protocol {names!r}: expected one or more of {', '.join(PROTOCOLS)}, with commas between")
    return [PROTOCOLS[name] for name in wanted]


def _check_paths(generated: Sequence[Path], out: Path) -> None:
    """Refuse an empty or repeated list of files, and an ``--out`` that cannot be a folder."""
    if not generated:
        raise ValueError("no generated file given; expected one or more h5ad files")
    repeated = [path for path in generated if list(generated).count(path) > 1]
    if repeated:
        raise ValueError(f"{str(repeated[0])!r} is given more than once: each file counts as one sampling seed")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {str(out)!r} is a file; expected the name of a folder to write to")


def _read_cells(
    generated: Sequence[Path],
    real: Path,
    train: Path,
    *,
    name: str | None,
    condition_keys: str | None,
    layer: str | None,
) -> Cells:
    """Read all files, with the genes of the real one and one set of condition columns."""
    if name in RESERVED_NAMES:
        raise ValueError(f"--name {name!r} is the name of a row of every table; expected another name")
    real_file = read_h5ad(real)
    files = [read_h5ad(path) for path in generated]
    conditions = condition_columns(condition_keys, real_file, files)
    genes = real_file.var_names
    real_cells = from_anndata(real_file, name=str(real), conditions=conditions)
    by_model: dict[str, list[LabelledCounts]] = {}
    for path, file in zip(generated, files):
        cells = from_anndata(file, name=str(path), conditions=conditions, genes=genes, layer=layer)
        if not set(cells.rows_by_condition) & set(real_cells.rows_by_condition):
            raise ValueError(
                f"{str(path)!r} has none of the conditions of {str(real)!r} (columns {', '.join(conditions)}); it has "
                f"{next(iter(cells.rows_by_condition))!r}, the other {next(iter(real_cells.rows_by_condition))!r}, ..."
            )
        by_model.setdefault(name or _generator(file, path), []).append(cells)
    train_cells = from_anndata(read_h5ad(train), name=str(train), conditions=conditions, genes=genes)
    named = [file.uns.get("dcm_sampling", {}).get("checkpoint") for file in files]
    checkpoints = list(dict.fromkeys(str(checkpoint) for checkpoint in named if checkpoint is not None))
    return Cells(real_cells, train_cells, by_model, ", ".join(checkpoints) or None)


def _generator(file: anndata.AnnData, path: Path) -> str:
    """The generator's name as the file tells it."""
    if "generator" not in file.uns:
        raise ValueError(f"{str(path)!r} does not say what generated it (uns['generator']); pass --name NAME")
    if str(file.uns["generator"]) in RESERVED_NAMES:
        raise ValueError(
            f"{str(path)!r}: uns['generator'] is {file.uns['generator']!r}, a row of every table; pass --name"
        )
    return str(file.uns["generator"])


def _warn_of_gaps(cells: Cells) -> None:
    """Say which test cells have no generated partner, and which generated cells are never compared."""
    for model, files in cells.generated.items():
        for position, file in enumerate(files, start=1):
            number, short, unmatched = missing_cells(file, cells.real)
            if number:
                logger.warning(
                    "%s, file %d: %d of %d test cells have no generated partner, in %d conditions (%s, ...); it is "
                    "compared on fewer cells than the floor",
                    model,
                    position,
                    number,
                    len(cells.real),
                    len(short),
                    short[0],
                )
            if unmatched:
                logger.warning(
                    "%s, file %d: %d conditions are not among the test cells and are left out (%s, ...)",
                    model,
                    position,
                    len(unmatched),
                    unmatched[0],
                )


def _write_figures(out: Path, cells: Cells, dataset: str, *, seed: int) -> list[Path]:
    """One figure per generator, of its first file: ``figure.png``, and ``figure_NAME.png`` from the second on."""
    rng = np.random.default_rng(seed)
    baseline = _baseline_cells(independent_marginals(cells.train), cells.real, seed=seed, draw=0).counts
    real, baseline = _thinned(cells.real.counts, rng), _thinned(baseline, rng)
    paths = []
    for model, files in cells.generated.items():
        figure = comparison_figure(
            real, _thinned(files[0].counts, rng), baseline, dataset=dataset, model=model, baseline_name=BASELINE
        )
        paths.append(out / ("figure.png" if not paths else f"figure_{re.sub(r'[^A-Za-z0-9._-]+', '_', model)}.png"))
        with written_aside(paths[-1]) as aside:
            figure.savefig(aside, format="png", dpi=130)
    return paths


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
        if value != defaults[name]:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def cli() -> None:
    """Run the stage from the command line."""
    run(main)


if __name__ == "__main__":
    cli()
