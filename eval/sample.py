"""Draw cells from a checkpoint into an h5ad file.

    dcm-sample checkpoint/ --out generated.h5ad --num-cells 500 --cell-type k562 --perturbation KLF1
    dcm-sample checkpoint/ --out generated.h5ad --like test.h5ad

Knows nothing of training. The checkpoint is a folder or a Hub id.
"""

import json
import logging
import time
from pathlib import Path
from typing import Annotated

import torch
import transformers
import tyro
from safetensors import SafetensorError

from modeling_dcm import DCMForDenoising
from tokenization import DCMTokenizer
from tokenization.command_line import run
from tokenization.files import read_h5ad, written_aside

logger = logging.getLogger(__name__)

DEFAULT_NUM_CELLS = 500


def main(
    checkpoint: Annotated[str, tyro.conf.Positional],
    *,
    out: Path,
    num_cells: int | None = None,
    cell_type: str | None = None,
    perturbation: str | None = None,
    covariates: dict[str, str] | None = None,
    like: Path | None = None,
    steps: int = 20,
    schedule: str = "cubic",
    guidance_scale: float = 0.0,
    temperature: float = 1.0,
    library_size: float | None = None,
    seed: int = 0,
    batch_size: int = 256,
) -> Path:
    """Draw cells from a checkpoint.

    Args:
        checkpoint: Folder of a checkpoint, or its id on the Hub.
        out: The h5ad file to write: integer counts in X, conditions in obs.
        num_cells: How many cells; default 500, or with --like as many as that file has.
        cell_type: Cell type of all cells.
        perturbation: Perturbation of all cells; combinations are joined, as in KLF1+TGFBR2.
        covariates: Labels of covariates, as in --covariates donor D1.
        like: An h5ad file: one cell is drawn for each of its cells, with that cell's conditions.
        steps: Network calls for each batch of cells.
        schedule: How many genes each step reveals: linear, cosine or cubic.
        guidance_scale: Strengthens the conditions; 0 draws from the model.
        temperature: Below 1 sharpens; 1 draws from the model.
        library_size: Total counts of each cell; default: drawn from the training cells of the same condition.
        seed: The same seed and batch size give the same cells.
        batch_size: Cells drawn together.
    """
    if like is not None and (cell_type or perturbation or covariates or num_cells is not None):
        raise ValueError("--like takes conditions and number of cells from its file: leave out the other options")
    model, tokenizer = load_checkpoint(checkpoint)
    try:
        if like is None:
            wanted = _nones_left_out(cell_type=cell_type, perturbation=perturbation, covariates=covariates)
            num_cells = DEFAULT_NUM_CELLS if num_cells is None else num_cells
            conditions = tokenizer.conditions(num_cells=num_cells, **wanted)
        else:
            conditions = conditions_of(like, tokenizer)
    except ValueError as error:
        raise ValueError(f"{error}{_why_unknown(str(error), model)}") from error
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    ids = model.generate(
        **conditions,
        steps=steps,
        schedule=schedule,
        guidance_scale=guidance_scale,
        temperature=temperature,
        library_size=library_size,
        seed=seed,
        batch_size=batch_size,
        progress=True,
    )
    rate = len(ids) / (time.perf_counter() - start)
    cells = tokenizer.decode(ids, conditions=conditions)
    cells.uns["generator"] = "dcm"
    cells.uns["dcm_sampling"] = {
        "checkpoint": Path(checkpoint).name,
        "steps": steps,
        "schedule": schedule,
        "guidance_scale": guidance_scale,
        "temperature": temperature,
        "seed": seed,
        "batch_size": batch_size,
    }
    with written_aside(out) as aside:
        cells.write_h5ad(aside, compression="gzip")
    logger.info("%s: %d cells x %d genes, %.0f cells/s", out, *cells.shape, rate)
    return out


def load_checkpoint(checkpoint: str) -> tuple[DCMForDenoising, DCMTokenizer]:
    """Model and tokenizer of a folder or a Hub id.

    Raises:
        ValueError: weights that are damaged or do not fit this version.
        FileNotFoundError: a folder that lacks the weights or the tokenizer; the message says which.
    """
    folder = Path(checkpoint)
    if folder.is_dir():
        needed = {"config.json": "the configuration", "model.safetensors": "the weights", "genes.txt": "the tokenizer"}
        sharded = (folder / "model.safetensors.index.json").exists()
        missing = [
            name for name in needed if not (folder / name).exists() and not (sharded and name.startswith("model"))
        ]
        if missing:
            what = ", ".join(f"{needed[name]} ({name})" for name in missing)
            raise FileNotFoundError(
                f"{checkpoint!r} is no complete checkpoint: it has no {what}; save model and tokenizer into one folder"
            )
    elif checkpoint.startswith((".", "/")) or checkpoint.endswith("/") or checkpoint.count("/") > 1:
        raise FileNotFoundError(f"no checkpoint folder {checkpoint!r}")
    try:
        return DCMForDenoising.from_pretrained(checkpoint), DCMTokenizer.from_pretrained(checkpoint)
    except json.JSONDecodeError as error:
        raise ValueError(f"{checkpoint!r} holds a damaged JSON file ({error}): copy it again") from error
    except OSError as error:
        if folder.is_dir():
            raise
        raise FileNotFoundError(f"{checkpoint!r} is no checkpoint folder, and not found on the Hub: {error}") from error
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"the weights of {checkpoint!r} cannot be loaded: damaged, or of another version of this package"
        ) from error


def conditions_of(path: Path, tokenizer: DCMTokenizer) -> dict[str, torch.Tensor | int]:
    """Conditions of the cells of an h5ad file, as ids; counts are not looked at, nor their library sizes."""
    obs = read_h5ad(path, backed=True).obs
    needed = [*(["cell_type"] if tokenizer.cell_types else []), *(["perturbation"] if tokenizer.perturbations else [])]
    needed += list(tokenizer.covariates)
    missing = [name for name in needed if name not in obs]
    if missing:
        raise ValueError(f"{str(path)!r} has no obs column {missing}; its columns: {', '.join(obs.columns) or 'none'}")
    wanted = {name: obs[name].astype(str).tolist() for name in needed}
    covariates = {name: wanted.pop(name) for name in tokenizer.covariates}
    return tokenizer.conditions(num_cells=len(obs), **wanted, **_nones_left_out(covariates=covariates or None))


def _why_unknown(message: str, model: DCMForDenoising) -> str:
    """What to add to an unknown perturbation's error: which names this model can be asked for."""
    if not message.startswith("unknown perturbation"):
        return ""
    if model.config.perturbation_dim is None:
        return (
            "; this model learned a vector for each training perturbation: others need --perturbation-embeddings "
            "in training"
        )
    return "; this model knows the names of its perturbation table only"


def _nones_left_out(**values):
    return {name: value for name, value in values.items() if value is not None}


def cli() -> None:
    """Entry point of ``dcm-sample``."""
    transformers.utils.logging.disable_progress_bar()
    run(main)


if __name__ == "__main__":
    cli()
