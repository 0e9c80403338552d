"""Inputs out of public bug reports that once went wrong, each with what is right.

``x.h5ad`` is a sound file of 60 cells.
"""

import json
import logging
import os
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from safetensors.torch import save_file

from eval.comparison.cells import read_comparison
from eval.drawing.read_cells import read_measured_cells
from eval.score import main as score
from tests.tiny_esm import write_tiny_esm
from tokenization import DCMTokenizer
from training.conversion.conditions import ConditionColumns
from training.conversion.splits import SplitOptions, split_cells
from training.convert_h5ad import main as convert
from training.data.checkpoint import check_checkpoint
from training.data.files import written_aside
from training.data.formats import read_counts
from training.data.h5ad import open_h5ad
from training.embed_perturbations import main as embed
from training.embed_perturbations import perturbation_names
from training.perturbations import proteins as protein_vectors

N, GENES = 60, [f"G{i}" for i in range(20)]
BOM = "\ufeff"


def sound(perturbations: tuple[str, ...] = ("control", "G1", "G2")) -> anndata.AnnData:
    """60 cells x 20 genes with integer counts, two cell types and these perturbations in turn."""
    counts = np.random.default_rng(0).poisson(3, size=(N, len(GENES))).astype(np.float32)
    labels = [perturbations[i % len(perturbations)] for i in range(N)]
    obs = pd.DataFrame({"cell_type": [f"type{i % 2}" for i in range(N)], "perturbation": labels})
    obs.index = [f"cell{i}" for i in range(N)]
    return anndata.AnnData(scipy.sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=GENES))


@pytest.fixture
def x(tmp_path) -> Path:
    sound().write_h5ad(tmp_path / "x.h5ad")
    return tmp_path / "x.h5ad"


@pytest.mark.parametrize("line_break", list("\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"), ids=ascii)
def test_no_gene_has_a_line_break_in_its_name(line_break):
    with pytest.raises(ValueError, match="expected one line"):
        DCMTokenizer.from_labels(genes=["A", f"B{line_break}b", "C"], max_count=5)


def test_a_byte_order_mark_is_no_part_of_the_first_name(x, tmp_path):
    cells = sound()
    files = {
        "genes.txt": "G1\r\nG2\r\n",
        "held_out.txt": "G1\r\n",
        "split.json": json.dumps({"train": list(cells.obs_names[:40]), "test": list(cells.obs_names[40:])}),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(BOM + text, encoding="utf-8")
    folder = convert(
        x,
        out=tmp_path / "shards",
        genes=tmp_path / "genes.txt",
        join="union",
        perturbation_key="perturbation",
        split="held-out-perturbations",
        held_out=f"@{tmp_path / 'held_out.txt'}",
    )
    assert DCMTokenizer.from_pretrained(folder / "tokenizer").genes == ["G1", "G2"]
    assert not (folder / "panels.json").exists()  # each of them was measured
    assert json.loads((folder / "split.json").read_text())["held_out"] == ["G1"]
    assert perturbation_names(tmp_path / "held_out.txt") == ["G1"]
    options = SplitOptions(split="from-file", split_file=tmp_path / "split.json")
    split = split_cells(cells.obs, ConditionColumns({}, {}, control=None, separator=None), options)
    assert len(split.cells["test"]) == 20
    for name in ("genes.txt", "conditions.json"):  # of a tokenizer, after an editor has saved them
        path = folder / "tokenizer" / name
        path.write_text(BOM + path.read_text())
    assert DCMTokenizer.from_pretrained(folder / "tokenizer").genes == ["G1", "G2"]


def test_the_separator_travels_with_the_cells(tmp_path):
    sound(("control", "G1", "G2", "G1_G2")).write_h5ad(tmp_path / "x.h5ad")
    folder = convert(tmp_path / "x.h5ad", out=tmp_path / "s", perturbation_key="perturbation", separator="_")
    cells = anndata.read_h5ad(folder / "train.h5ad")
    assert cells.uns["dcm_separator"] == "_"
    assert set(cells.obs["perturbation"]) == {"control", "G1", "G2", "G1_G2"}
    tokenizer = DCMTokenizer.from_pretrained(folder / "tokenizer")
    drawn = tokenizer.decode([[0] * 20], tokenizer.conditions(perturbation="G1_G2"))
    assert drawn.uns["dcm_separator"] == "_"
    assert drawn.obs["perturbation"].tolist() == ["G1_G2"]


def perturbations_of(labels: tuple[str, ...], folder: Path, **options) -> DCMTokenizer:
    """The tokenizer of cells with these labels, once converted."""
    sound(labels).write_h5ad(folder / "x.h5ad")
    shards = convert(folder / "x.h5ad", out=folder / "s", perturbation_key="perturbation", **options)
    return DCMTokenizer.from_pretrained(shards / "tokenizer")


def test_a_separator_within_a_name_is_said(tmp_path, caplog):
    labels = ("control", "(+)-JQ1", "Abexinostat")
    caplog.set_level(logging.INFO)
    perturbations_of(labels, tmp_path)
    assert "1 of 3 perturbation labels are read as combinations, joined by '+': (+)-JQ1" in caplog.text
    assert "1 of these have a part that never stands alone (such as '(' of '(+)-JQ1')" in caplog.text
    assert '--separator ""' in caplog.text
    assert perturbations_of(labels, tmp_path, separator="").perturbations == sorted(labels)
    caplog.clear()
    assert perturbations_of(("control", "A", "B", "A + B"), tmp_path).perturbations == ["A", "B", "control"]
    assert "1 of 4 perturbation labels are read as combinations" in caplog.text
    assert "never stands alone" not in caplog.text
    with pytest.raises(ValueError, match=r"'CD8\+' has an empty part.*pass --separator"):
        perturbations_of(("control", "CD8+"), tmp_path)


@pytest.mark.parametrize(
    ("labels", "given", "control"),
    [
        (("control+control", "KLF1+control"), None, "control"),
        (("KLF1+control", "KLF1"), None, "control"),
        (("NT+NT", "KLF1+NT"), "NT", "NT"),
        (("KLF1+NT", "KLF1"), "NT", "NT"),
    ],
)
def test_the_control_is_found_among_single_names(labels, given, control, tmp_path):
    tokenizer = perturbations_of(labels, tmp_path, control=given)
    assert tokenizer.control == control
    assert tokenizer.perturbations == sorted(["KLF1", control])
    written = set(anndata.read_h5ad(tmp_path / "s" / "train.h5ad").obs["perturbation"])
    assert written == {"KLF1"} | ({control} if f"{control}+{control}" in labels else set())


def of_anndata_0_6(path: Path) -> Path:
    """The cells of ``x.h5ad`` as anndata 0.6 wrote them: compound tables, categories in ``uns``."""
    cells = anndata.read_h5ad(path)
    old = path.with_name("old.h5ad")
    with h5py.File(old, "w") as file:
        codes = cells.obs["cell_type"].astype("category").cat.codes
        text = h5py.string_dtype()
        columns = [("index", text), ("cell_type", "i1"), ("perturbation", text), ("n", "f4")]
        table = zip(cells.obs_names, codes, cells.obs["perturbation"], np.arange(N))
        file["obs"] = np.array(list(table), dtype=columns)
        file["var"] = np.array([(gene,) for gene in GENES], dtype=[("index", "S8")])
        file["uns/cell_type_categories"] = np.array(["type0", "type1"], dtype=object)
        file["raw.var"] = file["var"]
        for group, matrix in ((file.create_group("X"), cells.X), (file.create_group("raw.X"), 2 * cells.X)):
            for name in ("data", "indices", "indptr"):
                group[name] = getattr(matrix, name)
            group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = "csr", cells.shape
    return old


def test_tables_of_anndata_0_6_are_read_with_their_categories(x):
    cells, old = anndata.read_h5ad(x), read_counts(of_anndata_0_6(x))
    assert (old.X != cells.X).nnz == 0
    assert old.obs["cell_type"].tolist() == cells.obs["cell_type"].tolist()
    assert old.obs["perturbation"].tolist() == cells.obs["perturbation"].tolist()
    assert old.obs_names.tolist() == cells.obs_names.tolist()
    assert old.var_names.tolist() == GENES
    raw = read_counts(of_anndata_0_6(x), "raw")
    assert (raw.X != 2 * cells.X).nnz == 0
    assert raw.var_names.tolist() == GENES
    with pytest.raises(
        ValueError, match=r"before anndata 0\.7; read it and write it again"
    ):  # before a model is loaded
        score("no/model", x.with_name("old.h5ad"), out=x.with_name("scored.h5ad"))


def test_a_column_of_unknown_encoding_is_not_read(x, caplog):
    with h5py.File(x, "r+") as file:
        file["obs/cell_type"].attrs["encoding-type"] = "of the future"
        file["uns/new"] = 1
        file["uns/new"].attrs["encoding-type"] = "of the future"
    cells = read_counts(x)
    assert list(cells.obs) == ["perturbation"]
    assert "/obs/cell_type has an encoding" in caplog.text
    with pytest.raises(ValueError, match="no column 'cell_type' in obs"):
        convert(x, out=x.parent / "s", cell_type_key="cell_type")


def test_float16_is_read_and_missing_labels_are_not_given_and_cells_without_x_list_their_layers():
    cells, tokenizer = sound(), DCMTokenizer.from_labels(genes=GENES, max_count=20, cell_types=["type0", "type1"])
    expected = tokenizer(cells)["input_ids"]
    cells.X = cells.X.toarray().astype("float16")
    assert (tokenizer(cells)["input_ids"] == expected).all()
    assert tokenizer.cell_type_ids(["type1", None, np.nan, pd.NA, pd.NaT]).tolist() == [1, -1, -1, -1, -1]
    cells.layers["counts"], cells.X = cells.X, None
    with pytest.raises(ValueError, match="no X; pass layer= with one of: counts"):
        tokenizer(cells)


def test_raw_is_a_layer_with_its_own_genes_for_every_command(tmp_path):
    cells, file = sound(), tmp_path / "x.h5ad"
    cells.raw = cells
    few = cells[:, 5:10].copy()
    few.X = few.X.multiply(0.5).tocsr()
    few.uns["generator"] = "a model"
    few.write_h5ad(file)
    counts = cells.X.toarray()
    tokenizer = DCMTokenizer.from_labels(genes=GENES, max_count=20)
    assert (tokenizer(few, layer="raw")["input_ids"].numpy() == counts).all()
    measured = read_measured_cells(file, tokenizer, "raw")  # dcm-sample, dcm-score and dcm-impute
    assert (measured.counts.toarray() == counts).all()
    assert measured.panels.all()
    assert measured.library_size().tolist() == counts.sum(axis=1).tolist()
    shards = convert(file, out=tmp_path / "s", layer="raw")
    parts = [anndata.read_h5ad(shards / f"{name}.h5ad").to_df() for name in ("train", "validation", "test")]
    assert pd.concat(parts).loc[cells.obs_names, GENES].to_numpy().tolist() == counts.tolist()
    options = {"reserved_names": (), "layer": "raw"}
    compared = read_comparison({file: None}, shards / "test.h5ad", shards / "train.h5ad", **options)
    assert (compared.generated["a model"][0].counts.toarray() == counts).all()


def test_a_symbolic_link_is_followed(x, tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "beside").mkdir()
    link = tmp_path / "beside" / "shards"
    link.symlink_to(tmp_path / "scratch")
    for _ in range(2):
        convert(x, out=link)
        assert link.is_symlink()
        assert (tmp_path / "scratch" / "split.json").is_file()
        assert [path.name for path in link.parent.iterdir()] == ["shards"]
        assert {path.name for path in tmp_path.iterdir()} == {"x.h5ad", "scratch", "beside"}


def test_what_safetensors_writes_has_the_mode_of_other_files(x, tmp_path):
    before = os.umask(0o022)
    try:
        shards = convert(x, out=tmp_path / "s")
        with written_aside(tmp_path / "table.safetensors") as aside:
            save_file({"a": torch.zeros(1)}, aside)
    finally:
        os.umask(before)
    for file in (shards / "statistics.safetensors", tmp_path / "table.safetensors"):
        assert file.stat().st_mode & 0o777 == 0o644


def test_files_without_permission_are_named_as_such(x, tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(os, "access", lambda path, _: Path(path).suffix not in (".safetensors", ".h5ad"))
    with pytest.raises(PermissionError, match="no permission to read"):
        open_h5ad(x)
    with pytest.raises(PermissionError, match=r"no permission to read .*model\.safetensors"):
        check_checkpoint(str(tmp_path))


def test_a_language_model_that_cannot_be_downloaded_is_one_line(monkeypatch):
    monkeypatch.setattr(protein_vectors, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="the Hub cannot be reached: give a local folder"):
        protein_vectors.ProteinEncoder.load("somebody/esm2_that_is_nowhere")


def test_a_language_model_that_was_downloaded_before_is_loaded_without_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(protein_vectors, "ENDPOINT", "http://127.0.0.1:9")
    folder = tmp_path / "models--somebody--tiny"
    write_tiny_esm(folder / "snapshots" / "1")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("1")
    here = protein_vectors.ProteinEncoder.load(str(folder / "snapshots" / "1"))
    for module in ("huggingface_hub.constants.HF_HUB_CACHE", "transformers.utils.hub.constants.HF_HUB_CACHE"):
        monkeypatch.setattr(module, str(tmp_path))
    assert protein_vectors.ProteinEncoder.load("somebody/tiny").fingerprint() == here.fingerprint()


def test_no_vector_is_promised_to_a_name_that_no_training_cell_has(x, tmp_path, caplog):
    sound(("control", "G1", "G2", "G3")).write_h5ad(x)
    options = {"split": "held-out-perturbations", "held_out": "G3"}
    shards = convert(x, out=tmp_path / "s", perturbation_key="perturbation", **options)
    save_file({"G1": torch.ones(3)}, tmp_path / "vectors.safetensors")
    embed(shards, tmp_path / "table.safetensors", source=str(tmp_path / "vectors.safetensors"), allow_missing=True)
    assert "and get a learned vector in training: G2\n" in caplog.text
    assert "and no training cell: the model will not know them: G3\n" in caplog.text
