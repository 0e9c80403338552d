"""Component variance and copying: what independent genes, and copied cells, must score."""

import numpy as np
import pytest
from scipy import sparse
from sklearn.decomposition import PCA

from eval.metrics.distances import nearest_distance_ratio
from eval.metrics.gene_agreement import BANDS, component_variance_ratio, principal_directions


@pytest.fixture
def modules():
    """Cells of 60 genes that vary together in five modules; three samples of them."""
    rng = np.random.default_rng(0)
    loadings = rng.normal(size=(5, 60))
    return [rng.normal(size=(400, 5)) @ loadings + rng.normal(size=(400, 60)) for _ in range(3)]


@pytest.mark.parametrize("num_cells", [400, 30])  # more cells than genes, and fewer
def test_directions_are_those_of_an_outside_pca(modules, num_cells):
    cells = modules[0][:num_cells]
    found, expected = principal_directions(cells, 10), PCA(10, svd_solver="full").fit(cells).components_
    np.testing.assert_allclose(np.abs((found.T * expected).sum(axis=1)), 1, atol=1e-8)
    np.testing.assert_allclose(
        principal_directions(sparse.csr_matrix(cells), 10) ** 2, found**2, atol=1e-8, err_msg="of a sparse matrix"
    )


def test_independent_genes_lose_variance_along_components_and_real_cells_do_not(modules):
    train, real, again = modules
    directions = principal_directions(train)
    rng = np.random.default_rng(1)
    shuffled = np.stack([rng.permutation(gene) for gene in again.T], axis=1)
    assert component_variance_ratio(shuffled, real, directions, BANDS["2_5"]) < 0.3
    for name, band in BANDS.items():
        assert name in (str(band.stop), f"{band.start + 1}_{band.stop}")
        assert component_variance_ratio(again, real, directions, band) == pytest.approx(1, abs=0.2)
    scaled = again.mean(axis=0) + 2 * (again - again.mean(axis=0))
    at_once = component_variance_ratio(scaled, again, directions, BANDS["11_20"])
    assert at_once == pytest.approx(4), "a variance, not a standard deviation"


def test_a_band_beyond_the_components_is_nan(modules):
    directions = principal_directions(modules[0][:9])
    assert np.isnan(component_variance_ratio(modules[1], modules[2], directions, BANDS["21_40"]))


def test_copies_are_at_no_distance_and_fresh_cells_at_that_of_real_ones(modules):
    train, real, again = modules
    assert nearest_distance_ratio(train[:100], real, train) == pytest.approx(0, abs=1e-6)
    assert nearest_distance_ratio(again, real, train) == pytest.approx(1, abs=0.03)
    assert nearest_distance_ratio(again + 10, real, train) > 3
