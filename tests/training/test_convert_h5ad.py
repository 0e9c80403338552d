"""Properties of dcm-convert: what goes in comes out, only training cells decide, and bad input leaves nothing."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import anndata
import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import scipy.sparse

from tokenization import DCMTokenizer
from training.conversion import write
from training.convert_h5ad import main
from training.data import h5ad as h5ad_blocks
from training.data import shards

KEYS = {"cell_type_key": "line", "perturbation_key": "guide", "covariate_keys": "donor"}


def made_up(n: int = 300, num_genes: int = 30) -> anndata.AnnData:
    rng = np.random.default_rng(0)
    obs = pd.DataFrame(
        {
            "line": pd.Categorical(rng.choice(["k562", "rpe1"], n)),
            "guide": pd.Categorical(rng.choice(["control", "g1", "g3+g2", "g2+control"], n)),
            "donor": rng.choice([1, 2], n),
            "quality": rng.random(n),
        },
        index=[f"cell{i}" for i in range(n)],
    )
    counts = rng.poisson(rng.gamma(0.5, 4.0, size=(n, num_genes)))
    counts[:, 5] = 0
    return anndata.AnnData(
        scipy.sparse.csr_matrix(counts.astype(np.float32)),
        obs=obs,
        var=pd.DataFrame({"chromosome": "1"}, index=[f"g{i}" for i in range(num_genes)]),
    )


@pytest.fixture
def cells() -> anndata.AnnData:
    return made_up()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def convert(cells: anndata.AnnData, folder: Path, **options) -> Path:
    cells.write_h5ad(folder / "cells.h5ad")
    return main(folder / "cells.h5ad", out=folder / "shards", **options)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- what is written --------------------------------------------------------------------------------------------------


def test_every_cell_comes_out_once_in_its_part_with_its_counts_and_labels(cells, tmp_path):
    out = convert(cells, tmp_path, **KEYS)
    parts = {name: anndata.read_h5ad(out / f"{name}.h5ad") for name in ("train", "validation", "test")}
    assert sorted(name for part in parts.values() for name in part.obs_names) == sorted(cells.obs_names)
    split = json.loads((out / "split.json").read_text())
    for name, part in parts.items():
        assert part.X.format == "csr"
        assert part.X.dtype == np.int32
        assert (part.X != cells[part.obs_names].X).nnz == 0
        assert part.obs["cell_type"].tolist() == cells.obs.loc[part.obs_names, "line"].tolist()
        assert part.obs["quality"].tolist() == cells.obs.loc[part.obs_names, "quality"].tolist()
        assert set(part.obs["perturbation"]) == {"control", "g1", "g2+g3", "g2"}
        assert list(part.uns["dcm_conditions"]) == ["cell_type", "perturbation", "donor"] == split["conditions"]
        assert part.uns["dcm_control"] == "control" == split["control"]
        assert part.uns["dcm_separator"] == "+" == split["separator"]
        assert part.obs_names.tolist() == split["cells"][name]
    assert parts["train"].var["chromosome"].tolist() == ["1"] * 30
    assert [len(split["cells"][name]) for name in ("train", "validation", "test")] == [216, 24, 60]


def test_shards_are_a_datasets_folder_with_class_labels(cells, tmp_path):
    out = convert(cells, tmp_path, **KEYS)
    loaded = datasets.load_dataset(str(out))
    assert list(loaded) == ["train", "validation", "test"]
    assert loaded["train"].features["perturbation"].names == ["control", "g1", "g2", "g2+g3"]
    assert loaded["train"].features["donor"].names == ["1", "2"]
    stream = datasets.load_dataset(str(out), split="test", streaming=True)
    assert len(list(stream)) == 60
    assert stream.features == loaded["test"].features


def test_shards_hold_the_cells_of_the_h5ad_in_another_order(cells, tmp_path):
    out = convert(cells, tmp_path, **KEYS)
    for name in ("train", "validation", "test"):
        part = anndata.read_h5ad(out / f"{name}.h5ad")
        rows = datasets.load_dataset(str(out), split=name)
        dense = np.zeros(part.shape, dtype=int)
        for i, row in enumerate(rows):
            assert row["genes"] == sorted(row["genes"])
            dense[i, row["genes"]] = row["expressions"]
        names = rows.features["perturbation"].names
        here = [(names[row["perturbation"]], *counts) for row, counts in zip(rows, dense.tolist())]
        there = list(zip(part.obs["perturbation"], *part.X.toarray().T.tolist()))
        assert here != there
        assert sorted(here) == sorted(there)


def test_blocks_and_buckets_do_not_change_the_cells(cells, tmp_path, monkeypatch):
    whole = convert(cells, tmp_path, **KEYS)
    expected = datasets.load_dataset(str(whole), split="train").to_pandas()
    monkeypatch.setattr(h5ad_blocks, "BLOCK_CELLS", 7)
    monkeypatch.setattr(shards, "SHARD_CELLS", 50)
    (tmp_path / "small").mkdir()
    small = convert(cells, tmp_path / "small", **KEYS)
    assert len(list((small / "train").iterdir())) == 5
    pd.testing.assert_frame_equal(datasets.load_dataset(str(small), split="train").to_pandas(), expected)
    for name in ("train", "test"):
        one, two = (anndata.read_h5ad(out / f"{name}.h5ad") for out in (whole, small))
        assert (one.X != two.X).nnz == 0


def test_parquet_is_zstd_with_delta_packed_genes_in_narrow_integers(cells, tmp_path):
    file = pq.ParquetFile(next((convert(cells, tmp_path) / "train").iterdir()))
    genes, expressions = (file.metadata.row_group(0).column(i) for i in (0, 1))
    assert (genes.path_in_schema, genes.compression) == ("genes.list.element", "ZSTD")
    assert "DELTA_BINARY_PACKED" in genes.encodings
    assert "DELTA_BINARY_PACKED" not in expressions.encodings
    assert expressions.compression == "ZSTD"
    assert [str(file.schema_arrow.field(i).type.value_type) for i in (0, 1)] == ["uint16", "uint16"]


def test_counts_beyond_16_bits_widen_the_column(cells, tmp_path):
    cells.X.data[0] = 70_000
    out = convert(cells, tmp_path)
    features = datasets.load_dataset(str(out), split="train").features
    assert features["expressions"].feature.dtype == "uint32"
    assert max(anndata.read_h5ad(out / f"{name}.h5ad").X.max() for name in ("train", "validation", "test")) == 70_000


def test_csr_csc_dense_and_layers_give_the_same_shards(cells, tmp_path):
    expected = None
    counts = cells.X.copy()
    for kind in ("csr", "csc", "dense", "layer"):
        cells.X = {"csc": counts.tocsc(), "dense": counts.toarray()}.get(kind, counts)
        if kind == "layer":
            cells.layers["counts"] = counts
            cells.X = np.log1p(counts.toarray())
        (tmp_path / kind).mkdir()
        out = convert(cells, tmp_path / kind, layer="counts" if kind == "layer" else None, **KEYS)
        parquet = {name: data for name, data in files_of(out).items() if name.endswith((".parquet", "genes.txt"))}
        expected = expected or parquet
        assert parquet == expected


def test_a_rerun_gives_identical_bytes_and_another_seed_another_split(cells, tmp_path):
    first = files_of(convert(cells, tmp_path, **KEYS))
    again = files_of(main(tmp_path / "cells.h5ad", out=tmp_path / "again", **KEYS))
    assert again == first
    other = files_of(main(tmp_path / "cells.h5ad", out=tmp_path / "other", split_seed=1, **KEYS))
    assert other["train/00000.parquet"] != first["train/00000.parquet"]


def test_without_keys_the_data_are_unconditional(cells, tmp_path):
    out = convert(cells, tmp_path)
    assert DCMTokenizer.from_pretrained(out / "tokenizer").conditions(num_cells=2) == {"num_cells": 2}
    assert list(anndata.read_h5ad(out / "train.h5ad").uns["dcm_conditions"]) == []


def test_a_part_without_cells_is_not_written(cells, tmp_path):
    out = convert(cells, tmp_path, test_fraction=0.0)
    assert not (out / "test").exists()
    assert not (out / "test.h5ad").exists()
    assert list(datasets.load_dataset(str(out))) == ["train", "validation"]


def test_a_column_in_the_place_of_a_canonical_one_is_kept(cells, tmp_path):
    cells.obs["cell_type"] = "something else"
    train = anndata.read_h5ad(convert(cells, tmp_path, cell_type_key="line") / "train.h5ad")
    assert set(train.obs["cell_type"]) == {"k562", "rpe1"}
    assert set(train.obs["original_cell_type"]) == {"something else"}
    again = anndata.read_h5ad(convert(train, tmp_path, cell_type_key="donor") / "train.h5ad")
    assert set(again.obs["original_original_cell_type"]) == {"k562", "rpe1"}


# --- what may decide --------------------------------------------------------------------------------------------------


def test_only_training_cells_choose_genes_and_the_largest_count(cells, tmp_path):
    first = json.loads((convert(cells, tmp_path, n_top_genes=10) / "split.json").read_text())
    held_out = cells.obs_names.isin(first["cells"]["test"] + first["cells"]["validation"])
    counts = cells.X.toarray()
    counts[held_out] = counts[held_out][:, ::-1] * 50
    cells.X = scipy.sparse.csr_matrix(counts)
    second = json.loads((convert(cells, tmp_path, n_top_genes=10) / "split.json").read_text())
    assert second["cells"] == first["cells"]
    assert second["genes"] == first["genes"]
    assert second["max_count"] == first["max_count"]


def test_variable_genes_are_scanpys_on_the_training_cells_in_the_order_of_the_file(cells, tmp_path):
    scanpy = pytest.importorskip("scanpy")
    split = json.loads((convert(cells, tmp_path, n_top_genes=10) / "split.json").read_text())
    train = cells[split["cells"]["train"]].copy()
    scanpy.pp.highly_variable_genes(train, flavor="seurat_v3", n_top_genes=10)
    assert split["genes"]["panel"] == train.var_names[train.var["highly_variable"]].tolist()


def test_a_panel_keeps_the_counts_of_its_genes(cells, tmp_path):
    out = convert(cells, tmp_path, n_top_genes=10)
    train = anndata.read_h5ad(out / "train.h5ad")
    assert (train.X != cells[train.obs_names, train.var_names].X).nnz == 0
    rows = datasets.load_dataset(str(out), split="train")
    assert all(row["genes"] == sorted(row["genes"]) for row in rows)
    assert sum(sum(row["expressions"]) for row in rows) == train.X.sum()


def test_max_count_is_the_largest_training_count_of_the_panel(cells, tmp_path):
    out = convert(cells, tmp_path)
    largest = int(anndata.read_h5ad(out / "train.h5ad").X.max())
    assert DCMTokenizer.from_pretrained(out / "tokenizer").max_count == largest


# --- labels -----------------------------------------------------------------------------------------------------------


def test_the_control_is_found_named_or_absent(cells, tmp_path, caplog):
    caplog.set_level(logging.INFO)

    def control_of(**options) -> str | None:
        out = convert(cells, tmp_path, perturbation_key="guide", **options)
        return DCMTokenizer.from_pretrained(out / "tokenizer").control

    assert control_of() == "control"
    assert control_of(control="g1") == "g1"
    cells.obs["guide"] = cells.obs["guide"].cat.rename_categories({"control": "nothing", "g2+control": "g2"})
    assert control_of() is None
    assert "there is no control" in caplog.text
    cells.obs["guide"] = cells.obs["guide"].cat.rename_categories({"nothing": "control", "g2": "non-targeting"})
    with pytest.raises(ValueError, match="both 'control' and 'non-targeting'; pass --control"):
        control_of()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cell_type_key": "celltype"}, "no column 'celltype' in obs; columns there: line, guide, donor, quality"),
        ({"perturbation_key": "guide", "control": "contol"}, "unknown control 'contol'; near matches: 'control'"),
        ({"control": "control"}, "--control 'control' was given without --perturbation-key"),
        ({"covariate_keys": "donor,donor"}, "covariate column 'donor' is named twice"),
        ({"covariate_keys": "cell_type"}, "'cell_type' is named twice or has a reserved name"),
        ({"layer": "counts"}, "has no layer 'counts'; layers there: none"),
        ({"n_top_genes": 31}, "--n-top-genes is 31; expected 1 to 30"),
        ({"n_top_genes": 0}, "--n-top-genes is 0"),
        ({"test_fraction": 1.0}, "test fraction is 1.0"),
    ],
)
def test_wrong_options_are_refused_and_leave_nothing(cells, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        convert(cells, tmp_path, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["cells.h5ad"]


def log_normalise(cells: anndata.AnnData) -> anndata.AnnData:
    cells.X.data = np.log1p(cells.X.data)
    return cells


# --- the output folder ------------------------------------------------------------------------------------------------


def test_an_earlier_conversion_is_replaced_and_nothing_else(cells, tmp_path):
    out = convert(cells, tmp_path)
    convert(cells[:100].copy(), tmp_path)
    assert sum(len(cells) for cells in json.loads((out / "split.json").read_text())["cells"].values()) == 100
    (out / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"other things \(notes.txt\) that replacing it would delete"):
        convert(cells, tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="exists and holds no conversion"):
        main(tmp_path / "cells.h5ad", out=tmp_path / "other")
    with pytest.raises(ValueError, match="is a file; expected a folder"):
        main(tmp_path / "cells.h5ad", out=tmp_path / "other" / "thesis.txt")


def test_a_failure_while_writing_leaves_the_earlier_conversion(cells, tmp_path, monkeypatch):
    before = files_of(convert(cells, tmp_path))

    def fail(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(write.pq, "write_table", fail)
    with pytest.raises(OSError, match="No space left"):
        convert(cells, tmp_path, split_seed=1)
    assert files_of(tmp_path / "shards") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cells.h5ad", "shards"]


def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(cells, tmp_path):
    log_normalise(cells).write_h5ad(tmp_path / "cells.h5ad")
    command = [sys.executable, "-m", "training.convert_h5ad", "cells.h5ad", "--out", "out/shards"]
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "HF_HOME": str(tmp_path / "hf")}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: X of cells.h5ad: ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
