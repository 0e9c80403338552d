"""Properties of chunks as files: each is drawn once, and merged they are the whole matrix."""

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from eval.drawing.chunks import ChunkFiles

REQUEST = {"seed": 0, "guidance_scale": {"cell_type": 1.0}}


@pytest.fixture
def files(tmp_path) -> ChunkFiles:
    """Seven cells in chunks of three, nothing drawn yet."""
    files = ChunkFiles(tmp_path / "new" / "cells.h5ad", REQUEST, num_cells=7, batch_size=3)
    assert not files.folder.parent.exists()
    assert files.prepare() == ([0, 1, 2], 0)
    return files


def annotations(num_cells: int, num_genes: int) -> anndata.AnnData:
    obs, var = (pd.DataFrame(index=np.arange(n).astype(str)) for n in (num_cells, num_genes))
    return anndata.AnnData(obs=obs, var=var, uns={"generator": "test"})


@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_merged_chunks_are_the_matrix_in_order_and_leave_nothing_behind(files, density):
    counts = sparse.random(7, 4, density, format="csr", random_state=0, data_rvs=lambda n: np.arange(1, n + 1))
    counts = counts.astype(np.int32)
    for chunk in (2, 0, 1):
        files.write(chunk, counts[files.rows[chunk]])
    files.merge(annotations(7, 4))
    cells = anndata.read_h5ad(files.out)
    assert (counts != cells.X).nnz == 0
    assert cells.X.dtype == np.int32
    assert cells.X.indptr.dtype == cells.X.indices.dtype == np.int32
    assert cells.uns["generator"] == "test"
    assert (counts[4:] != anndata.read_h5ad(files.out, backed="r")[4:].to_memory().X).nnz == 0
    assert list(files.out.parent.iterdir()) == [files.out]


def test_what_was_taken_but_not_written_is_to_be_drawn_again(files):
    other = ChunkFiles(files.out, {"seed": 1}, num_cells=9, batch_size=3)
    assert other.prepare() == ([0, 1, 2], 0)  # another request meets no resistance where nothing was drawn
    assert files.prepare() == ([0, 1, 2], 0)
    assert [files.take(chunk) for chunk in (0, 1, 1)] == [True, True, False]  # a chunk is taken once
    files.write(0, sparse.csr_matrix((3, 4), dtype=np.int32))
    assert files.prepare() == ([1, 2], 0)
    assert files.take(1)


def test_an_output_is_not_written_while_a_chunk_is_missing(files):
    for chunk in (0, 2):
        files.write(chunk, sparse.csr_matrix((len(range(7)[files.rows[chunk]]), 4), dtype=np.int32))
    with pytest.raises(ValueError, match=r"1\.safetensors' is missing or damaged: run again, it alone is drawn again"):
        files.merge(annotations(7, 4))
    assert not files.out.exists()
    assert files.prepare() == ([1], 0)


def test_a_request_that_cannot_be_read_is_another_request(files):
    files.write(0, sparse.csr_matrix((3, 4), dtype=np.int32))
    (files.folder / "request.json").write_text("{")
    with pytest.raises(ValueError, match="1 drawn chunks of another request"):
        files.prepare()
    assert files.prepare(fresh=True) == ([0, 1, 2], 0)
