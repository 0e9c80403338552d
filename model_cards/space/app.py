"""A Gradio page for any checkpoint: choose conditions, draw cells, see them beside real ones, take them home.

    dcm-app checkpoint/
    dcm-app checkpoint/ --reference cells.h5ad    # real cells of raw counts, shown beside the generated ones
    DCM_CHECKPOINT=org/name DCM_REFERENCE=cells.h5ad python app.py    # as a Space, with the files of this folder

Uses transformers, numpy and gradio (and anndata where it is installed), so that it runs as a Space where this package
is not installed. Every input is checked and bounded before the model sees it. Knows nothing of training and evaluation.
"""

import argparse
import csv
import html
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from transformers import pipeline

MAX_CELLS = 500
MAX_STEPS = 100
MAX_GUIDANCE = 10
REFERENCE_POOL, REFERENCE_SHOWN = 20_000, 300  # cells kept of the file; cells shown of each kind, at random
SHOWN_CELLS, SHOWN_GENES, SHOWN_CHANGES = 20, 30, 15
KEPT_FILES = 20  # of the last answers; older ones are deleted
BATCH_CELLS = 128
PER_CELL = 1e4  # counts that a cell is scaled to before logarithms
FOLD_PSEUDOCOUNT = 0.1  # of a mean per 10,000 counts
ANY = "(any)"
SVG = 'xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="11" style="width: 100%"'
PAPER = '<rect width="100%" height="100%" fill="white"/>'  # also where the page is dark
COLOURS = {"generated": "#4477aa", "generated control": "#ccbb44", "reference, same labels": "#ee6677"}
CHANGES = ["gene", "mean count", "in control", "log2 fold change", "t"]


class Checkpoint:
    """The pipeline of a folder or an id on the Hub, and what may be asked of it.

    Args:
        path: the folder, or the id.
        reference: h5ad of real cells to show beside the drawn ones, or None.

    Raises:
        ValueError: the reference holds no raw counts, or none of the model's genes.
    """

    def __init__(self, path: str, reference: str | None = None):
        self.name = path
        self.pipeline = pipeline("cell-generation", model=path, trust_remote_code=True)
        self.tokenizer = self.pipeline.tokenizer
        self.reference = None if reference is None else Reference(reference, self.tokenizer)

    def draw(
        self,
        cell_type: str | None,
        perturbation: str | None,
        num_cells: float,
        steps: float | None,
        guidance_scale: float,
        seed: float,
    ) -> dict[str, object]:
        """Cells as the pipeline gives them: ``counts`` (n, G), ``genes``, and ``adata`` where anndata is installed.

        Args:
            cell_type: a label, or None or ``"(any)"`` for no condition.
            perturbation: likewise; combinations as in ``KLF1+TGFBR2``.
            num_cells: at most ``MAX_CELLS``.
            steps: at most ``MAX_STEPS``; None or 0: the model's own default.
            guidance_scale: at most ``MAX_GUIDANCE``.
            seed: the same seed gives the same cells.

        Raises:
            ValueError: an input is out of bounds, or a label unknown.
        """
        wanted = {"cell_type": cell_type, "perturbation": perturbation}
        wanted = {name: label for name, label in wanted.items() if label not in (None, "", ANY)}
        for name, label in wanted.items():
            if not isinstance(label, str) or len(label) > 200:
                raise ValueError(f"{name} must be a label of at most 200 characters")
        request = {"num_cells": whole("cells", num_cells, 1, MAX_CELLS), **wanted}
        options = {"seed": whole("seed", seed, 0, 2**32 - 1)}
        if steps:
            options["steps"] = whole("steps", steps, 1, MAX_STEPS)
        if not isinstance(guidance_scale, int | float) or not 0 <= guidance_scale <= MAX_GUIDANCE:
            raise ValueError(f"guidance must be from 0 to {MAX_GUIDANCE}")
        return self.pipeline(request, **options, guidance_scale=float(guidance_scale), batch_size=BATCH_CELLS)

    def draw_control(self, drawn: Mapping[str, object], steps: float | None, seed: float) -> dict[str, object] | None:
        """As many control cells of the same cell type, by another seed; None where no perturbation was asked for."""
        control, asked = self.tokenizer.control, drawn["conditions"]
        if control is None or asked.get("perturbation") in (None, control):
            return None
        return self.draw(asked.get("cell_type"), control, len(drawn["counts"]), steps, 0, (int(seed) + 1) % 2**32)

    def picture(self, drawn: Mapping[str, object], control: Mapping[str, object] | None) -> str:
        """Drawn cells, control and reference as points of one plane, SVG."""
        clouds = {"generated": drawn["counts"]} | ({} if control is None else {"generated control": control["counts"]})
        if self.reference is not None:
            clouds = self.reference.beside(clouds, drawn["conditions"])
        points, shares = principal_plane(clouds)
        return scatter_svg(points, [f"PC{i + 1} ({share:.0%} of variance)" for i, share in enumerate(shares)])

    def choices(self) -> dict[str, list[str]]:
        """Labels of cell type and perturbation to choose from; empty where the model does not know the condition."""
        known = {"cell_type": self.tokenizer.cell_types, "perturbation": self.tokenizer.perturbations}
        return {name: [ANY, *labels] if labels else [] for name, labels in known.items()}


class Reference:
    """Real cells of an h5ad, over those of the model's genes that it has, by exact name.

    Args:
        path: the file; raw counts in ``X``, labels in ``obs["cell_type"]`` and ``obs["perturbation"]`` if at all.
        tokenizer: the model's, with ``genes``, ``separator`` and ``control``.
    """

    def __init__(self, path: str, tokenizer: object):
        if importlib.util.find_spec("anndata") is None:
            raise ValueError("reference cells need anndata: pip install anndata")
        import anndata

        cells = anndata.read_h5ad(path, backed="r")
        if not cells.var_names.is_unique:
            raise ValueError(f"{path!r} has gene names more than once in var_names; sum or drop the duplicates")
        columns = cells.var_names.get_indexer(tokenizer.genes)
        self.panel = np.flatnonzero(columns >= 0)  # positions of the shared genes among the model's
        if not len(self.panel) or not cells.n_obs:
            raise ValueError(f"{path!r} has no cells, or none of the genes {', '.join(tokenizer.genes[:3])}, ...")
        n = min(cells.n_obs, REFERENCE_POOL)
        sample = cells[np.sort(np.random.default_rng(0).choice(cells.n_obs, n, replace=False))].to_memory()
        cells.file.close()
        self.counts = sample.X[:, columns[self.panel]]
        values = self.counts.data if hasattr(self.counts, "indptr") else self.counts
        if not np.all(values >= 0) or not np.array_equal(values, np.floor(values)):
            raise ValueError(f"{path!r} holds values in X that are no counts; expected raw counts as a reference")
        self.separator, self.control = tokenizer.separator, tokenizer.control
        self.labels = {
            name: [self._parts(name, label) for label in sample.obs[name]]
            for name in ("cell_type", "perturbation")
            if name in sample.obs
        }

    def beside(self, clouds: Mapping[str, np.ndarray], asked: Mapping[str, str]) -> dict[str, np.ndarray]:
        """``clouds`` over the shared genes after some real cells: others, and those of the labels asked for."""
        is_same = np.full(self.counts.shape[0], bool(asked) and all(name in self.labels for name in asked))
        for name in set(asked) & set(self.labels):
            is_same &= np.array([parts == self._parts(name, asked[name]) for parts in self.labels[name]])
        ours = {name: counts[:, self.panel] for name, counts in clouds.items()}
        return {"reference": self._some(~is_same), "reference, same labels": self._some(is_same)} | ours

    def _parts(self, name: str, label: object) -> frozenset[str]:
        """Single names of a perturbation's label, without the control beside others; any other label is one name."""
        if name != "perturbation" or not self.separator:
            return frozenset([str(label)])
        names = frozenset(str(label).split(self.separator))
        return names - {self.control} or names

    def _some(self, wanted: np.ndarray) -> np.ndarray:
        rows = np.random.default_rng(0).permutation(np.flatnonzero(wanted))[:REFERENCE_SHOWN]
        counts = self.counts[np.sort(rows)]
        return np.asarray(counts.toarray() if hasattr(counts, "toarray") else counts)


def whole(name: str, value: object, least: int, most: int) -> int:
    """A whole number within bounds. Raises ValueError for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= most or value != int(value):
        raise ValueError(f"{name} must be a whole number from {least:,} to {most:,}")
    return int(value)


def log_scaled(counts: np.ndarray) -> np.ndarray:
    """``log1p`` of counts (n, G) after each cell is scaled to 10,000; a cell without counts stays zero."""
    return np.log1p(PER_CELL * counts / np.maximum(1, counts.sum(axis=1, keepdims=True)))


def principal_plane(clouds: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Each cloud's cells (n, G) on the first two principal components of all, (n, 2), and their shares of variance."""
    values = log_scaled(np.concatenate(list(clouds.values())))
    values = values - values.mean(axis=0)
    is_wide = values.shape[0] < values.shape[1]
    variance, vectors = np.linalg.eigh(values @ values.T if is_wide else values.T @ values)
    first = np.argsort(-variance)[:2]
    top = np.maximum(variance[first], 0)
    points = vectors[:, first] * np.sqrt(top) if is_wide else values @ vectors[:, first]
    points = np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
    shares = np.pad(top / max(np.maximum(variance, 0).sum(), 1e-12), (0, 2 - len(top)))
    ends = np.cumsum([len(cloud) for cloud in clouds.values()])[:-1]
    return dict(zip(clouds, np.split(points, ends))), shares


def top_changes(counts: np.ndarray, control: np.ndarray, genes: list[str]) -> list[list[object]]:
    """Rows of ``CHANGES``: the genes whose log-scaled counts differ most from control cells', by Welch's t.

    Args:
        counts: (n, G).
        control: (m, G).
        genes: names of the G genes.
    """
    ours, theirs = log_scaled(counts), log_scaled(control)
    error = ours.var(axis=0) / len(ours) + theirs.var(axis=0) / len(theirs)
    t = (ours.mean(axis=0) - theirs.mean(axis=0)) / np.sqrt(np.maximum(error, 1e-12))
    fold = np.log2(
        (np.expm1(ours).mean(axis=0) + FOLD_PSEUDOCOUNT) / (np.expm1(theirs).mean(axis=0) + FOLD_PSEUDOCOUNT)
    )
    means = counts.mean(axis=0), control.mean(axis=0)
    return [
        [genes[i], *(round(float(mean[i]), 2) for mean in means), round(float(fold[i]), 2), round(float(t[i]), 1)]
        for i in np.argsort(-np.abs(t), kind="stable")[:SHOWN_CHANGES]
    ]


def count_table(counts: np.ndarray, genes: list[str]) -> tuple[list[str], list[list[object]]]:
    """Header and rows of the first cells' counts (n, G), over the ``genes`` of the highest mean."""
    counts = counts[:SHOWN_CELLS]
    highest = np.argsort(-counts.mean(axis=0), kind="stable")[:SHOWN_GENES]
    return ["cell", *(genes[j] for j in highest)], [[i, *map(int, row[highest])] for i, row in enumerate(counts)]


def histogram_svg(values: np.ndarray, title: str, *, bins: int = 30) -> str:
    """A small histogram as SVG: no plotting library is needed."""
    heights, edges = np.histogram(values, bins=bins)
    top = max(1, heights.max())
    bars = "".join(
        f'<rect x="{10 + 12 * i}" y="{110 - h:.1f}" width="11" height="{h:.1f}" fill="#4477aa"/>'
        for i, h in enumerate(100 * heights / top)
    )
    ends = f'<text x="10" y="125">{edges[0]:,.0f}</text><text x="370" y="125" text-anchor="end">{edges[-1]:,.0f}</text>'
    text = f'<text x="190" y="145" text-anchor="middle">{title} (n = {len(values):,})</text>'
    return f'<svg {SVG} viewBox="0 0 380 150">{PAPER}{bars}{ends}{text}</svg>'


def scatter_svg(clouds: Mapping[str, np.ndarray], axes: list[str]) -> str:
    """Clouds of points (n, 2) as SVG, the first at the back, with a legend of how many each has."""
    every = np.concatenate(list(clouds.values()))
    low, span = every.min(axis=0), np.maximum(np.ptp(every, axis=0), 1e-9)
    dots, legend, x = [], [], 20
    for name, points in clouds.items():
        if not len(points):
            continue
        colour = COLOURS.get(name, "#bbbbbb")
        places = np.array([20, 300]) + np.array([660, -280]) * (points - low) / span
        dots += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in places]
        text = f"{name} ({len(points):,})"
        legend.append(f'<circle cx="{x}" cy="340" r="4" fill="{colour}"/><text x="{x + 8}" y="344">{text}</text>')
        x += 30 + 6 * len(text)
    names = [f'<text x="350" y="322" text-anchor="middle">{html.escape(axes[0])}</text>']
    names.append(f'<text transform="translate(12,160) rotate(-90)" text-anchor="middle">{html.escape(axes[1])}</text>')
    drawing = "".join([*names, f'<g fill-opacity="0.7">{"".join(dots)}</g>', *legend])
    return f'<svg {SVG} viewBox="0 0 700 360">{PAPER}{drawing}</svg>'


class KeptFiles:
    """Folders of the last answers' files: a page that runs for weeks must not fill the disk."""

    def __init__(self):
        self.home = tempfile.TemporaryDirectory(prefix="dcm-app-")
        self.folders: list[Path] = []

    def new_folder(self) -> Path:
        """An empty folder; the oldest is deleted when there are more than ``KEPT_FILES``."""
        self.folders.append(Path(tempfile.mkdtemp(dir=self.home.name)))
        if len(self.folders) > KEPT_FILES:
            shutil.rmtree(self.folders.pop(0))
        return self.folders[-1]


def save_cells(drawn: dict[str, object], folder: Path) -> Path:
    """Write all cells: ``cells.h5ad`` where anndata is installed, else ``cells.csv`` with one row for each count."""
    if "adata" in drawn:
        path = folder / "cells.h5ad"
        drawn["adata"].write_h5ad(path)
        return path
    path = folder / "cells.csv"
    counts, genes = drawn["counts"], drawn["genes"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["cell", "gene", "count"])
        writer.writerows([i, genes[j], counts[i, j]] for i, j in zip(*np.nonzero(counts)))
    return path


def build(checkpoint: Checkpoint):
    """The page, as gradio's Blocks; inputs are bounded and wait in a queue."""
    import gradio as gr

    files = KeptFiles()

    def answer(*inputs):
        try:
            drawn = checkpoint.draw(*inputs)
            control = checkpoint.draw_control(drawn, inputs[3], inputs[5])
        except ValueError as error:
            return f"**Not generated:** {html.escape(str(error))}", "", "", None, None, None
        counts, genes = drawn["counts"], drawn["genes"]
        header, rows = count_table(counts, genes)
        return (
            summary(drawn),
            checkpoint.picture(drawn, control),
            histogram_svg(counts.sum(axis=1), "counts per cell"),
            {"headers": CHANGES, "data": [] if control is None else top_changes(counts, control["counts"], genes)},
            {"headers": header, "data": rows},
            str(save_cells(drawn, files.new_folder())),
        )

    with gr.Blocks(title="Discrete Cell Model", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        inputs, button = _inputs(gr, checkpoint)
        said = gr.Markdown(elem_id="said")
        file = gr.File(label="all cells", elem_id="cells-file")
        with gr.Row():
            with gr.Column(scale=2):
                plane = gr.HTML()
            with gr.Column(scale=1):
                histogram = gr.HTML()
        changes = gr.Dataframe(
            headers=CHANGES,
            label="top changed genes, for a perturbation: against control cells drawn alike (choose a cell type, too)",
            visible=checkpoint.tokenizer.control is not None,
        )
        table = gr.Dataframe(label=f"counts of the first {SHOWN_CELLS} cells")
        outputs = [said, plane, histogram, changes, table, file]
        button.click(answer, inputs, outputs, concurrency_limit=1, api_name="generate")
    return page.queue(max_size=20)


def _inputs(gr, checkpoint: Checkpoint) -> tuple[list, object]:
    """The page's inputs, in the order of the answer's arguments, and its button."""
    choices = checkpoint.choices()
    gr.Markdown(
        f"# Cells of `{Path(checkpoint.name).name}`\n\n{len(checkpoint.tokenizer.genes):,} genes, integer counts."
    )
    with gr.Row():
        cell_type = gr.Dropdown(
            choices["cell_type"], label="cell type", visible=bool(choices["cell_type"]), elem_id="cell-type"
        )
        perturbation = gr.Dropdown(
            choices["perturbation"],
            label="perturbation (A+B combines)",
            visible=bool(choices["perturbation"]),
            allow_custom_value=True,
            elem_id="perturbation",
        )
    with gr.Row():
        num_cells = gr.Slider(1, MAX_CELLS, value=100, step=1, label="cells", elem_id="num-cells")
        steps = gr.Slider(0, MAX_STEPS, value=0, step=1, label="steps (0: the model's default)")
        guidance = gr.Slider(0, MAX_GUIDANCE, value=0, label="guidance")
        seed = gr.Number(value=0, precision=0, label="seed", elem_id="seed")
    button = gr.Button("Generate", variant="primary", elem_id="generate")
    return [cell_type, perturbation, num_cells, steps, guidance, seed], button


def summary(drawn: Mapping[str, object]) -> str:
    """One line on the drawn cells."""
    counts = drawn["counts"]
    asked = ", ".join(map(str, drawn["conditions"].values())) or "no condition"
    return (
        f"{len(counts):,} cells ({asked}): median {np.median(counts.sum(axis=1)):,.0f} counts and "
        f"{np.median((counts > 0).sum(axis=1)):,.0f} of {counts.shape[1]:,} genes with a count."
    )


def main(path: str, reference: str | None = None) -> None:
    """Serve the page for a checkpoint until it is stopped.

    Raises:
        ImportError: gradio is not installed.
        ValueError: no such checkpoint, or the reference does not fit it.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ImportError("the page needs gradio: pip install 'discrete-cell-models[app]'")
    build(Checkpoint(path, reference)).launch()


def cli() -> None:
    """Entry point of ``dcm-app``, and of a Space."""
    parser = argparse.ArgumentParser(prog="dcm-app", description="A page that generates cells by a checkpoint.")
    checkpoint, reference = os.environ.get("DCM_CHECKPOINT"), os.environ.get("DCM_REFERENCE")
    parser.add_argument(
        "checkpoint", nargs="?", default=checkpoint, help="a folder or an id on the Hub (or set DCM_CHECKPOINT)"
    )
    parser.add_argument(
        "--reference", default=reference, help="h5ad of real cells to show beside the generated (or set DCM_REFERENCE)"
    )
    given = parser.parse_args()
    if not given.checkpoint:
        parser.error("no checkpoint: name a folder or an id on the Hub, or set DCM_CHECKPOINT")
    try:
        main(given.checkpoint, given.reference or None)
    except (ImportError, OSError, ValueError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(2)


if __name__ == "__main__":
    cli()
