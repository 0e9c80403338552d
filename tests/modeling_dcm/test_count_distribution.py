"""Properties of the distribution over counts: the negative binomial it starts at, and its two stages."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import nbinom

from modeling_dcm.count_distribution_dcm import draw_counts, log_counts_and_tail, log_ratios
from modeling_dcm.layers_dcm import NUM_SMALL_COUNTS, count_features


def grid() -> tuple[torch.Tensor, torch.Tensor]:
    """Means and sizes from a rare gene with loud cells to a Poisson gene with thousands of counts."""
    axes = (np.geomspace(1e-4, 2e3, 40), np.geomspace(3e-2, 1e3, 30))
    return torch.meshgrid(*(torch.from_numpy(axis).float() for axis in axes), indexing="ij")


def scipys(mean: torch.Tensor, size: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    r = size.double().numpy()
    return r, r / (r + mean.double().numpy())


@pytest.mark.parametrize("num_small", [1, 2, 16, 63])
def test_small_counts_and_tail_are_scipys_in_float32(num_small):
    mean, size = grid()
    r, p = scipys(mean, size)
    small, found = log_counts_and_tail(mean, size, num_small).split([num_small, 1], dim=-1)
    expected = nbinom.logpmf(np.arange(num_small), r[..., None], p[..., None])
    np.testing.assert_allclose(small.numpy(), expected, rtol=1e-4, atol=1e-4)
    tail = nbinom.logsf(num_small - 1, r, p)
    found = found[..., 0].numpy()
    possible = np.isfinite(tail)  # scipy has no logarithm of what is below 1e-308
    np.testing.assert_allclose(found[possible], tail[possible], rtol=1e-2, atol=1e-3)
    assert np.isfinite(found).all()


def test_ratios_of_large_counts_are_scipys():
    mean, size = grid()
    r, p = (x[..., None] for x in scipys(mean, size))
    found = log_ratios(63, 2000, mean, size).cumsum(dim=-1).numpy()
    expected = nbinom.logpmf(np.arange(64, 2064), r, p) - nbinom.logpmf(63, r, p)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_gradients_are_finite_where_tails_are_tiny_and_where_they_are_everything():
    given = [x.clone().requires_grad_() for x in grid()]
    log_counts_and_tail(*given, 8).sum().backward()
    assert all(bool(x.grad.isfinite().all()) for x in given)


def estimates(model) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    G, E = model.config.num_genes, model.config.state_width
    generator = torch.Generator().manual_seed(0)
    loading = 0.3 * torch.randn(G, E + 1, generator=generator) if E else None
    return torch.linspace(1, 9, G), torch.linspace(0.1, 2, G), loading, torch.linspace(0.05, 1, G)


@pytest.mark.parametrize("gene_output_bias", [0, 3, 64])
@pytest.mark.parametrize("state_dim", [0, 2])
def test_a_fresh_head_emits_the_corrected_negative_binomial_that_it_was_given(
    make_model, backbone, gene_output_bias, state_dim
):
    options = {"gene_output_bias": gene_output_bias, "state_dim": state_dim, "library_size_conditioning": True}
    model = make_model(backbone, fresh=True, max_count=40, count_distribution="nb", **options)
    model.set_marginals(torch.ones(7, 41))
    model.totals.gene_mean[:] = torch.linspace(0.2, 3, 7)
    u = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    model.head.set_estimates(*estimates(model), u)
    x = torch.full((2, 7), model.config.mask_token_id)
    library_size = torch.tensor([5.0, 14.0])
    state = torch.tensor([[0.5, -1.0], [torch.nan, torch.nan]]) if state_dim else None
    found = model(x, library_size=library_size, state=state).logits.log_softmax(dim=-1)
    mean = model.totals.gene_mean[-1] * (library_size[:, None] + 1) / (model.totals.gene_mean[-1].sum() + 1)
    largest, dispersion, loading, told = estimates(model)
    dispersion = dispersion.expand(2, 7).clone()
    if state_dim:
        mean[0] *= (loading @ torch.tensor([0.5, -1.0, 1.0])).exp()
        dispersion[0] = told
    mean = torch.minimum(mean, largest)
    r, p = scipys(mean, 1 / dispersion)
    expected = torch.from_numpy(nbinom.logpmf(np.arange(41), r[..., None], p[..., None]))
    if gene_output_bias:
        expected = expected + u[:, torch.arange(41).clamp(max=2)]
    expected = expected.log_softmax(dim=-1)
    # with two stages, counts above K are among the large ones
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-2)


def test_shapes_are_those_of_each_gene_while_none_is_observed(make_model):
    model = make_model("latent", count_distribution="nb", num_genes=7)
    masked = torch.full((1, 7), model.config.mask_token_id)
    partly = masked.clone()
    partly[0, :3] = 2
    before = [model(x).logits for x in (masked, partly)]
    torch.nn.init.zeros_(model.head.counts.weight)
    torch.nn.init.zeros_(model.head.rate.weight[1:])
    torch.nn.init.zeros_(model.head.rate.bias[1:])
    after = [model(x).logits for x in (masked, partly)]
    torch.testing.assert_close(after[0], before[0])
    assert (after[1] - before[1]).abs().max() > 1e-2


def test_a_cell_told_its_state_is_what_the_statistics_say_until_something_is_observed(make_model):
    model = make_model("latent", count_distribution="nb", num_genes=7, state_dim=2, library_size_conditioning=True)
    masked = torch.full((1, 7), model.config.mask_token_id)
    partly = masked.clone()
    partly[0, :3] = 2
    state = torch.tensor([[0.5, -1.0]])
    cases = {"told": (masked, state), "told, some observed": (partly, state), "not told": (masked, None)}
    before = {name: model(x, state=z).logits for name, (x, z) in cases.items()}
    learned = [model.head.rate, model.head.score, model.head.gene_bias, model.head.counts]
    for parameter in (parameter for layer in learned for parameter in layer.parameters()):
        torch.nn.init.zeros_(parameter)
    after = {name: model(x, state=z).logits for name, (x, z) in cases.items()}
    torch.testing.assert_close(after["told"], before["told"])
    for name in ("told, some observed", "not told"):
        assert (after[name] - before[name]).abs().max() > 1e-2


def test_a_cell_type_shifts_the_means_of_cells_that_are_told_their_state(make_model):
    options = {"count_distribution": "nb", "state_dim": 2, "num_cell_types": 2, "library_size_conditioning": True}
    model = make_model("latent", num_genes=7, **options)
    masked = torch.full((3, 7), model.config.mask_token_id)
    given = {"state": torch.zeros(3, 2), "cell_type_ids": torch.tensor([0, 1, -1])}
    given["state"][1] = torch.nan
    shift = torch.linspace(-1, 1, 7)
    before = model(masked, **given).logits
    model.head.type_shift[:2] = shift
    shifted = model(masked, **given).logits
    model.head.type_shift.zero_()
    model.head.state_loading.weight[:, -1] += shift
    torch.testing.assert_close(shifted[0], model(masked, **given).logits[0])
    torch.testing.assert_close(shifted[1:], before[1:])


def test_the_probability_of_a_bin_is_the_sum_over_its_counts(make_model):
    found = []
    for bins in (None, [8, 20]):
        options = {"max_count": 40, "count_bins": bins, "gene_output_bias": 3, "count_distribution": "nb"}
        model = make_model("dit", fresh=True, **options)
        model.set_marginals(torch.ones(7, model.config.num_counts))
        model.totals.gene_mean[:] = 9.0
        model.head.set_estimates(torch.full((7,), 40.0), *estimates(model)[1:])
        found.append(model(torch.full((1, 7), model.config.mask_token_id)).logits.softmax(dim=-1))
    of_counts, of_bins = found
    sums = [of_counts[..., 8:20].sum(dim=-1, keepdim=True), of_counts[..., 20:].sum(dim=-1, keepdim=True)]
    torch.testing.assert_close(of_bins, torch.cat([of_counts[..., :8], *sums], dim=-1), rtol=1e-3, atol=0)


def test_bumps_over_the_counts_go_from_zero_to_the_largest():
    features = count_features(256, torch.device("cpu"))
    assert features[0, NUM_SMALL_COUNTS] == 1
    assert features[-1, -1] == pytest.approx(1)


def test_a_draw_is_a_count_whatever_the_logits_are():
    logits = torch.tensor([[0.0, -1.0, 0.5], [0.0, math.nan, 0.0], [math.inf, 0.0, 0.0], [20.0, 1.0, 0.0]])
    for temperature in (1.0, 1e-38):  # at which logits overflow
        drawn = draw_counts(logits, temperature, torch.Generator().manual_seed(0))
        assert 0 <= drawn.min() <= drawn.max() < 3


def test_draws_and_loss_follow_the_logits_in_both_stages(make_model, backbone):
    model = make_model(backbone, max_count=40, gene_output_bias=5, count_distribution="nb", num_genes=2)
    model.head.set_estimates(torch.full((2,), 40.0), torch.tensor([1.0, 0.5]), None, torch.ones(2))
    model.totals.gene_mean[:] = torch.tensor([2.0, 9.0])
    distribution = model.distribution(torch.full((4000, 2), model.config.mask_token_id))
    log_p = distribution.full().log_softmax(dim=-1)
    drawn = distribution.draw(torch.Generator().manual_seed(0))
    shares = torch.stack([torch.bincount(gene, minlength=41) for gene in drawn.T]) / 4000
    torch.testing.assert_close(shares, log_p[0].exp(), rtol=0, atol=0.03)
    labels = torch.randint(0, 41, (4000, 2), generator=torch.Generator().manual_seed(0))
    nats = -log_p.gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(distribution.cross_entropy(labels), nats, rtol=1e-4, atol=1e-4)
