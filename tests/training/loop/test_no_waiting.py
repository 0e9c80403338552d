"""A training step and a sampling step never make an accelerator wait: nothing in them depends on what tensors hold.

Shown twice: by the operations that PyTorch dispatches on a CPU, and on the device ``meta``, whose tensors hold nothing,
can't be copied from, and can't be mixed with those of a CPU.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eval.benchmarks.training import OPTIONS, OURS, Case, SimulatedCells, Training, start_accelerator
from modeling_dcm.diffusion_dcm import keyed_generator
from modeling_dcm.guidance_dcm import denoiser
from training.loop.batches import BLOCK, TrainBatches, gene_keys
from training.loop.step import take_step, update_average

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "_unique2", "unique_dim", "bincount"}


class Refusing(TorchDispatchMode):
    """Refuses operations whose result, or the shape of it, has to be known before the next one."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        if name in WAITING:
            raise AssertionError(f"{name} waits")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            assert all(index is None or index.dtype == torch.int64 for index in args[1]), "a shape depends on a mask"
        return operation(*args, **(kwargs or {}))


@pytest.fixture
def model(make_model, backbone):
    """Every condition, a cell state, and a head of two stages."""
    return make_model(backbone, conditioned=True, count_distribution="nb", state_dim=2, num_genes=24)


def batch_of(model, B: int = 8) -> dict[str, torch.Tensor]:
    """Clean cells with every condition, as a loader reads them."""
    counts = torch.arange(24 * B).view(B, 24) % model.config.num_counts
    ids = {"cell_type_ids": torch.arange(B) % 3, "perturbation_ids": torch.arange(B)[:, None] % 4}
    covariates = torch.stack([torch.arange(B) % 2, torch.arange(B) % 3], dim=1)
    return {"input_ids": counts.short(), "library_size": counts.sum(dim=1), **ids, "covariate_ids": covariates}


class PartlyMeasured(SimulatedCells):
    """In half of the cells a gene was not measured."""

    measured = np.array([[True], [False]])

    def batches(self, **order):
        for batch in super().batches(**order):
            batch["input_ids"][::2, 0] = 502
            yield batch


@pytest.mark.parametrize("cells", [SimulatedCells, PartlyMeasured])
def test_a_training_step_waits_for_nothing(backbone, cells):
    training = Training(Case("small", backbone, OURS, genes=40, cells=6), start_accelerator(), cells(40, 6))
    step = (training.model, training.optimizer, training.batches, training.accelerator, training.config)
    assert training.network.config.pad_token_id == 502
    with Refusing():
        for _ in range(2):
            take_step(*step, several_panels=cells is PartlyMeasured)
            update_average(training.ema, training.network, 0, 0.9)


def test_forward_and_backward_pass_and_a_sampling_step_need_no_value_of_a_tensor(model, monkeypatch):
    on_cpu = lambda *key, device="cpu": keyed_generator(*key)  # noqa: E731 (`meta` has no generators)
    monkeypatch.setattr("training.loop.batches.keyed_generator", on_cpu)
    options = replace(OPTIONS, query_genes=6)
    model.to("meta").train()
    inputs = TrainBatches(None, options, model.config, device="meta", state=model.state).noised(batch_of(model), 0)
    model(**inputs).loss.backward()
    x = torch.full((5, 24), model.config.mask_token_id, device="meta")
    conditions = {"cell_type_ids": x[:, 0], "library_size": x[:, 0].float()}
    for w in (0.0, 1.5):
        denoise = denoiser(model.eval(), x, torch.arange(24, device="meta"), conditions, w, from_nothing=True)
        with torch.no_grad():
            for known in (0, 7):
                p = denoise(x, x[:, :4], x[:, :known])
                assert w or p.draw(None).shape == (5, 4)


def test_large_counts_cost_the_same_nats_whether_their_number_is_looked_at_or_known(make_model, backbone):
    model = make_model(backbone, count_distribution="nb", num_genes=24)
    labels = batch_of(model)["input_ids"].long()
    distribution = model.distribution(torch.full_like(labels, model.config.mask_token_id))
    number = int((labels >= model.config.num_small).sum())
    expected = distribution.full().log_softmax(dim=-1).gather(-1, labels[..., None])[..., 0]
    for known in (None, number, number + 3, 10**6):
        torch.testing.assert_close(distribution.cross_entropy(labels, known), -expected)


def test_a_block_of_rows_has_the_same_keys_in_every_process_and_others_than_its_neighbours():
    whole = gene_keys(3, 5, 0, (100, 7), torch.device("cpu"))
    for first, B in ((0, 1), (BLOCK - 1, 2), (50, 50), (99, 1)):
        assert torch.equal(gene_keys(3, 5, first, (B, 7), torch.device("cpu")), whole[first : first + B])
    assert len(whole.flatten().unique()) == 700
    assert not torch.isin(whole, gene_keys(3, 6, 0, (100, 7), torch.device("cpu"))).any()


def test_a_batch_is_made_while_the_one_before_it_is_in_use_and_what_fails_there_is_raised_here():
    made = []

    class Cells:
        measured = np.ones((1, 3), dtype=bool)

        def batches(self, **order):
            for index in range(3):
                made.append(index)
                yield {"input_ids": torch.zeros(2, 3, dtype=torch.int16), "library_size": torch.zeros(2)}
            raise OSError("a shard is gone")

    training = Training(Case("small", "latent", OURS, genes=3, cells=2), start_accelerator(), SimulatedCells(3, 2))
    batches = TrainBatches(Cells(), training.config, training.network.config, rank=0, world=1, device="cpu")
    found = batches.starting_at(0)
    next(found)
    next(found)
    next(found)
    assert made == [0, 1, 2]
    with pytest.raises(OSError, match="a shard is gone"):
        next(found)
    assert batches.waited > 0
