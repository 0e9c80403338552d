"""Properties of training that starts from statistics: what the first network knows, and that runs go on and over."""

import pytest
import torch

from modeling_dcm import DCMForDenoising
from tests.tiny_training import tiny_training
from tokenization import DCMTokenizer
from training.data.cells import Cells
from training.loop.effects import cell_states
from training.loop.estimates import STATE_DIMS
from training.loop.start import build_model, chosen_state_dim
from training.train import main as train

FIRST = {"count_distribution": "nb", "state_dim": 3}


def start(shards, out, **options) -> tuple[DCMForDenoising, Cells]:
    tokenizer = DCMTokenizer.from_pretrained(shards / "tokenizer")
    cells = Cells(shards, "train", tokenizer)
    return build_model(tiny_training(shards, out, **FIRST | options), tokenizer, cells), cells


def nats(model: DCMForDenoising, cells: Cells, **options) -> float:
    """Cross-entropy of all genes of training cells that are wholly masked."""
    batch = cells[list(range(64))]
    masked = torch.full_like(batch["input_ids"].long(), model.config.mask_token_id)
    given = {"cell_type_ids": batch["cell_type_ids"], "library_size": batch["library_size"].float()}
    with torch.no_grad():
        return model(masked, labels=batch["input_ids"].long(), **given, **options).loss.item()


def test_the_first_network_knows_depth_and_state_and_the_paper_s_does_not(shards, tmp_path):
    model, cells = start(shards, tmp_path)
    paper, _ = start(shards, tmp_path, count_distribution="categorical", state_dim=0)
    told = cell_states(model, cells)[:64]
    assert nats(model, cells, state=told) < nats(model, cells) < nats(paper, cells)


def test_states_of_training_cells_are_white(shards, tmp_path):
    model, cells = start(shards, tmp_path)
    states = cell_states(model, cells)
    torch.testing.assert_close(states.mean(dim=0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cov(states.T), torch.eye(3), atol=1e-3, rtol=0)


@pytest.mark.parametrize("keep_states", [False, True])
def test_drawn_states_have_the_mean_of_their_cell_type(shards, tmp_path, keep_states):
    model, cells = start(shards, tmp_path, keep_states=keep_states)
    assert model.state_source.has_bank == keep_states
    states, types = cell_states(model, cells), cells.conditions["cell_type_ids"]
    for label in (0, 1):
        ids = torch.full((2_000,), label)
        keys = model.library_sizes.group_keys(2_000, ids, None, None)
        source = model.state_source
        if keep_states:
            drawn = source.bank[source.rows_of_bank(keys, 0)]
        else:
            drawn = source.draw(keys, ids, torch.Generator().manual_seed(0))
        own = states[types == label]
        assert (drawn[:, :3].mean(dim=0) - own.mean(dim=0)).abs().max() < 0.3
        assert (drawn[:, :3].std(dim=0) - own.std(dim=0)).abs().max() < 0.4


def test_a_checkpoint_draws_completes_and_scores_in_a_fresh_model(shards, tmp_path):
    model = DCMForDenoising.from_pretrained(train(tiny_training(shards, tmp_path / "out", **FIRST)))
    cells = model.generate(6, cell_type_ids=torch.arange(6) % 2, steps=2)
    assert cells.shape == (6, 15)
    assert torch.equal(model.generate(observed=cells), cells)
    assert bool(model.log_likelihood(cells, num_samples=2).isfinite().all())
    assert model.config.entropy_curve is not None


def test_fine_tuning_on_the_same_data_starts_as_the_same_function(shards, tmp_path):
    out = train(tiny_training(shards, tmp_path / "out", **FIRST))
    tuned = train(tiny_training(shards, tmp_path / "tuned", init_from=str(out), max_steps=1, learning_rate=1e-12))
    x = torch.full((2, 15), DCMForDenoising.from_pretrained(out).config.mask_token_id)
    given = {"library_size": torch.tensor([20.0, 40.0]), "state": torch.randn(2, 3)}
    first, second = (DCMForDenoising.from_pretrained(folder)(x, **given).logits for folder in (out, tuned))
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)


def test_how_many_components_is_found_by_drawing_cells_unless_it_is_said(shards, tmp_path):
    model, cells = start(shards, tmp_path, state_dim=None)
    assert model.config.state_dim in STATE_DIMS
    assert chosen_state_dim(tiny_training(shards, tmp_path, state_dim=5), cells) == 5


def test_too_few_whole_cells_are_refused(shards, tmp_path):
    with pytest.raises(ValueError, match="training cells have every gene measured, expected more than 1001"):
        start(shards, tmp_path, state_dim=1000)
