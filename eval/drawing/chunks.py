"""Drawn cells as one file for each chunk beside the output: written one by one, found again after a kill, then merged.

The files stand in `.NAME.parts/` beside the output NAME: one safetensors file (CSR arrays) for each chunk, written
aside and renamed, and `request.json`, which says what they are chunks of. Several processes may share the folder, each
chunk is taken by one of them.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import anndata
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy.sparse import csr_matrix

from modeling_dcm.generation_dcm import row_chunks
from training.data.command_line import ProgressReport
from training.data.files import followed, write_text, written_aside
from training.data.h5ad import write_h5ad_in_blocks

REQUEST = "request.json"
SUFFIX = ".safetensors"
ARRAYS = ("indptr", "indices", "data")


class ChunkFiles:
    """Chunks of ``batch_size`` cells of one output file.

    ``request`` is everything that decides which cells these are, as JSON can hold it; chunks of another are never mixed
    in.
    """

    def __init__(self, out: Path, request: dict[str, object], *, num_cells: int, batch_size: int):
        self.out = followed(out)
        self.folder = self.out.parent / f".{self.out.name}.parts"
        self.request = json.loads(json.dumps(request))
        self.num_cells = num_cells
        self.rows = [rows for _, rows in row_chunks(num_cells, batch_size)]

    def prepare(self, *, fresh: bool = False) -> tuple[list[int], int]:
        """Make the folder, or find the chunks that an interrupted run left (``fresh``: throw them away).

        To be called by one process. Returns the chunks that are still to be drawn, and how many of them had a damaged
        file, which is removed.

        Raises:
            ValueError: the folder holds chunks of another request.
        """
        if self.folder.exists():
            if not fresh and self.written():
                self._check_request()
            else:
                shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / REQUEST, json.dumps(self.request, indent=1) + "\n")
        for taken in self.folder.glob("*.taken"):
            taken.unlink()
        written = set(self.written())
        damaged = {chunk for chunk in written if not self._is_whole(chunk)}
        for chunk in damaged:
            self._path(chunk).unlink()
        return [chunk for chunk in range(len(self.rows)) if chunk not in written - damaged], len(damaged)

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

    def written(self) -> list[int]:
        """Chunks that are there, by all processes."""
        return [int(path.stem) for path in self.folder.glob(f"[0-9]*{SUFFIX}")]

    def num_cells_of(self, chunks: Iterable[int]) -> int:
        """Cells in all of some chunks."""
        return sum(self.rows[chunk].stop - self.rows[chunk].start for chunk in chunks)

    def merge(self, annotations: anndata.AnnData) -> None:
        """Write the output: the annotations of all cells with the chunks' counts in order, CSR in ``X``.

        One chunk is in memory at a time. The output gets its name when it is whole; then the folder is removed.

        Raises:
            ValueError: a chunk is missing or damaged.
        """
        for chunk in range(len(self.rows)):
            path = self._path(chunk)
            if not path.exists() or not self._is_whole(chunk):
                raise ValueError(f"{str(path)!r} is missing or damaged: run again, it alone is drawn again")
        whole = self.folder / self.out.name
        with written_aside(whole) as aside, ProgressReport(self.num_cells, task="merging", unit="cells") as report:
            write_h5ad_in_blocks(aside, annotations, self._blocks(annotations.n_vars, report), {"X": np.int32})
        os.replace(whole, self.out)
        shutil.rmtree(self.folder)

    def _blocks(self, num_genes: int, report: ProgressReport) -> Iterator[dict[str, csr_matrix]]:
        for chunk, rows in enumerate(self.rows):
            with safe_open(self._path(chunk), "np") as part:
                indptr, indices, data = (part.get_tensor(name) for name in ARRAYS)
            yield {"X": csr_matrix((data, indices, indptr), shape=(rows.stop - rows.start, num_genes))}
            report.update(rows.stop - rows.start)

    def _path(self, chunk: int) -> Path:
        return self.folder / f"{chunk}{SUFFIX}"

    def _check_request(self) -> None:
        try:
            before = json.loads((self.folder / REQUEST).read_text())
        except (OSError, json.JSONDecodeError):
            before = {}
        if before == self.request:
            return
        names = [name for name in {**before, **self.request} if before.get(name) != self.request.get(name)]
        differences = ", ".join(f"{name}: {before.get(name)} then, {self.request.get(name)} now" for name in names)
        raise ValueError(
            f"{str(self.folder)!r} holds {len(self.written()):,} drawn chunks of another request ({differences}): "
            "finish that one with its own options, throw its cells away with --fresh, or choose another --out"
        )

    def _is_whole(self, chunk: int) -> bool:
        """By the file's header, where a file cut short is noticed."""
        rows = self.rows[chunk]
        try:
            with safe_open(self._path(chunk), "np") as part:
                cells, *values = (part.get_slice(name).get_shape() for name in ARRAYS)
        except (SafetensorError, OSError):
            return False
        return cells == [rows.stop - rows.start + 1] and values[0] == values[1]
