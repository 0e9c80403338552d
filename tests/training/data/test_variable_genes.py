"""seurat_v3 in blocks: equal to scanpy's, whatever the blocks."""

import anndata
import numpy as np
import pytest
from scipy.sparse import csr_matrix

from training.conversion.genes import read_gene_list
from training.data.variable_genes import GeneTotals, seurat_v3_variances, top_genes


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


def test_equals_scanpy_whatever_the_blocks_and_their_order(counts):
    scanpy = pytest.importorskip("scanpy")
    expected = scanpy.pp.highly_variable_genes(
        anndata.AnnData(counts.astype(np.float64)), flavor="seurat_v3", n_top_genes=100, inplace=False
    )
    ours = variances(counts, 128)
    np.testing.assert_allclose(ours, expected["variances_norm"], rtol=1e-8)
    assert np.array_equal(top_genes(ours, 100), np.flatnonzero(expected["highly_variable"]))
    for other in (variances(counts, 700), variances(counts, 3), variances(counts[::-1], 11)):
        assert np.array_equal(ours, other)  # to the last bit
    assert np.abs(ours[[10, 11]]).max() < 1e-9  # constant genes come last
    assert not {10, 11} & set(top_genes(ours, int((ours > 1e-9).sum())))


def test_too_few_cells_or_genes_are_refused(counts):
    with pytest.raises(ValueError, match="at least 2 cells, got 1"):
        variances(counts[:1], 1)
    with pytest.raises(ValueError, match="cannot fit variance on mean for 1 variable genes of 700 cells; expected at"):
        variances(counts[:, 9:12], 700)


def test_genes_that_some_cells_did_not_measure_are_judged_by_the_others(counts):
    dense = counts.toarray()
    dense[:300, :50] = 0
    measured = np.arange(400) >= 50
    totals = GeneTotals(400)
    totals.add(csr_matrix(dense[:300]), measured)
    totals.add(csr_matrix(dense[300:]))
    ours = seurat_v3_variances(totals, [csr_matrix(dense)])
    alone = variances(csr_matrix(dense[300:]), 700)
    assert np.corrcoef(ours[:50], alone[:50])[0, 1] > 0.99
    naive = variances(csr_matrix(dense), 700)
    assert np.abs(ours[:50] - alone[:50]).mean() < 0.5 * np.abs(naive[:50] - alone[:50]).mean()


def test_a_list_of_genes_is_read_in_order(tmp_path):
    path = tmp_path / "genes.txt"
    path.write_text("g2\n\n g1 \n")
    assert read_gene_list(path) == ["g2", "g1"]
    for content, message in (
        ("\n", "is empty; expected one name per line"),
        ("a\nb\na\n", r"names 1 genes twice \(a\)"),
        ("\xff", "not a text"),
    ):
        path.write_bytes(content.encode("latin-1"))
        with pytest.raises(ValueError, match=message):
            read_gene_list(path)
    with pytest.raises(FileNotFoundError, match=r"no file .*absent.txt' \(--genes\)"):
        read_gene_list(tmp_path / "absent.txt")
