"""Drawn cells as one file for each chunk beside the output: written one by one, found again after a kill, then merged.

The files stand in `.NAME.parts/` beside the output NAME: one safetensors file (CSR arrays) for each chunk, written
aside and renamed, and `request.json`, which says what they are chunks of. Several processes may share the folder, each
chunk is taken by one of them. Knows nothing of models, conditions and how cells are drawn.
"""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import anndata
import h5py
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy.sparse import csr_matrix
from tqdm.auto import tqdm

from modeling_dcm.generation_dcm import row_chunks
from training.data.files import written_aside

REQUEST = "request.json"
SUFFIX = ".safetensors"
ARRAYS = ("indptr", "indices", "data")
HDF5_CHUNK = 2**16  # values


class ChunkFiles:
    """Chunks of the cells of one output file.

    Args:
        out: the h5ad file that they become.
        request: everything that decides which cells these are, as JSON can hold it; chunks of another request are
            never mixed in.
        num_cells: of all chunks.
        batch_size: cells of a chunk.
    """

    def __init__(self, out: Path, request: dict[str, object], *, num_cells: int, batch_size: int):
        self.out = out
        self.folder = out.parent / f".{out.name}.parts"
        self.request = json.loads(json.dumps(request))
        self.num_cells = num_cells
        self.rows = [rows for _, rows in row_chunks(num_cells, batch_size)]

    def prepare(self, *, fresh: bool = False) -> tuple[list[int], int]:
        """Make the folder, or find the chunks that an interrupted run left; to be called by one process.

        Args:
            fresh: throw away what an interrupted run left.

        Returns:
            The chunks that are still to be drawn, and how many of them had a damaged file, which is removed.

        Raises:
            ValueError: the folder holds chunks of another request.
        """
        if self.folder.exists():
            if not fresh and self.written():
                self._check_request()
            else:
                shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        with written_aside(self.folder / REQUEST) as aside:
            aside.write_text(json.dumps(self.request, indent=1) + "\n")
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

    def merge(self, cells: anndata.AnnData) -> None:
        """Write the output: ``cells`` (obs, var and uns of all cells) with the chunks' counts in order, CSR in ``X``.

        One chunk is in memory at a time. The output gets its name when it is whole; then the folder is removed.

        Raises:
            ValueError: a chunk is missing or damaged.
        """
        whole = self.folder / self.out.name
        with written_aside(whole) as aside:
            cells.write_h5ad(aside, compression="gzip")
            with h5py.File(aside, "r+") as file:
                self._write_counts(file.create_group("X"), cells.n_vars)
        os.replace(whole, self.out)
        shutil.rmtree(self.folder)

    def _write_counts(self, group: h5py.Group, num_genes: int) -> None:
        """AnnData's layout of a CSR matrix."""
        num_values = sum(self._num_values(chunk) for chunk in range(len(self.rows)))
        index = np.int32 if num_values <= np.iinfo(np.int32).max else np.int64
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
        group.attrs["shape"] = (self.num_cells, num_genes)
        options = {"maxshape": (None,), "chunks": (HDF5_CHUNK,), "compression": "gzip", "shuffle": True}
        indptr = group.create_dataset("indptr", self.num_cells + 1, index, **options)
        indices = group.create_dataset("indices", num_values, index, **options)
        data = group.create_dataset("data", num_values, np.int32, **options)
        end = 0
        bar = tqdm(self.rows, desc="merging", unit="chunk", unit_scale=True, delay=1, disable=None)
        for chunk, rows in enumerate(bar):
            part = self._read(chunk)
            start, end = end, end + len(part["data"])
            indptr[rows.start + 1 : rows.stop + 1] = part["indptr"][1:].astype(index) + start
            indices[start:end], data[start:end] = part["indices"], part["data"]

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

    def _shape(self, chunk: int, name: str) -> list[int]:
        """Shape of an array, from the file's header; a file cut short is noticed here."""
        with safe_open(self._path(chunk), "np") as part:
            return part.get_slice(name).get_shape()

    def _is_whole(self, chunk: int) -> bool:
        rows = self.rows[chunk]
        try:
            shape, *values = (self._shape(chunk, name) for name in ARRAYS)
        except (SafetensorError, OSError):
            return False
        return shape == [rows.stop - rows.start + 1] and values[0] == values[1]

    def _num_values(self, chunk: int) -> int:
        if not self._path(chunk).exists() or not self._is_whole(chunk):
            raise ValueError(f"{str(self._path(chunk))!r} is missing or damaged: run again, it alone is drawn again")
        return self._shape(chunk, "data")[0]

    def _read(self, chunk: int) -> dict[str, np.ndarray]:
        with safe_open(self._path(chunk), "np") as part:
            return {name: part.get_tensor(name) for name in ARRAYS}
