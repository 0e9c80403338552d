"""Properties of the Gradio page's functions: bounded inputs, tables and plots that say what was drawn."""

import ast
import importlib.util
import sys
from pathlib import Path

import anndata
import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.stats import ttest_ind
from sklearn.decomposition import PCA

from model_cards.space import app
from modeling_dcm import DCMForDenoising
from tests.tiny_checkpoint import GENES, write_tiny_checkpoint
from tokenization import DCMTokenizer


@pytest.fixture(scope="module")
def folder(make_model, tmp_path_factory) -> Path:
    model = make_model("latent", conditioned=True)
    return write_tiny_checkpoint(tmp_path_factory.mktemp("app") / "checkpoint", model)


@pytest.fixture(scope="module")
def checkpoint(folder) -> app.Checkpoint:
    return app.Checkpoint(str(folder))


def test_the_page_needs_transformers_numpy_and_gradio_alone():
    tree = ast.parse(Path(app.__file__).read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) == {
        "transformers",
        "numpy",
        "gradio",
        "anndata",  # for reference cells only
    }


def test_cells_are_those_of_generate_with_its_own_defaults(checkpoint, folder):
    tokenizer, model = DCMTokenizer.from_pretrained(folder), DCMForDenoising.from_pretrained(folder)
    drawn = checkpoint.draw("k562", "KLF1+TGFBR2", 7, None, 0, 5)
    conditions = tokenizer.conditions(cell_type="k562", perturbation="KLF1+TGFBR2", num_cells=7)
    ours = model.generate(**conditions, seed=5, batch_size=app.BATCH_CELLS)
    assert np.array_equal(drawn["counts"], ours.numpy())
    assert checkpoint.draw(app.ANY, None, 3.0, 2.0, 1, 0.0)["counts"].shape == (3, len(GENES))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_cells": 10**9}, "cells must be a whole number from 1 to 500"),
        ({"num_cells": 0}, "cells must be"),
        ({"num_cells": 2.5}, "cells must be"),
        ({"num_cells": "many"}, "cells must be"),
        ({"num_cells": float("nan")}, "cells must be"),
        ({"steps": 10**6}, "steps must be"),
        ({"steps": -1}, "steps must be"),
        ({"guidance_scale": float("inf")}, "guidance must be"),
        ({"guidance_scale": None}, "guidance must be"),
        ({"seed": -1}, "seed must be"),
        ({"cell_type": "k56"}, "unknown cell_type 'k56'; near matches: 'k562'"),
        ({"cell_type": "x" * 1000}, "at most 200 characters"),
        ({"perturbation": ["KLF1"]}, "perturbation must be a label"),
    ],
)
def test_inputs_out_of_bounds_are_refused(change, message, checkpoint):
    inputs = {"cell_type": None, "perturbation": None, "num_cells": 2, "steps": 2, "guidance_scale": 0, "seed": 0}
    with pytest.raises(ValueError, match=message):
        checkpoint.draw(**{**inputs, **change})


def test_the_table_shows_the_first_cells_over_the_genes_of_the_highest_mean():
    counts = np.array([[0, 2, 0], [5, 0, 1]])
    head, rows = app.count_table(counts, ["A", "B", "C"])
    assert head == ["cell", "A", "B", "C"]
    assert rows == [[0, 0, 2, 0], [1, 5, 0, 1]]
    head, rows = app.count_table(np.ones((99, 40)), [str(i) for i in range(40)])
    assert (len(rows), len(head)) == (app.SHOWN_CELLS, 1 + app.SHOWN_GENES)


def test_the_plane_is_that_of_principal_component_analysis():
    rng = np.random.default_rng(0)
    for genes in (5, 90):  # more cells than genes, and fewer
        clouds = {"a": rng.poisson(3, (40, genes)), "b": rng.poisson(5, (20, genes))}
        points, shares = app.principal_plane(clouds)
        oracle = PCA(2, svd_solver="full").fit(app.log_scaled(np.concatenate(list(clouds.values()))))
        assert np.allclose(shares, oracle.explained_variance_ratio_)
        theirs = oracle.transform(app.log_scaled(clouds["b"]))
        assert np.allclose(np.abs(points["b"]), np.abs(theirs), atol=1e-8)
    points, shares = app.principal_plane({"one": np.ones((1, 1))})
    assert points["one"].shape == (1, 2)
    assert np.isfinite(shares).all()


def test_top_changes_are_the_genes_that_differ_by_welchs_test():
    rng = np.random.default_rng(1)
    control, counts = rng.poisson(20, (50, 40)), rng.poisson(20, (60, 40))
    counts[:, 7] = rng.poisson(60, 60)
    counts[:, 3] = 0
    rows = app.top_changes(counts, control, [f"g{i}" for i in range(40)])
    assert len(rows) == app.SHOWN_CHANGES
    assert {rows[0][0], rows[1][0]} == {"g3", "g7"}
    t = ttest_ind(app.log_scaled(counts), app.log_scaled(control), equal_var=False).statistic
    assert [row[4] for row in rows[2:]] == pytest.approx(
        sorted((t[int(row[0][1:])] for row in rows[2:]), key=abs, reverse=True), rel=0.1, abs=0.1
    )
    assert dict(zip(app.CHANGES, next(row for row in rows if row[0] == "g7")))["log2 fold change"] > 1


def test_control_cells_are_drawn_alike_for_a_perturbation_only(checkpoint):
    drawn = checkpoint.draw("k562", "KLF1", 5, 2, 0, 2**32 - 1)
    control = checkpoint.draw_control(drawn, 2, 2**32 - 1)
    assert control["conditions"] == {"cell_type": "k562", "perturbation": "control"}
    assert control["counts"].shape == drawn["counts"].shape
    for perturbation in (None, "control"):
        assert checkpoint.draw_control(checkpoint.draw("k562", perturbation, 2, 2, 0, 0), 2, 0) is None


@pytest.mark.parametrize("sparse", [True, False])
def test_reference_cells_are_matched_by_name_and_told_apart_by_label(sparse, checkpoint, tmp_path):
    counts = np.arange(18, dtype=np.float32).reshape(6, 3)
    cells = anndata.AnnData(csr_matrix(counts) if sparse else counts)
    cells.var_names = ["HBB", "other", "KLF1"]
    cells.obs["perturbation"] = ["TGFBR2+KLF1", "KLF1+TGFBR2", *["control"] * 4]
    cells.write_h5ad(tmp_path / "real.h5ad")
    reference = app.Reference(str(tmp_path / "real.h5ad"), checkpoint.tokenizer)
    ours = np.arange(7)[None]
    clouds = reference.beside({"generated": ours}, {"perturbation": "KLF1+TGFBR2"})
    assert clouds["reference, same labels"].tolist() == counts[:2, [2, 0]].tolist()  # in the panel's order
    assert clouds["reference"].tolist() == counts[2:, [2, 0]].tolist()
    assert clouds["generated"].tolist() == [[GENES.index("KLF1"), GENES.index("HBB")]]
    for unsaid in ({}, {"cell_type": "k562", "perturbation": "KLF1+TGFBR2"}):  # the file does not tell cell types
        assert len(reference.beside({"generated": ours}, unsaid)["reference"]) == 6
    points, _ = app.principal_plane(clouds)
    svg = app.scatter_svg(points, ["PC1", "PC2"])
    assert "reference, same labels (2)" in svg
    assert svg.count('r="2.5"') == 7


@pytest.mark.parametrize(
    ("counts", "genes", "message"),
    [
        ([[0.5, 1]], ["KLF1", "HBB"], "no counts; expected raw counts"),
        ([[-1, 1]], ["KLF1", "HBB"], "no counts; expected raw counts"),
        ([[1, 1]], ["A", "B"], "none of the genes KLF1, TGFBR2, GATA1"),
    ],
)
def test_a_reference_that_does_not_fit_is_refused(counts, genes, message, checkpoint, tmp_path):
    cells = anndata.AnnData(np.array(counts, dtype=np.float32))
    cells.var_names = genes
    cells.write_h5ad(tmp_path / "bad.h5ad")
    with pytest.raises(ValueError, match=message):
        app.Reference(str(tmp_path / "bad.h5ad"), checkpoint.tokenizer)


def test_only_the_last_files_are_kept():
    files = app.KeptFiles()
    folders = [files.new_folder() for _ in range(app.KEPT_FILES + 3)]
    assert [folder.is_dir() for folder in folders] == [False] * 3 + [True] * app.KEPT_FILES


def test_the_histogram_has_one_bar_per_bin_and_says_how_many_cells():
    svg = app.histogram_svg(np.arange(90), "counts per cell", bins=9)
    assert svg.count("<rect") == 1 + 9  # the paper, and the bars
    assert "counts per cell (n = 90)" in svg
    assert app.histogram_svg(np.zeros(3), "zeros").startswith("<svg")


def test_all_cells_can_be_taken_home(checkpoint, tmp_path):
    drawn = checkpoint.draw("rpe1", None, 6, 2, 0, 1)
    cells = anndata.read_h5ad(app.save_cells(drawn, tmp_path))
    assert np.array_equal(cells.X.toarray(), drawn["counts"])
    assert set(cells.obs["cell_type"]) == {"rpe1"}
    del drawn["adata"]
    lines = app.save_cells(drawn, tmp_path).read_text().splitlines()
    assert lines[0] == "cell,gene,count"
    assert len(lines) == 1 + (drawn["counts"] > 0).sum()


def test_no_checkpoint_is_a_line_of_usage(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dcm-app"])
    monkeypatch.delenv("DCM_CHECKPOINT", raising=False)
    with pytest.raises(SystemExit, match="2"):
        app.cli()
    said = capsys.readouterr().err
    assert said.startswith("usage: dcm-app")
    assert "no checkpoint: name a folder or an id on the Hub, or set DCM_CHECKPOINT" in said


def test_without_gradio_the_way_out_is_said(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dcm-app", "checkpoint"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        app.cli()
    assert capsys.readouterr().err == "error: the page needs gradio: pip install 'discrete-cell-models[app]'\n"


def test_the_page_builds(checkpoint):
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'discrete-cell-models[app]'")
    assert app.build(checkpoint).title == "Discrete Cell Model"
