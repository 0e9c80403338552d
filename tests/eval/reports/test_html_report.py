"""The report of an evaluation: every table and figure in one file, nothing fetched, readable on light and dark."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from eval.comparison.cells import CellCounts, Comparison
from eval.comparison.protocols import Score
from eval.reports.figures import INK, differential_figure
from eval.reports.html_report import html_report
from eval.reports.tables import Row, summary_rows

HEADER = {
    "dataset": "a <b> & dentate gyrus",
    "split": "test",
    "checkpoint": None,
    "versions": {"python": "3", "absent": None},
    "command": "dcm-evaluate x",
}
VOID = {"meta", "link", "br", "img"}


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
    """A floor of two draws and one generator: at the floor when pooled, far from it in one condition."""
    made = []
    for model, values in (("floor", (1.0, 1.2)), ("<mine>", (1.25,))):
        scores = [
            [
                Score("pooled", None, "w2", value, 200),
                Score("condition", "a | x", "w2", value + (model != "floor") * 9, 50),
                Score("condition", "b | x", "w2", value, 50),
            ]
            for value in values
        ]
        made += summary_rows(model, "log", scores, test_cells={"a | x": 50, "b | x": 50})
    return made


@pytest.fixture(scope="module")
def page() -> str:
    compared = Comparison(cells(0), cells(1), {"<mine>": [cells(2)]}, [f"gene{i}" for i in range(12)], None)
    return html_report(HEADER, rows(), compared, cells(3), baseline_name="marginals", umap=False)


class Outline(HTMLParser):
    """Checks that elements close in order, and collects what a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.ids = [], [], []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.fetched += [values[name] for name in ("src", "href", "xlink:href") if name in values]
        self.ids += [values["id"]] if "id" in values else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_it_is_one_well_formed_page_that_fetches_nothing(page):
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    assert all(target.startswith(("#", "data:")) for target in outline.fetched)
    assert "<script" not in page
    assert "@import" not in page
    assert "url(http" not in page


def test_every_figure_is_there_with_a_caption_and_a_label(page):
    assert page.count("<figure>") == page.count("<figcaption>") == 5
    pictures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(pictures) == 5
    for picture in pictures:
        assert ElementTree.fromstring(picture).get("aria-label")
    for text in ("Heat map of conditions", "PCA of real", "library size", "Correlation matrices", "differential genes"):
        assert text in page


def test_identifiers_of_figures_do_not_clash_and_every_reference_has_its_target(page):
    outline = Outline()
    outline.feed(page)
    assert len(set(outline.ids)) == len(outline.ids)
    used = set(re.findall(r"url\(#([^)]+)\)", page)) | {t[1:] for t in outline.fetched if t.startswith("#")}
    assert used <= set(outline.ids)


def test_lines_and_letters_take_the_colour_of_the_page(page):
    assert INK not in page
    assert "currentColor" in page
    assert "prefers-color-scheme: dark" in page


def test_the_table_marks_what_is_at_the_floor_and_names_are_escaped(page):
    assert '<td class="at-floor" title="at the floor">1.25</td>' in page
    assert "&lt;mine&gt;" in page
    assert "<mine>" not in page
    assert "a &lt;b&gt; &amp; dentate gyrus" in page
    assert "n = 200, 2 draws" in page


def test_worst_conditions_come_first(page):
    worst = page[page.index("Worst conditions") :]
    assert worst.index("a | x") < worst.index("b | x")
    assert f"<td>{(10.25 - 1.1) / np.std([1.0, 1.2], ddof=1):.1f}</td>" in worst


def test_published_numbers_stand_apart_and_only_for_their_data_set(page):
    section = page[page.index("<h2>As published, another protocol</h2>") :]
    assert "CFGen" in section
    assert "CFGen" not in page[: page.index("<h2>As published")]
    assert "scGPT" not in page
    compared = Comparison(cells(0), cells(1), {}, [f"gene{i}" for i in range(12)], None)
    other = html_report({**HEADER, "dataset": "pbmc3k"}, rows(), compared, cells(3), baseline_name="m", umap=False)
    assert "As published" not in other


def test_the_gene_that_a_perturbation_moves_is_the_first_of_its_panel():
    figure = differential_figure(cells(0), cells(2), [f"gene{i}" for i in range(12)])
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert {axes.get_title() for axes in shown} == {"a | x", "b | x"}
    assert all(axes.get_yticklabels()[-1].get_text() == "gene3" for axes in shown)
    alone = cells(0)
    assert differential_figure(CellCounts(alone.counts, alone.labels), cells(2), []) is None
