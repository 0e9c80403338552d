"""What stands in place of a linear layer is heard: adapters of PEFT train and start as nothing, 8-bit layers run."""

import pytest
import torch
from torch import nn

DIM = 6  # of frozen vectors


@pytest.fixture
def model(make_model, backbone):
    model = make_model(backbone, conditioned=True, condition_tokens=True, perturbation_dim=DIM)
    model.conditions.perturbation.has_vector[1:] = True
    model.conditions.perturbation.table.normal_(generator=torch.Generator().manual_seed(1))
    return model


def cells() -> dict[str, torch.Tensor]:
    """Eight cells of which half of the genes are masked, with every condition; all counts are there, large ones too."""
    labels = (torch.arange(56) % 5).view(8, 7)
    return {
        "input_ids": labels.masked_fill(torch.arange(56).view(8, 7) % 2 == 0, 5),
        "labels": labels,
        "cell_type_ids": torch.arange(8) % 3,
        "perturbation_ids": torch.arange(8)[:, None] % 4,
        "perturbation_embeds": torch.ones(8, 1, DIM),
        "covariate_ids": torch.stack([torch.arange(8) % 2, torch.arange(8) % 3], dim=1),
        "library_size": torch.arange(8) * 5.0,
    }


def lora(model, **options):
    peft = pytest.importorskip("peft", reason="peft is not installed (extra 'dev')")
    return peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules="all-linear", **options))


def num_linear(model) -> int:
    return sum(isinstance(module, nn.Linear) for module in model.modules())


@pytest.mark.parametrize("init", [True, "pissa"])
def test_every_adapter_of_a_linear_layer_starts_as_nothing_trains_and_merges_into_the_weights(model, init):
    batch, linear = cells(), num_linear(model)
    before = model(**batch).logits.detach()
    adapted = lora(model, init_lora_weights=init)
    torch.testing.assert_close(adapted(**batch).logits, before, atol=1e-4, rtol=1e-4)
    adapted(**batch).loss.backward()
    gradients = {name: p.grad for name, p in adapted.named_parameters() if "lora_B" in name}
    assert len(gradients) == linear
    for name, gradient in gradients.items():
        assert gradient is not None and bool(gradient.any()), name
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.05)
    trained = adapted(**batch).logits.detach()
    assert not torch.allclose(trained, before, atol=1e-2)
    torch.testing.assert_close(adapted.merge_and_unload()(**batch).logits, trained, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_no_linear_layer_is_read_past_its_call_so_that_dynamic_quantisation_keeps_the_distribution(model):
    batch = cells()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert num_linear(quantised) < num_linear(model)
    p, q = (network(**batch).logits.softmax(dim=-1) for network in (model, quantised))
    assert (p - q).abs().mean() < 0.02
    assert quantised.generate(2, library_size=20, steps=2).shape == (2, 7)
