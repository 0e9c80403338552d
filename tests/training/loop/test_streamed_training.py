"""Properties of training on streamed shards: it resumes exactly, starts from the same network, and stays streamed."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_training import tiny_training
from training.convert_h5ad import main as convert
from training.data import shards as shards_module
from training.data.streaming import StreamedCells
from training.loop import run
from training.loop.start import build_model, build_tokenizer, open_cells
from training.train import main


@pytest.fixture(scope="module")
def blocks(cells_h5ad, tmp_path_factory):
    """The cells of ``shards`` in many small row groups."""
    patch = pytest.MonkeyPatch()
    patch.setattr(shards_module, "ROW_GROUP_CELLS", 16)
    patch.setattr(shards_module, "SHARD_CELLS", 64)
    keys = {"cell_type_key": "cell_type", "perturbation_key": "perturbation"}
    yield convert(cells_h5ad, out=tmp_path_factory.mktemp("blocks") / "shards", **keys)
    patch.undo()


def test_a_streamed_run_starts_from_the_same_network(blocks, tmp_path):
    states = []
    for streaming in (False, True):
        config = tiny_training(blocks, tmp_path, streaming=streaming)
        tokenizer = build_tokenizer(config)
        cells = open_cells(config, "train", tokenizer)
        assert isinstance(cells, StreamedCells) == streaming
        torch.manual_seed(0)
        states.append(build_model(config, tokenizer, cells).state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_streamed_run_that_was_stopped_ends_with_the_same_weights(blocks, tmp_path, monkeypatch):
    config = tiny_training(blocks, tmp_path / "whole", streaming=True)
    main(config)
    broken = replace(config, out=tmp_path / "broken")
    steps = iter(range(100))
    take_step = run.take_step

    def stops(*arguments, **options):
        if next(steps) == 4:
            raise KeyboardInterrupt
        return take_step(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "take_step", stops)
        main(broken)
    with pytest.raises(ValueError, match=r"cannot be resumed with other options .*streaming: True then, False now"):
        main(replace(broken, resume=True, streaming=False))
    main(replace(broken, resume=True))
    ours, theirs = (load_file(out / "model.safetensors") for out in (config.out, broken.out))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
