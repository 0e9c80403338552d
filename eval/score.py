"""Bound the likelihood of measured cells with a checkpoint, and embed them.

    dcm-score checkpoint/ cells.h5ad --out scored.h5ad
    dcm-score checkpoint/ cells.h5ad --out scored.h5ad --library-size null

The bound given the library size and the bound without it are different quantities; they stand in columns of different
names and are not to be compared. Knows nothing of training and of how cells are drawn.
"""

import logging
import shutil
from pathlib import Path
from typing import Annotated, Literal

import h5py
import numpy as np
import torch
import transformers
import tyro
from anndata.io import write_elem

from eval.drawing.panel_cells import PanelCells, chunk_seed, read_panel_cells
from eval.sample import load_checkpoint
from modeling_dcm import DCMForDenoising
from modeling_dcm.generation_dcm import row_chunks
from training.data.command_line import ProgressReport, run
from training.data.files import written_aside

logger = logging.getLogger(__name__)

GIVEN_LIBRARY_SIZE = "_given_library_size"  # ends the names of a bound on log p(x | library size, ..)


def main(
    checkpoint: Annotated[str, tyro.conf.Positional],
    cells: Annotated[Path, tyro.conf.Positional],
    *,
    out: Path,
    num_samples: int = 16,
    library_size: Literal["conditioned", "null"] | None = None,
    embed: bool = True,
    layer: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> Path:
    """Write cells with their ELBO: a lower bound on their log-likelihood in nats per cell.

    Adds to obs the columns dcm_elbo, dcm_elbo_per_gene (divided by the measured genes) and dcm_elbo_error (Monte Carlo
    standard error), all ending in _given_library_size where the library size was given, and says in uns["dcm_score"]
    (likewise) how they were made. Everything else of the file stays as it is.

    Args:
        checkpoint: Folder of a checkpoint, or its id on the Hub.
        cells: The h5ad file of cells to score; genes are matched by name, conditions by the names of obs columns.
        out: The h5ad file to write.
        num_samples: Masked versions of each cell, an even number; the error falls with its square root.
        library_size: conditioned: give the model each cell's total over its genes; null: do not. Default: conditioned
            where the model knows library sizes and the file has all of its genes.
        embed: Write each cell's embedding to obsm["X_dcm"].
        layer: Layer of the counts; default: X.
        seed: The same seed and batch size give the same numbers.
        batch_size: Cells scored together.
    """
    model, tokenizer = load_checkpoint(checkpoint)
    panel = read_panel_cells(cells, tokenizer, layer)
    given = _library_size_given(library_size, model, panel)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    with ProgressReport(len(panel), task="scoring", unit="cells") as progress:
        scores = score(
            model,
            panel,
            num_samples=num_samples,
            give_library_size=given == "conditioned",
            embed=embed,
            seed=seed,
            batch_size=batch_size,
            progress=progress,
        )
    num_genes = int(panel.measured.sum())
    options = {
        "checkpoint": Path(checkpoint).name,
        "num_samples": num_samples,
        "seed": seed,
        "batch_size": batch_size,
        "library_size": given,
        "conditions": np.array(panel.conditions, dtype=object),
        "num_genes": num_genes,
    }
    _write(cells, out, scores, num_genes, options)
    logger.info(
        "%s: %d cells, ELBO %.2f nats per cell (%.4f per gene, %d genes), library size %s; %.3g cells/s",
        out,
        len(panel),
        scores["elbo"].mean(),
        scores["elbo"].mean() / num_genes,
        num_genes,
        "given" if given == "conditioned" else "not given",
        progress.rate,
    )
    return out


def score(
    model: DCMForDenoising,
    cells: PanelCells,
    *,
    num_samples: int,
    give_library_size: bool,
    embed: bool,
    seed: int,
    batch_size: int,
    progress: ProgressReport,
) -> dict[str, np.ndarray]:
    """``elbo`` (N,) and ``error`` (N,) in nats per cell, and with ``embed`` the embeddings ``X_dcm`` (N, D) float32.

    Raises:
        ValueError: an odd number of samples, or a batch size below 1.
    """
    parts: dict[str, list[torch.Tensor]] = {}
    for chunk, rows in row_chunks(len(cells), batch_size):
        input_ids, conditions = cells.input_ids(rows), cells.conditions_of(rows)
        if give_library_size:
            conditions["library_size"] = cells.library_size(rows)
        elbo, error = model.log_likelihood(
            input_ids,
            num_samples=num_samples,
            seed=chunk_seed(seed, chunk),
            batch_size=batch_size,
            return_error=True,
            **conditions,
        )
        found = {"elbo": elbo, "error": error}
        if embed:
            found["X_dcm"] = model.embed(input_ids, batch_size=batch_size, **conditions).float()
        for name, values in found.items():
            parts.setdefault(name, []).append(values)
        progress.update(len(input_ids))
    return {name: torch.cat(values).numpy() for name, values in parts.items()}


def _library_size_given(
    wanted: Literal["conditioned", "null"] | None, model: DCMForDenoising, cells: PanelCells
) -> Literal["conditioned", "null", "none"]:
    """Whether the model is told library sizes: ``none`` where it knows of no such thing.

    Raises:
        ValueError: it was asked for and cannot be.
    """
    missing = int((~cells.measured).sum())
    if not model.config.library_size_conditioning:
        if wanted == "conditioned":
            raise ValueError("--library-size conditioned: this model was trained without library sizes; leave it out")
        return "none"
    if not missing or wanted == "null":
        return wanted or "conditioned"
    reason = f"the library size is the total over all genes of the model, and {missing:,} were not measured"
    if wanted == "conditioned":
        raise ValueError(f"--library-size conditioned: {reason}; pass --library-size null")
    logger.warning("%s: it is not given, as with --library-size null", reason)
    return "null"


def _write(cells: Path, out: Path, scores: dict[str, np.ndarray], num_genes: int, options: dict[str, object]) -> None:
    """Copy the file and add columns, embeddings and options to the copy."""
    ending = GIVEN_LIBRARY_SIZE if options["library_size"] == "conditioned" else ""
    columns = {
        "dcm_elbo": scores["elbo"],
        "dcm_elbo_per_gene": scores["elbo"] / num_genes,
        "dcm_elbo_error": scores["error"],
    }
    with written_aside(out) as aside:
        shutil.copyfile(cells, aside)
        with h5py.File(aside, "r+") as file:
            obs = file["obs"]
            if not isinstance(obs, h5py.Group):
                raise ValueError(f"{str(cells)!r} was written before anndata 0.7; read it and write it again")
            order = [str(name) for name in obs.attrs["column-order"]]
            for name, values in columns.items():
                write_elem(obs, name + ending, values)
                order += [name + ending] if name + ending not in order else []
            obs.attrs["column-order"] = order
            _put(file, "uns", f"dcm_score{ending}", options)
            if "X_dcm" in scores:
                _put(file, "obsm", "X_dcm", scores["X_dcm"])


def _put(file: h5py.File, group: str, key: str, value: object) -> None:
    """Write one entry of a mapping of AnnData, which an old file may lack."""
    if group not in file:
        write_elem(file, group, {})
    write_elem(file[group], key, value)


def cli() -> None:
    """Entry point of ``dcm-score``."""
    transformers.utils.logging.disable_progress_bar()
    run(main)


if __name__ == "__main__":
    cli()
