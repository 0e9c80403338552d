"""Whoever asks the network may do so in mixed precision: an attention that refuses float32 stands for flash kernels."""

import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_dcm.scoring_dcm import measure_entropy

CONDITIONS = {
    "cell_type_ids": torch.arange(6) % 3,
    "perturbation_ids": torch.stack([torch.arange(6) % 4, torch.full((6,), -1)], dim=1),
    "covariate_ids": torch.stack([torch.arange(6) % 2, torch.arange(6) % 3], dim=1),
}


def attention_in_half_precision(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """As transformers' flash attention: half precision only, and a mask is (B, S)."""
    for tensor in (query, key, value):
        if tensor.dtype not in (torch.bfloat16, torch.float16):
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    assert attention_mask is None or attention_mask.ndim == 2
    mask = None if attention_mask is None else attention_mask[:, None, None, :]
    attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return attended.transpose(1, 2), None


@pytest.fixture(params=["latent", "dit", "dit that reads observed genes only"])
def model(request, make_model, monkeypatch):
    options = {"conditioned": True, "condition_tokens": True, "num_hidden_layers": 2, "perturbation_dim": 6}
    model = make_model(request.param.split()[0], masked_keys="only" not in request.param, **options)
    model.conditions.perturbation.has_vector[1:] = True
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_of_tests", attention_in_half_precision)
    model.config._attn_implementation = "flash_of_tests"
    return model


def cells(model, pad: bool = False) -> torch.Tensor:
    x_0 = torch.randint(0, model.config.num_counts, (6, 7), generator=torch.Generator().manual_seed(0))
    if pad:
        x_0[:, 4:] = model.config.pad_token_id
    return x_0


def ask_everything(model) -> dict[str, torch.Tensor]:
    """What the network says, by the name of what was asked."""
    observed = cells(model).masked_fill(torch.arange(7) > 3, -1)
    size = {"library_size": torch.full((6,), 12.0)}
    said = {}
    for pad in (False, True):
        x_0 = cells(model, pad)
        is_masked = (torch.arange(7) % 2 == 0) & (x_0 != model.config.pad_token_id)
        x_t = x_0.masked_fill(is_masked, model.config.mask_token_id)
        said |= {
            f"logits, {pad}": model(x_t, **CONDITIONS, **size).logits,
            f"loss, {pad}": model(x_t, labels=x_0, **CONDITIONS, **size).loss,
            f"likelihood, {pad}": model.log_likelihood(x_0, num_samples=2, **CONDITIONS),
            f"embedding, {pad}": model.embed(x_0, **CONDITIONS),
        }
    said["score"] = model.concrete_score(x_t, 0.5, **CONDITIONS)
    curve = measure_entropy(model, [{"input_ids": cells(model), **CONDITIONS}])
    said["entropy"] = torch.tensor(curve["entropy"])
    said["drawn"] = model.generate(6, steps=7, library_size=12, **CONDITIONS)
    said["guided"] = model.generate(6, steps=2, library_size=12, guidance_scale=1.0, temperature=0.5, **CONDITIONS)
    said["completed"] = model.generate(6, steps=2, observed=observed, **CONDITIONS)
    return said


@torch.no_grad()
def test_whatever_is_asked_under_autocast_is_answered_nearly_as_in_full_precision_and_in_float32(model):
    with pytest.raises(RuntimeError, match="FlashAttention only support"):
        model(cells(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = ask_everything(model)
    model.config._attn_implementation = "sdpa"
    full = ask_everything(model)
    for name, value in half.items():
        assert value.dtype == full[name].dtype, name
        if value.is_floating_point():
            assert (value - full[name]).norm() < 0.05 * full[name].norm(), name
        else:
            assert 0 <= value.min() <= value.max() < model.config.num_counts, name


@torch.no_grad()
def test_a_cell_revealed_gene_by_gene_is_told_like_one_read_at_once(make_model):
    model = make_model("latent", num_genes=600)
    x = torch.full((1, 600), 4)
    order = torch.arange(600)[None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cells = model.partial_cells(x)
        revealed = model.backbone.incremental(cells, model.conditions, model.totals)
        for known in range(599):
            revealed._read(x, order[:, known : known + 1])
        told = revealed(x, order)[0].condition
        at_once = model.backbone.encode(cells, model.conditions).condition
    assert (told - at_once).norm() < 0.02 * at_once.norm()


def test_a_training_step_under_autocast_gives_every_weight_its_gradient(model):
    x_0 = cells(model)
    x_t = x_0.masked_fill(torch.arange(7) % 2 == 0, model.config.mask_token_id)
    gradients = []
    for attention in ("sdpa", "flash_of_tests"):
        model.config._attn_implementation = attention
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=attention != "sdpa"):
            queries = torch.arange(0, 7, 2).expand(6, -1)
            loss = model.train()(x_t, labels=x_0, query_positions=queries, **CONDITIONS).loss
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(gradient.dtype == torch.float32 for gradient in gradients[1].values())
