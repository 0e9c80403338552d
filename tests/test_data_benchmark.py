"""Properties of the readers' benchmark: every reader reads the same counts, and each is measured."""

import numpy as np
import pytest
import torch

from training.cells import Cells
from training.data_benchmark import READERS, _yardsticks, main


def test_every_yardstick_reads_the_same_counts(shards):
    cells, rows = Cells(shards, "train"), np.array([5, 0, 77, 5])
    readers = _yardsticks(shards, "train", cells.csr())
    assert torch.equal(readers["in-memory CSR"](rows).long(), cells[rows]["counts"])
    assert torch.equal(readers["Python-list rows"](rows), cells[rows]["counts"])
    in_file_order = readers["backed AnnData rows"](np.arange(len(cells))).long()
    everything = cells[np.arange(len(cells))]["counts"]
    assert sorted(in_file_order.tolist()) == sorted(everything.tolist())  # shards are shuffled, the h5ad is not


def test_every_reader_is_measured_and_the_table_says_so(shards, capsys):
    best = main(shards, batch_sizes=(8, 16), seconds=1e-3)
    assert set(best) == set(READERS)
    assert all(rates[B] > 0 for rates in best.values() for B in (8, 16))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("216 cells of train, 15 genes, ")
    assert [line.split(" | ")[0].strip("| ") for line in lines[3:8]] == list(READERS)
    assert lines[-1].startswith("B=16 map_over_memory=")


def test_a_split_too_small_to_stream_is_measured_without(shards):
    best = main(shards, batch_sizes=(1000,), seconds=1e-3)
    assert not best["streaming"]
    assert best["map-style"][1000] > 0


def test_impossible_numbers_are_refused(shards):
    with pytest.raises(ValueError, match=r"seconds=0, batch_sizes=\(64, 512\); expected numbers above 0"):
        main(shards, seconds=0)
