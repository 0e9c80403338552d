"""seurat_v3 in blocks: equal to scanpy's, whatever the blocks."""

import anndata
import numpy as np
import pytest
from scipy.sparse import csr_matrix

from training.gene_panel import GeneTotals, seurat_v3_variances, top_genes


@pytest.fixture
def counts() -> csr_matrix:
    rng = np.random.default_rng(0)
    means = rng.lognormal(-1, 1.5, size=400)
    shape = rng.uniform(0.3, 5, size=400)
    cells = rng.poisson(rng.gamma(shape, means / shape, size=(700, 400)))
    cells[:, 10] = 0
    cells[:, 11] = 3
    return csr_matrix(cells)


def variances(counts: csr_matrix, block: int) -> np.ndarray:
    blocks = [counts[start : start + block] for start in range(0, counts.shape[0], block)]
    totals = GeneTotals(counts.shape[1])
    for cells in blocks:
        totals.add(cells)
    return seurat_v3_variances(totals, blocks)


def test_equals_scanpy(counts):
    scanpy = pytest.importorskip("scanpy")
    expected = scanpy.pp.highly_variable_genes(
        anndata.AnnData(counts.astype(np.float64)), flavor="seurat_v3", n_top_genes=100, inplace=False
    )
    ours = variances(counts, 128)
    np.testing.assert_allclose(ours, expected["variances_norm"], rtol=1e-8)
    assert np.array_equal(top_genes(ours, 100), np.flatnonzero(expected["highly_variable"]))


def test_blocks_do_not_matter(counts):
    np.testing.assert_allclose(variances(counts, 700), variances(counts, 3), rtol=1e-12)


def test_constant_genes_come_last(counts):
    ours = variances(counts, 700)
    assert np.abs(ours[[10, 11]]).max() < 1e-9
    num_varying = int((ours > 1e-9).sum())
    assert not {10, 11} & set(top_genes(ours, num_varying))


def test_too_few_cells_or_genes_are_refused(counts):
    with pytest.raises(ValueError, match="at least 2 training cells, got 1"):
        variances(counts[:1], 1)
    with pytest.raises(
        ValueError, match="cannot fit variance on mean for 1 variable genes of 700 training cells; expected at"
    ):
        variances(counts[:, 9:12], 700)
