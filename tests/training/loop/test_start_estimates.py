"""Estimates from which the network starts: each finds the truth of simulated counts, or what a library finds."""

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from scipy.stats import nbinom

from training.loop import start
from training.loop.start_estimates import (
    calibrated_loadings,
    count_corrections,
    held_out_spread,
    largest_means,
    likely_dispersion,
    moment_dispersion,
    principal_components,
    regressed,
    state_effect,
    state_loadings,
    state_mixture,
    type_shifts,
)

NO_BOUND = np.full(10, np.inf)


def negative_binomial(mean: np.ndarray, dispersion: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    r = 1 / np.broadcast_to(dispersion, mean.shape)
    return nbinom.rvs(r, r / (r + mean), random_state=rng)


@pytest.mark.parametrize("estimate", [moment_dispersion, lambda x, mean: likely_dispersion(csr_matrix(x), mean)])
def test_dispersions_of_simulated_counts_are_found(estimate):
    rng = np.random.default_rng(0)
    truth = np.array([0.02, 0.3, 1.0, 3.0])
    mean = rng.gamma(4, 1, (20_000, 4)) * np.array([20.0, 3.0, 1.0, 5.0]) / 4
    found = estimate(negative_binomial(mean, truth, rng), mean)
    np.testing.assert_allclose(found, truth, rtol=0.25)


def test_a_few_loud_cells_move_the_likely_dispersion_less_than_that_of_moments():
    rng = np.random.default_rng(0)
    mean = np.full((5_000, 1), 3.0)
    x = negative_binomial(mean, np.array([0.2]), rng)
    x[:10] = 60
    by_likelihood, by_moments = likely_dispersion(csr_matrix(x), mean)[0], moment_dispersion(x, mean)[0]
    assert abs(np.log(by_likelihood / 0.2)) < 0.5 * abs(np.log(by_moments / 0.2))


def test_loadings_and_dispersions_of_a_simulated_state_are_found_whatever_the_blocks(monkeypatch):
    rng = np.random.default_rng(1)
    n, G, d = 6_000, 7, 3
    truth = np.concatenate([rng.normal(0, 0.5, (G, d)), rng.normal(0, 0.2, (G, 1))], axis=1)
    spread = rng.uniform(0.05, 0.5, G)
    state = rng.normal(size=(n, d))
    expected = rng.gamma(5, 1, (n, G)).astype(np.float32)
    x = csr_matrix(negative_binomial(expected * state_effect(truth, state), spread, rng))
    loadings, dispersion = state_loadings(x, expected, state, NO_BOUND[:G])
    np.testing.assert_allclose(loadings, truth, atol=0.05)
    np.testing.assert_allclose(dispersion, spread, rtol=0.25)
    monkeypatch.setattr("training.loop.start_estimates.GENES_AT_ONCE", 3)
    in_blocks = state_loadings(x, expected, state, NO_BOUND[:G])
    np.testing.assert_allclose(in_blocks[0], loadings, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(in_blocks[1], dispersion)


def test_a_gene_that_no_cell_has_gets_finite_loadings():
    rng = np.random.default_rng(2)
    x = csr_matrix((300, 2))
    assert largest_means(x).tolist() == [1, 1]
    loadings, dispersion = state_loadings(x, np.full((300, 2), 1e-3), rng.normal(size=(300, 4)), largest_means(x))
    assert np.isfinite(loadings).all()
    assert np.isfinite(dispersion).all()


def cells_of_modules(n: int, G: int = 60, modules: int = 3) -> tuple[csr_matrix, np.ndarray, float]:
    """Counts (n, G), their totals and the median of these."""
    rng = np.random.default_rng(4)
    strength = 0.5 * rng.normal(0, 1, (n, modules))[:, np.arange(G) % modules]
    x = csr_matrix(rng.poisson(2 * np.exp(strength)))
    total = np.asarray(x.sum(axis=1))[:, 0].astype(float)
    return x, total, float(np.median(total))


def test_how_spread_new_cells_are_is_found_without_them_where_each_cell_is_of_a_small_group():
    rng, n, G, groups = np.random.default_rng(4), 300, 300, 100
    program = np.zeros((groups, G))
    which, is_on = rng.integers(0, groups, 11 * n), rng.random(11 * n) < 0.8
    for row in program:
        row[rng.choice(G, 8, replace=False)] = 3.0
    strength = is_on[:, None] * rng.gamma(2, 0.5, (11 * n, 1))
    x = csr_matrix(rng.poisson(0.5 * np.exp(program[which] * strength)))
    total = np.asarray(x.sum(axis=1))[:, 0].astype(float)
    median = float(np.median(total))
    _, components = principal_components(x[:n], total[:n], median, 30)
    truth = (np.log1p(x.toarray() / total[:, None] * median)[n:] @ components.T).var(axis=0)
    spread = held_out_spread(x[:n], total[:n], median, np.zeros(n), 30, seed=0)
    assert truth.max() < 0.8
    assert np.abs(spread - truth).mean() < 0.06  # .10 for what a fifth of the cells shows along components of the rest


def test_cells_drawn_with_calibrated_loadings_have_the_spread_that_is_wanted_and_the_genes_their_means():
    x, total, median = cells_of_modules(2_000)
    center, components = principal_components(x, total, median, 12)
    largest = largest_means(x)

    def encode(counts: np.ndarray) -> np.ndarray:
        return (np.log1p(counts / np.maximum(counts.sum(axis=1), 1)[:, None] * median) - center) @ components.T

    state = encode(x.toarray())
    expected = np.outer(total, np.asarray(x.mean(axis=0))[0] / x.mean(axis=0).sum()).astype(np.float32)
    wanted, rng = np.linspace(1, 0.8, 12), np.random.default_rng(0)
    errors = []
    options = (largest, np.zeros(2_000), wanted, encode, 0)
    for loadings, dispersion in (
        state_loadings(x, expected, state, largest),
        calibrated_loadings(x, expected, state, *options),
    ):
        mean = regressed(expected, loadings, state, largest)
        drawn = rng.poisson(rng.gamma(1 / dispersion, mean * dispersion))
        errors.append(np.abs(encode(drawn).var(axis=0) - wanted).mean())
        assert drawn.mean() == pytest.approx(x.mean(), rel=0.03)
    assert errors[1] < 0.06 < 0.2 < errors[0]


def test_means_of_cell_types_are_shifted_to_their_counts_as_far_as_there_are_some():
    rng, n = np.random.default_rng(5), 3_000
    types = rng.integers(-1, 2, n)
    truth = np.array([[0.5, -0.5, 0.0], [-1.0, 0.2, 0.0], [0.0, 0.0, 0.0]])
    mean = np.tile(np.array([2.0, 5.0, 1e-4], dtype=np.float32), (n, 1))
    dispersion = np.array([0.5, 0.2, 1.0])
    x = csr_matrix(negative_binomial(mean * np.exp(truth[types]), dispersion, rng))
    np.testing.assert_allclose(type_shifts(x, mean, dispersion, types, 2), truth, atol=0.1)
    assert not type_shifts(x[types < 0], mean[types < 0], dispersion, types[types < 0], 2).any()


def test_corrected_counts_are_as_frequent_as_in_the_cells():
    rng = np.random.default_rng(6)
    n, dispersion = 5_000, np.array([1.0, 0.3])
    mean = rng.gamma(2, 1, (n, 2)).astype(np.float32)
    x = negative_binomial(mean, dispersion, rng)
    x[rng.random((n, 2)) < 0.3] = 0  # more zeros than a negative binomial has
    S = 6
    u = count_corrections(csr_matrix(x), mean, dispersion, S)
    assert u.shape == (2, S + 1)
    r = 1 / dispersion
    p = nbinom.pmf(np.arange(S)[:, None, None], r, r / (r + mean))
    p = np.concatenate([p, 1 - p.sum(axis=0, keepdims=True)]) * np.exp(u.T[:, None])
    likely = (p / p.sum(axis=0)).mean(axis=1)  # (S+1, 2)
    share = np.stack([(np.minimum(x, S) == count).mean(axis=0) for count in range(S + 1)])
    np.testing.assert_allclose(likely, share, atol=0.003)


def test_no_mean_is_beyond_what_cells_have_and_a_rare_population_keeps_its_own():
    x = np.zeros((10_000, 2))
    x[:, 0] = np.random.default_rng(5).poisson(20, len(x))
    x[:10, 1] = 80  # one cell of a thousand
    largest = largest_means(csr_matrix(x))
    assert 30 < largest[0] < x[:, 0].max()
    assert largest[1] == 80
    mean = regressed(np.ones((1, 2)), np.array([[9.0, 0.0], [1.0, 0.0]]), np.ones((1, 1)), largest)
    np.testing.assert_allclose(mean, [[largest[0], np.e]], rtol=1e-5)


def test_draws_from_a_fitted_mixture_have_the_moments_of_the_cells():
    rng = np.random.default_rng(3)
    cells = np.concatenate([rng.normal(-2, 1, (3_000, 2)), rng.normal(3, 1, (1_000, 2))])
    log_weight, location, scale = map(torch.from_numpy, state_mixture(cells, 4, seed=0))
    part = log_weight.exp().multinomial(20_000, replacement=True, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(20_000, 2, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn = (location[part] + (scale @ noise)[..., 0]).numpy()
    np.testing.assert_allclose(drawn.mean(axis=0), cells.mean(axis=0), atol=0.1)
    np.testing.assert_allclose(np.cov(drawn.T), np.cov(cells.T), rtol=0.1, atol=0.1)


def test_few_cells_get_few_components():
    log_weight, _, scale = state_mixture(np.random.default_rng(4).normal(size=(100, 3)), 8, seed=0)
    assert (np.exp(log_weight) > 0).sum() == 2
    assert np.isclose(np.exp(log_weight).sum(), 1)
    log_weight, _, scale = state_mixture(np.zeros((1, 3)), 8, seed=0)
    assert np.exp(log_weight[0]) == 1
    assert (scale == np.eye(3)).all()


def test_of_too_many_states_those_of_small_groups_are_all_kept(monkeypatch):
    monkeypatch.setattr(start, "BANK_CELLS", 60)
    keys = torch.tensor([[0, 1]] * 500 + [[1, -1]] * 7 + [[0, -1]] * 40)[torch.randperm(547)]
    rows = start._kept_states(keys, seed=0)
    assert len(set(rows.tolist())) == len(rows) <= 60
    kept = keys[rows].tolist()
    assert kept == sorted(kept), "each group is one stretch"
    assert kept.count([1, -1]) == 7
    assert abs(kept.count([0, 1]) - kept.count([0, -1])) <= 1
    monkeypatch.setattr(start, "BANK_CELLS", 1000)
    assert len(start._kept_states(keys, seed=0)) == 547
