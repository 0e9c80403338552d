"""Draw the chunks of a run, shared among processes: each takes the next chunk that nobody has taken.

So all of them end within the time of a chunk, and as a chunk's draws depend on its number alone, the cells are the same
whoever draws them.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from eval.drawing.checkpoint import cast_weights
from eval.drawing.chunks import ChunkFiles
from eval.drawing.measured import read_obs
from modeling_dcm import DCMForDenoising
from modeling_dcm.diffusion_dcm import keyed_generator
from tokenization import DCMTokenizer
from training.data.command_line import ProgressReport

logger = logging.getLogger(__name__)


def draw_cells(
    model: DCMForDenoising,
    tokenizer: DCMTokenizer,
    conditions: dict[str, torch.Tensor | int],
    given: dict[str, torch.Tensor | float | str | None],
    options: dict[str, object],
    out: Path,
    *,
    asked: dict[str, object],
    source: Path | None = None,
    dtype: str = "float32",
    fresh: bool = False,
) -> None:
    """Draw cells into an h5ad file, shared among the processes; return when this process has no more to do.

    Args:
        model: is moved to the device of this process, and cast to ``dtype``.
        conditions: as :meth:`DCMTokenizer.conditions`.
        given: ``library_size`` and ``state`` as ``generate`` takes them.
        options: other arguments of ``generate``, ``seed`` and ``batch_size`` among them.
        asked: for the file, the checkpoint's name and what was asked for, as JSON can hold it.
        source: the h5ad file, if any, that has one cell for each of these: the output gets its cells' names and labels.
        fresh: throw away what an interrupted run left.

    Raises:
        ValueError: what the model cannot do, or an interrupted run that left chunks of another request.
        ConnectionError: another process failed.
    """
    state, num_cells = PartialState(cpu=not torch.cuda.is_available()), conditions["num_cells"]
    sampling = {**asked, **options} | ({} if dtype == "float32" else {"dtype": dtype})
    sampling |= {
        name: value if isinstance(value, str | float) else "given" for name, value in given.items() if value is not None
    }
    if model.config.loss_still_falling is not None:
        sampling["loss_still_falling"] = model.config.loss_still_falling
    asked = {**conditions, **given}
    weights_and_names = {**model.state_dict(), "config": model.config.to_json_string(), "genes": tokenizer.genes}
    request = {"num_cells": num_cells, **sampling, "device": state.device.type}
    request |= {"checkpoint_sha256": _sha256(weights_and_names), "conditions_sha256": _sha256(asked)}
    files = ChunkFiles(out, request, num_cells=num_cells, batch_size=options["batch_size"])
    cast_weights(model.to(state.device), dtype)
    asked |= options
    _refuse_what_does_not_fit(model, asked)
    _draw_chunks(model, tokenizer, asked, files, state, fresh=fresh)
    if state.is_main_process:
        annotations = _annotations(tokenizer, conditions, sampling, source)
        ids, unseen = conditions.get("perturbation_ids"), model.config.perturbations_without_cells or ()
        names = [tokenizer.perturbations[i] for i in unseen if ids is not None and (ids == i).any()]
        if names:
            logger.warning("no training cell had these perturbations; all that is known is their vector: %s", names)
            annotations.uns["dcm_perturbations_without_cells"] = np.array(names, dtype=object)
        files.merge(annotations)
        logger.info("%s: %d cells x %d genes", out, num_cells, len(tokenizer.genes))


def _draw_chunks(
    model: DCMForDenoising,
    tokenizer: DCMTokenizer,
    asked: dict[str, object],
    files: ChunkFiles,
    state: PartialState,
    *,
    fresh: bool,
) -> None:
    """Draw the chunks that are not there yet; return when all of them are written, by whichever process."""
    missing = _agreed_chunks(files, state, fresh=fresh)
    already = files.num_cells_of(set(range(len(files.rows))) - set(missing))
    with _report(files.num_cells - already, state) as report:

        def write(chunk: int, ids: torch.Tensor) -> None:
            # of counts that share a bin: keyed as every other draw of the chunk is
            seed = keyed_generator(asked["seed"], chunk).initial_seed()
            files.write(chunk, tokenizer.decode(ids, seed=seed).X)

        model.generate(**asked, chunks=_taken(files, missing, report), on_chunk=write)
        with _failure_of_another_explained():
            state.wait_for_everyone()
        if report:
            logger.info("drew %d cells, %.3g per second", report.done, report.rate)


def _taken(files: ChunkFiles, missing: list[int], report: ProgressReport | None) -> Iterator[int]:
    """The chunks that this process is to draw; those that others take count as drawn when it comes to them."""
    for chunk in missing:
        if files.take(chunk):
            yield chunk
        if report:
            report.update(files.num_cells_of([chunk]))


def _report(num_cells: int, state: PartialState) -> AbstractContextManager[ProgressReport | None]:
    """Only the first process reports, for all of them."""
    return ProgressReport(num_cells, task="sampling", unit="cells") if state.is_main_process else nullcontext()


def _agreed_chunks(files: ChunkFiles, state: PartialState, *, fresh: bool) -> list[int]:
    """The chunks to draw, found by the first process; its error is everyone's error."""
    found: list[object] = [None]
    if state.is_main_process:
        try:
            missing, num_damaged = files.prepare(fresh=fresh)
            kept = len(files.rows) - len(missing)
            if kept:
                logger.info("%d of %d chunks are there already and are not drawn again", kept, len(files.rows))
            if num_damaged:
                logger.warning("%d chunks are damaged and are drawn again", num_damaged)
            found = [missing]
        except (ValueError, OSError) as error:
            found = [error]
    with _failure_of_another_explained():
        broadcast_object_list(found)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


@contextmanager
def _failure_of_another_explained() -> Iterator[None]:
    """Turn what waiting for a process that is gone raises into one line."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(
            f"another process failed, so there is no output yet ({error}); run again: what is drawn is kept"
        ) from error


def _refuse_what_does_not_fit(model: DCMForDenoising, asked: dict[str, object]) -> None:
    """Draw one gene of one cell: what the model cannot do is said before anything is written."""
    first = {name: value[:1] if torch.is_tensor(value) else value for name, value in asked.items()}
    model.generate(**{**first, "num_cells": 1, "gene_ids": torch.arange(1)})


def _annotations(
    tokenizer: DCMTokenizer, conditions: dict, sampling: dict[str, object], source: Path | None
) -> anndata.AnnData:
    """What the tokenizer decodes cells of these conditions to, but for the counts; beside them the names of the cells
    of ``source``, and their labels as they stand there."""
    num_cells = conditions["num_cells"]
    labels, uns = tokenizer.condition_labels(conditions, num_cells)
    obs = pd.DataFrame(index=[f"dcm-{sampling['seed']}-{i}" for i in range(num_cells)])
    for name, column in labels.items():
        obs[name] = pd.Categorical(column)
    if source is not None:
        theirs = read_obs(source)
        obs["source_cell"] = theirs.index.astype(str)
        for name in theirs.columns.intersection(tokenizer.known_conditions()):
            obs[f"source_{name}"] = pd.Categorical(theirs[name].astype(str))
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
