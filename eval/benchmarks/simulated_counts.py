"""Counts as sparse as droplet data, written to h5ad in blocks of cells: something to measure on, of any size.

Log-normal levels of genes, gamma noise and a log-normal depth of the cell, Poisson counts; no labels. Knows nothing of
what is measured. Letters: G genes.
"""

from collections.abc import Iterator
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

LEVEL_SD = 1.9  # of the log level of genes: a tenth of 17,002 genes are on in a cell of 2,800 counts
DEPTH_SD = 0.4  # of the log depth of cells
CELLS_AT_ONCE = 500
STORED_CHUNK = 2**16  # stored values that are compressed together


def counts_of_panel(num_genes: int) -> float:
    """Counts of a cell on average: 2,800 over 17,002 genes, and more for each gene of a small panel.

    Small panels are of variable genes, which are expressed more than most; the square root is our guess.
    """
    return 2800 * (num_genes / 17_002) ** 0.5


def simulated_blocks(num_cells: int, num_genes: int, *, counts_per_cell: float, seed: int) -> Iterator[csr_matrix]:
    """Blocks of at most 500 cells (m, G), CSR int32; the same seed gives the same cells."""
    level = np.random.default_rng([seed, 0]).lognormal(0.0, LEVEL_SD, num_genes)
    level *= counts_per_cell / level.sum()
    rng = np.random.default_rng([seed, 1])
    for start in range(0, num_cells, CELLS_AT_ONCE):
        m = min(CELLS_AT_ONCE, num_cells - start)
        noise = rng.gamma(2.0, 0.5, (m, num_genes)) * rng.lognormal(0.0, DEPTH_SD, (m, 1))
        yield csr_matrix(rng.poisson(level * noise).astype(np.int32))


def write_simulated(path: Path, num_cells: int, num_genes: int, *, counts_per_cell: float, seed: int) -> int:
    """Write an h5ad compressed as ``adata.write_h5ad(path, compression="gzip")`` does; return its stored values."""
    obs = pd.DataFrame(index=[f"cell{i:07d}-1" for i in range(num_cells)])
    var = pd.DataFrame(index=[f"GENE{i:05d}" for i in range(num_genes)])
    anndata.AnnData(obs=obs, var=var).write_h5ad(path, compression="gzip")
    with h5py.File(path, "r+") as file:
        if "X" in file:
            del file["X"]
        X = file.create_group("X")
        X.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": (num_cells, num_genes)})
        options = {"maxshape": (None,), "chunks": (STORED_CHUNK,), "compression": "gzip"}
        arrays = {name: X.create_dataset(name, (0,), np.int32, **options) for name in ("data", "indices")}
        lengths = [np.zeros(1, dtype=np.int64)]
        for block in simulated_blocks(num_cells, num_genes, counts_per_cell=counts_per_cell, seed=seed):
            for name, array in arrays.items():
                array.resize(len(array) + block.nnz, axis=0)
                array[len(array) - block.nnz :] = getattr(block, name)
            lengths.append(np.diff(block.indptr))
        indptr = np.cumsum(np.concatenate(lengths))
        X.create_dataset("indptr", data=indptr, compression="gzip")
    return int(indptr[-1])
