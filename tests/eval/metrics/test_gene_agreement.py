"""Agreement of genes between samples of cells, against numpy, scipy, scikit-learn and by hand."""

import numpy as np
import pytest
from scipy import sparse, stats
from sklearn.decomposition import PCA
from sklearn.metrics import r2_score

from eval.metrics.blocks import mean_and_variance
from eval.metrics.gene_agreement import (
    BANDS,
    component_variance_ratio,
    correlation_agreement,
    correlation_triangles,
    library_size_cv_ratio,
    mean_r2,
    most_variable_genes,
    pearson_delta,
    principal_directions,
    variance_r2,
    zero_fraction_error,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_correlation_agreement_equals_numpy(rng):
    x, y = (rng.normal(size=(n, 8)) @ rng.normal(size=(8, 8)) for n in (40, 50))
    upper = np.triu_indices(8, k=1)
    fit = stats.linregress(np.corrcoef(y.T)[upper], np.corrcoef(x.T)[upper])
    assert correlation_agreement(x, y) == pytest.approx((fit.rvalue, fit.slope), abs=1e-12)


def test_correlation_agreement_of_a_sample_with_itself_is_one_and_independent_genes_have_no_slope(rng):
    y = rng.normal(size=(3000, 1)) + rng.normal(size=(3000, 10)) * np.linspace(0.2, 3, 10)
    assert correlation_agreement(y, y) == pytest.approx((1.0, 1.0))
    independent = np.stack([rng.permutation(column) for column in y.T], axis=1)
    assert abs(correlation_agreement(independent, y)[1]) < 0.1


def test_correlation_takes_the_most_variable_genes_of_y_and_a_constant_gene_has_none(rng):
    y = rng.normal(size=(50, 6)) * [1, 5, 1, 4, 3, 0]
    x = rng.normal(size=(50, 6))
    x[:, 1] = 7.0
    assert most_variable_genes(y, 3).tolist() == [1, 3, 4]
    assert most_variable_genes(y, 100).size == 5
    ours, _ = correlation_triangles(x, y, num_genes=3)
    assert ours[:2].tolist() == [0, 0]
    assert ours[2] == pytest.approx(np.corrcoef(x[:, 3], x[:, 4])[0, 1])
    assert np.isnan(correlation_agreement(x, np.zeros((10, 6)))).all()


def test_r2_equals_scikit_learn(rng):
    x, y = rng.poisson(2.0, (13, 6)), rng.poisson(3.0, (17, 6))
    assert mean_r2(x, y) == pytest.approx(r2_score(y.mean(axis=0), x.mean(axis=0)))
    assert variance_r2(x, y) == pytest.approx(r2_score(y.var(axis=0, ddof=1), x.var(axis=0, ddof=1)))
    assert mean_r2(y, y) == 1.0


def test_zero_fraction_and_library_size_by_hand():
    x, y = np.array([[0, 1], [0, 3]]), np.array([[0, 2], [4, 2]])
    assert zero_fraction_error(x, y) == pytest.approx((0.5 + 0.0) / 2)
    assert library_size_cv_ratio(x, y) == pytest.approx((np.sqrt(2) / 2) / (np.sqrt(8) / 4))
    assert np.isnan(library_size_cv_ratio(x, np.ones((3, 2))))


def test_pearson_delta_equals_scipy(rng):
    x, y, control = (rng.normal(size=(20, 7)) + rng.normal(size=7) for _ in range(3))
    expected = stats.pearsonr(x.mean(axis=0) - control.mean(axis=0), y.mean(axis=0) - control.mean(axis=0)).statistic
    assert pearson_delta(x, y, control) == pytest.approx(expected)
    expected = stats.pearsonr(x.mean(axis=0) - control.mean(axis=0), y.mean(axis=0) - x[:9].mean(axis=0)).statistic
    assert pearson_delta(x, y, control, x[:9]) == pytest.approx(expected)
    assert np.isnan(pearson_delta(control, y, control))


def test_means_and_variances_equal_numpy_and_entries_stored_twice_add_up(rng):
    cells = rng.poisson(np.linspace(0.05, 40, 12), (25, 12))
    rows, columns = np.nonzero(cells)
    starts = np.concatenate([[0], 2 * np.cumsum((cells > 0).sum(axis=1))])
    halves = sparse.csr_matrix((np.repeat(cells[rows, columns] / 2, 2), np.repeat(columns, 2), starts), cells.shape)
    assert not halves.has_canonical_format
    for form in (cells, sparse.csr_matrix(cells), halves):
        mean, variance = mean_and_variance(form)
        np.testing.assert_allclose(mean, cells.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(variance, cells.var(axis=0, ddof=1), rtol=1e-12, atol=1e-12)
    constant = np.log1p(np.array([[3.0, 1.0], [3.0, 2.0], [3.0, 5.0]]))
    assert mean_and_variance(sparse.csr_matrix(constant))[1][0] == 0.0  # exactly


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


def test_control_cells_that_both_shifts_start_from_look_like_agreement_and_disjoint_ones_do_not(rng):
    x, y, one, other = (rng.normal(size=(5, 4000)) for _ in range(4))
    assert pearson_delta(x, y, one) == pytest.approx(0.5, abs=0.05)
    assert pearson_delta(x, y, one, other) == pytest.approx(0, abs=0.05)
