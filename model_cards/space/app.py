"""A Gradio page for any checkpoint: choose conditions, draw cells, see them beside real ones, take them home.

    dcm-app checkpoint/
    dcm-app checkpoint/ --reference cells.h5ad    # real cells of raw counts, drawn beside the generated ones
    DCM_CHECKPOINT=org/name DCM_REFERENCE=cells.h5ad python app.py    # as a Space, with the files of this folder

It runs as a Space without this package: what it needs stands in requirements.txt. Every input is checked and bounded
before the model sees it.
"""

import html
import importlib.util
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

MAX_CELLS = 500
MAX_STEPS = 100
MAX_GUIDANCE = 10
REFERENCE_POOL, REFERENCE_DRAWN = 20_000, 300  # cells kept of the file; cells drawn of each kind, at random
TABLE_CELLS, TABLE_GENES, TABLE_CHANGES = 20, 30, 15
BATCH_CELLS = 128
PER_CELL = 1e4  # counts that a cell is scaled to before logarithms
FOLD_PSEUDOCOUNT = 0.1  # of a mean per 10,000 counts
ANY = "(as in training)"
COLOURS = {"real cells": "#bbbbbb", "real cells, same labels": "#ee6677", "generated control": "#ccbb44"}
GENERATED = "#4477aa"
REFUSED = "**Not generated:**"
CHANGES_LABEL = (
    "genes that the perturbation changes most, against control cells drawn alike: means per 10,000 counts of a cell; "
    "t: their difference on log counts in standard errors (Welch), beyond 3 or -3 hardly chance"
)
CHANGES = ["gene", "mean per 10,000", "in control", "log2 fold change", "t"]


class Checkpoint:
    """The pipeline of a folder or an id on the Hub, and what may be asked of it.

    Args:
        path: the folder, or the id.
        reference: h5ad of real cells to draw beside the generated ones, or None.

    Raises:
        ValueError: the reference holds no raw counts, or none of the model's genes.
    """

    def __init__(self, path: str, reference: str | None = None):
        from transformers import pipeline

        self.name = Path(path).name
        if Path(path).is_dir() and not (Path(path) / "pipeline_dcm.py").is_file():  # its code is this package's
            from modeling_dcm import DCMForDenoising
            from modeling_dcm.pipeline_dcm import CellGenerationPipeline
            from tokenization import DCMTokenizer

            model, tokenizer = DCMForDenoising.from_pretrained(path), DCMTokenizer.from_pretrained(path)
            self.pipeline = CellGenerationPipeline(model=model, tokenizer=tokenizer)
        else:
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
        """Draw cells as the pipeline gives them: ``counts`` (n, G), ``genes``, ``conditions`` and ``adata``.

        Args:
            cell_type: a label; None or ``"(as in training)"``: drawn in the proportions of the training cells.
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
        """Draw as many control cells of the same cell type, by another seed; None without a perturbation."""
        control, asked = self.tokenizer.control, drawn["conditions"]
        if control is None or asked.get("perturbation") in (None, control):
            return None
        return self.draw(asked.get("cell_type"), control, len(drawn["counts"]), steps, 0, (int(seed) + 1) % 2**32)

    def clouds(self, drawn: Mapping[str, object], control: Mapping[str, object] | None) -> dict[str, np.ndarray]:
        """Return the counts (n, G) of each kind of cells, the last in front, over the genes that all of them have."""
        clouds = {} if control is None else {"generated control": control["counts"]}
        clouds |= {"generated": drawn["counts"]}
        return clouds if self.reference is None else self.reference.beside(clouds, drawn["conditions"])


class Reference:
    """Real cells of an h5ad, over those of the model's genes that it has, by exact name.

    Args:
        path: the file; raw counts in ``X``, labels in ``obs["cell_type"]`` and ``obs["perturbation"]`` if at all.
        tokenizer: the model's, with ``genes``, ``separator`` and ``control``.
    """

    def __init__(self, path: str, tokenizer: object):
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
            name: [self._names(name, label) for label in sample.obs[name]]
            for name in ("cell_type", "perturbation")
            if name in sample.obs
        }

    def beside(self, clouds: Mapping[str, np.ndarray], asked: Mapping[str, str]) -> dict[str, np.ndarray]:
        """Return ``clouds`` over the shared genes behind some real cells: others, and those of the labels asked for."""
        is_same = np.full(self.counts.shape[0], bool(asked) and all(name in self.labels for name in asked))
        for name in set(asked) & set(self.labels):
            is_same &= np.array([names == self._names(name, asked[name]) for names in self.labels[name]])
        ours = {name: counts[:, self.panel] for name, counts in clouds.items()}
        return {"real cells": self._some(~is_same), "real cells, same labels": self._some(is_same)} | ours

    def _names(self, name: str, label: object) -> frozenset[str]:
        """Return the names in a perturbation's label, without a control beside others; any other label is one name."""
        if name != "perturbation" or not self.separator:
            return frozenset([str(label)])
        names = frozenset(str(label).split(self.separator))
        return names - {self.control} or names

    def _some(self, wanted: np.ndarray) -> np.ndarray:
        rows = np.random.default_rng(0).permutation(np.flatnonzero(wanted))[:REFERENCE_DRAWN]
        counts = self.counts[np.sort(rows)]
        return np.asarray(counts.toarray() if hasattr(counts, "toarray") else counts)


def whole(name: str, value: object, least: int, most: int) -> int:
    """Return a whole number within bounds. Raises ValueError for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= most or value != int(value):
        raise ValueError(f"{name} must be a whole number from {least:,} to {most:,}")
    return int(value)


def log_scaled(counts: np.ndarray) -> np.ndarray:
    """Compute ``log1p`` of counts (n, G) after each cell is scaled to 10,000; a cell without counts stays zero."""
    return np.log1p(PER_CELL * counts / np.maximum(1, counts.sum(axis=1, keepdims=True)))


def principal_plane(clouds: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return each cloud's cells (n, G) on two principal components of all, (n, 2), and their shares of variance."""
    values = log_scaled(np.concatenate(list(clouds.values())))
    values -= values.mean(axis=0)
    variance, vectors = np.linalg.eigh(values @ values.T)  # ascending
    variance = np.maximum(variance[::-1], 0)
    points = np.pad(vectors[:, ::-1] * np.sqrt(variance), ((0, 0), (0, 1)))[:, :2]
    shares = np.pad(variance, (0, 1))[:2] / max(variance.sum(), 1e-12)
    ends = np.cumsum([len(cloud) for cloud in clouds.values()])[:-1]
    return dict(zip(clouds, np.split(points, ends))), shares


def top_changes(counts: np.ndarray, control: np.ndarray, genes: list[str]) -> list[list[object]]:
    """Return rows of ``CHANGES``: the genes whose log-scaled counts differ most from control cells', by Welch's t.

    Args:
        counts: (n, G).
        control: (m, G).
        genes: names of the G genes.
    """
    ours, theirs = log_scaled(counts), log_scaled(control)
    error = ours.var(axis=0) / len(ours) + theirs.var(axis=0) / len(theirs)
    t = (ours.mean(axis=0) - theirs.mean(axis=0)) / np.sqrt(np.maximum(error, 1e-12))
    means = np.expm1(ours).mean(axis=0), np.expm1(theirs).mean(axis=0)
    fold = np.log2((means[0] + FOLD_PSEUDOCOUNT) / (means[1] + FOLD_PSEUDOCOUNT))
    return [
        [genes[i], *(round(float(mean[i]), 2) for mean in means), round(float(fold[i]), 2), round(float(t[i]), 1)]
        for i in np.argsort(-np.abs(t), kind="stable")[:TABLE_CHANGES]
    ]


def count_table(counts: np.ndarray, genes: list[str]) -> tuple[list[str], list[list[object]]]:
    """Return header and rows of the first cells' counts (n, G), over the ``genes`` of the highest mean."""
    counts = counts[:TABLE_CELLS]
    highest = np.argsort(-counts.mean(axis=0), kind="stable")[:TABLE_GENES]
    return ["cell", *(genes[j] for j in highest)], [[i, *map(int, row[highest])] for i, row in enumerate(counts)]


def figures(clouds: Mapping[str, np.ndarray]) -> tuple:
    """Draw kinds of cells (n, G) on their first two principal components, and their library sizes, by matplotlib."""
    from matplotlib.figure import Figure

    clouds = {name: counts for name, counts in clouds.items() if len(counts)}
    points, shares = principal_plane(clouds)
    drawings = [Figure(figsize=(width, 5.4), layout="constrained", dpi=110) for width in (6.5, 6.5)]
    plane, sizes = (drawing.subplots() for drawing in drawings)
    totals = {name: counts.sum(axis=1) for name, counts in clouds.items()}
    bins = np.linspace(0, max(1, *(total.max() for total in totals.values())), 30)
    for name, counts in clouds.items():
        colour, label = COLOURS.get(name, GENERATED), f"{name} ({len(counts):,})"
        plane.scatter(*points[name].T, s=14, c=colour, alpha=0.7, linewidths=0, label=label)
        share = np.full(len(counts), 1 / len(counts))
        sizes.hist(totals[name], bins=bins, weights=share, histtype="step", lw=2, color=colour)
    axes = [f"PC {i} ({share:.0%} of variance)" for i, share in enumerate(shares, start=1)]
    plane.set(title="one point for each cell; similar cells lie close", xlabel=axes[0], ylabel=axes[1])
    sizes.set(title="library size", xlabel=f"counts per cell, {counts.shape[1]:,} genes", ylabel="share of cells")
    drawings[0].legend(loc="outside lower center", ncols=2, frameon=False, markerscale=2)
    return tuple(drawings)


def build(checkpoint: Checkpoint):
    """Return the page, as gradio's Blocks; inputs are bounded and wait in a queue."""
    import gradio as gr

    home = tempfile.TemporaryDirectory(prefix="dcm-app-")  # gradio takes a copy, and deletes it within hours
    file = Path(home.name) / "cells.h5ad"

    def answer(*inputs):
        try:
            drawn = checkpoint.draw(*inputs)
            control = checkpoint.draw_control(drawn, inputs[3], inputs[5])
        except ValueError as error:
            return f"{REFUSED} {html.escape(str(error))}", None, None, None, None, None
        counts, genes = drawn["counts"], drawn["genes"]
        drawn["adata"].write_h5ad(file)
        header, rows = count_table(counts, genes)
        changes = [] if control is None else top_changes(counts, control["counts"], genes)
        return (
            summary(drawn),
            *figures(checkpoint.clouds(drawn, control)),
            str(file),
            {"headers": CHANGES, "data": changes},
            {"headers": header, "data": rows},
        )

    with gr.Blocks(title="Discrete Cell Model", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        page.home = home
        inputs, button = _inputs(gr, checkpoint)
        said = gr.Markdown("Nothing is generated yet.", elem_id="said")
        with gr.Column(visible=False) as found:  # until there is something to see
            with gr.Row():
                pictures = [gr.Plot(show_label=False, elem_id=name, min_width=320) for name in ("picture", "sizes")]
            file_of_cells = gr.File(label="all cells, every gene (AnnData)", elem_id="cells-file")
            changed = gr.Dataframe(headers=CHANGES, label=CHANGES_LABEL, visible=False)
            table = gr.Dataframe(label=f"counts of the first {TABLE_CELLS} cells, genes of the highest mean")
        drawing = button.click(
            answer,
            inputs,
            [said, *pictures, file_of_cells, changed, table],
            concurrency_limit=1,
            api_name="generate",
        )
        drawing.then(
            lambda text, rows: (gr.Column(visible=not text.startswith(REFUSED)), gr.Dataframe(visible=len(rows) > 0)),
            [said, changed],
            [found, changed],
            api_name=False,
        )
    return page.queue(max_size=20)


def _inputs(gr, checkpoint: Checkpoint) -> tuple[list, object]:
    """Return the page's inputs, in the order of the answer's arguments, and its button."""
    tokenizer = checkpoint.tokenizer
    gr.Markdown(
        f"# Cells of `{checkpoint.name}`\n\nThis model draws single cells that were never measured: for each, how "
        f"often each of {len(tokenizer.genes):,} genes is counted. Choose a kind of cell, press *Generate*, look at "
        "the cells and download them. A label that you leave open is drawn as often as the training cells have it. "
        "They are predictions of a model, not data."
    )
    with gr.Row():
        cell_type, perturbation = (
            gr.Dropdown([ANY, *labels], label=label, visible=bool(labels), allow_custom_value=is_free, elem_id=name)
            for name, label, labels, is_free in (
                ("cell-type", "cell type", tokenizer.cell_types, False),
                ("perturbation", "perturbation (A+B combines)", tokenizer.perturbations, True),
            )
        )
    with gr.Row():
        num_cells = gr.Slider(1, MAX_CELLS, value=100, step=1, label="cells", elem_id="num-cells")
        words = "Network calls for a cell. 0: the model's own choice."
        steps = gr.Slider(0, MAX_STEPS, value=0, step=1, label="steps", info=words)
        words = "Exaggerates what the labels say. 0: as trained."
        guidance = gr.Slider(0, MAX_GUIDANCE, value=0, label="guidance", info=words)
        words = "The same seed gives the same cells."
        seed = gr.Number(value=0, precision=0, label="seed", info=words, elem_id="seed")
    button = gr.Button("Generate", variant="primary", elem_id="generate")
    return [cell_type, perturbation, num_cells, steps, guidance, seed], button


def summary(drawn: Mapping[str, object]) -> str:
    """Return one line on the drawn cells."""
    counts = drawn["counts"]
    asked = ", ".join(map(str, drawn["conditions"].values())) or "no condition"
    return (
        f"{len(counts):,} cells ({asked}): median {np.median(counts.sum(axis=1)):,.0f} counts and "
        f"{np.median((counts > 0).sum(axis=1)):,.0f} of {counts.shape[1]:,} genes with a count."
    )


def main(checkpoint: str = "", /, *, reference: Path | None = None) -> None:
    """Serve a page that generates cells by a checkpoint, until it is stopped.

    Args:
        checkpoint: Folder of a checkpoint, or its id on the Hub; default what DCM_CHECKPOINT says.
        reference: An h5ad file of raw counts: real cells to draw beside the generated ones; default what DCM_REFERENCE
            says.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: no checkpoint is named, gradio is not installed, or the reference does not fit.
    """
    checkpoint = checkpoint or os.environ.get("DCM_CHECKPOINT")
    reference = reference or os.environ.get("DCM_REFERENCE")
    if not checkpoint:
        raise ValueError("no checkpoint: name a folder or an id on the Hub, or set DCM_CHECKPOINT")
    if not Path(checkpoint).is_dir() and (checkpoint.count("/") != 1 or checkpoint.startswith(("/", "."))):
        raise FileNotFoundError(f"no folder {checkpoint!r}; expected a checkpoint, or an id on the Hub as in org/name")
    if reference and not Path(reference).is_file():
        raise FileNotFoundError(f"no file {str(reference)!r}; expected an h5ad file of real cells")
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the page needs gradio: pip install 'discrete-cell-models[app]'")
    build(Checkpoint(checkpoint, str(reference) if reference else None)).launch()


def cli() -> None:
    """Entry point of ``dcm-app``; of a Space, too, where this package is not installed and options are variables."""
    try:
        from training.data.command_line import run
    except ImportError:
        return main()
    return run(main)


if __name__ == "__main__":
    cli()
