"""Draw cells in chunks, shared among processes: each takes the next chunk that nobody has taken.

So all of them end within the time of a chunk, and as a chunk's draws depend on its number alone, the cells are the same
whoever draws them. Chunks stand in `.NAME.parts/` beside the output NAME until all are there and are merged: one
safetensors file (CSR arrays) for each, written aside and renamed, and `request.json`, which says what they are chunks
of. So a killed run goes on where it was.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy.sparse import csr_matrix

from eval.drawing.read_cells import read_obs
from modeling_dcm import DCMForDenoising
from modeling_dcm.diffusion_dcm import keyed_generator
from modeling_dcm.generation_dcm import row_chunks
from tokenization import DCMTokenizer
from training.data.checkpoint import cast_weights
from training.data.command_line import ProgressReport
from training.data.files import followed, write_text, written_aside
from training.data.h5ad import write_h5ad_in_blocks

logger = logging.getLogger(__name__)

REQUEST = "request.json"
SUFFIX = ".safetensors"
ARRAYS = ("data", "indices", "indptr")


class ChunkFiles:
    """Chunks of ``batch_size`` cells of one output file.

    ``request`` is everything that decides which cells these are, as JSON can hold it; chunks of another are never mixed
    in.
    """

    def __init__(self, out: Path, request: dict[str, object], *, num_cells: int, batch_size: int):
        self.out = followed(out)
        self.folder = self.out.parent / f".{self.out.name}.parts"
        self.request = json.loads(json.dumps(request))
        self.rows = [rows for _, rows in row_chunks(num_cells, batch_size)]
        self.sizes = [rows.stop - rows.start for rows in self.rows]

    def prepare(self) -> list[int]:
        """Make the folder, or find the chunks that an interrupted run left, in one process; return those to be drawn.

        Raises:
            ValueError: the folder holds chunks of another request.
        """
        written = {int(path.stem) for path in self.folder.glob(f"[0-9]*{SUFFIX}")}
        if written:
            self._check_request(len(written))
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / REQUEST, json.dumps(self.request, indent=1) + "\n")
        for taken in self.folder.glob("*.taken"):
            taken.unlink()
        return [chunk for chunk in range(len(self.rows)) if chunk not in written]

    def take(self, chunk: int) -> bool:
        """Whether this process is the first to ask for the chunk, and so the one to draw it."""
        try:
            (self.folder / f"{chunk}.taken").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def write(self, chunk: int, counts: csr_matrix) -> None:
        """Keep the counts (cells of the chunk, G), int32.

        Raises:
            OSError: the disk is full, or fails otherwise.
        """
        arrays = {name: getattr(counts, name).astype(np.int32, copy=False) for name in ARRAYS}
        with written_aside(self._path(chunk)) as aside:
            try:
                save_file(arrays, aside)
            except SafetensorError as error:
                raise OSError(f"cannot write {str(self._path(chunk))!r}: {error}") from error

    def merge(self, annotations: anndata.AnnData) -> None:
        """Write the output: the annotations of all cells with the chunks' counts in order, CSR in ``X``.

        One chunk is in memory at a time. The output gets its name when it is whole; then the folder is removed.

        Raises:
            FileNotFoundError: a chunk is missing.
            ValueError: a chunk is damaged.
        """
        whole = self.folder / self.out.name
        with written_aside(whole) as aside, ProgressReport(sum(self.sizes), task="merging", unit="cells") as report:
            write_h5ad_in_blocks(aside, annotations, self._blocks(annotations.n_vars, report), {"X": np.int32})
        os.replace(whole, self.out)
        shutil.rmtree(self.folder)

    def _blocks(self, num_genes: int, report: ProgressReport) -> Iterator[dict[str, csr_matrix]]:
        for chunk, size in enumerate(self.sizes):
            try:
                arrays = load_file(self._path(chunk))
            except SafetensorError as error:
                raise ValueError(f"{str(self._path(chunk))!r} is damaged ({error}): remove it and run again") from error
            yield {"X": csr_matrix(tuple(arrays[name] for name in ARRAYS), shape=(size, num_genes))}
            report.update(size)

    def _path(self, chunk: int) -> Path:
        return self.folder / f"{chunk}{SUFFIX}"

    def _check_request(self, num_written: int) -> None:
        before = json.loads((self.folder / REQUEST).read_text())
        names = [name for name in {**before, **self.request} if before.get(name) != self.request.get(name)]
        if names:
            differences = ", ".join(f"{name}: {before.get(name)} then, {self.request.get(name)} now" for name in names)
            raise ValueError(
                f"{str(self.folder)!r} holds {num_written:,} drawn chunks of another request ({differences}): finish "
                "that one with its own options, remove the folder, or choose another --out"
            )


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
) -> None:
    """Draw cells into an h5ad file, shared among the processes; return when this process has no more to do.

    Args:
        model: is moved to the device of this process, and cast to ``dtype``.
        conditions: as :meth:`DCMTokenizer.conditions`.
        given: ``library_size`` and ``state`` as ``generate`` takes them.
        options: other arguments of ``generate``, ``seed`` and ``batch_size`` among them.
        asked: for the file, the checkpoint's name and what was asked for, as JSON can hold it.
        source: the h5ad file, if any, that has one cell for each of these: the output gets its cells' names and labels.

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
    # one gene of one cell first: what the model cannot do is said before anything is written
    first = {name: value[:1] if torch.is_tensor(value) else value for name, value in (asked | options).items()}
    model.generate(**{**first, "num_cells": 1, "gene_ids": torch.arange(1)})
    _draw_chunks(model, tokenizer, asked | options, files, state)
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
    model: DCMForDenoising, tokenizer: DCMTokenizer, asked: dict[str, object], files: ChunkFiles, state: PartialState
) -> None:
    """Draw the chunks that are not there yet; return when all of them are written, by whichever process."""
    missing = _agreed_chunks(files, state)
    number = sum(files.sizes[chunk] for chunk in missing)
    is_main = state.is_main_process  # which reports for all of them
    with ProgressReport(number, task="sampling", unit="cells") if is_main else nullcontext() as report:

        def taken() -> Iterator[int]:
            for chunk in missing:
                if files.take(chunk):
                    yield chunk
                if report:  # those that others take count as drawn when it comes to them
                    report.update(files.sizes[chunk])

        def write(chunk: int, ids: torch.Tensor) -> None:
            # of counts that share a bin: keyed as every other draw of the chunk is
            seed = keyed_generator(asked["seed"], chunk).initial_seed()
            files.write(chunk, tokenizer.decode(ids, seed=seed).X)

        model.generate(**asked, chunks=taken(), on_chunk=write)
        with _failure_of_another_explained():
            state.wait_for_everyone()
        if report:
            logger.info("drew %d cells, %.3g per second", report.done, report.rate)


def _agreed_chunks(files: ChunkFiles, state: PartialState) -> list[int]:
    """The chunks to draw, found by the first process; its error is everyone's error."""
    found: list[object] = [None]
    if state.is_main_process:
        try:
            found = [files.prepare()]
            kept = len(files.rows) - len(found[0])
            if kept:
                logger.info("%d of %d chunks are there already and are not drawn again", kept, len(files.rows))
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
