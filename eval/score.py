"""Bound the likelihood of measured cells with a checkpoint, and embed them.

    dcm-score checkpoint/ cells.h5ad --out scored.h5ad
    dcm-score checkpoint/ cells.h5ad --out scored.h5ad --library-size null

The bound given the library size and the bound without it are different quantities; they stand in columns of different
names and are not to be compared.
"""

from __future__ import annotations

import logging
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from training.data.checkpoint import check_checkpoint, load_checkpoint
from training.data.command_line import ProgressReport, run
from training.data.files import check_writable, written_aside

if TYPE_CHECKING:
    import numpy as np

    from eval.drawing.read_cells import MeasuredCells
    from modeling_dcm import DCMForDenoising

logger = logging.getLogger(__name__)

GIVEN_LIBRARY_SIZE = "_given_library_size"  # ends the names of a bound on log p(x | library size, ..)


def main(
    checkpoint: Annotated[str, tyro.conf.Positional],
    cells: Annotated[Path, tyro.conf.Positional],
    *,
    out: Path,
    num_samples: int = 16,
    library_size: Literal["conditioned", "null"] | None = None,
    layer: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> Path:
    """Write cells with their ELBO: a lower bound on their log-likelihood in nats per cell.

    Adds to obs the columns dcm_elbo, dcm_elbo_per_gene (divided by the measured genes) and dcm_elbo_error (Monte Carlo
    standard error), all ending in _given_library_size where the library size was given, and says in uns["dcm_score"]
    (likewise) how they were made; obsm["X_dcm"] is each cell's embedding. Everything else of the file stays as it is.

    Args:
        checkpoint: Folder of a checkpoint, or its id on the Hub.
        cells: The h5ad file of cells to score; genes are matched by name, conditions by the names of obs columns.
        out: The h5ad file to write.
        num_samples: Masked versions of each cell, an even number; the error falls with its square root.
        library_size: conditioned: give the model each cell's total over its genes; null: do not. Default: conditioned
            where the model knows library sizes and the file has all of its genes.
        layer: Layer of the counts; default: X.
        seed: The same seed and batch size give the same numbers.
        batch_size: Cells scored together.
    """
    check_checkpoint(checkpoint)
    check_writable(out)
    from training.data.h5ad import open_h5ad

    with open_h5ad(cells) as file:
        if hasattr(file["obs"], "dtype"):  # a compound dataset takes no more columns
            raise ValueError(f"{str(cells)!r} was written before anndata 0.7; read it and write it again")
    import numpy as np
    import torch

    from eval.drawing.read_cells import read_measured_cells

    model, tokenizer = load_checkpoint(checkpoint)
    measured = read_measured_cells(cells, tokenizer, layer)
    given = _library_size_given(library_size, model, measured)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    options = {"num_samples": num_samples, "seed": seed, "batch_size": batch_size}
    with ProgressReport(len(measured), task="scoring", unit="cells") as report:
        scores = _scores(model, measured, options, report, tell_size=given == "conditioned")
    num_genes = measured.panels.sum(axis=1)[measured.panel]  # (N,)
    numbers = np.unique(num_genes).tolist()
    described = {"checkpoint": Path(checkpoint).name, **options, "library_size": given}
    described["num_genes"] = numbers[0] if len(numbers) == 1 else np.array(numbers)
    described["conditions"] = np.array(measured.conditions, dtype=object)
    _write(cells, out, scores, described, num_genes)
    logger.info(
        "%s: %d cells, ELBO %.2f nats per cell (%.4f per gene, %s genes), library size %s; %.3g cells/s",
        *(out, len(measured), scores["elbo"].mean(), (scores["elbo"] / num_genes).mean()),
        " to ".join(map(str, dict.fromkeys((numbers[0], numbers[-1])))),
        *("given" if given == "conditioned" else "not given", report.rate),
    )
    return out


def _scores(
    model: DCMForDenoising,
    cells: MeasuredCells,
    options: dict[str, int],
    report: ProgressReport,
    *,
    tell_size: bool,
) -> dict[str, np.ndarray]:
    """``elbo`` (N,) and ``error`` (N,) in nats per cell, and the embeddings ``X_dcm`` (N, D) float32."""
    import torch

    from eval.drawing.read_cells import chunk_seed
    from modeling_dcm.generation_dcm import row_chunks

    chunks: list[dict[str, torch.Tensor]] = []
    for chunk, rows in row_chunks(len(cells), options["batch_size"]):
        input_ids, conditions = cells.input_ids(rows), cells.conditions_of(rows)
        if tell_size:
            conditions["library_size"] = cells.library_size(rows)
        of_chunk = options | {"seed": chunk_seed(options["seed"], chunk)}
        elbo, error = model.log_likelihood(input_ids, **of_chunk, return_error=True, **conditions)
        embedded = model.embed(input_ids, batch_size=options["batch_size"], **conditions).float()
        chunks.append({"elbo": elbo, "error": error, "X_dcm": embedded})
        report.update(len(input_ids))
    return {name: torch.cat([found[name] for found in chunks]).numpy() for name in chunks[0]}


def _library_size_given(
    wanted: Literal["conditioned", "null"] | None, model: DCMForDenoising, cells: MeasuredCells
) -> Literal["conditioned", "null", "none"]:
    """Whether the model is told library sizes: ``none`` where it knows of no such thing.

    Raises:
        ValueError: it was asked for and cannot be.
    """
    is_known, missing = model.config.library_size_conditioning, int((~cells.always_measured).sum())
    reason = f"the library size is the total over all genes of the model, and {missing:,} were not measured"
    reason += "" if len(cells.panels) == 1 else " in every cell"
    if wanted == "conditioned" and not is_known:
        raise ValueError("--library-size conditioned: this model was trained without library sizes; leave it out")
    if wanted == "conditioned" and missing:
        raise ValueError(f"--library-size conditioned: {reason}; pass --library-size null")
    if is_known and missing and wanted is None:
        logger.warning("%s: it is not given, as with --library-size null", reason)
    return "none" if not is_known else "null" if missing else wanted or "conditioned"


def _write(
    cells: Path, out: Path, scores: dict[str, np.ndarray], options: dict[str, object], num_genes: np.ndarray
) -> None:
    """Copy the file and add columns, embeddings and options to the copy; ``num_genes`` (N,) were measured."""
    import h5py
    from anndata.io import write_elem

    ending = GIVEN_LIBRARY_SIZE if options["library_size"] == "conditioned" else ""
    columns = {
        "dcm_elbo": scores["elbo"],
        "dcm_elbo_per_gene": scores["elbo"] / num_genes,
        "dcm_elbo_error": scores["error"],
    }
    entries = {("uns", f"dcm_score{ending}"): options, ("obsm", "X_dcm"): scores["X_dcm"]}
    with written_aside(out) as aside:
        shutil.copyfile(cells, aside)
        with h5py.File(aside, "r+") as file:
            obs = file["obs"]
            order = [str(name) for name in obs.attrs["column-order"]]
            for name, values in columns.items():
                write_elem(obs, name + ending, values)
                order += [name + ending] if name + ending not in order else []
            obs.attrs["column-order"] = order
            for (group, key), value in entries.items():
                if group not in file:  # an old file may lack it
                    write_elem(file, group, {})
                write_elem(file[group], key, value)


cli = partial(run, main)

if __name__ == "__main__":
    cli()
