"""The network in mixed precision, by attention that refuses float32 as flash kernels do, and with other things in place
of linear layers: adapters of PEFT train and start as nothing, 8-bit layers run."""

import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_dcm.scoring_dcm import measure_entropy
from tests.conftest import every_condition

DIM = 6  # of frozen vectors


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
def model(request, make_model):
    options = {"conditioned": True, "condition_tokens": True, "num_hidden_layers": 2, "perturbation_dim": DIM}
    model = make_model(request.param.split()[0], masked_keys="only" not in request.param, **options)
    model.conditions.perturbation.has_vector[1:] = True
    model.conditions.perturbation.table.normal_(generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture
def flash(model, monkeypatch):
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
    observed, given = cells(model).masked_fill(torch.arange(7) > 3, -1), every_condition(6)
    size = {"library_size": given.pop("library_size")}
    said = {}
    for pad in (False, True):
        x_0 = cells(model, pad)
        is_masked = (torch.arange(7) % 2 == 0) & (x_0 != model.config.pad_token_id)
        x_t = x_0.masked_fill(is_masked, model.config.mask_token_id)
        said |= {
            f"logits, {pad}": model(x_t, **given, **size).logits,
            f"loss, {pad}": model(x_t, labels=x_0, **given, **size).loss,
            f"likelihood, {pad}": model.log_likelihood(x_0, num_samples=2, **given),
            f"embedding, {pad}": model.embed(x_0, **given),
        }
    said["score"] = model.concrete_score(x_t, 0.5, **given)
    curve = measure_entropy(model, [{"input_ids": cells(model), **given}])
    said["entropy"] = torch.tensor(curve["entropy"])
    said["drawn"] = model.generate(6, steps=7, library_size=12, **given)
    said["guided"] = model.generate(6, steps=2, library_size=12, guidance_scale=1.0, temperature=0.5, **given)
    said["completed"] = model.generate(6, steps=2, observed=observed, **given)
    return said


@torch.no_grad()
def test_whatever_is_asked_under_autocast_is_answered_nearly_as_in_full_precision_and_in_float32(flash):
    with pytest.raises(RuntimeError, match="FlashAttention only support"):
        flash(cells(flash))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = ask_everything(flash)
    flash.config._attn_implementation = "sdpa"
    full = ask_everything(flash)
    for name, value in half.items():
        assert value.dtype == full[name].dtype, name
        if value.is_floating_point():
            assert (value - full[name]).norm() < 0.05 * full[name].norm(), name
        else:
            assert 0 <= value.min() <= value.max() < flash.config.num_counts, name


@torch.no_grad()
def test_a_cell_revealed_gene_by_gene_is_told_like_one_read_at_once(make_model):
    model = make_model("latent", num_genes=600)
    x, order = torch.full((1, 600), 4), torch.arange(600)[None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cells = model.partial_cells(x)
        revealed = model.backbone.incremental(cells, model.conditions, model.totals)
        for known in range(599):
            revealed._read(x, order[:, known : known + 1])
        told = revealed(x, order)[0].condition
        at_once = model.backbone.encode(cells, model.conditions).condition
    assert (told - at_once).norm() < 0.02 * at_once.norm()


def test_a_training_step_under_autocast_gives_every_weight_its_gradient(flash):
    x_0, given = cells(flash), every_condition(6)
    x_t = x_0.masked_fill(torch.arange(7) % 2 == 0, flash.config.mask_token_id)
    gradients = []
    for attention in ("sdpa", "flash_of_tests"):
        flash.config._attn_implementation = attention
        flash.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=attention != "sdpa"):
            queries = torch.arange(0, 7, 2).expand(6, -1)
            loss = flash.train()(x_t, labels=x_0, query_positions=queries, **given).loss
        loss.backward()
        gradients.append({name: p.grad for name, p in flash.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(gradient.dtype == torch.float32 for gradient in gradients[1].values())


def batch() -> dict[str, torch.Tensor]:
    """Eight cells of which half of the genes are masked, with every condition; all counts are there, large ones too."""
    labels = (torch.arange(56) % 5).view(8, 7)
    x_t = labels.masked_fill(torch.arange(56).view(8, 7) % 2 == 0, 5)
    return {"input_ids": x_t, "labels": labels, "perturbation_embeds": torch.ones(8, 1, DIM), **every_condition(8)}


def num_linear(model) -> int:
    return sum(isinstance(module, nn.Linear) for module in model.modules())


@pytest.mark.parametrize("init", [True, "pissa"])
def test_every_adapter_of_a_linear_layer_starts_as_nothing_trains_and_merges_into_the_weights(model, init):
    peft = pytest.importorskip("peft", reason="peft is not installed (extra 'dev')")
    linear, before = num_linear(model), model(**batch()).logits.detach()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules="all-linear", init_lora_weights=init))
    torch.testing.assert_close(adapted(**batch()).logits, before, atol=1e-4, rtol=1e-4)
    adapted(**batch()).loss.backward()
    adapters = {name: parameter for name, parameter in adapted.named_parameters() if "lora_B" in name}
    assert len(adapters) == linear
    assert [name for name, parameter in adapters.items() if parameter.grad is None or not parameter.grad.any()] == []
    for parameter in adapters.values():
        parameter.data.add_(0.05)
    trained = adapted(**batch()).logits.detach()
    assert not torch.allclose(trained, before, atol=1e-2)
    torch.testing.assert_close(adapted.merge_and_unload()(**batch()).logits, trained, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_no_linear_layer_is_read_past_its_call_so_that_dynamic_quantisation_keeps_the_distribution(model):
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert num_linear(quantised) < num_linear(model)
    p, q = (network(**batch()).logits.softmax(dim=-1) for network in (model, quantised))
    assert (p - q).abs().mean() < 0.02
    assert quantised.generate(2, library_size=20, steps=2).shape == (2, 7)
