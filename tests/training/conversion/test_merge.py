"""Properties of merged shards: the data set that one conversion of all files makes, without a count being written."""

import json
import shutil
from pathlib import Path

import anndata
import datasets
import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from tests.tiny_training import tiny_training
from tests.token_rows import write_token_rows
from tokenization import DCMTokenizer
from training.convert_h5ad import main as convert
from training.data.loader import Cells, open_cells
from training.train import main as train

KEYS = {"cell_type_key": "cell_type", "perturbation_key": "perturbation", "split": "from-file", "split_key": "split"}


@pytest.fixture(scope="module")
def files(cells_h5ad, tmp_path_factory) -> list[Path]:
    """Two files with labels that the other has not, one with larger counts and without two of the genes."""
    folder, cells = tmp_path_factory.mktemp("files"), anndata.read_h5ad(cells_h5ad)
    cells.obs["split"] = np.random.default_rng(0).choice(["train", "validation", "test"], len(cells), p=[0.6, 0.2, 0.2])
    cell_type, perturbation = (cells.obs[name].to_numpy().astype(str) for name in ("cell_type", "perturbation"))
    is_first = cell_type == cell_type[0]
    lacking = next(name for name in perturbation if name != "control")
    first, second = cells[is_first & (perturbation != lacking)].copy(), cells[~is_first, 2:].copy()
    second.X = second.X.toarray()
    second.X[np.flatnonzero(second.obs["split"] == "train")[0], 0] = 70_000
    first.write_h5ad(folder / "one.h5ad")
    second.write_h5ad(folder / "two.h5ad")
    (folder / "genes.txt").write_text("\n".join(cells.var_names))
    return [folder / "one.h5ad", folder / "two.h5ad"]


@pytest.fixture(scope="module")
def merged(files, tmp_path_factory) -> tuple[Path, Path]:
    """Shards of both files by one conversion, and those of a conversion of each, merged."""
    folder = tmp_path_factory.mktemp("merged")
    options = {**KEYS, "genes": files[0].with_name("genes.txt"), "join": "union"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        convert(tuple(files), out=folder / "joint", **options)
        for file in files:
            convert(file, out=folder / file.stem, **options)
        convert((folder / "one", folder / "two"), out=folder / "merged", merge=True)
        yield folder / "joint", folder / "merged"


def rows_of(cells: Cells) -> list[tuple]:
    """All that is known of each cell, in an order of its own."""
    counts, labels = cells.csr().toarray(), [cells.labels(name).astype(str) for name in ("cell_type", "perturbation")]
    measured = cells.measured[cells.panel]
    return sorted(zip(*labels, cells.library_size.tolist(), map(tuple, counts.tolist()), map(tuple, measured.tolist())))


@pytest.mark.parametrize("streaming", [False, True])
def test_merged_shards_hold_the_cells_labels_and_panels_of_a_joint_conversion(merged, streaming):
    for split in ("train", "validation", "test"):
        joint, cells = (open_cells(folder, split, streaming=streaming) for folder in merged)
        assert rows_of(cells) == rows_of(joint)
        shapes = [{name: ids.shape for name, ids in of.conditions.items()} for of in (joint, cells)]
        assert shapes[0] == shapes[1]


def test_vocabulary_and_statistics_are_those_of_a_joint_conversion(merged):
    joint, cells = (DCMTokenizer.from_pretrained(folder / "tokenizer") for folder in merged)
    for name in ("genes", "max_count", "cell_types", "perturbations", "control", "separator"):
        assert getattr(joint, name) == getattr(cells, name), name
    assert cells.max_count == 70_000
    joint, cells = (load_file(folder / "statistics.safetensors") for folder in merged)
    assert joint.keys() == cells.keys()
    for name, values in joint.items():
        np.testing.assert_allclose(cells[name], values, rtol=1e-12, err_msg=name)


def test_shards_are_linked_and_each_part_is_a_configuration_with_its_own_labels_for_load_dataset(merged):
    folder, name = merged[1], "part00001-00000.parquet"
    assert (folder / "train" / name).samefile(folder.parent / "two" / "train" / "00000.parquet")
    part = datasets.load_dataset(str(folder), "part00001", split="train")
    own = datasets.load_dataset(str(folder.parent / "two"), split="train")
    assert part.features == own.features
    assert part["expressions"] == own["expressions"]
    assert json.loads((folder / "split.json").read_text())["parts"]["part00001"]["cells"]["train"] == len(own)


def test_files_of_tahoe_are_converted_one_by_one_merged_and_streamed(cells_h5ad, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    cells = anndata.read_h5ad(cells_h5ad)
    drugs = cells.obs["perturbation"].astype(str).replace({"control": "DMSO_TF"})
    obs = pd.DataFrame({"drug": drugs, "cell_line_id": cells.obs["cell_type"], "plate": "plate1"})
    keys = {"cell_type_key": "cell_line_id", "perturbation_key": "drug", "covariate_keys": "plate"}
    parts, expected = [], []
    for name, rows in (("0", slice(0, 120)), ("1", slice(120, 300))):
        file = write_token_rows(tmp_path / "data" / f"{name}.parquet", cells.X[rows], obs.iloc[rows])
        parts.append(convert(file, out=tmp_path / name, control="DMSO_TF", **keys))
        split = json.loads((parts[-1] / "split.json").read_text())["cells"]["train"]
        expected += [(drugs[cell], *cells[cell].X.toarray()[0].tolist()) for cell in split]
    convert(tuple(parts), out=tmp_path / "shards", merge=True)
    streamed = open_cells(tmp_path / "shards", "train", streaming=True)
    found = zip(streamed.labels("perturbation").astype(str), streamed.csr().toarray().tolist())
    assert sorted((drug, *counts) for drug, counts in found) == sorted(expected)
    assert streamed.tokenizer.genes[0] == "ENSG00000000000"
    out = train(tiny_training(tmp_path / "shards", tmp_path / "checkpoint", max_steps=1, streaming=True, batch_size=4))
    assert (out / "model.safetensors").is_file()


def test_parts_of_other_genes_or_options_are_refused_and_nothing_is_written(files, merged, tmp_path):
    folder, out = merged[1].parent, tmp_path / "out"
    convert(files[1], out=tmp_path / "fewer", **KEYS)
    with pytest.raises(ValueError, match=r"have other genes, or in another order .* the same --genes FILE"):
        convert((folder / "one", tmp_path / "fewer"), out=out, merge=True)
    other = shutil.copytree(folder / "two", tmp_path / "other")
    description = json.loads((other / "split.json").read_text())
    (other / "split.json").write_text(json.dumps({**description, "control": "untreated"}))
    with pytest.raises(ValueError, match=r"differ in control .*: convert them with the same options"):
        convert((folder / "one", other), out=out, merge=True)
    with pytest.raises(ValueError, match="leave out --cell-type-key"):
        convert((folder / "one", folder / "two"), out=out, merge=True, **KEYS)
    with pytest.raises(FileNotFoundError, match=r"no split\.json in .*; expected a folder that dcm-convert wrote"):
        convert((folder / "one", tmp_path), out=out, merge=True)
    assert not out.exists()
