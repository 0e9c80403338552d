"""The Gradio page in a headless Chromium: load it, click, see cells, take them home, and see what is wrong."""

import io
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pytest
from PIL import Image

from modeling_dcm import DCMForDenoising
from tests.tiny_checkpoint import GENES, write_tiny_checkpoint
from tokenization import DCMTokenizer

pytest.importorskip("gradio", reason="gradio is not installed (extra 'app')")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(make_model, tmp_path_factory) -> Path:
    model = make_model("latent", conditioned=True)
    return write_tiny_checkpoint(tmp_path_factory.mktemp("page") / "checkpoint", model)


@pytest.fixture(scope="module")
def address(browser, folder, tmp_path_factory):
    """Where ``dcm-app`` serves the page of a tiny checkpoint, beside 40 reference cells."""
    home = tmp_path_factory.mktemp("serving")
    reference = anndata.AnnData(np.random.default_rng(0).poisson(1.0, (40, len(GENES))).astype(np.float32))
    reference.var_names = GENES
    reference.obs["cell_type"] = ["k562"] * 25 + ["rpe1"] * 15
    reference.write_h5ad(home / "reference.h5ad")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
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


def until(holds: Callable[[], object], what: str, *, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds:g} seconds: {what}"
        time.sleep(0.1)


class Page:
    """The page in the browser: elements by their CSS selector."""

    def __init__(self, browser, url: str):
        self.browser = browser
        browser.get(url)
        until(lambda: self.all("#generate"), "the page has its button")
        until(lambda: self.all("#num-cells input[type=number]"), "and its inputs")

    def all(self, selector: str) -> list:
        return self.browser.find_elements("css selector", selector)

    def click(self, selector: str) -> None:
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", self.all(selector)[0])
        self.all(selector)[0].click()

    def replace(self, selector: str, text: str) -> None:
        element = self.all(selector)[0]
        element.send_keys("\ue009a\ue000", text, "\ue004")  # control and a, then the text, then tab

    def text(self) -> str:
        return self.browser.execute_script("return document.body.innerText")


@pytest.fixture
def page(browser, address) -> Page:
    return Page(browser, address)


def test_a_click_shows_cells_that_can_be_taken_home(page, folder, tmp_path):
    page.replace("#num-cells input[type=number]", "12")
    page.replace("#perturbation input", "KLF1+TGFBR2")
    page.replace("#seed input", "5")
    page.click("#generate")
    until(lambda: "12 cells (KLF1+TGFBR2): median" in page.text(), "the summary appears")
    text = page.text()
    assert "log2 fold change" in text
    until(lambda: page.all("#picture img"), "the picture is there")
    with Image.open(io.BytesIO(page.all("#picture img")[0].screenshot_as_png)) as picture:
        assert picture.width > 600
        assert len(set(picture.convert("RGB").getdata())) > 50, "hardly anything is drawn"

    page.click("#cells-file a[download]")
    file = page.browser.downloads / "cells.h5ad"
    until(file.is_file, "the download is there")
    cells = anndata.read_h5ad(file)
    tokenizer, model = DCMTokenizer.from_pretrained(folder), DCMForDenoising.from_pretrained(folder)
    ours = model.generate(**tokenizer.conditions(perturbation="KLF1+TGFBR2", num_cells=12), seed=5, batch_size=128)
    assert list(cells.var_names) == GENES
    assert np.array_equal(cells.X.toarray(), ours.numpy())


def test_what_cannot_be_is_said_in_the_page_and_it_goes_on(page):
    page.replace("#perturbation input", "KLF11")
    page.click("#generate")
    until(lambda: "unknown perturbation 'KLF11'; near matches: 'KLF1'" in page.text(), "near matches appear")
    page.replace("#perturbation input", "KLF1")
    page.replace("#seed input", "-1")
    page.click("#generate")
    until(lambda: "seed must be a whole number from 0 to" in page.text(), "the seed's bounds appear")
    page.replace("#seed input", "1")
    page.click("#cell-type input")
    k562 = "[role=option][aria-label=k562]"
    until(lambda: page.all(k562), "the list of cell types opens")
    page.click(k562)
    page.click("#generate")
    until(lambda: "cells (k562, KLF1): median" in page.text(), "cells appear after all")
