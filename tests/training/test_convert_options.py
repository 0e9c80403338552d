"""Properties of dcm-convert over several files, gene lists and named splits, as the shards show them."""

import json
from pathlib import Path

import anndata
import datasets
import numpy as np
import pytest

from tests.training.test_convert_h5ad import KEYS, made_up
from tokenization import DCMTokenizer
from training.convert_h5ad import main


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


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


# --- several files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("join", ["intersection", "union"])
def test_cells_of_several_files_stand_in_one_panel(two, tmp_path, join):
    out = main(two, out=tmp_path / "shards", join=join, **KEYS)
    genes = DCMTokenizer.from_pretrained(out / "tokenizer").genes
    assert genes == [f"g{i}" for i in (range(5, 30) if join == "intersection" else [*range(30), 31, 30])]
    for name, path in zip(("one", "two"), two):
        expected = anndata.read_h5ad(path).to_df().reindex(columns=genes).fillna(0)
        for part in ("train", "validation", "test"):
            cells = anndata.read_h5ad(out / f"{part}.h5ad")
            here = cells[cells.obs["source_file"] == name]
            assert here.obs_names.str.startswith(f"{name}:").all()
            assert np.array_equal(here.X.toarray(), expected.loc[here.obs_names.str.removeprefix(f"{name}:")])


def test_a_union_says_which_genes_were_measured_in_each_cell(two, tmp_path):
    out = main(two, out=tmp_path / "shards", join="union", **KEYS)
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


def test_files_that_measured_the_same_genes_need_no_panels(one, tmp_path):
    made_up(n=50)[:, ::-1].copy().write_h5ad(tmp_path / "two.h5ad")
    out = main((one, tmp_path / "two.h5ad"), out=tmp_path / "shards", join="union")
    assert not (out / "panels.json").exists()
    assert "panel" not in datasets.load_dataset(str(out), split="train").features


def test_the_file_can_be_a_condition(two, tmp_path):
    out = main(two, out=tmp_path / "shards", cell_type_key="source_file")
    assert DCMTokenizer.from_pretrained(out / "tokenizer").cell_types == ["one", "two"]


def test_the_order_of_genes_does_not_change_with_the_split(two, tmp_path):
    a, b = (main(two, out=tmp_path / f"{seed}", split_seed=seed, join="union") for seed in (0, 1))
    assert split_of(a)["genes"] == split_of(b)["genes"]


# --- panels -----------------------------------------------------------------------------------------------------------


def test_a_list_of_genes_is_the_panel_in_its_order(one, tmp_path):
    (tmp_path / "genes.txt").write_text("g7\ng2\ng29\n")
    out = main(one, out=tmp_path / "shards", genes=tmp_path / "genes.txt")
    assert DCMTokenizer.from_pretrained(out / "tokenizer").genes == ["g7", "g2", "g29"]
    train = anndata.read_h5ad(out / "train.h5ad")
    assert (train.X != anndata.read_h5ad(one)[train.obs_names, train.var_names].X).nnz == 0
    assert all(row["genes"] == sorted(row["genes"]) for row in datasets.load_dataset(str(out), split="train"))
    again = main(one, out=tmp_path / "again", genes=out / "tokenizer" / "genes.txt")
    assert (again / "train" / "00000.parquet").read_bytes() == (out / "train" / "00000.parquet").read_bytes()


@pytest.mark.parametrize("join", ["intersection", "union"])
def test_variable_genes_of_several_files_come_from_training_cells(two, tmp_path, join):
    options = {"join": join, "n_top_genes": 22}
    first = split_of(main(two, out=tmp_path / "first", **options))
    cells = anndata.read_h5ad(two[0])
    held_out = ("one:" + cells.obs_names).isin(first["cells"]["test"] + first["cells"]["validation"])
    counts = cells.X.toarray()
    counts[held_out] = counts[held_out][:, ::-1] * 50
    cells.X = counts
    cells.write_h5ad(two[0])
    second = split_of(main(two, out=tmp_path / "second", **options))
    for key in ("cells", "genes", "max_count"):
        assert second[key] == first[key]


# --- splits -----------------------------------------------------------------------------------------------------------


def test_a_held_out_perturbation_is_known_but_never_trained_on(one, tmp_path):
    out = main(one, out=tmp_path / "shards", split="held-out-perturbations", held_out="g2", **KEYS)
    assert labels(out, "train") == {"control", "g1"}
    assert labels(out, "test") == {"control", "g2", "g2+g3"}
    assert DCMTokenizer.from_pretrained(out / "tokenizer").perturbations == ["control", "g1", "g2", "g3"]
    split = split_of(out)
    assert (split["split"], split["held_out"], split["controls"]) == ("held-out-perturbations", ["g2"], "proportional")


def test_held_out_labels_may_stand_in_a_file(one, tmp_path):
    (tmp_path / "names.txt").write_text("g1\n g3+g2\n")
    options = {"split": "few-shot", "held_out": f"@{tmp_path / 'names.txt'}", "held_out_cell_type": "rpe1"}
    out = main(one, out=tmp_path / "shards", **options, **KEYS)
    assert labels(out, "test", "cell_type") == {"rpe1"}
    assert labels(out, "test") == {"control", "g1", "g2+g3"}
    with pytest.raises(FileNotFoundError, match=r"no file 'absent.txt' \(--held-out @FILE\)"):
        main(one, out=tmp_path / "other", **options | {"held_out": "@absent.txt"}, **KEYS)


def test_an_earlier_split_json_gives_the_same_parts(one, tmp_path):
    first = main(one, out=tmp_path / "first", split="zero-shot", held_out_cell_type="k562", **KEYS)
    again = main(one, out=tmp_path / "again", split="from-file", split_file=first / "split.json", **KEYS)
    assert split_of(again)["cells"] == split_of(first)["cells"]
    for path in first.glob("*/*.parquet"):
        assert (again / path.relative_to(first)).read_bytes() == path.read_bytes()


def test_published_train_and_test_files_are_the_split(one, tmp_path):
    cells = anndata.read_h5ad(one)
    cells[:200].write_h5ad(tmp_path / "train.h5ad")
    cells[200:].write_h5ad(tmp_path / "test.h5ad")
    files = (tmp_path / "train.h5ad", tmp_path / "test.h5ad")
    out = main(files, out=tmp_path / "shards", split="from-file", split_key="source_file")
    assert sorted(split_of(out)["cells"]["test"]) == sorted(cells.obs_names[200:])
    assert len(split_of(out)["cells"]["validation"]) == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": "g1"}, "--held-out was given, but --split random has no use for it"),
        ({"controls": "train"}, "--controls was given, but --split random"),
        ({"split": "few-shot", "split_key": "donor"}, "--split-key was given, but --split few-shot"),
        ({"split": "from-file"}, "needs either --split-file or --split-key"),
        ({"split": "from-file", "split_key": "parts"}, "no column 'parts' in obs; columns there: line"),
        ({"genes": Path("genes.txt"), "n_top_genes": 3}, "--genes and --n-top-genes were both given"),
        ({"genes": Path("absent.txt")}, "no file 'absent.txt'"),
        ({"gene_key": "symbol"}, "has no var column 'symbol'"),
    ],
)
def test_options_that_contradict_are_refused_and_leave_nothing(one, tmp_path, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(one, out=tmp_path / "shards", **options, **KEYS)
    assert [path.name for path in tmp_path.iterdir()] == ["one.h5ad"]
