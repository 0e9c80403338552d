"""The Gradio page in a headless Chromium: load it, click, see cells, take them home, and see what is wrong."""

import importlib.util
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import anndata
import numpy as np
import pytest

from modeling_dcm import DCMForDenoising
from tests.headless_browser import Browser, free_port, missing, until
from tests.tiny_checkpoint import GENES, write_tiny_checkpoint
from tokenization import DCMTokenizer

LACKING = missing() if importlib.util.find_spec("gradio") else "gradio not installed (extra 'app')"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(LACKING is not None, reason=str(LACKING))]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(make_model, tmp_path_factory) -> Path:
    model = make_model("latent", conditioned=True)
    return write_tiny_checkpoint(tmp_path_factory.mktemp("page") / "checkpoint", model)


@pytest.fixture(scope="module")
def address(folder, tmp_path_factory):
    """Where ``dcm-app`` serves the page of a tiny checkpoint, beside 40 reference cells."""
    home = tmp_path_factory.mktemp("serving")
    reference = anndata.AnnData(np.random.default_rng(0).poisson(1.0, (40, len(GENES))).astype(np.float32))
    reference.var_names = GENES
    reference.obs["cell_type"] = ["k562"] * 25 + ["rpe1"] * 15
    reference.write_h5ad(home / "reference.h5ad")
    port = free_port()
    own = {"GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": str(home / "gradio"), "HF_HOME": str(home / "hf")}
    own |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "model_cards.space.app", folder, "--reference", home / "reference.h5ad"]
    with (home / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | own, cwd=home)
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: server.poll() is not None or is_serving(url), "the page is served", seconds=120)
        assert server.poll() is None, (home / "log").read_text()
        yield url
    finally:
        server.terminate()
        server.wait(timeout=30)


def is_serving(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.fixture
def browser(address, tmp_path):
    with Browser(tmp_path / "browser") as window:
        window.open(address)
        until(lambda: window.run("return !!document.querySelector('#generate')"), "the page has its button")
        until(lambda: window.run("return !!document.querySelector('#num-cells input[type=number]')"), "and its inputs")
        yield window


def test_a_click_shows_cells_that_can_be_taken_home(browser, folder, tmp_path):
    browser.replace("#num-cells input[type=number]", "12")
    browser.replace("#perturbation input", "KLF1+TGFBR2")
    browser.replace("#seed input", "5")
    browser.click("#generate")
    until(lambda: "12 cells (KLF1+TGFBR2): median" in browser.text(), "the summary appears")
    page = browser.text()
    for expected in ("reference (40)", "generated (12)", "generated control (12)", "log2 fold change"):
        assert expected in page
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000

    browser.click("#cells-file a[download]")
    file = browser.downloads / "cells.h5ad"
    until(file.is_file, "the download is there")
    cells = anndata.read_h5ad(file)
    tokenizer, model = DCMTokenizer.from_pretrained(folder), DCMForDenoising.from_pretrained(folder)
    ours = model.generate(**tokenizer.conditions(perturbation="KLF1+TGFBR2", num_cells=12), seed=5, batch_size=128)
    assert list(cells.var_names) == GENES
    assert np.array_equal(cells.X.toarray(), ours.numpy())


def test_what_cannot_be_is_said_in_the_page_and_it_goes_on(browser):
    browser.replace("#perturbation input", "KLF11")
    browser.click("#generate")
    until(lambda: "unknown perturbation 'KLF11'; near matches: 'KLF1'" in browser.text(), "near matches appear")
    browser.replace("#perturbation input", "KLF1")
    browser.replace("#seed input", "-1")
    browser.click("#generate")
    until(lambda: "seed must be a whole number from 0 to" in browser.text(), "the seed's bounds appear")
    browser.replace("#seed input", "1")
    browser.click("#cell-type input")
    k562 = "[role=option][aria-label=k562]"
    until(lambda: browser.run(f"return !!document.querySelector('{k562}')"), "the list of cell types opens")
    browser.click(k562)
    browser.click("#generate")
    until(lambda: "cells (k562, KLF1): median" in browser.text(), "cells appear after all")
    assert "reference, same labels" not in browser.text()  # the file has no perturbations
