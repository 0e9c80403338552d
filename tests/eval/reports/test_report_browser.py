"""The report of an evaluation in a headless Chromium that may fetch nothing at all: every figure is drawn."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.comparison.cells import Comparison
from eval.reports.html_report import html_report
from tests.eval.reports.test_html_report import HEADER, cells, rows
from tests.headless_browser import Browser, missing, until

LACKING = missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(LACKING is not None, reason=str(LACKING))]

# nothing but what stands in the page itself; whatever else it asks for is refused, and listed
GUARD = """
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<script>refused = []; addEventListener('securitypolicyviolation', event => refused.push(event.blockedURI));</script>
"""
# size of every figure on the page, and the natural width of every raster image in it
FIGURES = """
const widthOf = image => new Promise(done => {
  const copy = new Image();
  copy.onload = () => done(copy.naturalWidth);
  copy.onerror = () => done(0);
  copy.src = image.getAttribute('href') || image.getAttribute('xlink:href');
});
return Promise.all([...document.querySelectorAll('figure > svg')].map(async svg => {
  const {width, height} = svg.getBoundingClientRect();
  const images = await Promise.all([...svg.querySelectorAll('image')].map(widthOf));
  return {label: svg.getAttribute('aria-label'), width, height, images};
}));
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as window:
        yield window


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    compared = Comparison(cells(0), cells(1), {"<mine>": [cells(2)]}, [f"gene{i}" for i in range(12)], None)
    path = tmp_path_factory.mktemp("report") / "report.html"
    page = html_report(HEADER, rows(), compared, cells(3), baseline_name="marginals", umap=False)
    path.write_text(guarded(page))
    return path


def guarded(page: str) -> str:
    return page.replace("<head>", f"<head>{GUARD}", 1)


def test_every_figure_is_drawn(browser, report, tmp_path):
    browser.open(report.as_uri())
    figures = browser.run(FIGURES)
    assert len(figures) == 5
    assert sum(len(figure["images"]) for figure in figures) >= 3
    for number, figure in enumerate(figures):
        assert figure["width"] > 250, figure["label"]
        assert figure["height"] > 120, figure["label"]
        assert all(width > 0 for width in figure["images"]), figure["label"]
        picture = np.asarray(picture_of(browser, number, tmp_path))
        colours = np.unique(picture.reshape(-1, 3), axis=0)
        assert len(colours) > 50, f"{figure['label']}: hardly anything is drawn"


def picture_of(browser: Browser, number: int, folder: Path) -> Image.Image:
    """What the window shows of a figure."""
    box = browser.run(
        f"const svg = document.querySelectorAll('figure > svg')[{number}]; svg.scrollIntoView({{block: 'start'}});"
        "const {left, top, right, bottom} = svg.getBoundingClientRect(); return [left, top, right, bottom]"
    )
    browser.screenshot(folder / "window.png")
    with Image.open(folder / "window.png") as window:
        return window.convert("RGB").crop((box[0], box[1], box[2], min(box[3], window.height)))


def test_nothing_is_fetched_and_the_page_is_not_wider_than_its_window(browser, report, tmp_path):
    browser.open(report.as_uri())
    assert browser.run("return refused") == []
    assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
    fetching = tmp_path / "fetching.html"  # a page that fetches something is found out
    fetching.write_text(guarded('<html><head></head><body><img src="http://127.0.0.1:9/x.png"></body></html>'))
    browser.open(fetching.as_uri())
    assert until(lambda: browser.run("return refused"), "the picture is refused") == ["http://127.0.0.1:9/x.png"]
