"""Properties of the Gradio page's functions: bounded inputs, tables and plots that say what was drawn."""

import ast
import sys
from pathlib import Path

import anndata
import numpy as np
import pytest

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
    assert {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) == {"transformers", "numpy", "gradio"}


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


def test_both_tables_say_the_same_counts():
    counts = np.array([[0, 2, 0], [5, 0, 1]])
    head, rows = app.count_table(counts, ["A", "B", "C"], "sparse")
    assert head == ["cell", "gene", "count"]
    assert rows == [[0, "B", 2], [1, "A", 5], [1, "C", 1]]
    head, rows = app.count_table(counts, ["A", "B", "C"], "dense")
    assert head == ["cell", "A", "B", "C"]
    assert rows == [[0, 0, 2, 0], [1, 5, 0, 1]]
    assert len(app.count_table(np.ones((99, 40)), [str(i) for i in range(40)], "dense")[1]) == app.SHOWN_CELLS
    with pytest.raises(ValueError, match="format must be one of sparse, dense"):
        app.count_table(counts, ["A", "B", "C"], "xlsx")


def test_the_histogram_has_one_bar_per_bin_and_says_how_many_cells():
    svg = app.histogram_svg(np.arange(90), "counts per cell", bins=9)
    assert svg.count("<rect") == 9
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
    assert capsys.readouterr().err.startswith("usage: dcm-app CHECKPOINT")


def test_the_page_builds(checkpoint):
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'discrete-cell-models[app]'")
    assert app.build(checkpoint).title == "Discrete Cell Model"
