"""Properties of the loader: batches are the cells of the file, and every process gets its piece of one order."""

import json
import logging
import shutil
from itertools import chain, islice
from pathlib import Path

import anndata
import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse
import torch

from tokenization import DCMTokenizer
from training.convert_h5ad import main
from training.data import shards
from training.data.loader import Cells, GlobalBatchSampler, SparseRows, open_cells, to_csr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    rng = np.random.default_rng(0)
    n = 400
    counts = rng.poisson(rng.gamma(0.4, 3.0, size=(n, 20)))
    counts[:10] = 0
    obs = pd.DataFrame(
        {
            "cell_type": rng.choice(["a", "b"], n),
            "perturbation": rng.choice(["control", "g1", "g1+g2"], n),
            "day": rng.choice(["d0", "d1"], n),
        },
        index=[f"c{i}" for i in range(n)],
    )
    cells = anndata.AnnData(counts.astype(np.int32), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(20)]))
    cells.write_h5ad(folder / "cells.h5ad")
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    patch.setattr(shards, "SHARD_CELLS", 64)
    keys = {"cell_type_key": "cell_type", "perturbation_key": "perturbation", "covariate_keys": "day"}
    main(folder / "cells.h5ad", out=folder / "shards", **keys)
    yield folder / "shards"
    patch.undo()


def rows_of(dense: np.ndarray, *labels: np.ndarray) -> list[tuple]:
    return sorted(zip(*dense.T.tolist(), *labels))


@pytest.mark.parametrize("streaming", [False, True])
def test_no_epoch_puts_cells_back_into_the_order_of_their_file(folder, tmp_path, monkeypatch, streaming):
    """Conversion and loader both shuffle, from the same seed by default: the one must not undo the other."""
    monkeypatch.setattr(shards, "SHARD_CELLS", 4096)
    main(folder.parent / "cells.h5ad", out=tmp_path / "shards", cell_type_key="cell_type")
    file = anndata.read_h5ad(tmp_path / "shards" / "train.h5ad").X.toarray()
    assert rows_of(Cells(tmp_path / "shards", "train").csr().toarray()) == rows_of(file)  # not those of a cache
    place = {row.tobytes(): index for index, row in enumerate(file.astype(np.int64))}
    cells = open_cells(
        tmp_path / "shards",
        "train",
        DCMTokenizer.from_pretrained(tmp_path / "shards" / "tokenizer"),
        streaming=streaming,
    )
    num_batches = len(cells) // 8
    for seed in (0, 1):
        batches = cells.batches(batch_size=8, seed=seed)
        for _ in range(2):  # epochs
            places = [
                place[row.tobytes()]
                for batch in islice(batches, num_batches)
                for row in batch["input_ids"].long().numpy()
            ]
            assert abs(np.corrcoef(places, np.arange(len(places)))[0, 1]) < 0.3  # 1 in the order of the file


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_split_is_the_cells_of_its_h5ad(folder, split):
    cells, file = Cells(folder, split), anndata.read_h5ad(folder / f"{split}.h5ad")
    assert len(cells) == len(file)
    columns = ("cell_type", "perturbation", "day")
    here = rows_of(cells.csr().toarray(), *(cells.labels(name) for name in columns))
    assert here == rows_of(file.X.toarray(), *(file.obs[name] for name in columns))


def test_a_batch_is_its_rows_of_the_split_in_the_order_asked_for(folder):
    cells = Cells(folder, "train")
    (empty,) = np.nonzero(np.asarray(cells.csr().sum(axis=1)).ravel() == 0)
    indices = [200, 3, 3, int(empty[0]), 287]
    batch = cells[indices]
    expected = cells.csr()[indices].toarray()
    assert batch["input_ids"].tolist() == expected.tolist()
    assert batch["library_size"].tolist() == expected.sum(axis=1).tolist()
    for name, labels in (("cell_type_ids", "cell_type"), ("perturbation_ids", "perturbation")):
        ids = getattr(cells.tokenizer, name)(cells.labels(labels)[indices])
        assert torch.equal(batch[name], ids)
    assert torch.equal(batch["covariate_ids"], cells.tokenizer.covariate_ids({"day": cells.labels("day")[indices]}))
    assert {name: tuple(values.shape) for name, values in batch.items()} == {
        "input_ids": (5, 20),
        "library_size": (5,),
        "cell_type_ids": (5,),
        "perturbation_ids": (5, 2),
        "covariate_ids": (5, 1),
    }
    for index in (-1, 288):
        with pytest.raises(IndexError, match="of 288; expected 0 to 287"):
            cells[[0, index]]
    plain = DCMTokenizer.from_labels(genes=[f"g{i}" for i in range(20)], max_count=99)  # it knows no condition
    assert set(Cells(folder, "train", plain)[[0, 1]]) == {"input_ids", "library_size"}
    binned = lowered(folder, 1000, [3, 10])
    assert torch.equal(
        Cells(folder, "train", binned)[indices]["input_ids"].long(), torch.tensor(binned.count_ids(expected))
    )


@pytest.mark.parametrize(
    ("max_count", "narrowest"), [(125, torch.int8), (126, torch.int16), (32_765, torch.int16), (32_766, torch.int32)]
)
def test_ids_come_in_the_narrowest_type_that_holds_mask_and_pad_and_the_rest_in_int64(folder, max_count, narrowest):
    tokenizer = lowered(folder, max_count)
    cells, rows = Cells(folder, "train", tokenizer), [7, 0, 200]
    batch = cells[rows]
    assert batch["input_ids"].dtype == narrowest
    assert torch.iinfo(narrowest).max >= tokenizer.pad_token_id
    assert batch.pop("input_ids").tolist() == cells.csr(rows).toarray().tolist()
    assert all(values.dtype == torch.int64 for values in batch.values())


def one_file_copy(folder, tmp_path) -> tuple[Path, Path, pa.Table]:
    """A copy of the shards to tamper with, the only file of its training cells, and what to write there."""
    copy = tmp_path / "shards"
    shutil.copytree(folder, copy)
    files = sorted((copy / "train").glob("*.parquet"))
    table = pa.concat_tables(map(pq.read_table, files))
    for file in files:
        file.unlink()
    return copy, files[0], table


def test_genes_that_were_not_measured_are_pad(folder, tmp_path):
    copy, file, table = one_file_copy(folder, tmp_path)
    # cells of two panels in turn; the second lacks genes that the file has counts of: PAD must replace them
    features = datasets.Features.from_arrow_schema(table.schema)
    features["panel"] = datasets.ClassLabel(names=["all", "few"])
    panel = np.arange(len(table)) % 2
    columns = [*(table.column(name) for name in table.column_names), pa.array(panel)]
    pq.write_table(pa.Table.from_arrays(columns, schema=features.arrow_schema), file, row_group_size=64)
    with pytest.raises(FileNotFoundError, match=r"no panels\.json in"):
        Cells(copy, "train")
    panels = {"all": {"files": ["a"], "missing_genes": []}, "few": {"files": ["b"], "missing_genes": ["g3", "g19"]}}
    (copy / "panels.json").write_text(json.dumps(panels))
    cells, plain = Cells(copy, "train"), Cells(folder, "train")
    indices = [1, 0, 7, 6]
    expected = plain[indices]["input_ids"]
    expected[::2, [3, 19]] = cells.tokenizer.pad_token_id
    assert torch.equal(cells[indices]["input_ids"], expected)
    assert cells.not_measured(indices).sum(axis=1).tolist() == [2, 0, 2, 0]
    assert plain.not_measured(indices) is None
    assert set(cells[indices]) == set(plain[indices])
    with pytest.raises(ValueError, match="no condition 'panel' in the shards; they have: cell_type, perturbation, day"):
        cells.labels("panel")


def test_a_missing_label_is_not_given(folder, tmp_path):
    copy, file, table = one_file_copy(folder, tmp_path)
    codes = [None, -1, *table.column("cell_type").to_pylist()[2:]]
    index = table.schema.get_field_index("cell_type")
    pq.write_table(table.set_column(index, table.schema.field(index), pa.array(codes)), file)
    assert Cells(copy, "train")[[0, 1, 2]]["cell_type_ids"].tolist() == [-1, -1, codes[2]]


def lowered(folder, max_count: int, count_bins: list[int] | None = None) -> DCMTokenizer:
    full = DCMTokenizer.from_pretrained(folder / "tokenizer")
    labels = {name: getattr(full, name) for name in ("cell_types", "perturbations", "control", "covariates")}
    return DCMTokenizer(genes=full.genes, max_count=max_count, count_bins=count_bins, **labels)


def test_counts_above_the_largest_are_an_error_in_training_and_clipped_elsewhere_with_one_warning(folder, caplog):
    caplog.set_level(logging.WARNING)
    with pytest.raises(ValueError, match=r"a training cell has the count .* above max_count=2"):
        Cells(folder, "train", lowered(folder, 2))[list(range(100))]
    cells, full = Cells(folder, "validation", lowered(folder, 2)), Cells(folder, "validation")
    indices = list(range(len(cells)))
    for _ in range(2):
        batch = cells[indices]
    assert torch.equal(batch["input_ids"], full[indices]["input_ids"].clamp(max=2))
    assert torch.equal(batch["library_size"], full[indices]["library_size"])
    assert len(caplog.records) == 1
    assert "validation cells have counts above max_count=2" in caplog.text


def test_folders_and_conditions_that_are_not_there_are_refused(folder):
    with pytest.raises(FileNotFoundError, match=r"no holdout/\*\.parquet in .*; expected what dcm-convert"):
        Cells(folder, "holdout")
    with pytest.raises(ValueError, match="no condition 'donor' in the shards; they have: cell_type, perturbation, day"):
        Cells(folder, "train").labels("donor")
    other = DCMTokenizer.from_labels(genes=[f"g{i}" for i in range(20)], max_count=99, covariates={"donor": ["a"]})
    with pytest.raises(
        ValueError, match=r"the shards have the conditions \['cell_type', .*\] but the tokenizer \['donor'\]"
    ):
        Cells(folder, "train", other)


@pytest.fixture
def matrix():
    counts = scipy.sparse.random(50, 9, density=0.3, format="csr", random_state=0, dtype=np.float64)
    counts.data = np.arange(1, counts.nnz + 1)
    dense = counts.toarray().astype(np.uint16)
    dense[[0, 7, 49]] = 0
    return scipy.sparse.csr_matrix(dense)


def list_columns(matrix, cuts: list[int]) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """The matrix as two columns of lists, in chunks that end at ``cuts``."""
    offsets = pa.array(matrix.indptr, pa.int32())
    pieces = list(zip([0, *cuts], [*cuts, matrix.shape[0]]))
    return tuple(
        pa.chunked_array([pa.ListArray.from_arrays(offsets, values)[a:b] for a, b in pieces])
        for values in (matrix.indices.astype(np.uint16), matrix.data)
    )


@pytest.mark.parametrize("cuts", [[], [25], [1, 2, 30, 49]])
def test_rows_of_list_columns_are_the_rows_of_the_matrix(matrix, cuts):
    rows_ = SparseRows(*list_columns(matrix, cuts))
    assert len(rows_) == 50
    for wanted in ([0], [49, 0, 7], [3, 4, 5, 5, 4, 24, 25, 26, 1, 2], list(range(50)), []):
        indptr, positions, values = rows_.take(np.array(wanted, dtype=np.int64))
        assert (to_csr(indptr, positions, values, 9) != matrix[wanted]).nnz == 0
        if len(values):
            assert values.dtype == positions.dtype == np.uint16


def test_rows_are_views_of_the_arrow_buffers_and_as_many_genes_as_counts(matrix):
    columns, before = list_columns(matrix, [25]), pa.total_allocated_bytes()
    rows_ = SparseRows(*columns)
    assert pa.total_allocated_bytes() == before
    assert all(not view.flags.owndata for views in rows_._views for view in views)
    wrong = matrix.toarray()
    wrong[1] = 1
    with pytest.raises(ValueError, match="the shards are damaged; convert again"):
        SparseRows(columns[0], list_columns(scipy.sparse.csr_matrix(wrong), [25])[1])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_global_batches_do_not_depend_on_the_number_of_processes(world_size):
    whole = list(GlobalBatchSampler(103, batch_size=16, seed=5).epoch(0))
    pieces = [
        list(GlobalBatchSampler(103, batch_size=16 // world_size, seed=5, rank=rank, world_size=world_size).epoch(0))
        for rank in range(world_size)
    ]
    assert [list(chain(*batch)) for batch in zip(*pieces)] == whole
    assert all(len(piece) == len(whole) == 6 for piece in pieces)


def test_an_epoch_has_no_cell_twice_and_epochs_differ():
    sampler = GlobalBatchSampler(100, batch_size=16, seed=0)
    seen = []
    for epoch in (0, 1, 0):
        seen.append(list(chain(*sampler.epoch(epoch))))
        assert len(set(seen[-1])) == len(seen[-1]) == 96 == 16 * len(sampler)
    assert seen[0] == seen[2] != seen[1]
    assert list(chain(*GlobalBatchSampler(100, batch_size=16, seed=1).epoch(0))) != seen[0]


def test_fewer_cells_than_a_global_batch_are_repeated():
    pieces = [list(GlobalBatchSampler(5, batch_size=4, seed=0, rank=rank, world_size=3).epoch(0)) for rank in range(3)]
    assert [len(piece) for piece in pieces] == [1, 1, 1]
    everything = [index for piece in pieces for index in piece[0]]
    assert len(everything) == 12
    assert sorted(np.bincount(everything).tolist()) == [2, 2, 2, 3, 3]
