"""Properties of the data benchmark: readers read the same counts, and its files say what it found."""

import json
import math

import anndata
import datasets
import numpy as np
import pytest
import scipy.sparse
import torch

from eval.benchmarks import conversion as conversion_benchmark
from eval.benchmarks.conversion import Conversion, measure_conversion
from eval.benchmarks.data import main
from eval.benchmarks.data_report import Measured, last_line, summary
from eval.benchmarks.readers import BACKED, MAP_STYLE, PYTHON_LISTS, READERS, STREAMING, Rates, whole_readers
from eval.benchmarks.simulated_counts import counts_of_panel, simulated_blocks, write_simulated
from training.data.cells import Cells

SMALL = {"num_cells": (150, 120), "num_genes": (60, 20), "memory_cells": (200, 100), "batch_sizes": (4, 115)}
SMALL |= {"seconds": 1e-3, "rounds": 2}


@pytest.fixture
def in_this_process(monkeypatch):
    """Starting others takes seconds; memory is then of no interest."""
    monkeypatch.setattr(conversion_benchmark, "_in_a_fresh_process", conversion_benchmark._converted)


def conversion(num_genes: int, *, peak: float = 500.0, shard: float = 50.0) -> Conversion:
    sizes = {"gzip_bytes": 100.0, "shard_bytes": shard, "folder_bytes": 200.0}
    return Conversion(1000, num_genes, 10.0, seconds=2.0, peak_mib=peak, empty_mib=400.0, **sizes)


# --- simulated cells -------------------------------------------------------------------------------------------------


def test_simulated_cells_are_as_sparse_as_droplet_data_and_the_same_for_a_seed():
    def cells(seed: int) -> scipy.sparse.csr_matrix:
        options = {"counts_per_cell": counts_of_panel(17_002), "seed": seed}
        return scipy.sparse.vstack(list(simulated_blocks(600, 17_002, **options)), format="csr")

    found = cells(0)
    assert found.shape == (600, 17_002)
    assert found.dtype == np.int32
    assert (found != cells(0)).nnz == 0
    assert (found != cells(1)).nnz > 0
    depth = np.asarray(found.sum(axis=1)).ravel()
    assert depth.mean() == pytest.approx(2800, rel=0.15)
    assert depth.std() / depth.mean() > 0.3
    assert 0.07 < found.nnz / (600 * 17_002) < 0.13


def test_a_simulated_file_is_what_anndata_writes_with_gzip(tmp_path):
    options = {"counts_per_cell": 300.0, "seed": 3}
    stored = write_simulated(tmp_path / "blocks.h5ad", 1200, 400, **options)
    cells = anndata.read_h5ad(tmp_path / "blocks.h5ad")
    assert stored == cells.X.nnz
    assert cells.X.dtype == np.int32
    assert (scipy.sparse.vstack(list(simulated_blocks(1200, 400, **options))) != cells.X).nnz == 0
    cells.write_h5ad(tmp_path / "whole.h5ad", compression="gzip")
    ours, theirs = ((tmp_path / f"{name}.h5ad").stat().st_size for name in ("blocks", "whole"))
    assert ours == pytest.approx(theirs, rel=0.05)


# --- readers ---------------------------------------------------------------------------------------------------------


def test_every_reader_gives_the_same_counts(shards):
    cells, rows = Cells(shards, "train"), np.array([5, 0, 77, 5])
    readers = whole_readers(shards)
    assert set(readers) == set(READERS) - {STREAMING}
    for name in set(readers) - {BACKED}:
        assert torch.equal(readers[name](rows).long(), cells[rows]["input_ids"].long()), name
    in_file_order = readers[BACKED](np.arange(len(cells))).long()
    everything = cells[np.arange(len(cells))]["input_ids"]
    assert sorted(in_file_order.tolist()) == sorted(everything.tolist())  # shards are shuffled, the h5ad is not


def test_ratios_compare_readers_within_a_round():
    # the machine is twice as fast in the second round, and ten times as slow in the third
    rates = Rates({"ours": {8: [60.0, 100.0, 7.0]}, "theirs": {8: [100.0, 200.0, 10.0]}})
    assert rates.ratio("ours", "theirs", 8) == pytest.approx((0.6, 0.5, 0.7))
    assert rates.of("ours", 8) == 60.0


# --- results ---------------------------------------------------------------------------------------------------------


def test_the_last_line_is_the_worst_of_the_loader_at_the_panel_of_most_genes():
    def rates(ours: float, streamed: float) -> Rates:
        of = {name: {8: [10.0], 64: [10.0]} for name in READERS}
        of |= {MAP_STYLE: {8: [ours], 64: [ours + 1]}, STREAMING: {8: [streamed]}, PYTHON_LISTS: {8: [2.0], 64: [1.0]}}
        return Rates(of)

    few = Measured(conversion(100, shard=90.0), conversion(100), rates(1.0, 1.0))
    many = Measured(conversion(5000, shard=40.0), conversion(5000), rates(8.0, 6.0))
    assert last_line(summary([few, many])) == "loader_vs_csr=0.60 loader_vs_lists=3.00 bytes_vs_gzip=0.40"
    assert last_line(summary([many])) == last_line(summary([many, few]))


def test_the_counts_share_of_memory_is_what_empty_cells_do_not_need():
    measured = conversion(100, peak=480.0)
    assert measured.counts_mib == 80.0
    assert measured.csr_mib == pytest.approx(1000 * 10 * 8 / 2**20)
    assert Measured(measured, conversion(100, peak=440.0), Rates({})).memory_growth == 2.0
    assert math.isnan(Measured(measured, conversion(100, peak=400.0), Rates({})).memory_growth)  # not measurable


def test_everything_is_measured_printed_and_written(in_this_process, tmp_path, capsys, monkeypatch):
    cache = datasets.config.HF_DATASETS_CACHE
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scratch").mkdir()
    result = main(**SMALL, scratch=tmp_path / "scratch", out=tmp_path / "results")
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == last_line(result)
    assert list((tmp_path / "scratch").iterdir()) == []
    assert cache == datasets.config.HF_DATASETS_CACHE
    text = (tmp_path / "results" / "data.md").read_text()
    assert printed.splitlines()[:-1] == text.splitlines()[6:-1]
    content = json.loads((tmp_path / "results" / "data.json").read_text())
    assert content["command"] == (
        "dcm-benchmark data --out results --num-cells 150 120 --num-genes 60 20 --memory-cells 200 100 "
        "--batch-sizes 4 115 --seconds 0.001 --rounds 2"
    )
    assert str(tmp_path) not in text + json.dumps(content)
    assert {name: content[name] for name in result} == result
    first, second = content["measured"]
    assert first["conversion"]["num_cells"] == 150
    assert first["compared"]["num_cells"] == 200
    assert second["conversion"]["num_genes"] == 20
    for measured in (first, second):
        for name, rounds in measured["cells_per_second"].items():
            sizes = {"4": 2, "115": 2} if name != STREAMING or measured is first else {"4": 2}
            assert {B: len(rates) for B, rates in rounds.items()} == sizes, name
            assert all(rate > 0 for rates in rounds.values() for rate in rates)
        sizes = measured["conversion"]
        assert 0 < sizes["shard_bytes"] < sizes["folder_bytes"]
        assert sizes["gzip_bytes"] > 0
    assert "| streaming |" in text
    assert "Readers of 120 cells x 20 genes" in text


@pytest.mark.slow
def test_the_peak_memory_of_a_conversion_is_its_own(tmp_path):
    ballast = np.ones(2**27)  # 1 GiB here
    measured = measure_conversion(200, 30, tmp_path, seed=0)
    assert 50 < measured.peak_mib < conversion_benchmark._peak_mib() - 512
    assert 50 < measured.empty_mib < conversion_benchmark._peak_mib() - 512
    assert measured.seconds > 0
    assert (tmp_path / "shards" / "train").is_dir()
    assert ballast[-1] == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_cells": (500,)}, r"num_cells, num_genes and memory_cells have \[1, 2, 2\] numbers; expected as many"),
        ({"num_cells": (500, 9)}, r"num_cells=\(500, 9\); expected 100 or more"),
        ({"batch_sizes": ()}, r"batch_sizes=\(\); expected 1 or more"),
        ({"rounds": 0}, "rounds=0; expected 1 or more"),
        ({"seconds": 0.0}, r"seconds=0.0; expected more than 0"),
    ],
)
def test_impossible_numbers_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        main(**SMALL | wrong)


def test_results_do_not_replace_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--out '.*file' is a file; expected the name of a folder"):
        main(**SMALL, out=tmp_path / "file")
