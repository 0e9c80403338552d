"""Properties of the Gradio page: bounded inputs, tables and plots that say what was drawn, and a click in a browser."""

import ast
import importlib.util
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pytest
from PIL import Image
from scipy.sparse import csr_matrix
from scipy.stats import ttest_ind
from sklearn.decomposition import PCA

from model_cards.space import app
from modeling_dcm import DCMForDenoising
from tests.tiny_checkpoint import GENES


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint) -> app.Checkpoint:
    return app.Checkpoint(str(tiny_checkpoint))


def test_a_space_needs_its_requirements_and_gradio_alone():
    tree = ast.parse(Path(app.__file__).read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    listed = re.findall(r"^[a-z]+", (Path(app.__file__).with_name("requirements.txt")).read_text(), flags=re.MULTILINE)
    own = {"training", "modeling_dcm", "tokenization"}  # in cli(), which does without; for folders without code
    assert {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - own <= {"gradio", *listed}


def test_cells_are_those_of_generate_with_its_own_defaults(checkpoint, tiny_checkpoint):
    drawn = checkpoint.draw("k562", "KLF1+TGFBR2", 7, None, 0, 5)
    asked = {"cell_type": "k562", "perturbation": "KLF1+TGFBR2", "seed": 5, "batch_size": app.BATCH_CELLS}
    ours = DCMForDenoising.from_pretrained(tiny_checkpoint).generate(7, **asked)
    assert np.array_equal(drawn["counts"], ours.numpy())
    assert checkpoint.draw(app.ANY, None, 3.0, 2.0, 1, 0.0)["counts"].shape == (3, len(GENES))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_cells": 10**9}, "cells must be a whole number from 1 to 500"),
        ({"num_cells": 2.5}, "cells must be"),
        ({"num_cells": float("nan")}, "cells must be"),
        ({"steps": -1}, "steps must be"),
        ({"guidance_scale": float("inf")}, "guidance must be"),
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
    assert (head, rows) == (["cell", "A", "B", "C"], [[0, 0, 2, 0], [1, 5, 0, 1]])
    head, rows = app.count_table(np.ones((99, 40)), list("ABCDEFGH") * 5)
    assert (len(rows), len(head)) == (app.TABLE_CELLS, 1 + app.TABLE_GENES)


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
    assert len(rows) == app.TABLE_CHANGES
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
    assert clouds["real cells, same labels"].tolist() == counts[:2, [2, 0]].tolist()  # in the panel's order
    assert clouds["real cells"].tolist() == counts[2:, [2, 0]].tolist()
    assert clouds["generated"].tolist() == [[GENES.index("KLF1"), GENES.index("HBB")]]
    for unsaid in ({}, {"cell_type": "k562", "perturbation": "KLF1+TGFBR2"}):  # the file does not tell cell types
        assert len(reference.beside({"generated": ours}, unsaid)["real cells"]) == 6
    drawing, _ = app.figures(clouds)
    legend = [text.get_text() for text in drawing.legends[0].get_texts()]
    assert legend == ["real cells (4)", "real cells, same labels (2)", "generated (1)"]
    assert [len(points.get_offsets()) for points in drawing.axes[0].collections] == [4, 2, 1]
    for numbers in (np.arange(90)[:, None], np.zeros((3, 1))):  # histograms have every cell, also without a count
        path = app.figures({"generated": numbers})[1].axes[0].patches[0].get_path().vertices
        assert sum(path[1:-1:2, 1]) == pytest.approx(1)


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no checkpoint: name a folder or an id on the Hub, or set DCM_CHECKPOINT"),
        (["./absent"], "no folder './absent'; expected a checkpoint, or an id on the Hub as in org/name"),
        (["org/name", "--reference", "absent.h5ad"], "no file 'absent.h5ad'; expected an h5ad file of real cells"),
        (["org/name"], "the page needs gradio: pip install 'discrete-cell-models[app]'"),
    ],
)
def test_what_is_missing_is_one_line_before_anything_is_loaded(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dcm-app", *arguments])
    monkeypatch.delenv("DCM_CHECKPOINT", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        app.cli()
    assert capsys.readouterr().err == f"error: {message}\n"


def test_the_checkpoint_is_named_on_the_command_line_or_in_a_space_by_a_variable(tiny_checkpoint, monkeypatch):
    named = []
    monkeypatch.setattr(app, "Checkpoint", lambda *names: named.append(names))
    monkeypatch.setattr(app, "build", lambda checkpoint: SimpleNamespace(launch=lambda: None))
    monkeypatch.setattr(sys, "argv", ["dcm-app", str(tiny_checkpoint), "--reference", __file__])
    app.cli()
    monkeypatch.setitem(sys.modules, "training.data.command_line", None)  # this package is not installed there
    monkeypatch.setenv("DCM_CHECKPOINT", str(tiny_checkpoint))
    app.cli()
    assert named == [(str(tiny_checkpoint), __file__), (str(tiny_checkpoint), None)]


def test_an_answer_is_cells_to_take_home_and_what_is_wrong_takes_none(checkpoint):
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'discrete-cell-models[app]'")
    page = app.build(checkpoint)
    answer = next(function.fn for function in page.fns.values() if function.api_name == "generate")
    said, drawing, sizes, file, changes, table = answer("rpe1", "KLF1", 6, 2, 0, 1)
    cells = anndata.read_h5ad(file)
    assert np.array_equal(cells.X.toarray(), checkpoint.draw("rpe1", "KLF1", 6, 2, 0, 1)["counts"])
    assert set(cells.obs["cell_type"]) == {"rpe1"}
    assert said.startswith("6 cells (rpe1, KLF1)")
    assert len(drawing.axes[0].collections) == 2  # and control cells
    assert len(sizes.axes[0].patches) == 2
    assert len(changes["data"]) == len(GENES)
    assert len(table["data"]) == 6
    assert answer("rpe1", "KLF1", 7, 2, 0, 1)[3] == file  # replaced: a page that runs for weeks fills no disk
    said, *nothing = answer("<b>", "KLF1", 6, 2, 0, 1)
    assert said.startswith("**Not generated:** unknown cell_type &#x27;&lt;b&gt;&#x27;")
    assert nothing == [None] * 5


@pytest.fixture(scope="module")
def page(browser, tiny_checkpoint, tmp_path_factory):
    """The page of a tiny checkpoint in a browser, beside 40 reference cells."""
    pytest.importorskip("gradio", reason="gradio is not installed (extra 'app')")
    reference = anndata.AnnData(np.random.default_rng(0).poisson(1.0, (40, len(GENES))).astype(np.float32))
    reference.var_names = GENES
    reference.obs["cell_type"] = ["k562"] * 25 + ["rpe1"] * 15
    file = tmp_path_factory.mktemp("serving") / "reference.h5ad"
    reference.write_h5ad(file)
    served = app.build(app.Checkpoint(str(tiny_checkpoint), str(file)))
    browser.get(served.launch(prevent_thread_lock=True, quiet=True)[1])
    yield browser
    served.close()


@pytest.mark.slow
def test_a_click_shows_cells_that_can_be_taken_home(page, tiny_checkpoint):
    from selenium.webdriver.support.ui import WebDriverWait

    def until(holds: Callable[[], object], what: str) -> object:
        return WebDriverWait(page, 60).until(lambda _: holds(), message=what)

    def element(selector: str):
        return until(lambda: page.find_elements("css selector", selector), f"{selector} is there")[0]

    def click(selector: str) -> None:
        page.execute_script("arguments[0].scrollIntoView({block: 'center'})", element(selector))
        element(selector).click()

    def shows(words: str) -> bool:
        return words in page.execute_script("return document.body.innerText")

    typed = {"#num-cells input[type=number]": "12", "#perturbation input": "KLF1+TGFBR2", "#seed input": "5"}
    for selector, value in typed.items():
        element(selector).send_keys("\ue009a\ue000", value, "\ue004")  # control and a, the text, tab
    click("#generate")
    until(lambda: shows("12 cells (KLF1+TGFBR2): median"), "the summary appears")
    until(lambda: shows("log2 fold change"), "so does the table of changes")  # each part arrives by itself
    loaded = "const image = document.querySelector('#picture img'); return image && image.naturalWidth > 0"
    until(lambda: page.execute_script(loaded), "the picture is there")
    with Image.open(io.BytesIO(element("#picture img").screenshot_as_png)) as picture:
        assert picture.width > 450
        assert len(set(picture.convert("RGB").getdata())) > 50, "hardly anything is drawn"
    click("#cells-file a[download]")
    file = page.downloads / "cells.h5ad"
    until(file.is_file, "the download is there")
    cells, model = anndata.read_h5ad(file), DCMForDenoising.from_pretrained(tiny_checkpoint)
    assert list(cells.var_names) == GENES
    ours = model.generate(12, perturbation="KLF1+TGFBR2", seed=5, batch_size=app.BATCH_CELLS)
    assert np.array_equal(cells.X.toarray(), ours.numpy())
