"""Properties of generating, completing, scoring and embedding cells with a network.

Letters: N cells, L genes of the sequence, G genes of the panel, K largest count.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from modeling_dcm import generation_dcm
from modeling_dcm.guidance_dcm import denoiser
from tests.conftest import every_condition
from tests.modeling_dcm.any_order import any_order, any_order_p_value, generator

MASK, PAD = 5, 6  # of the tiny models


def conditions(N: int) -> dict[str, torch.Tensor]:
    return {name: ids for name, ids in every_condition(N).items() if name != "library_size"}


@pytest.fixture
def model(make_model, backbone):
    """A model with every condition, targets, and two groups of library sizes."""
    model = make_model(backbone, conditioned=True, condition_tokens=True, library_size_groups=2)
    model.target_gene_ids.copy_(torch.tensor([-1, 2, 3, 0]))
    model.library_sizes.keys[0, 0] = 1
    model.library_sizes.quantiles.copy_(torch.linspace(0, 64, 65) + torch.tensor([[1000.0], [0.0]]))
    return model


@pytest.mark.parametrize("schedule", ["linear", "cosine", "cubic"])
@pytest.mark.parametrize("steps", [1, 3, 50])
def test_generated_cells_hold_counts_and_never_mask_or_pad(model, schedule, steps):
    cells = model.generate(40, steps=steps, schedule=schedule)
    assert (cells.shape, cells.dtype) == ((40, 7), torch.int64)
    assert 0 <= cells.min() <= cells.max() < MASK


def test_a_chunk_of_cells_depends_on_seed_and_batch_size_and_not_on_other_chunks_and_differs_from_them(model):
    whole, again, other = (model.generate(**conditions(10), steps=3, seed=seed, batch_size=4) for seed in (0, 0, 1))
    assert torch.equal(whole, again)
    assert not torch.equal(whole, other)
    first = {name: ids[:8] for name, ids in conditions(10).items()}
    assert torch.equal(model.generate(**first, steps=3, batch_size=4), whole[:8])
    some = model.generate(**conditions(10), steps=3, batch_size=4, chunks=[2, 0])
    assert torch.equal(some, torch.cat([whole[8:], whole[:4]]))
    cells = model.generate(8, steps=3, batch_size=4)
    assert not torch.equal(cells[:4], cells[4:])


def test_generating_and_scoring_leave_the_global_random_state_and_the_mode_of_the_model_alone(make_model, backbone):
    model = make_model(backbone, dropout=0.5).train()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = model.generate(6, steps=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert torch.equal(model.eval().generate(6, steps=2), first)
    x_0 = torch.randint(0, 5, (4, 7), generator=generator())
    for score in (model.train().log_likelihood, model.embed):
        assert torch.equal(score(x_0), score(x_0))
    assert model.training


def test_given_genes_come_back_unchanged_and_the_others_are_drawn_given_them(model):
    observed = torch.randint(-1, 5, (30, 7), generator=generator())
    cells = model.generate(observed=observed, steps=3)
    assert torch.equal(cells[observed >= 0], observed[observed >= 0])
    assert cells[observed < 0].max() < MASK
    assert torch.equal(model.generate(observed=torch.ones(3, 7)), torch.ones(3, 7, dtype=torch.long))
    cells = model.generate(observed=torch.tensor([[4, -1], [2, -1]]), gene_ids=torch.tensor([5, 1]))
    assert cells[:, 0].tolist() == [4, 2]  # also where some genes of the panel are drawn, in another order
    low, high = (torch.full((200, 7), -1).index_fill(1, torch.tensor(0), count) for count in (0, 4))
    after_low, after_high = (model.generate(observed=given, steps=2)[:, 1:] for given in (low, high))
    assert not torch.equal(after_low, after_high)  # with the same order and the same noise


@pytest.fixture
def seen(monkeypatch) -> list[torch.Tensor]:
    """The library sizes (B,) of each chunk that is drawn from now on."""
    seen = []

    def spied(model, x, gene_ids, conditions, *arguments, **options):
        seen.append(conditions["library_size"].tolist())
        return denoiser(model, x, gene_ids, conditions, *arguments, **options)

    monkeypatch.setattr(generation_dcm, "denoiser", spied)
    return seen


def test_library_size_is_drawn_from_the_training_cells_given_or_null(model, seen):
    model.generate(cell_type_ids=torch.tensor([0, 1, 1, 2]), steps=1)
    assert [size >= 1000 for size in seen[-1]] == [False, True, True, False]
    model.generate(observed=torch.full((2, 7), -1), steps=1)  # imputation: not given unless asked
    for size in ("null", 12, torch.tensor([1, 2, 3])):
        model.generate(3, steps=1, library_size=size, batch_size=2)
    assert seen[1:] == [[-1, -1], [-1, -1], [-1], [12, 12], [12], [1, 2], [3]]


def test_library_size_of_some_genes_is_their_share_of_a_mean_cell(model, seen, monkeypatch):
    of_type, of_all = [1.0, 2, 3, 4, 5, 6, 4], [4.0, 6, 5, 4, 3, 2, 1]
    monkeypatch.setattr(model.totals, "gene_mean", torch.tensor([of_type, of_type, [1.0] * 7, of_all]))
    for given, share in (({"cell_type_ids": torch.tensor([0, 1])}, 6 / 25), ({"num_cells": 2}, 7 / 25)):
        model.generate(**given, steps=1)
        model.generate(**given, steps=1, gene_ids=torch.tensor([4, 0]))
        assert seen[-1] == [round(size * share) for size in seen[-2]]
    model.generate(2, steps=1, gene_ids=torch.tensor([4, 0]), library_size=12)
    assert seen[-1] == [12, 12]


def test_guidance_of_0_is_no_guidance_and_more_of_it_is_another_distribution(model):
    plain = model.generate(**conditions(20), steps=2)
    assert torch.equal(model.generate(**conditions(20), steps=2, guidance_scale=0.0), plain)
    assert not torch.equal(model.generate(**conditions(20), steps=2, guidance_scale=3.0), plain)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "num_cells is missing: give it, or conditions or observed genes"),
        ({"num_cells": 0}, "num_cells=0, expected at least 1"),
        ({"num_cells": 3, "cell_type_ids": torch.tensor([0, 0])}, "arguments disagree on the number of cells"),
        ({"num_cells": 2, "steps": 0}, "steps=0, expected at least 1"),
        ({"num_cells": 2, "schedule": "fast"}, "schedule='fast', expected one of"),
        ({"num_cells": 2, "temperature": 0.0}, "temperature=0.0, expected above 0"),
        ({"num_cells": 2, "temperature": math.inf}, "temperature=inf, expected above 0"),
        ({"num_cells": 2, "guidance_scale": math.nan}, "guidance_scale=nan, expected finite numbers"),
        ({"num_cells": 2, "steps": 2.5}, "steps=2.5, expected at least 1"),
        ({"num_cells": 2, "library_size": "drawn"}, r"='drawn', expected numbers, None \(drawn\) or 'null'"),
        ({"num_cells": 2, "library_size": -3}, "expected one number or 2, all 0 or more"),
        ({"num_cells": 2, "library_size": math.inf}, "expected one number or 2, all 0 or more"),
        ({"num_cells": 2, "library_size": torch.ones(3)}, r"library_size of shape \(3,\), expected one number or 2"),
        ({"observed": torch.zeros(2, 3)}, r"observed has shape \(2, 3\), expected \(2, 7\): cells x genes"),
        ({"observed": torch.arange(-1, 6).expand(2, 7)}, "values from -1 to 5, expected counts 0..4, or -1"),
        ({"observed": torch.full((2, 7), -2)}, r"observed holds values from -2 to -2"),
        ({"observed": torch.full((2, 7), 0.5)}, "observed holds values that are not integers"),
        ({"num_cells": 2, "gene_ids": torch.tensor([0, 7])}, r"gene_ids are \[0, 7\], expected genes 0..6"),
        ({"num_cells": 2, "gene_ids": torch.tensor([1, 1])}, r"shape \(2,\), expected genes \(L,\), each once"),
    ],
)
def test_bad_arguments_are_refused_with_the_value_and_what_was_expected(make_model, arguments, message):
    model = make_model(conditioned=True, library_size_groups=1)
    with pytest.raises(ValueError, match=message):
        model.generate(**arguments)
    with pytest.raises(ValueError, match="library_size=100 was given, but this model was trained without"):
        make_model().generate(2, library_size=100)


@torch.no_grad()
def test_logits_while_sampling_are_those_of_the_full_sequence(model):
    """The latent backbone reads a compact subset of the sequence: known genes, then queried ones."""
    x_t = torch.tensor([[0, 1, MASK, MASK, 2, MASK, MASK], [MASK] * 7, [3, MASK, 0, 4, MASK, MASK, MASK]])
    known = torch.tensor([[4, 0, 1, 2], [1, 6, 3, 0], [0, 2, 3, 6]])  # some are still masked
    positions = torch.tensor([[5, 3], [2, 4], [4, 5]])
    given = {**conditions(3), "library_size": torch.tensor([5.0, -1.0, 80.0])}
    compact = denoiser(model, x_t, torch.arange(7), given, 0.0, from_nothing=False)(x_t, positions, known).full()
    full = model(x_t, **given).logits.gather(1, positions[..., None].expand(-1, -1, 5))
    torch.testing.assert_close(compact, full, atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("genes", [torch.arange(7), torch.tensor([6, 2, 0, 5])])
def test_genes_embedded_once_give_the_logits_of_the_full_sequence(make_model, genes):
    model = make_model("latent", conditioned=True, seed=3)
    given = {**conditions(3), "library_size": torch.tensor([5.0, -1.0, 80.0])}
    L, read, asked = len(genes), [], []
    x_0, x_t = torch.randint(0, 5, (3, L), generator=generator()), torch.full((3, L), MASK)
    denoise = denoiser(model, x_t, genes, given, 0.0, from_nothing=True)
    order = torch.rand(3, L, generator=generator(1)).argsort(dim=1)
    hook = model.backbone.embedding.register_forward_hook(lambda _, cells, tokens: read.append(cells[0].input_ids))
    for start, end in [(0, 1), (1, 3), (3, L)]:
        positions = order[:, start:end]
        asked.append((x_t, positions, denoise(x_t, positions, order[:, :start]).full()))
        assert sum(ids.shape[1] for ids in read) == start  # each gene is embedded once
        x_t = x_t.scatter(1, positions, x_0.gather(1, positions))
    hook.remove()
    for x_t, positions, logits in asked:
        full = model(x_t, gene_ids=genes, **given).logits.gather(1, positions[..., None].expand(-1, -1, 5))
        torch.testing.assert_close(logits, full, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_without_masked_keys_a_masked_gene_has_no_influence(make_model):
    model = make_model("dit", conditioned=True, masked_keys=False)
    x_t = torch.tensor([[0, 1, MASK, MASK, 2, MASK, MASK]])
    kept = torch.tensor([4, 0, 1, 3])
    part = model.predict(model.partial_cells(x_t).at(kept[None])).full()
    torch.testing.assert_close(part, model(x_t).logits[:, kept], atol=2e-5, rtol=1e-5)
    nothing_observed = model(torch.full((1, 7), MASK)).logits
    assert bool(nothing_observed.isfinite().all())


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.5, 2.0, -1.0])
def test_guided_distribution_is_the_formula_of_the_design(model, scale):
    x_t, library_size = torch.tensor([[0, 1, MASK, MASK, 2, MASK, 4]]), torch.tensor([50.0])
    known, positions = torch.tensor([[0, 1, 4, 6]]), torch.tensor([[2, 3, 5]])
    given = {**{name: ids[2:3] for name, ids in conditions(3).items()}, "library_size": library_size}
    denoise = denoiser(model, x_t, torch.arange(7), given, scale, from_nothing=False)
    guided = denoise(x_t, positions, known).log_softmax(dim=-1)
    conditional = model(x_t, **given).logits[:, positions[0]].log_softmax(dim=-1)
    null = model(x_t, library_size=library_size).logits[:, positions[0]].log_softmax(dim=-1)
    expected = ((1 + scale) * conditional - scale * null).log_softmax(dim=-1)
    torch.testing.assert_close(guided, expected, atol=5e-5, rtol=1e-4)


@torch.no_grad()
def denoiser_table(model) -> dict[tuple[int, ...], np.ndarray]:
    """The network's probabilities (3, 3) of each gene's counts in every one of the 4^3 states of three genes."""
    states = list(itertools.product(range(4), repeat=3))
    return dict(zip(states, model(torch.tensor(states)).logits.double().softmax(dim=-1).numpy()))


@torch.no_grad()
def enumerated_elbo(model, x_0: torch.Tensor) -> float:
    """The bound of one cell (n,) by all of its 2^n - 1 masks: k uniform, then a uniform set M of k genes."""
    n = len(x_0)
    masks = torch.tensor(list(itertools.product([False, True], repeat=n)))[1:]
    distribution = model.distribution(x_0.masked_fill(masks, model.config.mask_token_id))
    nats = (distribution.cross_entropy(x_0.expand_as(masks)).double() * masks).sum(dim=1)
    return -sum((n / k) * S_k / (n * math.comb(n, k)) for k, S_k in zip(masks.sum(dim=1).tolist(), nats.tolist()))


def test_one_gene_per_step_draws_the_networks_any_order_distribution(make_model, backbone):
    model = make_model(backbone, num_genes=3, max_count=2, seed=1)
    cells = model.generate(8000, steps=3, batch_size=4000)
    assert any_order_p_value(cells, any_order(denoiser_table(model))) > 1e-3


def test_log_likelihood_is_the_enumerated_elbo_and_below_the_log_probability(make_model, backbone):
    model = make_model(backbone, num_genes=3, max_count=2, seed=1)
    p = any_order(denoiser_table(model))
    cells = list(itertools.product(range(3), repeat=3))
    elbo = np.array([enumerated_elbo(model, torch.tensor(x_0)) for x_0 in cells])
    assert np.all(elbo <= np.log([p[x_0] for x_0 in cells]) + 1e-9)
    repeats = 120
    x_0 = torch.tensor(cells).repeat_interleave(repeats, dim=0)
    estimates = model.log_likelihood(x_0, num_samples=6, batch_size=1000).view(27, repeats)
    error = estimates.std(dim=1) / repeats**0.5
    assert bool(((estimates.mean(dim=1) - torch.from_numpy(elbo)).abs() < 4.5 * error + 1e-6).all())
    assert torch.equal(model.log_likelihood(x_0, num_samples=2), model.log_likelihood(x_0, num_samples=2))


def test_the_error_of_the_log_likelihood_covers_the_enumerated_elbo_at_its_rate(make_model, backbone):
    model, repeats = make_model(backbone, seed=1), 100
    cells = torch.randint(0, 5, (6, 7), generator=generator())
    elbo = torch.tensor([enumerated_elbo(model, x_0) for x_0 in cells], dtype=torch.float64)
    for num_samples in (16, 128):
        estimates, errors = model.log_likelihood(
            cells.repeat_interleave(repeats, dim=0), num_samples=num_samples, batch_size=600, return_error=True
        )
        off = estimates - elbo.repeat_interleave(repeats)
        assert off.square().mean().item() == pytest.approx(errors.square().mean().item(), rel=0.15)
    covered = [(off.abs() < z * errors).double().mean().item() for z in (1, 2)]
    assert covered == pytest.approx([0.68, 0.95], abs=0.03)  # 64 strata: nearly normal


def test_log_likelihood_of_a_uniform_network_is_exact_and_says_so(make_model, backbone):
    model = make_model(backbone, fresh=True)
    x_0 = torch.randint(0, 5, (9, 7), generator=generator())
    x_0[3:, :4], x_0[8] = PAD, PAD
    expected = torch.tensor([7.0] * 3 + [3.0] * 5 + [0.0], dtype=torch.float64) * -math.log(5)
    bound, error = model.log_likelihood(x_0, num_samples=2, return_error=True)
    torch.testing.assert_close(bound, expected, rtol=1e-6, atol=1e-6)
    assert error.max() < 1e-5
    assert model.log_likelihood(x_0[8:], num_samples=2).tolist() == [0.0]


def test_log_likelihood_refuses_masked_cells_and_samples_without_pairs(make_model):
    model, x_0 = make_model(), torch.zeros(2, 7, dtype=torch.long)
    with pytest.raises(ValueError, match="num_samples=3, expected an even number of at least 2"):
        model.log_likelihood(x_0, num_samples=3)
    x_0[1, 2] = MASK
    with pytest.raises(ValueError, match=r"input_ids hold MASK \(5\), expected counts"):
        model.log_likelihood(x_0)


def test_scoring_takes_attention_masks_and_genes_shared_by_all_cells(make_model, backbone):
    model, genes = make_model(backbone), torch.tensor([6, 2, 4])
    x_0 = torch.randint(0, 5, (5, 3), generator=generator())
    mask = torch.tensor([1, 0, 1]).expand(5, 3)
    for score in (model.log_likelihood, model.embed):
        shared = score(x_0, gene_ids=genes, batch_size=2)
        torch.testing.assert_close(shared, score(x_0, gene_ids=genes.expand(5, 3), batch_size=2))
        padded = score(x_0.masked_fill(mask == 0, PAD), gene_ids=genes)
        assert torch.equal(score(x_0, gene_ids=genes, attention_mask=mask), padded)


def test_embeddings_depend_on_counts_and_conditions_and_not_on_chunks_or_padded_genes(model):
    x_0 = torch.randint(0, 5, (6, 7), generator=generator())
    states = []
    hook = model.backbone.blocks[-1].register_forward_hook(lambda block, arguments, output: states.append(output))
    embedded = model.embed(x_0, **conditions(6))
    hook.remove()
    of_genes = states[0][:, -7:] if model.config.backbone == "dit" else states[0]  # tokens of conditions come first
    torch.testing.assert_close(embedded, of_genes.mean(dim=1))
    torch.testing.assert_close(model.embed(x_0, **conditions(6), batch_size=4), embedded, atol=1e-5, rtol=1e-5)
    for other in (model.embed(x_0), model.embed(4 - x_0, **conditions(6))):
        assert (other - embedded).abs().amax(dim=1).min() > 1e-4
    partial, genes = x_0.clone(), torch.tensor([0, 1, 3, 6])
    partial[:, [2, 4, 5]] = PAD
    partial[:, 3] = MASK
    left_out = model.embed(partial[:, genes], gene_ids=genes)
    torch.testing.assert_close(model.embed(partial), left_out, atol=2e-5, rtol=1e-5)
