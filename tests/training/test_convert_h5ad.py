"""Properties of dcm-convert: what goes in comes out, only training cells decide, and bad input leaves nothing."""

import json
import logging
from pathlib import Path

import anndata
import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import scipy.sparse

from tokenization import DCMTokenizer
from training.convert_h5ad import main

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


def test_shards_are_a_datasets_folder_with_class_labels_of_the_cells_in_another_order(cells, tmp_path):
    out = convert(cells, tmp_path, **KEYS)
    loaded = datasets.load_dataset(str(out))
    assert list(loaded) == ["train", "validation", "test"]
    assert loaded["train"].features["perturbation"].names == ["control", "g1", "g2", "g2+g3"]
    assert loaded["train"].features["donor"].names == ["1", "2"]
    stream = datasets.load_dataset(str(out), split="test", streaming=True)
    assert len(list(stream)) == 60
    assert stream.features == loaded["test"].features
    for name, rows in loaded.items():
        part = anndata.read_h5ad(out / f"{name}.h5ad")
        dense = np.zeros(part.shape, dtype=int)
        for i, row in enumerate(rows):
            assert row["genes"] == sorted(row["genes"])
            dense[i, row["genes"]] = row["expressions"]
        names = rows.features["perturbation"].names
        here = [(names[row["perturbation"]], *counts) for row, counts in zip(rows, dense.tolist())]
        there = list(zip(part.obs["perturbation"], *part.X.toarray().T.tolist()))
        assert here != there
        assert sorted(here) == sorted(there)


def test_parquet_is_zstd_with_delta_packed_genes_in_the_narrowest_integers(cells, tmp_path):
    file = pq.ParquetFile(next((convert(cells, tmp_path) / "train").iterdir()))
    genes, expressions = (file.metadata.row_group(0).column(i) for i in (0, 1))
    assert (genes.path_in_schema, genes.compression) == ("genes.list.element", "ZSTD")
    assert "DELTA_BINARY_PACKED" in genes.encodings
    assert "DELTA_BINARY_PACKED" not in expressions.encodings
    assert expressions.compression == "ZSTD"
    assert [str(file.schema_arrow.field(i).type.value_type) for i in (0, 1)] == ["uint16", "uint16"]
    cells.X.data[0] = 70_000
    features = datasets.load_dataset(str(convert(cells, tmp_path)), split="train").features
    assert features["expressions"].feature.dtype == "uint32"
    parts = (anndata.read_h5ad(tmp_path / "shards" / f"{name}.h5ad") for name in ("train", "validation", "test"))
    assert max(part.X.max() for part in parts) == 70_000


def test_a_part_without_cells_is_not_written_and_without_keys_the_data_are_unconditional(cells, tmp_path):
    out = convert(cells, tmp_path, test_fraction=0.0)
    assert DCMTokenizer.from_pretrained(out / "tokenizer").conditions(num_cells=2) == {"num_cells": 2}
    assert list(anndata.read_h5ad(out / "train.h5ad").uns["dcm_conditions"]) == []
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


def test_a_panel_keeps_the_counts_of_its_genes_and_has_their_largest(cells, tmp_path):
    out = convert(cells, tmp_path, n_top_genes=10)
    train = anndata.read_h5ad(out / "train.h5ad")
    assert (train.X != cells[train.obs_names, train.var_names].X).nnz == 0
    rows = datasets.load_dataset(str(out), split="train")
    assert all(row["genes"] == sorted(row["genes"]) for row in rows)
    assert sum(sum(row["expressions"]) for row in rows) == train.X.sum()
    assert DCMTokenizer.from_pretrained(out / "tokenizer").max_count == train.X.max()


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
        ({"held_out": "g1"}, "--held-out was given, but --split random has no use for it"),
        ({"split": "from-file"}, "needs either --split-file or --split-key"),
        ({"split": "from-file", "split_key": "parts"}, "no column 'parts' in obs; columns there: line"),
        ({"genes": Path("genes.txt"), "n_top_genes": 3}, "--genes and --n-top-genes were both given"),
        ({"genes": Path("absent.txt")}, "no file 'absent.txt'"),
        ({"gene_key": "symbol"}, "has no var column 'symbol'"),
    ],
)
def test_wrong_and_contradictory_options_are_refused_and_leave_nothing(cells, tmp_path, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        convert(cells, tmp_path, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["cells.h5ad"]


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


@pytest.fixture
def one(tmp_path) -> Path:
    made_up().write_h5ad(tmp_path / "one.h5ad")
    return tmp_path / "one.h5ad"


@pytest.fixture
def two(one) -> tuple[Path, Path]:
    """The first file, and one of 100 other cells that lacks five of its genes and has two more, in another order."""
    cells = made_up(n=100, num_genes=27)[:, ::-1].copy()
    cells.var_names = [f"g{i + 5}" for i in range(27)][::-1]
    path = one.with_name("two.h5ad")
    cells.write_h5ad(path)
    return one, path


def split_of(out: Path) -> dict:
    return json.loads((out / "split.json").read_text())


def labels(out: Path, part: str, column: str = "perturbation") -> set[str]:
    return set(anndata.read_h5ad(out / f"{part}.h5ad").obs[column])


def test_a_union_says_which_genes_were_measured_in_each_cell(two, tmp_path):
    out = main(two, out=tmp_path / "shards", join="union", **KEYS | {"cell_type_key": "source_file"})
    assert DCMTokenizer.from_pretrained(out / "tokenizer").cell_types == ["one", "two"]  # the file can be a condition
    panels = json.loads((out / "panels.json").read_text())
    assert panels == {
        "panel0": {"files": ["one.h5ad"], "missing_genes": ["g31", "g30"]},
        "panel1": {"files": ["two.h5ad"], "missing_genes": [f"g{i}" for i in range(5)]},
    }
    train = anndata.read_h5ad(out / "train.h5ad")
    of_file = {"one": "panel0", "two": "panel1"}
    assert train.obs["panel"].tolist() == [of_file[name] for name in train.obs["source_file"]]
    genes = train.var_names
    for name, panel in panels.items():
        assert set(genes[~train.uns["dcm_panels"][name]]) == set(panel["missing_genes"])
    assert "panel" not in list(train.uns["dcm_conditions"])
    loaded = datasets.load_dataset(str(out))
    assert loaded["train"].features["panel"].names == ["panel0", "panel1"]
    for row in loaded["train"]:
        missing = panels[loaded["train"].features["panel"].int2str(row["panel"])]["missing_genes"]
        assert not set(genes[row["genes"]]) & set(missing)
    stream = datasets.load_dataset(str(out), split="test", streaming=True)
    assert stream.features == loaded["test"].features
    assert {row["panel"] for row in stream} == {0, 1}


@pytest.mark.parametrize("join", ["intersection", "union"])
def test_variable_genes_of_several_files_come_from_training_cells(two, tmp_path, join):
    options = {"join": join, "n_top_genes": 22}
    first = split_of(main(two, out=tmp_path / "first", **options))
    whole = [split_of(main(two, out=tmp_path / f"{seed}", split_seed=seed, join=join)) for seed in (0, 1)]
    assert whole[0]["genes"] == whole[1]["genes"]  # in an order that does not depend on the split
    cells = anndata.read_h5ad(two[0])
    held_out = ("one:" + cells.obs_names).isin(first["cells"]["test"] + first["cells"]["validation"])
    counts = cells.X.toarray()
    counts[held_out] = counts[held_out][:, ::-1] * 50
    cells.X = counts
    cells.write_h5ad(two[0])
    second = split_of(main(two, out=tmp_path / "second", **options))
    for key in ("cells", "genes", "max_count"):
        assert second[key] == first[key]


def test_a_held_out_perturbation_is_known_but_never_trained_on(one, tmp_path):
    out = main(one, out=tmp_path / "shards", split="held-out-perturbations", held_out="g2", **KEYS)
    assert labels(out, "train") == {"control", "g1"}
    assert labels(out, "test") == {"control", "g2", "g2+g3"}
    assert DCMTokenizer.from_pretrained(out / "tokenizer").perturbations == ["control", "g1", "g2", "g3"]
    split = split_of(out)
    assert (split["split"], split["held_out"]) == ("held-out-perturbations", ["g2"])
    options = {"split": "few-shot", "held_out": "@absent.txt", "held_out_cell_type": "rpe1"}
    with pytest.raises(FileNotFoundError, match=r"no file 'absent.txt' \(--held-out @FILE\)"):
        main(one, out=tmp_path / "other", **options, **KEYS)


def test_published_train_and_test_files_are_the_split(one, tmp_path):
    cells = anndata.read_h5ad(one)
    cells[:200].write_h5ad(tmp_path / "train.h5ad")
    cells[200:].write_h5ad(tmp_path / "test.h5ad")
    files = (tmp_path / "train.h5ad", tmp_path / "test.h5ad")
    out = main(files, out=tmp_path / "shards", split="from-file", split_key="source_file")
    assert sorted(split_of(out)["cells"]["test"]) == sorted(cells.obs_names[200:])
    assert len(split_of(out)["cells"]["validation"]) == 20
