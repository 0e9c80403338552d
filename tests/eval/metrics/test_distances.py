"""Distances between samples of cells against independent implementations, closed forms and brute force."""

import tracemalloc

import numpy as np
import ot
import pytest
from scipy import linalg, sparse
from scipy.spatial.distance import pdist
from sklearn.neighbors import NearestNeighbors

from eval.metrics import blocks, distances, gene_agreement
from eval.metrics.distances import (
    median_bandwidth,
    mmd2,
    nearest_distance_ratio,
    nearest_neighbour_accuracy,
    w2,
    w2_gaussian,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def counts(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(13, 6) and (17, 6) counts of different distributions."""
    return rng.poisson(2.0, (13, 6)), rng.poisson(3.0, (17, 6))


def kernel_loops(x: np.ndarray, y: np.ndarray, sigmas: list[float], *, biased: bool) -> float:
    """Eq. 7 as it is printed."""

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return sum(np.exp(-((a - b) ** 2).sum() / (2 * sigma**2)) for sigma in sigmas)

    def within(z: np.ndarray) -> float:
        total = sum(k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if biased or i != j)
        return total / (len(z) ** 2 if biased else len(z) * (len(z) - 1))

    return within(x) + within(y) - 2 * sum(k(a, b) for a in x for b in y) / (len(x) * len(y))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("sigmas", [[1.5], [0.5, 1.0, 4.0]])
def test_mmd2_equals_explicit_kernel_loops(counts, sigmas, biased):
    x, y = counts
    expected = kernel_loops(x, y, sigmas, biased=biased)
    assert mmd2(x, y, bandwidths=sigmas, biased=biased) == pytest.approx(expected, abs=1e-12)
    assert mmd2(x, x, bandwidths=sigmas, biased=True) == pytest.approx(0, abs=1e-12)


def test_mmd2_default_bandwidth_is_the_median_rule_on_y(counts):
    x, y = counts
    assert median_bandwidth(y) == pytest.approx(np.sqrt(np.median(pdist(y, "sqeuclidean")) / 2), rel=1e-12)
    assert mmd2(x, y) == mmd2(x, y, bandwidths=[median_bandwidth(y)])
    mostly_equal = np.zeros((10, 3))
    mostly_equal[0] = 2.0
    assert median_bandwidth(mostly_equal) == pytest.approx(np.sqrt(9 * 12 / 45 / 2))
    assert median_bandwidth(np.ones((4, 3))) == 1.0


def test_for_equal_distributions_unbiased_mmd2_is_zero_on_average_and_the_biased_one_what_its_docstring_says(rng):
    """(1/n + 1/m) (kernels - mean kernel sum of two cells): the floor that a small n puts under every model."""
    sigmas, n, m = [1.0, 2.0], 12, 15
    pairs = [(rng.normal(size=(n, 3)), rng.normal(size=(m, 3))) for _ in range(500)]
    unbiased = np.array([mmd2(x, y, bandwidths=sigmas) for x, y in pairs])
    assert abs(unbiased.mean()) < 3 * unbiased.std() / np.sqrt(unbiased.size)
    biased = np.mean([mmd2(x, y, bandwidths=sigmas, biased=True) for x, y in pairs])
    squared = ((rng.normal(size=(4000, 3)) - rng.normal(size=(4000, 3))) ** 2).sum(axis=1)
    mean_kernels = sum(np.exp(-squared / (2 * sigma**2)).mean() for sigma in sigmas)
    assert biased == pytest.approx((1 / n + 1 / m) * (len(sigmas) - mean_kernels), rel=0.03)


@pytest.mark.parametrize("size", [17, 23])
def test_w2_equals_exact_transport_of_pot(rng, size):
    x, y = rng.normal(size=(17, 4)), rng.normal(size=(size, 4))
    assert w2(x, y) == pytest.approx(np.sqrt(ot.emd2([], [], ot.dist(x, y))), rel=1e-9)


def test_both_w2_of_a_shift_are_its_length_and_order_does_not_matter(rng):
    x, shift = rng.normal(size=(30, 3)), np.array([1.0, -2.0, 2.0])
    for metric in (w2, w2_gaussian):
        assert metric(x, x[::-1] + shift) == pytest.approx(3.0)
        assert metric(x, rng.permutation(x)) == pytest.approx(0.0, abs=1e-6)


def gaussian_w2_by_square_roots(x: np.ndarray, y: np.ndarray) -> float:
    """Eq. 9 as it is printed."""
    s_x, s_y = np.cov(x.T), np.cov(y.T)
    root = linalg.sqrtm(s_x)
    cross = linalg.sqrtm(root @ s_y @ root).real
    shift = ((x.mean(axis=0) - y.mean(axis=0)) ** 2).sum()
    return float(np.sqrt(shift + np.trace(s_x + s_y - 2 * cross)))


def test_gaussian_w2_equals_matrix_square_roots_for_few_and_for_many_cells_and_genes(rng, monkeypatch):
    """The faster way through the squared matrix; where cells repeat it is left, and a sample is at 0 from itself."""
    x, y = rng.normal(size=(40, 5)) @ rng.normal(size=(5, 5)), 1 + rng.normal(size=(30, 5))
    assert w2_gaussian(x, y) == pytest.approx(gaussian_w2_by_square_roots(x, y), rel=1e-9)
    wide_x, wide_y = (np.pad(z, ((0, 0), (0, 90))) for z in (x, y))  # by genes that are all zero
    assert w2_gaussian(wide_x, wide_y) == pytest.approx(w2_gaussian(x, y), rel=1e-9)
    x, y = (rng.poisson(np.exp(rng.normal(size=90)), (60, 90)) for _ in range(2))
    expected = gaussian_w2_by_square_roots(x, y)
    monkeypatch.setattr(distances, "SQUARED_FROM", 1)
    repeated = np.concatenate([x[:20], x[:20], x[:20]])
    assert w2_gaussian(repeated, repeated) == pytest.approx(0, abs=1e-5)
    monkeypatch.setattr(distances.linalg, "svdvals", None)
    assert w2_gaussian(x, y) == pytest.approx(expected, rel=1e-6)


def test_nearest_neighbour_accuracy_equals_scikit_learn(rng):
    x, y = rng.normal(size=(30, 4)), rng.normal(size=(30, 4)) + 0.7
    cells, side = np.concatenate([x, y]), np.repeat([0, 1], 30)
    right = side[NearestNeighbors(n_neighbors=2).fit(cells).kneighbors(cells)[1][:, 1]] == side
    assert nearest_neighbour_accuracy(x, y) == pytest.approx((right.mean(), right[30:].mean()))


def test_nearest_neighbour_accuracy_at_its_ends(rng):
    x = rng.normal(size=(40, 3))
    assert nearest_neighbour_accuracy(x, x + 100) == (1.0, 1.0)
    assert nearest_neighbour_accuracy(x, x) == (0.0, 0.0)  # copies
    same = np.log1p(np.full((5, 3), 2.0))
    assert nearest_neighbour_accuracy(same, same) == pytest.approx((4 / 9, 4 / 9))  # ties share the vote
    dense, spread = 0.01 * rng.normal(size=(30, 200)), rng.normal(size=(30, 200))
    assert nearest_neighbour_accuracy(dense, spread) == (0.5, 0.0)  # everybody's neighbour is in the dense one


def test_copies_are_at_no_distance_from_the_training_cells_and_fresh_cells_at_that_of_real_ones(rng):
    train, real, again = (rng.normal(size=(400, 20)) for _ in range(3))
    assert nearest_distance_ratio(train[:100], real, train) == pytest.approx(0, abs=1e-6)
    assert nearest_distance_ratio(again, real, train) == pytest.approx(1, abs=0.03)
    assert nearest_distance_ratio(again + 10, real, train) > 3


def test_quiet_and_loud_genes_are_multiplied_alike(rng, monkeypatch):
    x, y = (rng.poisson(np.linspace(0.01, 3, 40), (30, 40)) for _ in range(2))
    expected = [metric(x, y) for metric in (mmd2, w2, w2_gaussian)]
    for share in (0.0, 0.5, 1.1):
        monkeypatch.setattr(blocks, "LOUD_SHARE", share)
        found = [metric(sparse.csr_matrix(x), sparse.csr_matrix(y)) for metric in (mmd2, w2, w2_gaussian)]
        assert found == pytest.approx(expected, rel=1e-9)


def test_memory_does_not_grow_with_the_number_of_pairs(monkeypatch):
    """All distances of 3,000 cells would be 72 MB; blocks of 100 cells need a small part of it."""
    monkeypatch.setattr(blocks, "BLOCK_CELLS", 100)
    cells = sparse.random(3000, 50, density=0.1, format="csr", random_state=0)
    tracemalloc.start()
    mmd2(cells, cells, bandwidths=[1.0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6


@pytest.mark.parametrize(
    "metric",
    [
        *(mmd2, w2, w2_gaussian, nearest_neighbour_accuracy, gene_agreement.correlation_agreement),
        *(gene_agreement.mean_r2, gene_agreement.variance_r2, gene_agreement.zero_fraction_error),
        gene_agreement.library_size_cv_ratio,
    ],
)
def test_sparse_dense_gene_order_and_block_size_do_not_matter(counts, metric, monkeypatch):
    x, y = counts
    expected = metric(x, y)
    order = np.random.default_rng(1).permutation(x.shape[1])
    assert metric(x[:, order], y[:, order]) == pytest.approx(expected, abs=1e-9)
    monkeypatch.setattr(blocks, "BLOCK_CELLS", 4)
    assert metric(sparse.csr_matrix(x), sparse.csr_matrix(y)) == pytest.approx(expected, abs=1e-9)


def test_bad_input_is_refused_with_its_numbers(counts):
    x, y = counts
    with pytest.raises(ValueError, match="x has 6 genes and y has 5: expected the same genes"):
        w2(x, y[:, :5])
    with pytest.raises(ValueError, match="x has 1 cells: expected 2 or more"):
        mmd2(x[:1], y)
    with pytest.raises(ValueError, match="y has 1 values that are NaN or infinite"):
        w2_gaussian(x, np.where(np.arange(y.size).reshape(y.shape) == 3, np.nan, y))
    with pytest.raises(ValueError, match=r"bandwidths=\[0.0\]: expected one or more positive numbers"):
        mmd2(x, y, bandwidths=[0])
    with pytest.raises(ValueError, match=r"x has shape \(6,\)"):
        w2(x[0], y)
