"""The report of an evaluation: every table and figure in one file, nothing fetched, readable on light and dark."""

import io
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import sparse

from eval.comparison.cells import CellCounts, Comparison
from eval.comparison.protocols import Score
from eval.reports.figures import INK, cells_to_draw, differential_figure
from eval.reports.html_report import html_report
from eval.reports.tables import Row, summary_rows

GENES = [f"gene{i}" for i in range(12)]
DATASET = "a <b> & dentate gyrus"
# In the browser nothing is allowed but what stands in the page itself; whatever else it asks for is refused and listed.
GUARD = """<head>
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<script>refused = []; addEventListener('securitypolicyviolation', event => refused.push(event.blockedURI));</script>
"""
WIDTH_OF_IMAGE = """
const copy = new Image(), done = arguments[1];
copy.onload = () => done(copy.naturalWidth);
copy.onerror = () => done(0);
copy.src = arguments[0].getAttribute('href') || arguments[0].getAttribute('xlink:href');
"""


def cells(seed: int) -> CellCounts:
    """Two cell types of 50 controls and 50 perturbed cells, whose gene 3 is up."""
    rng = np.random.default_rng(seed)
    labels = pd.DataFrame(
        {"cell_type": np.repeat(["a", "b"], 100), "perturbation": np.tile(np.repeat(["control", "x"], 50), 2)}
    )
    level = rng.gamma(3, 1, (200, 1)) * np.linspace(0.3, 2, 12)
    level[(labels["perturbation"] == "x").to_numpy(), 3] *= 6
    return CellCounts(sparse.csr_matrix(rng.poisson(level)), labels, "control")


def rows() -> list[Row]:
    """A floor of two draws and one generator at the floor."""
    made = []
    for model, values in (("floor", (1.0, 1.2)), ("<mine>", (1.25,))):
        scores = [[Score("pooled", None, "w2", value, 200)] for value in values]
        made += summary_rows(model, "log", scores, test_cells={})
    return made


def report(dataset: str, generated: dict[str, list[CellCounts]]) -> str:
    header = {"dataset": dataset, "split": "test", "checkpoint": None, "command": "dcm-evaluate x"}
    header["versions"] = {"python": "3", "absent": None}
    shown = Comparison(cells(0), cells(1), generated, GENES, None)
    drawn = cells_to_draw(shown, cells(3), baseline_name="marginals", seed=0)
    return html_report(header, rows(), shown, drawn, umap=False)


@pytest.fixture(scope="module")
def page() -> str:
    return report(DATASET, {"<mine>": [cells(2)], "other": [cells(4)]})


class Outline(HTMLParser):
    """Checks that elements close in order, and collects what a browser would fetch."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.fetched, self.ids = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.fetched += [values[name] for name in ("src", "href", "xlink:href") if name in values]
        self.ids += [values["id"]] if "id" in values else []
        self.open += [] if tag in ("meta", "link", "br", "img") else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_it_is_one_well_formed_page_that_fetches_nothing_and_whose_references_have_their_targets(page):
    outline = Outline(page)
    assert outline.open == []
    assert all(target.startswith(("#", "data:")) for target in outline.fetched)
    for fetching in ("<script", "@import", "url(http"):
        assert fetching not in page
    assert len(set(outline.ids)) == len(outline.ids)
    used = set(re.findall(r"url\(#([^)]+)\)", page)) | {t[1:] for t in outline.fetched if t.startswith("#")}
    assert used <= set(outline.ids)


def test_every_figure_is_there_with_a_caption_and_a_label(page):
    pictures = re.findall(r"<figure>(<svg.*?</svg>)\s*<figcaption>", page, flags=re.DOTALL)
    assert len(pictures) == page.count("<figure>") == 8
    labels = " ".join(ElementTree.fromstring(picture).get("aria-label") for picture in pictures)
    for text in ("PCA of real", "Library sizes", "Correlation matrices", "differential genes"):
        assert text in labels
    assert INK not in page  # lines and letters take the colour of the page
    assert "currentColor" in page
    assert "prefers-color-scheme: dark" in page


def test_tables_mark_what_is_at_the_floor_and_escape_names(page):
    assert '<td class="at-floor" title="at the floor">1.25</td>' in page
    assert "&lt;mine&gt;" in page
    assert "<mine>" not in page
    assert "a &lt;b&gt; &amp; dentate gyrus" in page
    assert "n = 200, 2 draws" in page


def test_published_numbers_stand_apart_and_only_for_their_data_set(page):
    before, section = page.split("<h2>As published, another protocol</h2>")
    assert "CFGen" in section
    assert "CFGen" not in before
    assert "scGPT" not in page
    assert "As published" not in report("pbmc3k", {})


def test_the_gene_that_a_perturbation_moves_is_the_first_of_its_panel():
    figure = differential_figure(cells(0), cells(2), GENES)
    drawn = [axes for axes in figure.axes if axes.get_visible()]
    assert {axes.get_title() for axes in drawn} == {"a | x", "b | x"}
    assert all(axes.get_yticklabels()[-1].get_text() == "gene3" for axes in drawn)
    alone = cells(0)
    assert differential_figure(CellCounts(alone.counts, alone.labels), cells(2), []) is None


@pytest.mark.slow
def test_a_browser_that_may_fetch_nothing_draws_every_figure_within_its_window(browser, page, tmp_path):
    open_guarded(browser, page, tmp_path)
    figures = browser.find_elements("css selector", "figure > svg")
    assert len(figures) == 8
    images = [image for figure in figures for image in figure.find_elements("tag name", "image")]
    assert len(images) >= 3
    assert all(browser.execute_async_script(WIDTH_OF_IMAGE, image) > 0 for image in images)
    for figure in figures:
        label = figure.get_attribute("aria-label")
        browser.execute_script("arguments[0].scrollIntoView()", figure)
        with Image.open(io.BytesIO(figure.screenshot_as_png)) as picture:
            assert picture.width > 250, label
            assert picture.height > 120, label
            assert len(set(picture.convert("RGB").getdata())) > 50, f"{label}: hardly anything is drawn"
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.execute_script("return refused") == []


def open_guarded(browser, page: str, folder: Path) -> None:
    (folder / "page.html").write_text(page.replace("<head>", GUARD, 1))
    browser.get((folder / "page.html").as_uri())
