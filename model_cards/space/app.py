"""A Gradio page for any checkpoint: choose conditions, draw cells, see them, take them home.

    dcm-app checkpoint/
    DCM_CHECKPOINT=org/name python app.py     # as a Space: this file beside a requirements.txt with transformers, torch

Uses transformers and gradio only, so that it runs as a Space where this package is not installed. Every
input is checked and bounded before the model sees it. Knows nothing of training and evaluation.
"""

import csv
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from transformers import pipeline

MAX_CELLS = 500
MAX_STEPS = 100
MAX_GUIDANCE = 10
SHOWN_CELLS, SHOWN_GENES = 20, 30
BATCH_CELLS = 128
ANY = "(any)"
FORMATS = ("sparse", "dense")


class Checkpoint:
    """The pipeline of a folder or an id on the Hub, and what may be asked of it."""

    def __init__(self, path: str):
        self.name = path
        self.pipeline = pipeline("cell-generation", model=path, trust_remote_code=True)
        self.tokenizer = self.pipeline.tokenizer

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

    def choices(self) -> dict[str, list[str]]:
        """Labels of cell type and perturbation to choose from; empty where the model does not know the condition."""
        known = {"cell_type": self.tokenizer.cell_types, "perturbation": self.tokenizer.perturbations}
        return {name: [ANY, *labels] if labels else [] for name, labels in known.items()}


def whole(name: str, value: object, least: int, most: int) -> int:
    """A whole number within bounds. Raises ValueError for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= most or value != int(value):
        raise ValueError(f"{name} must be a whole number from {least:,} to {most:,}")
    return int(value)


def count_table(counts: np.ndarray, genes: list[str], form: str) -> tuple[list[str], list[list[object]]]:
    """Header and rows of the first cells' counts.

    Args:
        counts: (n, G).
        genes: names of the G genes.
        form: ``"sparse"``: one row for each count that is not zero; ``"dense"``: one row for each cell, with the genes
            of the highest mean.
    """
    if form not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}")
    counts = counts[:SHOWN_CELLS]
    if form == "sparse":
        cells, columns = np.nonzero(counts)
        rows = [[int(i), genes[j], int(counts[i, j])] for i, j in zip(cells, columns)]
        return ["cell", "gene", "count"], rows
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
    style = 'font-family="sans-serif" font-size="11"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 380 150" width="570" {style}>{bars}{ends}{text}</svg>'


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

    choices = checkpoint.choices()

    def answer(cell_type, perturbation, num_cells, steps, guidance, seed, form):
        try:
            drawn = checkpoint.draw(cell_type, perturbation, num_cells, steps, guidance, seed)
            header, rows = count_table(drawn["counts"], drawn["genes"], form)
        except ValueError as error:
            raise gr.Error(str(error)) from None
        plot = histogram_svg(drawn["counts"].sum(axis=1), "counts per cell")
        file = save_cells(drawn, Path(tempfile.mkdtemp(prefix="cells-")))
        return plot, {"headers": header, "data": rows}, str(file)

    with gr.Blocks(title="Discrete Cell Model") as page:
        gr.Markdown(f"# Cells of {checkpoint.name}\n\n{len(checkpoint.tokenizer.genes):,} genes, integer counts.")
        with gr.Row():
            cell_type = gr.Dropdown(choices["cell_type"], label="cell type", visible=bool(choices["cell_type"]))
            perturbation = gr.Dropdown(
                choices["perturbation"],
                label="perturbation (A+B combines)",
                visible=bool(choices["perturbation"]),
                allow_custom_value=True,
            )
        with gr.Row():
            num_cells = gr.Slider(1, MAX_CELLS, value=100, step=1, label="cells")
            steps = gr.Slider(0, MAX_STEPS, value=0, step=1, label="steps (0: the model's default)")
            guidance = gr.Slider(0, MAX_GUIDANCE, value=0, label="guidance")
            seed = gr.Number(value=0, precision=0, label="seed")
        form = gr.Radio(FORMATS, value="dense", label="table")
        button = gr.Button("Draw cells", variant="primary")
        plot, table, file = gr.HTML(), gr.Dataframe(label="first cells"), gr.File(label="all cells")
        inputs = [cell_type, perturbation, num_cells, steps, guidance, seed, form]
        button.click(answer, inputs, [plot, table, file], concurrency_limit=1)
    return page.queue(max_size=20)


def main(path: str) -> None:
    """Serve the page for a checkpoint until it is stopped."""
    build(Checkpoint(path)).launch()


def cli() -> None:
    """Entry point of ``dcm-app``, and of a Space."""
    path = sys.argv[1] if len(sys.argv) == 2 else os.environ.get("DCM_CHECKPOINT")
    if not path or path.startswith("-"):
        sys.stderr.write("usage: dcm-app CHECKPOINT    (a folder or an id on the Hub; or set DCM_CHECKPOINT)\n")
        sys.exit(2)
    try:
        main(path)
    except (ImportError, OSError, ValueError) as error:
        hint = ": pip install 'discrete-cell-models[app]'" if "gradio" in str(error) else ""
        sys.stderr.write(f"error: {' '.join(str(error).split())}{hint}\n")
        sys.exit(2)


if __name__ == "__main__":
    cli()
