"""Inputs out of public bug reports that once went wrong, each with what is right.

``x.h5ad`` is a sound file of 60 cells.
"""

import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from tokenization import DCMTokenizer
from training.conversion.splits import split_from_names
from training.convert_h5ad import main as convert
from training.embed_perturbations import perturbation_names

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


# --- lists of names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line_break", list("\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"), ids=ascii)
def test_no_gene_has_a_line_break_in_its_name(line_break):
    with pytest.raises(ValueError, match="expected one line"):
        DCMTokenizer.from_labels(genes=["A", f"B{line_break}b", "C"], max_count=5)


def test_columns_of_a_table_are_genes():
    cells, tokenizer = sound().to_df(), DCMTokenizer.from_labels(genes=GENES, max_count=20)
    ids = tokenizer(cells)["input_ids"]
    assert (ids.numpy() == cells.to_numpy()).all()
    assert (tokenizer(cells[cells.columns[::-1]])["input_ids"] == ids).all()


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
    split = split_from_names(
        tmp_path / "split.json", cells.obs_names, np.zeros(N, dtype=int), validation_fraction=0.0, seed=0
    )
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
