"""A file for the Virtual Cell Challenge: every way in which it can be wrong, and how one is made."""

import re
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from eval.comparison.vcc2026 import MOST_COUNTS, defects, refuse_missing_genes, rewrite_as_submission
from eval.evaluate import main as evaluate
from training.data.command_line import run

GENES = ["A", "B", "C"]


def cells(names: list[str], genes: list[str], *, seed: int = 0, **uns: object) -> anndata.AnnData:
    counts = np.random.default_rng(seed).poisson(3.0, size=(len(names), len(genes)))
    obs = pd.DataFrame({"perturbation": names}, index=[str(place) for place in range(len(names))])
    return anndata.AnnData(sparse.csr_matrix(counts.astype(np.int32)), obs=obs, var=pd.DataFrame(index=genes), uns=uns)


@pytest.fixture
def real(tmp_path) -> Path:
    cells(["control", "x", "x+y"] * 3, GENES, dcm_control="control").write_h5ad(tmp_path / "real.h5ad")
    return tmp_path / "real.h5ad"


def changed(folder: Path, change) -> Path:
    adata = cells(["control", "x", "x+y"] * 2, GENES, seed=1)
    adata = change(adata) or adata
    adata.write_h5ad(folder / "changed.h5ad")
    return folder / "changed.h5ad"


def _fractional(adata):
    adata.X = adata.X.astype(np.float32) / 2


def _large(adata):
    adata.X.data[0] = MOST_COUNTS + 1


def _relabelled(adata):
    adata.obs["perturbation"] = ["control", "x", "y+x"] * 2


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda adata: None, []),
        (_fractional, ["are not integers"]),
        (_large, ["1 cells have more than 1,000,000 counts"]),
        (lambda adata: adata[:, :2].copy(), [r"1 genes are missing \(C\)"]),
        (lambda adata: adata[:, [0, 2, 1]].copy(), [r"another order \(gene 2 is C, expected B\)"]),
        (lambda adata: adata[adata.obs["perturbation"] != "control"].copy(), ["1 conditions without control cells"]),
        (_relabelled, [r"of the real file are missing \(x\+y\)", r"not in the real file \(y\+x\)"]),
        (lambda adata: adata[adata.obs["perturbation"] == "x", :1].copy(), ["2 genes", "without control", "missing"]),
    ],
)
def test_everything_that_is_wrong_is_in_the_list(real, tmp_path, change, expected):
    found = defects(changed(tmp_path, change), real)
    assert len(found) == len(expected)
    for defect, pattern in zip(found, expected):
        assert re.search(pattern, defect)


def test_the_command_says_it_in_one_line_and_exits_with_2(real, tmp_path, monkeypatch, capsys):
    path = changed(tmp_path, lambda adata: adata[adata.obs["perturbation"] == "x", :1].copy())
    monkeypatch.setattr("sys.argv", ["dcm-evaluate", str(path), "--real", str(real), "--validate"])
    with pytest.raises(SystemExit) as ended:
        run(evaluate)
    assert ended.value.code == 2
    line = capsys.readouterr().err
    assert "breaks the contract of vcc2026" in line
    assert "(1) 2 genes are missing (B, C); (2) 1 conditions without control cells (control); (3) " in line


def test_of_several_files_all_are_looked_at_and_none_is_a_mistake(real, tmp_path):
    wrong = changed(tmp_path, lambda adata: adata[:, :2].copy()).rename(tmp_path / "wrong.h5ad")
    order = changed(tmp_path, lambda adata: adata[:, [0, 2, 1]].copy())
    with pytest.raises(
        ValueError, match=r"wrong\.h5ad' breaks .* missing \(C\); .*changed\.h5ad' breaks .* another order"
    ):
        evaluate((wrong, order), real, validate=True)
    with pytest.raises(ValueError, match="no generated file given: expected one or more"):
        evaluate((), real, validate=True)
    with pytest.raises(FileNotFoundError, match=r"no file .*; expected an h5ad file of cells; draw from a checkpoint"):
        evaluate((tmp_path,), real, validate=True)


def test_a_real_file_without_control_cells_is_told_where_to_name_them(tmp_path):
    cells(["x", "y"], GENES).write_h5ad(tmp_path / "real.h5ad")
    with pytest.raises(ValueError, match=r"has no cells labelled 'None' .* name its label with --control"):
        refuse_missing_genes(GENES, tmp_path / "real.h5ad")


def test_drawn_cells_get_the_genes_and_labels_of_the_real_file(real, tmp_path):
    """A model has its genes in its own order, one more of them, and combinations in the order of their names."""
    drawn = cells(["control", "x", "y+x"] * 2, ["C", "D", "A", "B"], generator="dcm")
    drawn.obs["source_cell"] = drawn.obs_names
    drawn.obs["source_perturbation"] = ["control", "x", "x+y"] * 2
    drawn.write_h5ad(tmp_path / "drawn.h5ad")
    rewrite_as_submission(tmp_path / "drawn.h5ad", real)
    found = anndata.read_h5ad(tmp_path / "drawn.h5ad")
    assert list(found.var_names) == GENES
    assert found.obs.columns.tolist() == ["perturbation"]
    assert found.obs["perturbation"].tolist() == ["control", "x", "x+y"] * 2
    np.testing.assert_array_equal(found.X.toarray(), drawn[:, GENES].X.toarray())
    assert found.X.dtype == np.int32
    assert found.uns["generator"] == "dcm"
    assert defects(tmp_path / "drawn.h5ad", real) == []
