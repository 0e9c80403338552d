"""Properties of the absorbing diffusion: schedule, forward process, choice of genes, losses, and their textbook forms.

Letters: n measured genes, k masked ones, K largest count, m mask probability.
"""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.linalg import expm

from modeling_dcm.diffusion_dcm import (
    DataCollatorForCountMasking,
    alpha,
    choose_queries,
    drop_labels,
    mask_counts,
    mask_probability,
    mask_smallest,
    num_masked,
    reveal_probability,
    sigma,
    sigma_bar,
    stratified_uniform,
)
from tests.modeling_dcm.any_order import generator

EPS = 1e-3
MASK, PAD = 5, 6
IDS = {"mask_token_id": MASK, "pad_token_id": PAD}


def float64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_noise_rate_is_the_derivative_of_total_noise_and_the_papers_print_is_its_mirror_image():
    t = torch.linspace(0, 1, 101, dtype=torch.float64).requires_grad_()
    (derivative,) = torch.autograd.grad(sigma_bar(t, EPS).sum(), t)
    torch.testing.assert_close(sigma(t.detach(), EPS), derivative)
    torch.testing.assert_close(alpha(t, EPS), 1 - mask_probability(t, EPS))
    assert mask_probability(float64(0.0, 1.0), EPS).tolist() == [0, 1 - EPS]
    printed = (1 - EPS) / (EPS + (1 - EPS) * t.detach())
    torch.testing.assert_close(sigma(1 - t.detach(), EPS), printed)


@pytest.mark.parametrize("t", [0.0, 0.01, 0.5, 0.9, 1.0])
def test_matrix_exponential_of_the_absorbing_generator_is_the_forward_kernel(t):
    states = 4  # three counts and MASK
    q_absorb = -np.eye(states)  # columns are where a token comes from (Eq. 2)
    q_absorb[-1] += 1
    kernel = expm(sigma_bar(float64(t), EPS).item() * q_absorb)
    survival = alpha(float64(t), EPS).item()
    expected = survival * np.eye(states)
    expected[-1] += 1 - survival
    np.testing.assert_allclose(kernel, expected, atol=1e-12)


@pytest.mark.parametrize(("t", "s"), [(1.0, 0.7), (0.8, 0.1), (0.3, 0.0)])
def test_fine_euler_steps_of_the_reverse_process_reveal_with_the_probability_of_the_sampler(t, s):
    p = np.array([0.5, 0.3, 0.2])  # the denoiser's distribution at a masked gene
    times = np.linspace(t, s, 4_001)
    dt = times[0] - times[1]
    state = np.array([0.0, 0.0, 0.0, 1.0])  # over three counts and MASK
    for time in times[:-1]:
        survival = alpha(float64(time), EPS).item()
        score = survival / (1 - survival) * p  # Eq. 5
        rate = score * sigma(float64(time), EPS).item()  # Eq. 3 from MASK, whose forward rate is sigma(t)
        state = state + dt * state[-1] * np.append(rate, -rate.sum())
    revealed = reveal_probability(float64(t), float64(s), EPS).item()
    m_t, m_s = (mask_probability(float64(time), EPS).item() for time in (t, s))
    assert revealed == pytest.approx((m_t - m_s) / m_t)
    np.testing.assert_allclose(state, np.append(revealed * p, 1 - revealed), atol=1e-3)


def test_one_u_falls_in_each_stratum_of_the_batch_in_random_order():
    u = stratified_uniform(64, generator())
    strata = (u * 64).floor().tolist()
    assert sorted(strata) == list(range(64)) != strata


def test_number_of_masked_genes_is_uniform_from_1_to_all():
    u = (torch.arange(7000, dtype=torch.float64) + 0.5) / 7000
    k = num_masked(u, torch.full((7000,), 7))
    assert k.bincount().tolist() == [0, *[1000] * 7]
    n = torch.tensor([0, 1, 5, 20_000])  # a cell without measured genes has none masked
    assert num_masked(torch.full((4,), 1 - 1e-12, dtype=torch.float64), n).tolist() == n.tolist()
    assert num_masked(torch.zeros(4), n).tolist() == [0, 1, 1, 1]


def test_exactly_k_measured_genes_are_masked_and_all_others_stay():
    x_0 = torch.randint(0, 5, (200, 9), generator=generator())
    x_0[:, 7:], x_0[-1] = PAD, PAD
    k = num_masked(stratified_uniform(200, generator(1)), (x_0 != PAD).sum(dim=1))
    x_t = mask_counts(x_0, k, generator(2), **IDS)
    assert torch.equal((x_t == MASK).sum(dim=1), k)
    assert torch.equal(x_t[x_t != MASK], x_0[x_t != MASK])
    assert bool((x_t[:, 7:] == PAD).all())


def test_every_set_of_genes_is_masked_equally_often():
    x_t = mask_counts(torch.zeros(6000, 4, dtype=torch.long), torch.full((6000,), 2), generator(), **IDS)
    sets = (x_t == MASK).long() @ torch.tensor([1, 2, 4, 8])
    _, observed = sets.unique(return_counts=True)
    assert len(observed) == math.comb(4, 2)
    assert stats.chisquare(observed).pvalue > 1e-3


def test_queried_genes_are_masked_ones_chosen_uniformly_and_all_of_them_when_the_budget_allows():
    keys = torch.rand(6000, 5, generator=generator())
    x_t = mask_smallest(torch.zeros(6000, 5, dtype=torch.long), torch.full((6000,), 3), keys, **IDS)
    queries = choose_queries(x_t, keys, 1, mask_token_id=MASK)
    assert bool((x_t.gather(1, queries) == MASK).all())
    assert stats.chisquare(queries.flatten().bincount(minlength=5)).pvalue > 1e-3
    everything = choose_queries(x_t, keys, 4, mask_token_id=MASK)
    assert bool(((everything >= 0).sum(dim=1) == 3).all())
    queried = torch.zeros(6000, 6, dtype=torch.bool).scatter_(1, everything.where(everything >= 0, 5), True)[:, :5]
    assert torch.equal(queried, x_t == MASK)


def rows(n: int = 64, L: int = 9) -> list[dict[str, torch.Tensor]]:
    x_0 = torch.randint(0, 5, (n, L), generator=generator())
    x_0[:, 7:] = PAD
    return [{"input_ids": cell, "cell_type_ids": torch.tensor(i % 3)} for i, cell in enumerate(x_0)]


def collator(seed: int = 0) -> DataCollatorForCountMasking:
    return DataCollatorForCountMasking(SimpleNamespace(**IDS), seed=seed)


def test_the_collator_masks_from_one_to_all_measured_genes_and_labels_those_alone():
    cells = rows()
    batch = collator()(cells)
    x_0, x_t = torch.stack([cell["input_ids"] for cell in cells]), batch["input_ids"]
    is_masked = x_t == MASK
    assert is_masked.sum(dim=1).unique().tolist() == list(range(1, 8))
    assert torch.equal(x_t[~is_masked], x_0[~is_masked])
    assert torch.equal(batch["labels"], x_0.masked_fill(~is_masked, -100))
    assert batch["cell_type_ids"].tolist() == [i % 3 for i in range(64)]


def test_the_collator_pads_perturbations_and_leaves_out_what_attention_mask_does():
    mask = (torch.arange(9) < 5).long()
    cells = [{**cell, "perturbation_ids": torch.arange(1 + i % 2)} for i, cell in enumerate(rows(4))]
    batch = collator()([{**cell, "attention_mask": mask} for cell in cells])
    assert batch["perturbation_ids"].tolist() == [[0, -1], [0, 1]] * 2
    assert bool((batch["input_ids"][:, 5:] == PAD).all())
    assert batch.keys() == {"input_ids", "labels", "cell_type_ids", "perturbation_ids"}


def test_the_collator_draws_by_its_seed_anew_for_each_batch_and_apart_in_each_worker_and_process(monkeypatch):
    def masks(seed: int, **options) -> list[torch.Tensor]:
        loader = torch.utils.data.DataLoader(rows(1) * 16, batch_size=8, collate_fn=collator(seed), **options)
        return [batch["input_ids"] == MASK for batch in loader]

    first, second = masks(0)
    assert not torch.equal(first, second)
    assert torch.equal(masks(0)[0], first)
    assert not torch.equal(masks(1)[0], first)
    of_one_worker, of_another = masks(0, num_workers=2)
    assert not torch.equal(of_one_worker, of_another)
    monkeypatch.setenv("RANK", "1")
    assert not torch.equal(masks(0)[0], first)


def test_labels_are_dropped_where_u_is_below_the_probability_as_whole_combinations():
    u = torch.tensor([0.05, 0.5, 0.0999, 0.1])
    assert drop_labels(torch.tensor([0, 1, 2, 3]), u, 0.1).tolist() == [-1, 1, -1, 3]
    pairs = torch.tensor([[1, 2], [1, 2], [3, -1], [3, -1]])
    assert drop_labels(pairs, u, 0.1).tolist() == [[-1, -1], [1, 2], [-1, -1], [3, -1]]


def test_score_entropy_integrated_over_time_is_the_elbo():
    """The DWDSE loss of Lou et al. (2023) with Eq. 5's scores against (n/k) S_k, exactly, on 3 genes x 3 counts.

    DWDSE is the integral over t of sigma(t) E_{x_t} of the sum over masked genes i and counts v of
    s_iv - r_iv log s_iv + r_iv (log r_iv - 1), with the true ratio r_iv = alpha/(1-alpha) [v = x0_i]. The integrand is
    a polynomial in t of degree n-1, so that Gauss-Legendre quadrature is exact; eps -> 0 lets it reach m = 1.
    """
    eps, genes, counts, mask = 1e-9, 3, 3, 3
    rng = np.random.default_rng(0)
    p_data = rng.dirichlet(np.ones(counts**genes)).reshape((counts,) * genes)
    denoiser = {x_t: rng.dirichlet(np.ones(counts), size=genes) for x_t in itertools.product(range(4), repeat=genes)}
    nodes, weights = np.polynomial.legendre.leggauss(12)
    times, weights = torch.from_numpy((nodes + 1) / 2), weights / 2
    dwdse = elbo = 0.0
    for x_0 in itertools.product(range(counts), repeat=genes):
        for is_masked in itertools.product([False, True], repeat=genes):
            k = sum(is_masked)
            if not k:
                continue
            p = denoiser[tuple(mask if hidden else x for x, hidden in zip(x_0, is_masked))]
            cross_entropy = -sum(math.log(p[i, x_0[i]]) for i in range(genes) if is_masked[i])
            chance = 1 / genes / math.comb(genes, k)  # k uniform from 1 to n, then a uniform set of k genes
            elbo += p_data[x_0] * chance * genes / k * cross_entropy
            for t, weight in zip(times, weights):
                m, rate = mask_probability(t, eps).item(), sigma(t, eps).item()
                ratio = alpha(t, eps).item() / m
                score_entropy = 0.0
                for i in (i for i in range(genes) if is_masked[i]):
                    score_entropy += ratio * p[i].sum()  # sum over v of s_iv
                    score_entropy += -ratio * math.log(ratio * p[i, x_0[i]]) + ratio * (math.log(ratio) - 1)
                dwdse += weight * rate * p_data[x_0] * m**k * (1 - m) ** (genes - k) * score_entropy
    assert dwdse == pytest.approx(elbo, rel=1e-6)
