"""Write every table and figure of an evaluation as one HTML page: no script, no network, light and dark."""

import html
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from eval.comparison.cells import CellCounts, Comparison
from eval.metrics.by_name import metric_label, model_label
from eval.reports import figures
from eval.reports.tables import (
    AT_FLOOR,
    HOW_TO_READ,
    Row,
    Unlike,
    beside_floor,
    header_notes,
    models_of,
    sample_sizes,
    sections,
)

PUBLISHED = Path(__file__).with_name("published.json")  # by a word of the data set's name
PUBLISHED_NOTE = (
    "As published, another protocol: these numbers come from the paper's own tables. Its recipe, number of cells and "
    "test cells are not all known, so no number here can be compared with one above."
)
CSS = Path(__file__).with_name("report.css")


def html_report(
    header: dict[str, object],
    rows: Sequence[Row],
    cells: Comparison,
    drawn: dict[str, dict[str, CellCounts]],
    *,
    umap: bool = True,
) -> str:
    """Return the report as one HTML page.

    Args:
        header, rows: what stands in results.json.
        cells: real and generated cells.
        drawn: what is in the pictures of each generator, by :func:`eval.reports.figures.cells_to_draw`.
        umap: embed by UMAP where umap-learn is installed.
    """
    title = html.escape(f"{header['dataset']}, {header['split']} cells")
    parts = [f"<h1>{title}</h1>", _introduction(header, cells), "<h2>Scores</h2>"]
    for section in sections(rows):
        parts.append(f"<h3>Protocol {html.escape(section.protocol)}</h3>{_note(section.description)}")
        parts += [_score_table(ours, caption, unlike) for caption, ours, unlike in section.tables]
    parts += _published_section(str(header["dataset"]))
    for model, files in cells.generated.items():
        parts.append(f"<h2>Pictures of {html.escape(model)}</h2>")
        changes = figures.differential_figure(cells.real, files[0], cells.genes)
        parts += _pictures(drawn[model], changes, umap=umap)
    body, style = "\n".join(parts), CSS.read_text(encoding="utf-8")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>\n'
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def _introduction(header: dict[str, object], cells: Comparison) -> str:
    """Say what was compared, and how to read the tables."""
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items() if version)
    notes = "".join(f"<p><strong>{word} {html.escape(note)}.</strong></p>" for word, note in header_notes(header))
    return (
        f"<p>{len(cells.real):,} real test cells, {len(cells.train):,} real training cells, {len(cells.genes):,} "
        f"genes; generators: {html.escape(', '.join(cells.generated))}. "
        f"Checkpoint: {html.escape(str(header['checkpoint'] or 'not named'))}.</p>{notes}"
        f"{_note(f'{HOW_TO_READ} Shaded: {AT_FLOOR}')}"
        f'<p class="note">Made by <code>{html.escape(str(header["command"]))}</code> ({html.escape(versions)}).</p>'
    )


def _note(sentence: str) -> str:
    return f'<p class="note">{html.escape(sentence[:1].upper() + sentence[1:].rstrip("."))}.</p>'


def _table(caption: str, head: Iterable[str], lines: Iterable[tuple[str, Iterable[str]]]) -> str:
    """Return a table of escaped words: its head, and a name and whole ``<td>`` elements for each line."""
    columns = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>' for name, cells in lines)
    return (
        f'<div class="scroll" tabindex="0"><table><caption><span>{html.escape(caption)}</span></caption>'
        f"<thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _score_table(rows: Sequence[Row], caption: str, unlike: Unlike) -> str:
    """Return a table of scores: metrics down, models across; nothing that is ``unlike`` the floor is shaded."""
    head = [f"{html.escape(model_label(name))} <small>{sample_sizes(rows, name)}</small>" for name in models_of(rows)]
    lines = []
    for metric, found in beside_floor(rows, unlike):
        name, better = map(html.escape, metric_label(metric))
        lines.append((f"{name} <small>{better}</small>", map(_number, *zip(*found))))
    return _table(caption, ["metric", *head], lines)


def _number(row: Row | None, marked: bool) -> str:
    """Return one number of a table, shaded at the floor."""
    if row is None or row["mean"] is None:
        return "<td>-</td>"
    deviation = f" <small>± {row['std']:.2g}</small>" if row["std"] is not None else ""
    shade = ' class="at-floor" title="at the floor"' if marked else ""
    return f"<td{shade}>{row['mean']:.4g}{deviation}</td>"


def _published_section(dataset: str) -> list[str]:
    """Return published numbers of this data set, in a table of their own: other splits, other recipes, no floor."""
    parts = []
    for word, table in json.loads(PUBLISHED.read_text(encoding="utf-8")).items():
        if word in dataset.lower():
            lines = [(name, [f"<td>{number}</td>" for number in row]) for name, row in table["rows"].items()]
            parts += ["<h2>As published, another protocol</h2>", _note(PUBLISHED_NOTE)]
            parts.append(_table(table["source"], ["model", *table["columns"]], lines))
    return parts


def _pictures(cells: dict[str, CellCounts], changes: Figure | None, *, umap: bool) -> list[str]:
    """Return all figures of one generator; ``cells`` are real ones, its own, and a baseline's, by their names."""
    counts = {name: side.counts for name, side in cells.items()}
    _, model, baseline_name = cells
    embedding, method = figures.embedding_figure(dict(list(cells.items())[:2]), umap=umap)
    of_pca = "The first two principal components of log1p(CP10k), fitted on the real cells"
    of_umap = "UMAP of 30 principal components of log1p(CP10k), both sides together"
    pictures = [
        (
            embedding,
            f"{of_umap if method == 'UMAP' else of_pca}. Points are cells; lines hold the densest 30, 60 and 90 % of "
            "them.",
            f"{method} of real and of {model} cells with density contours",
        ),
        (
            figures.genes_figure(counts),
            "A point is a gene; on the line it is as in the real cells. "
            f"{model_label(baseline_name).capitalize()}: each gene drawn by itself from training cells.",
            f"Library sizes, and means, variances and zeros of genes, of real and of {model} cells",
        ),
        (
            figures.correlation_figure(counts),
            f"Gene-gene correlation of log1p counts over the {figures.CORRELATED_GENES} most variable genes of the "
            "real cells, in one order. A point is a pair of genes; nearer to 0 than the line it is too weak.",
            f"Correlation matrices of real and of {model} cells",
        ),
        (
            changes,
            "The ten genes that the strongest perturbations move most from control cells in real cells (blue), and how "
            "far they move in generated ones (orange). As they are chosen where the real change is large, noise "
            "included, a perfect generator falls somewhat short of it, too.",
            f"Top differential genes, real against {model} cells",
        ),
    ]
    return [_picture(*picture) for picture in pictures if picture[0] is not None]


def _picture(figure: Figure, caption: str, label: str) -> str:
    """Return a figure as inline SVG in the colours of the page. What its elements refer to has names made from the
    ``label``, which is another in each figure; other names, which matplotlib numbers anew in each, are left out."""
    stream = io.StringIO()
    with matplotlib.rc_context({**figures.STYLE, "svg.hashsalt": label}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace(figures.INK, "currentColor")
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(label, quote=True)}"', 1)
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"
