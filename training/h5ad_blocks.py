"""Read the counts of one h5ad file in blocks of cells, and write h5ad files block by block.

Counts are never all in memory (except for a CSC matrix, which cannot be read by rows); ``obs`` and ``var`` are. Knows
nothing of labels, splits, gene panels and Parquet.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse
from anndata.io import read_elem, sparse_dataset, write_elem
from tqdm import tqdm

from tokenization.counts_dcm import CountCheck
from tokenization.files import damage_explained, open_h5ad

logger = logging.getLogger(__name__)

BLOCK_CELLS = 4096
BLOCK_VALUES = 2**25  # of a dense matrix


@dataclass(frozen=True)
class CountFile:
    """An open h5ad file of n cells and their genes.

    Attributes:
        path: the file.
        source: what the counts are called in messages, such as ``"X of cells.h5ad"``.
        obs: annotations of the cells, indexed by cell name.
        var: annotations of the genes, indexed by gene name.
        layers: names of the file's layers.
        matrix: the counts, on disk (or a CSR matrix in memory); anything that gives rows for a slice.
    """

    path: Path
    source: str
    obs: pd.DataFrame
    var: pd.DataFrame
    layers: list[str]
    matrix: object

    def blocks(self, task: str, check: CountCheck | None = None) -> Iterator[tuple[slice, scipy.sparse.csr_matrix]]:
        """Yield slices of cells and their counts, CSR int64, with sorted genes and no stored zeros.

        Args:
            task: what the progress bar says.
            check: is given every value as it is stored, and raises at the end of the file if one was no count. After
                a value that is no count, blocks are still read but no longer yielded.

        Raises:
            ValueError: with ``check``, some value is not a count; or the file is damaged.
        """
        n = len(self.obs)
        dense_rows = max(1, BLOCK_VALUES // max(1, len(self.var)))
        step = min(BLOCK_CELLS, dense_rows) if isinstance(self.matrix, h5py.Dataset) else BLOCK_CELLS
        with tqdm(total=n, desc=task, unit=" cells", unit_scale=True, delay=1, disable=None) as bar:
            for start in range(0, n, step):
                rows = slice(start, min(start + step, n))
                with damage_explained(self.path):
                    block = self.matrix[rows]
                if check is not None:
                    check.add(block.data if scipy.sparse.issparse(block) else block)
                if check is None or check.is_clean:
                    counts = scipy.sparse.csr_matrix(block).astype(np.int64)
                    counts.sum_duplicates()
                    counts.eliminate_zeros()
                    yield rows, counts
                bar.update(rows.stop - rows.start)
        if check is not None:
            check.raise_if_bad(self.source, layers=self.layers, layer_option="--layer {}")


@contextmanager
def opened_counts(path: Path, layer: str | None = None) -> Iterator[CountFile]:
    """Open the counts of an h5ad file: ``X``, or a layer.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a readable h5ad, has no cells or genes, or lacks the matrix asked for.
    """
    with open_h5ad(path) as file:
        layers = sorted(file.get("layers", ()))
        if layer is not None and layer not in layers:
            raise ValueError(f"{str(path)!r} has no layer {layer!r}; layers there: {', '.join(layers) or 'none'}")
        if layer is None and "X" not in file:
            raise ValueError(f"{str(path)!r} has no X; pass --layer with one of: {', '.join(layers)}")
        with damage_explained(path):
            obs, var = read_elem(file["obs"]), read_elem(file["var"])
            element = file["X"] if layer is None else file["layers"][layer]
            matrix = element if isinstance(element, h5py.Dataset) else sparse_dataset(element)
            if getattr(matrix, "format", None) == "csc":
                logger.info("counts are stored by gene (CSC): loading them all to read them by cell")
                matrix = matrix.to_memory().tocsr()
        if matrix.shape != (len(obs), len(var)):
            raise ValueError(f"{str(path)!r} has counts of shape {matrix.shape} for {len(obs)} cells, {len(var)} genes")
        if not len(obs) or not len(var):
            raise ValueError(f"{str(path)!r} has {len(obs)} cells and {len(var)} genes; expected some of both")
        obs.index, var.index = obs.index.astype(str), var.index.astype(str)
        source = f"{'X' if layer is None else f'layer {layer!r}'} of {path.name}"
        yield CountFile(path=path, source=source, obs=obs, var=var, layers=layers, matrix=matrix)


class CountWriter:
    """Write an h5ad file whose counts (CSR int32) arrive in blocks of cells, in the order of ``obs``."""

    def __init__(self, path: Path, *, obs: pd.DataFrame, var: pd.DataFrame, uns: dict[str, object]):
        self.path = path
        anndata.AnnData(obs=obs, var=var, uns=uns).write_h5ad(path)
        with h5py.File(path, "r+") as file:
            empty = scipy.sparse.csr_matrix((0, len(var)), dtype=np.int32)
            write_elem(file, "X", empty, dataset_kwargs={"compression": "gzip", "compression_opts": 1})

    def add(self, counts: scipy.sparse.csr_matrix) -> None:
        """Append cells (m, genes)."""
        with h5py.File(self.path, "r+") as file:
            sparse_dataset(file["X"]).append(counts.astype(np.int32))
