"""Properties of streaming: the same cells as memory-mapped, shuffled by blocks, shared and resumed without loss."""

import shutil
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pytest
import torch

from eval.simulate import main as simulate
from tests.tiny_training import tiny_training
from tokenization import DCMTokenizer
from training.convert_h5ad import main as convert
from training.data import loader as stream
from training.data.loader import BlockBatchSampler, Cells, StreamedCells, open_cells
from training.data.shards import local_folder
from training.train import main as train


@pytest.fixture
def streamed(block_shards) -> StreamedCells:
    return open_cells(block_shards, "train", streaming=True)


@pytest.fixture
def read(monkeypatch) -> list[int]:
    """Blocks that were read from the files, in order."""
    blocks: list[int] = []
    join = StreamedCells._block

    def block(self, index):
        if index not in self._blocks:
            blocks.append(index)
        return join(self, index)

    monkeypatch.setattr(StreamedCells, "_block", block)
    return blocks


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, values in first.items():
        assert values.dtype == second[name].dtype
        assert torch.equal(values, second[name]), name


def test_streamed_cells_are_the_memory_mapped_cells(block_shards, streamed):
    mapped = open_cells(block_shards, "train")
    assert (type(mapped), type(streamed)) == (Cells, StreamedCells)
    with pytest.raises(FileNotFoundError, match=r"no holdout/\*\.parquet in"):
        open_cells(block_shards, "holdout", streaming=True)
    assert len(streamed) == len(mapped) > 400
    assert len(streamed._places) > 10
    assert (streamed.csr() != mapped.csr()).nnz == 0
    for name in ("cell_type", "perturbation"):
        assert (streamed.labels(name) == mapped.labels(name)).all()
    for rows in ([0], [300, 3, 3, 0, 161, 31, 32], list(range(len(mapped)))):
        assert_equal(streamed[rows], mapped[rows])
    batches = streamed.batches(batch_size=50, seed=0)
    for rows in streamed._sampler(batch_size=50, seed=0).epoch(0):
        assert_equal(next(batches), mapped[rows])


def test_shards_elsewhere_are_streamed_from_there(block_shards, streamed, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    elsewhere = fsspec.filesystem("memory")
    elsewhere.put(str(block_shards), "/shards", recursive=True)
    folder = local_folder(Path("memory://shards"))
    assert not list(folder.rglob("*.parquet"))
    assert DCMTokenizer.from_pretrained(folder / "tokenizer").genes == streamed.tokenizer.genes
    cells = open_cells(folder, "train", streaming=True)
    assert len(cells) == len(streamed)
    batches = (of.batches(batch_size=50, seed=0, rank=1, world_size=2) for of in (cells, streamed))
    for _, mine, expected in zip(range(8), *batches):
        assert_equal(mine, expected)
    config = tiny_training(Path("memory://shards"), tmp_path / "out", max_steps=1, streaming=True, batch_size=4)
    config.check_files()
    assert (train(config) / "model.safetensors").is_file()
    with pytest.raises(FileNotFoundError, match="no shards at 'memory://nothing'; expected a folder that dcm-convert"):
        local_folder(Path("memory://nothing"))


def test_cells_of_many_blocks_are_taken_from_a_few_at_a_time(block_shards, streamed, read):
    rows = np.random.default_rng(0).permutation(len(streamed)).tolist()
    assert_equal(streamed[rows], open_cells(block_shards, "train")[rows])
    assert sorted(read) == list(range(len(streamed._places)))
    assert len(streamed._blocks) == stream.BLOCKS_IN_MEMORY


def test_random_cells_are_of_few_blocks_and_where_there_are_few_those_of_memory_mapped_cells(
    block_shards, streamed, read, monkeypatch
):
    among = np.arange(10, len(streamed))
    same = open_cells(block_shards, "train").random_cells(among, 20, np.random.default_rng(3))
    assert (streamed.random_cells(among, 20, np.random.default_rng(3)) == same).all()
    monkeypatch.setattr(stream, "RANDOM_BLOCKS", 3)
    rows = streamed.random_cells(among, 20, np.random.default_rng(3))
    assert len(set(rows.tolist())) == 20
    assert rows.min() >= 10
    streamed.csr(np.sort(rows))
    assert 1 < len(read) <= 3


@pytest.mark.parametrize("streaming", [False, True])
def test_a_damaged_shard_is_named(block_shards, tmp_path, monkeypatch, streaming):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    copy = shutil.copytree(block_shards, tmp_path / "shards")
    files = sorted((copy / "train").glob("*.parquet"))
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[: len(whole) // 2])  # cut short: without its footer
    with pytest.raises(ValueError, match=r"the shard '.*00001\.parquet' is damaged \(.*\): copy it again, or run"):
        open_cells(copy, "train", streaming=streaming)
    files[1].write_bytes(whole[:4] + bytes(500) + whole[504:])  # its footer is whole, its first values are not
    with pytest.raises(ValueError, match=r"the shard '.*00001\.parquet' is damaged \(.*\): copy it again, or run"):
        open_cells(copy, "train", streaming=streaming)[[5, 160]]


def test_an_epoch_has_no_cell_twice_and_reads_each_block_once_and_batches_are_of_several_blocks(streamed, read):
    sampler = BlockBatchSampler(streamed._first_cells, batch_size=16, seed=0)
    seen = []
    for epoch in (0, 1, 0):
        batches = list(sampler.epoch(epoch))
        assert len(batches) == len(sampler) == len(streamed) // 16
        seen.append([row for batch in batches for row in batch])
        assert len(set(seen[-1])) == len(seen[-1])
        blocks = [len(np.unique(np.searchsorted(sampler.first_cells, batch, side="right"))) for batch in batches]
        assert np.mean(blocks) > 2.5
    assert seen[0] == seen[2] != seen[1]
    of_epoch = streamed.batches(batch_size=16, seed=0)
    for _ in range(len(sampler)):
        next(of_epoch)
    assert sorted(read) == list(range(len(streamed._places)))
    assert len(streamed._blocks) <= stream.BLOCKS_IN_MEMORY


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_blocks_and_have_as_many_batches(streamed, world_size):
    first_cells = streamed._first_cells
    samplers = [
        BlockBatchSampler(first_cells, batch_size=8, seed=0, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for epoch in range(5):
        blocks, lengths = [], set()
        for sampler in samplers:
            batches = list(sampler.epoch(epoch))
            lengths.add(len(batches))
            rows = [row for batch in batches for row in batch]
            blocks.append(set(np.searchsorted(first_cells, rows, side="right").tolist()))
        assert lengths == {len(samplers[0])}
        assert not set.intersection(*blocks)


@pytest.mark.parametrize("start", [0, 13, 26, 27, 60])
def test_a_resumed_run_goes_on_with_the_same_batches_and_reads_only_what_they_need(block_shards, streamed, read, start):
    options = {"batch_size": 16, "seed": 4}
    uninterrupted = streamed.batches(**options)
    for _ in range(start):
        next(uninterrupted)
    read.clear()
    resumed = open_cells(block_shards, "train", streaming=True).batches(**options, start=start)
    assert_equal(next(resumed), next(uninterrupted))
    assert len(read) <= 3 * stream.BLOCKS_IN_MEMORY
    for _ in range(30):
        assert_equal(next(resumed), next(uninterrupted))


def test_data_too_small_to_share_are_refused(block_shards):
    cells = open_cells(block_shards, "validation", streaming=True)
    with pytest.raises(ValueError, match=r"less than a batch of 64; do not stream data this small \(streaming=False\)"):
        next(cells.batches(batch_size=64, seed=0))
    with pytest.raises(ValueError, match="in 2 blocks leave a process as few as 0 of them"):
        next(cells.batches(batch_size=1, seed=0, rank=2, world_size=3))


def test_shards_without_labels_stream_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    simulate(tmp_path / "cells.h5ad", num_cells=100, num_genes=5, num_perturbations=0, num_pairs=0)
    convert(tmp_path / "cells.h5ad", out=tmp_path / "shards")
    streamed, mapped = (open_cells(tmp_path / "shards", "train", streaming=streaming) for streaming in (True, False))
    assert len(streamed) == len(mapped)
    assert_equal(streamed[[3, 1]], mapped[[3, 1]])
