"""Draw cells from a checkpoint into an h5ad file.

    dcm-sample checkpoint/ --out generated.h5ad --num-cells 500 --cell-type k562 --perturbation KLF1
    dcm-sample checkpoint/ --out generated.h5ad --like test.h5ad
    dcm-sample checkpoint/ --out counterfactual.h5ad --like control.h5ad --perturbation KLF1 --like-library-size
    accelerate launch -m eval.sample checkpoint/ --out generated.h5ad --num-cells 1000000

Cells are drawn and written in chunks of `--batch-size`, so memory does not grow with their number. Processes share the
chunks (all of them must see the folder of `--out`) and the first one merges them into one file; the same command given
again after an interruption draws only what is missing. Knows nothing of training. The checkpoint is a folder or a Hub
id.
"""

import hashlib
import inspect
import json
import logging
import os
from pathlib import Path
from typing import Annotated

import anndata
import numpy as np
import pandas as pd
import torch
import transformers
import tyro
from accelerate import PartialState
from safetensors import SafetensorError

from eval.drawing.chunk_files import ChunkFiles
from eval.drawing.draw_chunks import draw_chunks
from eval.drawing.like_cells import conditions_of, library_sizes_of
from modeling_dcm import DCMForDenoising
from modeling_dcm.generation_dcm import GUIDED
from modeling_dcm.schedule_dcm import SCHEDULES
from tokenization import DCMTokenizer
from training.data.command_line import run
from training.data.h5ad import open_h5ad

logger = logging.getLogger(__name__)

DEFAULT_NUM_CELLS = 500
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# what `generate` does when it is not told otherwise
DEFAULTS = {name: option.default for name, option in inspect.signature(DCMForDenoising.generate).parameters.items()}


def main(
    checkpoint: Annotated[str, tyro.conf.Positional],
    *,
    out: Path,
    num_cells: int | None = None,
    cell_type: str | None = None,
    perturbation: str | None = None,
    covariates: dict[str, str] | None = None,
    like: Path | None = None,
    like_library_size: bool = False,
    like_layer: str | None = None,
    steps: int | str = DEFAULTS["steps"],
    schedule: str = DEFAULTS["schedule"],
    guidance_scale: float = DEFAULTS["guidance_scale"],
    guidance: dict[str, float] | None = None,
    temperature: float = DEFAULTS["temperature"],
    library_size: float | None = None,
    dtype: str = "float32",
    seed: int = DEFAULTS["seed"],
    batch_size: int = DEFAULTS["batch_size"],
    fresh: bool = False,
) -> Path:
    """Draw cells from a checkpoint.

    Args:
        checkpoint: Folder of a checkpoint, or its id on the Hub.
        out: The h5ad file to write: integer counts in X, conditions in obs. Until it is whole, the cells drawn so far
            stand in the folder .NAME.parts beside it; the same command given again goes on from there.
        num_cells: How many cells; default 500. Not with --like, which draws as many as that file has.
        cell_type: Cell type of all cells; with --like, instead of what the file says.
        perturbation: Perturbation of all cells, combinations joined as in KLF1+TGFBR2; with --like, instead of what the
            file says (counterfactuals).
        covariates: Labels of covariates, as in --covariates donor D1; with --like, instead of what the file says.
        like: An h5ad file: one cell is drawn for each of its cells, with that cell's conditions.
        like_library_size: Give each cell the total count that its cell of --like has over the panel's genes, instead of
            drawing one from the training cells.
        like_layer: Where --like-library-size finds the counts; default X.
        steps: Network calls for each batch of cells, or auto: as few as the model's entropy curve allows.
        schedule: How many genes each step reveals: linear, cosine, cubic, or optimal by the model's entropy curve.
        guidance_scale: Strengthens all conditions together; 0 draws from the model.
        guidance: Strengthens single conditions, as in --guidance perturbation 2.0 cell_type 0.5.
        temperature: Below 1 sharpens; 1 draws from the model.
        library_size: Total counts of each cell; default: drawn from the training cells of the same condition.
        dtype: Of the network's weights: float32 or bfloat16.
        seed: The same seed and batch size give the same cells, whatever the number of processes.
        batch_size: Cells drawn together; memory grows with it, and not with the number of cells.
        fresh: Throw away what an interrupted run with the same --out left.

    Raises:
        ValueError: options that contradict each other, the checkpoint, or an interrupted run; unknown labels.
        OSError: no such checkpoint or file, an output that cannot be written, or another process that failed.
    """
    if guidance and guidance_scale:
        raise ValueError("--guidance-scale weighs all conditions and --guidance each on its own: give one of them")
    options = {"steps": steps, "schedule": schedule, "guidance_scale": guidance or guidance_scale}
    options |= {"temperature": temperature, "seed": seed, "batch_size": batch_size}
    _check_options(**options, dtype=dtype, num_cells=num_cells, library_size=library_size)
    _check_like(like, num_cells, library_size, like_library_size, like_layer)
    _check_out(out)
    state = PartialState(cpu=not torch.cuda.is_available())
    model, tokenizer = load_checkpoint(checkpoint)
    labels = {"cell_type": cell_type, "perturbation": perturbation, "covariates": covariates or None}
    try:
        if like is None:
            conditions = tokenizer.conditions(num_cells=DEFAULT_NUM_CELLS if num_cells is None else num_cells, **labels)
        else:
            conditions = conditions_of(like, tokenizer, **labels)
    except ValueError as error:
        raise ValueError(f"{error}{_why_unknown(str(error), model)}") from error
    learned = [name for name in model.config.condition_names if name != "library_size"]
    if like is None and learned and not any(labels.values()):
        logger.info(
            "no labels given: cells are drawn without %s (--like FILE draws those of its cells)", ", ".join(learned)
        )
    if like_library_size:
        library_size = library_sizes_of(like, tokenizer.genes, like_layer)
    asked = {**conditions, "library_size": library_size}
    sampling = {"checkpoint": Path(checkpoint).name, **options} | ({} if dtype == "float32" else {"dtype": dtype})
    weights_and_names = {**model.state_dict(), "config": model.config.to_json_string(), "genes": tokenizer.genes}
    request = {"num_cells": conditions["num_cells"], **sampling, "device": state.device.type}
    request |= {"checkpoint_sha256": _sha256(weights_and_names), "conditions_sha256": _sha256(asked)}
    files = ChunkFiles(out, request, num_cells=conditions["num_cells"], batch_size=batch_size)
    _cast_weights(model.to(state.device), DTYPES[dtype])
    _refuse_what_does_not_fit(model, {**asked, **options})
    draw_chunks(model, tokenizer, {**asked, **options}, files, state, fresh=fresh)
    if state.is_main_process:
        files.merge(_without_counts(tokenizer, conditions, sampling))
        logger.info("%s: %d cells x %d genes", out, conditions["num_cells"], len(tokenizer.genes))
    return out


def load_checkpoint(checkpoint: str) -> tuple[DCMForDenoising, DCMTokenizer]:
    """Model and tokenizer of a folder or a Hub id.

    Raises:
        ValueError: weights that are damaged, incomplete, or do not fit this version.
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
        model, loading = DCMForDenoising.from_pretrained(checkpoint, output_loading_info=True)
        tokenizer = DCMTokenizer.from_pretrained(checkpoint)
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
    missing = sorted(loading["missing_keys"])  # transformers would only warn, and draw them at random
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(
            f"the weights of {checkpoint!r} lack {len(missing)} tensors of this network ({shown}): they are of another "
            "version of this package"
        )
    return model, tokenizer


def _check_options(
    *,
    steps: int | str,
    schedule: str,
    guidance_scale: float | dict[str, float],
    temperature: float,
    seed: int,
    batch_size: int,
    dtype: str,
    num_cells: int | None,
    library_size: float | None,
) -> None:
    """Refuse what no model could do, before one is loaded."""
    weights = guidance_scale if isinstance(guidance_scale, dict) else {}
    for option, value, holds, expected in (
        ("--num-cells", num_cells, num_cells is None or num_cells >= 1, "at least 1"),
        ("--steps", steps, steps == "auto" or (isinstance(steps, int) and steps >= 1), "at least 1, or auto"),
        ("--schedule", schedule, schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
        ("--guidance", ", ".join(weights), set(weights) <= set(GUIDED), f"weights of {', '.join(GUIDED)}"),
        ("--temperature", temperature, temperature > 0, "above 0"),
        ("--library-size", library_size, library_size is None or library_size >= 0, "0 or more"),
        ("--dtype", dtype, dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
        ("--seed", seed, seed >= 0, "0 or more"),
        ("--batch-size", batch_size, batch_size >= 1, "at least 1"),
    ):
        if not holds:
            raise ValueError(f"{option} is {value}; expected {expected}")


def _check_like(
    like: Path | None,
    num_cells: int | None,
    library_size: float | None,
    like_library_size: bool,
    like_layer: str | None,
) -> None:
    if like is None and like_library_size:
        raise ValueError("--like-library-size takes the library sizes of a file's cells: name the file with --like")
    if like_layer is not None and not like_library_size:
        raise ValueError("--like-layer says where --like-library-size finds counts: give both, or none")
    if like_library_size and library_size is not None:
        raise ValueError("--library-size and --like-library-size contradict each other: give one of them")
    if like is not None:
        if num_cells is not None:
            raise ValueError("--like takes the number of cells from its file: leave out --num-cells")
        open_h5ad(like).close()


def _check_out(out: Path) -> None:
    if out.is_dir():
        raise IsADirectoryError(f"--out {str(out)!r} is a folder; expected the h5ad file to write")
    nearest = next(folder for folder in out.absolute().parents if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"--out {str(out)!r} cannot be written: {str(nearest)!r} is no folder to write into")


def _cast_weights(model: DCMForDenoising, dtype: torch.dtype) -> None:
    """Cast the parameters; the buffers (library sizes and mean counts of the training cells) stay exact."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _refuse_what_does_not_fit(model: DCMForDenoising, asked: dict[str, object]) -> None:
    """Draw one gene of one cell: what the model cannot do is said before anything is written."""
    first = {name: value[:1] if torch.is_tensor(value) else value for name, value in asked.items()}
    model.generate(**{**first, "num_cells": 1, "gene_ids": torch.arange(1)})


def _without_counts(tokenizer: DCMTokenizer, conditions: dict, sampling: dict[str, object]) -> anndata.AnnData:
    """What the tokenizer decodes cells of these conditions to, but for the counts."""
    num_cells = conditions["num_cells"]
    labels, uns = tokenizer.condition_labels(conditions, num_cells)
    obs = pd.DataFrame(index=np.arange(num_cells).astype(str))
    for name, column in labels.items():
        obs[name] = pd.Categorical(column)
    uns |= {"generator": "dcm", "dcm_sampling": sampling}
    return anndata.AnnData(obs=obs, var=pd.DataFrame(index=tokenizer.genes), uns=uns)


def _sha256(values: dict[str, object]) -> str:
    """Of tensors and of what JSON can hold, with their names."""
    total = hashlib.sha256()
    for name, value in values.items():
        is_tensor = torch.is_tensor(value)
        total.update(json.dumps([name, list(value.shape) if is_tensor else value]).encode())
        if is_tensor:
            total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


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


def cli() -> None:
    """Entry point of ``dcm-sample``."""
    transformers.utils.logging.disable_progress_bar()
    run(main)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    cli()
