"""Properties of the network: what it may and may not depend on, its losses, its start, and what saving keeps.

Letters: B cells, L genes, n measured genes, k masked ones, K largest count.
"""

import math

import anndata
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from modeling_dcm import DataCollatorForCountMasking, DCMForDenoising, modeling_dcm
from modeling_dcm.count_distribution_dcm import CountBias, ZeroLinear
from modeling_dcm.diffusion_dcm import choose_queries, mask_counts
from modeling_dcm.layers_dcm import AdaLNZero, modulate
from tests.conftest import every_condition
from tests.modeling_dcm.any_order import generator
from tokenization import DCMTokenizer

ATTENTIONS = ("eager", "sdpa")


def masked_cells(model, B: int = 6, seed: int = 0, pad: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Clean ids x_0 and masked ones x_t (B, G), with 1, 2, ... masked genes; some genes PAD on request."""
    config = model.config
    x_0 = torch.randint(0, config.num_counts, (B, config.num_genes), generator=generator(seed))
    if pad:
        x_0[torch.rand(x_0.shape, generator=generator(seed + 1)) < 0.3] = config.pad_token_id
        x_0[:, 0] = 1  # something is measured
    n = (x_0 != config.pad_token_id).sum(dim=1)
    k = torch.minimum(1 + torch.arange(B), n)
    ids = {"mask_token_id": config.mask_token_id, "pad_token_id": config.pad_token_id}
    return x_0, mask_counts(x_0, k, generator(seed + 2), **ids)


def test_output_has_a_logit_for_each_count_and_none_for_mask_or_pad(make_model, backbone):
    model = make_model(backbone)
    _, x_t = masked_cells(model)
    assert model(x_t).logits.shape == (6, 7, 5)
    binned = make_model(backbone, max_count=15, count_bins=[4, 8])
    assert binned(masked_cells(binned)[1]).logits.shape == (6, 7, 6)
    with pytest.raises(ValueError, match="input_ids has 4 genes, the model 7: pass gene_ids for a subset"):
        model(x_t[:, :4])
    with pytest.raises(ValueError, match=r"gene_ids has shape \(3,\), expected \(4,\) or \(6, 4\)"):
        model(x_t[:, :4], gene_ids=torch.arange(3))


@pytest.mark.parametrize("call", ["forward", "log_likelihood", "embed"])
def test_ids_that_are_no_counts_or_genes_are_refused(make_model, backbone, call):
    ask, ids = getattr(make_model(backbone), call), torch.zeros(2, 7, dtype=torch.long)
    for wrong in (-1, 7):
        with pytest.raises(ValueError, match=rf"input_ids hold {wrong}, expected ids of counts 0\.\.4, MASK \(5\) or "):
            ask(ids + wrong)
    with pytest.raises(ValueError, match=r"input_ids are torch\.float32, expected integers"):
        ask(ids.float())
    with pytest.raises(ValueError, match=r"gene_ids hold 7, expected genes 0\.\.6"):
        ask(ids, gene_ids=torch.arange(1, 8))


@torch.no_grad()
def test_permuting_the_genes_permutes_the_output(make_model, backbone):
    model = make_model(backbone, conditioned=True, condition_tokens=True)
    model.target_gene_ids.copy_(torch.tensor([2, 3, -1, 0]))
    x_0, x_t = masked_cells(model, pad=True)
    order = torch.randperm(7, generator=generator(5))
    before = torch.get_rng_state()
    straight = model(x_t, labels=x_0, **every_condition(6))
    assert torch.equal(torch.get_rng_state(), before)  # nothing is drawn
    permuted = model(x_t[:, order], gene_ids=order, labels=x_0[:, order], **every_condition(6))
    torch.testing.assert_close(permuted.logits, straight.logits[:, order], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(permuted.loss, straight.loss)


@torch.no_grad()
def test_every_cell_may_have_its_own_genes(make_model, backbone):
    model = make_model(backbone)
    genes = torch.stack([torch.randperm(7, generator=generator(i))[:4] for i in range(6)])
    x_t = masked_cells(model)[1][:, :4]
    together = model(x_t, gene_ids=genes).logits
    alone = torch.cat([model(x_t[i : i + 1], gene_ids=genes[i]).logits for i in range(6)])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_a_padded_gene_is_a_gene_left_out(make_model, backbone):
    model = make_model(backbone, conditioned=True)
    left_out, kept = torch.tensor([1, 4]), torch.tensor([0, 2, 3, 5, 6])
    _, x_t = masked_cells(model)
    padded = x_t.index_fill(1, left_out, model.config.pad_token_id)
    with_pad = model(padded, **every_condition(6)).logits[:, kept]
    without = model(x_t[:, kept], gene_ids=kept, **every_condition(6)).logits
    torch.testing.assert_close(with_pad, without, atol=2e-5, rtol=1e-5)
    mask = torch.ones_like(x_t).index_fill(1, left_out, 0)
    assert torch.equal(model(x_t, attention_mask=mask, **every_condition(6)).logits[:, kept], with_pad)


@torch.no_grad()
def test_masked_genes_are_told_apart_from_zeros_and_from_pad(make_model, backbone):
    model = make_model(backbone)
    masked, zero, pad = (torch.tensor([[5, 5, 5, id_, 5, 5, 2]]) for id_ in (5, 0, 6))
    for other in (zero, pad):
        assert not torch.allclose(model(other).logits[:, :3], model(masked).logits[:, :3], atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_output_is_finite_where_all_is_masked_or_nothing_is_measured(make_model, backbone, attention):
    model = make_model(backbone, conditioned=True)
    model.config._attn_implementation = attention
    x_t = torch.tensor([[model.config.mask_token_id], [model.config.pad_token_id]]).expand(2, 7)
    output = model(x_t, labels=torch.zeros_like(x_t))
    assert all(bool(value.isfinite().all()) for value in (output.logits, output.loss, output.elbo))
    alone = model(x_t[:1], labels=torch.zeros(1, 7, dtype=torch.long))
    torch.testing.assert_close(output.loss, alone.loss)  # a cell without measured genes counts for nothing


@torch.no_grad()
@pytest.mark.parametrize("pad", [False, True])
def test_attention_kernels_agree(make_model, backbone, pad):
    model = make_model(backbone, conditioned=True, condition_tokens=True)
    _, x_t = masked_cells(model, pad=pad)
    logits, measured = [], x_t != model.config.pad_token_id
    for model.config._attn_implementation in ATTENTIONS:
        logits.append(model(x_t, **every_condition(6)).logits[measured])
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("k", range(1, 8))
def test_elbo_of_the_fresh_network_is_log_of_the_number_of_counts_whatever_k(make_model, backbone, k):
    model = make_model(backbone, fresh=True, conditioned=True)
    x_0 = torch.randint(0, 5, (3, 7), generator=generator())
    x_t = mask_counts(x_0, torch.full((3,), k), generator(1), mask_token_id=5, pad_token_id=6)
    output = model(x_t, labels=x_0)
    assert output.elbo.item() == pytest.approx(math.log(5), rel=1e-6)
    assert output.loss.item() == pytest.approx(k / 7 * math.log(5), rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("ignored", [0, 2])
def test_loss_is_the_cross_entropy_over_masked_genes_weighted_as_configured_and_without_those_to_ignore(
    make_model, backbone, ignored
):
    """A masked gene that is labelled as ignored counts as not measured; labels of observed genes are not looked at."""
    model = make_model(backbone)
    x_0, x_t = masked_cells(model, pad=True)
    x_0[:, :3], x_t[:, :3] = 1, 5
    is_ignored = torch.arange(7) < ignored
    counted, n = (x_t == 5) & ~is_ignored, ((x_t != 6) & ~is_ignored).sum(dim=1)
    labels = x_0.masked_fill(is_ignored, -100)
    output = model(x_t, labels=labels)
    nats = -output.logits.log_softmax(dim=-1).gather(-1, x_0.clamp(max=4)[..., None])[..., 0]
    per_cell = (nats * counted).sum(dim=1)
    torch.testing.assert_close(output.loss, per_cell.sum() / n.sum())
    torch.testing.assert_close(output.elbo, (per_cell * n / counted.sum(dim=1)).sum() / n.sum())
    queries = choose_queries(x_t, torch.rand(x_t.shape, generator=generator()), 7, mask_token_id=5)
    torch.testing.assert_close(model(x_t, labels=labels, query_positions=queries).elbo, output.elbo)
    model.config.loss_weighting = "elbo"
    assert torch.equal(model(x_t, labels=torch.where(x_t == 5, labels, 99)).loss, output.elbo)


@torch.no_grad()
def test_logits_at_queried_genes_are_those_of_the_full_output(make_model, backbone):
    model = make_model(backbone, conditioned=True, condition_tokens=True)
    model.target_gene_ids.copy_(torch.tensor([2, 3, -1, 0]))
    _, x_t = masked_cells(model, pad=True)
    queries = torch.stack([torch.randperm(7, generator=generator(i))[:3] for i in range(6)])
    full = model(x_t, **every_condition(6)).logits
    queried = model(x_t, query_positions=queries, **every_condition(6)).logits
    torch.testing.assert_close(queried, full.gather(1, queries[..., None].expand(-1, -1, 5)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_loss_over_queried_genes_is_unbiased(make_model, backbone):
    model = make_model(backbone)
    x_0, x_t = masked_cells(model, B=1)
    x_t[0, :3] = 5  # masked, whatever else is
    full, masked = model(x_t, labels=x_0), (x_t == 5).nonzero()[:, 1]
    pairs = [model(x_t, labels=x_0, query_positions=pair[None]) for pair in torch.combinations(masked, 2)]
    for name in ("loss", "elbo"):
        mean = torch.stack([pair[name] for pair in pairs]).mean()
        torch.testing.assert_close(mean, full[name], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_concrete_score_is_the_survival_ratio_times_the_distribution_for_times_in_0_to_1(make_model, backbone):
    model = make_model(backbone)
    _, x_t = masked_cells(model)
    p = model(x_t).logits.softmax(dim=-1)
    t = torch.linspace(0.1, 1, 6)
    expected = (1 / ((1 - 1e-3) * t) - 1)[:, None, None] * p  # alpha / (1 - alpha)
    torch.testing.assert_close(model.concrete_score(x_t, t), expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(model.concrete_score(x_t, 0.1)[0], expected[0], rtol=1e-4, atol=1e-7)
    for outside in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"expected values in \(0, 1\]"):
            model.concrete_score(x_t, outside)


@pytest.mark.parametrize("label", [-1, 5, 6, 99])
def test_a_label_that_is_no_count_is_refused_at_masked_genes(make_model, label):
    model = make_model()
    x_0, x_t = masked_cells(model)
    with pytest.raises(ValueError, match=rf"labels hold {label} at a masked gene, expected ids of counts 0\.\.4"):
        model(x_t, labels=torch.where(x_t == 5, label, x_0))


def test_labels_without_a_masked_gene_are_warned_of_once(make_model, caplog):
    model = make_model()
    type(modeling_dcm.logger).warning_once.cache_clear()
    x_0, x_t = masked_cells(model)
    model(x_t, labels=x_0)
    assert not caplog.messages
    assert model(x_0, labels=x_0).loss == model(x_0, labels=x_0).loss == 0
    assert ["DataCollatorForCountMasking" in message for message in caplog.messages] == [True]


def test_the_trainer_of_transformers_trains_on_cells_of_the_tokenizer_with_the_collator(make_model, backbone, tmp_path):
    counts = np.random.default_rng(0).poisson([0.1, 0.2, 0.5, 3, 3, 3, 0.1], (64, 7)).clip(0, 4)
    adata = anndata.AnnData(counts, obs={"cell_type": ["a", "b"] * 32})
    tok = DCMTokenizer.from_labels(genes=adata.var_names, max_count=4, cell_types=["a", "b"])
    cells = [dict(zip(tok(adata), cell)) for cell in zip(*tok(adata).values())]
    options = {"num_train_epochs": 10, "learning_rate": 1e-2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    trainer = transformers.Trainer(
        make_model(backbone, fresh=True, num_cell_types=2),
        transformers.TrainingArguments(tmp_path, **options),
        DataCollatorForCountMasking(tok, seed=0),
        train_dataset=cells,
        eval_dataset=cells,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert before > 0.5
    assert trainer.evaluate()["eval_loss"] < 0.8 * before


@torch.no_grad()
def assert_starts_at_zero(model) -> None:
    zeroed = [module for module in model.modules() if isinstance(module, AdaLNZero | ZeroLinear | CountBias)]
    assert {type(module) for module in zeroed} == {AdaLNZero, ZeroLinear, CountBias}
    for module in zeroed:
        assert not any(parameter.any() for parameter in module.parameters())
    x = torch.randn(2, 4, 16, generator=generator())
    for block in model.backbone.blocks:
        assert torch.equal(block(x, torch.randn(2, 16, generator=generator(1))), x)
    torch.testing.assert_close(modulate(x, torch.full((2, 16), 3.0), torch.ones(2, 16)), 2 * x + 3)
    p = model(torch.full((2, 7), model.config.mask_token_id)).logits.softmax(dim=-1)
    torch.testing.assert_close(p, torch.full_like(p, 1 / 5), atol=1e-7, rtol=0)


def test_a_fresh_network_says_nothing_and_blocks_missing_from_a_file_start_so_too(make_model, backbone, tmp_path):
    model = make_model(backbone, fresh=True, conditioned=True)
    assert_starts_at_zero(model)
    for module in model.modules():
        if not isinstance(module, AdaLNZero | ZeroLinear | CountBias):
            assert all(p.std() > 0 for name, p in module.named_parameters(recurse=False) if name != "bias"), module
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if "modulation" not in name and "head" not in name}
    save_file(kept, file, metadata={"format": "pt"})
    assert_starts_at_zero(DCMForDenoising.from_pretrained(tmp_path))


@torch.no_grad()
@pytest.mark.parametrize("columns", [1, 3, 5, 64])
def test_head_starts_at_the_training_marginals(make_model, backbone, columns):
    model = make_model(backbone, fresh=True, gene_output_bias=columns)
    cells = torch.randint(0, 3, (5000, 7), generator=generator()) * torch.tensor([0, 0, 1, 1, 1, 2, 2])
    histogram = torch.nn.functional.one_hot(cells, 5).sum(dim=0)
    model.head.set_marginals(histogram)
    p = model(torch.full((1, 7), model.config.mask_token_id)).logits[0].softmax(dim=-1)
    assert p.min() > 0
    shared = min(columns, 5) - 1  # counts from here on share a bias: their total is right for each gene
    torch.testing.assert_close(p[:, :shared], histogram[:, :shared] / 5000, atol=1e-3, rtol=0)
    torch.testing.assert_close(p[:, shared:].sum(1), histogram[:, shared:].sum(1) / 5000, atol=1e-3, rtol=0)


@torch.no_grad()
def test_saving_and_loading_gives_identical_logits_and_buffers(make_model, backbone, tmp_path):
    options = {"perturbation_dim": 6, "library_size_groups": 2, "covariates": {"z": 2, "a": 3}}
    model = make_model(backbone, conditioned=True, condition_tokens=True, **options)
    for index, buffer in enumerate(model.buffers()):
        buffer.copy_(torch.randint(1, 3, buffer.shape, generator=generator(index)))
    model.save_pretrained(tmp_path)
    loaded = DCMForDenoising.from_pretrained(tmp_path).eval()
    assert {path.suffix for path in tmp_path.iterdir()} == {".py", ".json", ".safetensors"}
    saved, here = model.state_dict(), loaded.state_dict()
    assert saved.keys() == here.keys()
    for part in ("library_sizes.keys", "library_sizes.quantiles", "target_gene_ids", "conditions.perturbation.table"):
        assert part in saved
    for name, value in saved.items():
        torch.testing.assert_close(here[name], value, atol=0, rtol=0)  # of the same type, too
    _, x_t = masked_cells(model, pad=True)
    assert torch.equal(loaded(x_t, **every_condition(6)).logits, model(x_t, **every_condition(6)).logits)


def test_loaded_in_bfloat16_the_data_in_the_model_stay_exact(make_model, tmp_path):
    model = make_model("latent", conditioned=True, count_distribution="nb", state_dim=2)
    data = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    for buffer in data.values():
        buffer.uniform_(1, 2)
    model.save_pretrained(tmp_path)
    half = DCMForDenoising.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    for name, buffer in half.named_buffers():
        assert name not in data or torch.equal(buffer, data[name]), name
    logits = half.eval()(masked_cells(half)[1], **every_condition(6)).logits
    assert logits.isfinite().all()
