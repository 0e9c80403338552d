"""Properties of the sampler over denoisers whose distribution is known: no network here.

Letters: B cells, L genes, K largest count.
"""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from modeling_dcm.count_distribution_dcm import TwoStageCategorical, draw_counts
from modeling_dcm.sampling_dcm import random_order, sample_counts
from modeling_dcm.schedule_dcm import reveal_schedule
from tests.modeling_dcm.any_order import any_order, any_order_p_value, generator

MASK, PAD = 3, 4  # three counts
IDS = {"mask_token_id": MASK, "pad_token_id": PAD}


def uniform_denoiser(x_t, positions, known):
    return torch.zeros(*positions.shape, 3)


def masked(B: int, L: int) -> torch.Tensor:
    return torch.full((B, L), MASK)


def test_each_cell_follows_the_schedule_of_its_own_masked_genes():
    x = masked(3, 30)
    x[1, :20] = 1
    x[2, :29] = 2
    numbers = []
    options = {"steps": 5, "schedule": "cubic", "generator": generator(), **IDS}
    sample_counts(uniform_denoiser, x, on_step=lambda x_t: numbers.append((x_t == MASK).sum(dim=1).tolist()), **options)
    schedules = [reveal_schedule(n, 5, "cubic") for n in (30, 10, 1)]
    padded = [schedule + [schedule[-1]] * (6 - len(schedule)) for schedule in schedules]
    assert numbers == [[s[-1] - s[step] for s in padded] for step in range(1, 6)]


def test_order_has_given_genes_first_then_masked_ones_then_pad():
    x = torch.tensor([[MASK, 1, PAD, MASK, 0], [PAD, PAD, 2, MASK, PAD]])
    kinds = (x.gather(1, random_order(x, MASK, PAD, generator())) - 2).clamp(min=0)  # 0 given, 1 MASK, 2 PAD
    assert kinds.tolist() == [[0, 0, 1, 1, 2], [0, 1, 2, 2, 2]]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_counts_are_drawn_from_the_distribution_of_the_logits_over_the_temperature(temperature):
    logits = torch.tensor([1.0, -0.5, 0.3, -3.0])
    drawn = draw_counts(logits.expand(20_000, 4), temperature, generator())
    expected = 20_000 * (logits.double() / temperature).softmax(dim=0).numpy()
    assert stats.chisquare(drawn.bincount(minlength=4), expected).pvalue > 1e-3


@pytest.mark.parametrize("two_stages", [False, True])
def test_a_count_of_probability_1e_5_appears_at_its_rate_in_ten_million_draws(two_stages):
    """Expected 100 times in each of three distributions; five standard deviations of a Poisson count are allowed."""
    p = torch.tensor([0.6, 0.39997, 1e-5, 1e-5, 1e-5]).double()
    logits, draws, batch = p.log().float(), 10_000_000, 500_000
    distribution = logits.expand(batch, 5)
    if two_stages:  # small counts 0, 1; the large ones 2, 3, 4 come from the bias of the second stage
        small = torch.cat([logits[:2], logits[2:].logsumexp(0, keepdim=True)]).expand(batch, 3)
        distribution = TwoStageCategorical(small, torch.zeros(batch, 1), torch.zeros(3, 1), torch.zeros(3))
    source = generator(3)
    counted = torch.zeros(5, dtype=torch.long)
    for _ in range(draws // batch):
        drawn = distribution.draw(source) if two_stages else draw_counts(distribution, 1.0, source)
        counted += drawn.bincount(minlength=5)
    expected = p * draws
    assert bool(((counted - expected).abs() < 5 * expected.sqrt()).all()), counted.tolist()


def test_given_genes_and_pad_never_change_and_nothing_else_stays_masked():
    x = torch.randint(0, 5, (64, 12), generator=generator())
    drawn = sample_counts(uniform_denoiser, x, steps=3, generator=generator(1), **IDS)
    assert torch.equal(drawn[x != MASK], x[x != MASK])
    assert drawn[x == MASK].max() < MASK
    nothing = torch.tensor([[1, 2], [0, PAD]])
    assert torch.equal(sample_counts(None, nothing, steps=3, generator=generator(), **IDS), nothing)  # nobody is asked


def test_denoiser_is_asked_at_masked_genes_only_and_told_every_gene_that_is_known():
    x = masked(5, 9)
    x[:3, :4] = 1

    def denoise(x_t, positions, known):
        assert bool((x_t.gather(1, positions)[:, 0] == MASK).all())
        is_known = torch.zeros(5, 9, dtype=torch.bool).scatter_(1, known, True)
        assert bool(is_known[x_t < MASK].all())
        return torch.zeros(*positions.shape, 3)

    sample_counts(denoise, x, steps=4, schedule="linear", generator=generator(), **IDS)


@pytest.mark.parametrize("steps", [1, 3])
def test_one_step_draws_genes_by_themselves_and_one_gene_per_step_the_denoisers_any_order_distribution(steps):
    rng = np.random.default_rng(0)
    table = {x_t: rng.dirichlet(np.ones(3), size=3) for x_t in itertools.product(range(4), repeat=3)}
    logits = torch.tensor(np.array([table[x_t] for x_t in itertools.product(range(4), repeat=3)])).log()

    def denoise(x_t, positions, known):
        state = x_t @ torch.tensor([16, 4, 1])
        return logits[state].gather(1, positions[..., None].expand(-1, -1, 3))

    cells = sample_counts(denoise, masked(30_000, 3), steps=steps, generator=generator(), **IDS)
    expected = any_order(table) if steps == 3 else np.einsum("i,j,k->ijk", *table[3, 3, 3])
    assert expected.sum() == pytest.approx(1.0)
    assert any_order_p_value(cells, expected) > 1e-3
