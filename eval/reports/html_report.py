"""One HTML file with every table and figure of an evaluation: no script, no network, light and dark.

Knows nothing of metrics: numbers come from the rows, pictures from the cells.
"""

import html
import io
import re
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from eval.comparison.cells import CellCounts, Comparison
from eval.comparison.metric_table import METRICS
from eval.reports import figures
from eval.reports.published import PUBLISHED, PUBLISHED_NOTE
from eval.reports.tables import (
    FLOOR,
    Row,
    at_floor,
    averaged_over,
    biased_floor_notes,
    metric_label,
    protocol_description,
)

CELLS_SHOWN = 2000
WORST_SHOWN = 10
MAP_PROTOCOLS = ("log", "paper")
MAP_METRIC = "w2"
CSS = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --good: #d6f0e0; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171c; --ink: #e6e9ee; --soft: #a3adb8; --line: #3a424d; --good: #17452f; }
}
body { margin: 0 auto; max-width: 1180px; padding: 1.5rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { margin: 0 0 .3rem; } h2 { margin-top: 2.4rem; border-bottom: 1px solid var(--line); } h3 { margin-top: 1.6rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .3rem 0; color: var(--soft); }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 600; } th[scope=row], th:first-child { text-align: left; } td small, th small { color: var(--soft); }
thead th { white-space: normal; vertical-align: bottom; } tbody th small { display: block; font-weight: 400; }
td.at-floor { background: var(--good); font-weight: 600; }
figure { margin: 1rem 0; } figcaption, .note { color: var(--soft); max-width: 75ch; }
svg { max-width: 100%; height: auto; } code { overflow-wrap: anywhere; }
"""


def html_report(
    header: dict[str, object],
    rows: Sequence[Row],
    cells: Comparison,
    baseline: CellCounts,
    *,
    baseline_name: str,
    umap: bool = True,
    seed: int = 0,
) -> str:
    """The report as one HTML page.

    Args:
        header: what stands at the head of results.json.
        rows: its rows.
        cells: what was compared; pictures show the first file of each generator, at most 2,000 cells a side.
        baseline: cells of a baseline for the pictures of genes.
        baseline_name: its name.
        umap: embed by UMAP where umap-learn is installed.
        seed: of the thinning.
    """
    title = f"{header['dataset']}, {header['split']} cells"
    parts = [_introduction(title, header, cells), "<h2>Scores</h2>"]
    parts += [_protocol_section(protocol, rows) for protocol in dict.fromkeys(row["protocol"] for row in rows)]
    parts += _published_section(str(header["dataset"]))
    with matplotlib.rc_context(figures.STYLE):
        parts += _condition_section(rows)
        for model, files in cells.generated.items():
            parts.append(f"<h2>Pictures of {html.escape(model)}</h2>")
            parts += _pictures(model, files[0], cells, baseline, baseline_name, umap=umap, seed=seed)
    body = _distinct_ids("\n".join(parts))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{CSS}</style></head>\n'
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def _introduction(title: str, header: dict[str, object], cells: Comparison) -> str:
    """What was compared, and how to read the tables."""
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items() if version)
    genes = f"<p><strong>Compared on {html.escape(str(header['genes']))}.</strong></p>" if header.get("genes") else ""
    return (
        f"<h1>{html.escape(title)}</h1>"
        f"<p>{len(cells.real):,} real test cells, {len(cells.train):,} real training cells, {len(cells.genes):,} "
        f"genes; generators: {html.escape(', '.join(cells.generated))}. "
        f"Checkpoint: {html.escape(str(header['checkpoint'] or 'not named'))}.</p>{genes}"
        '<p class="note"><strong>floor</strong> is real training cells against the real test cells, as many in each '
        "condition: no generator can be expected to do better. A shaded number is at the floor, within two of its "
        "standard deviations. A distance between two samples is not 0 even where their laws are equal, and it falls "
        "with n: read every number against the floor beside it.</p>"
        f"<p class=note>Made by <code>{html.escape(str(header['command']))}</code> ({html.escape(versions)}).</p>"
    )


def _protocol_section(protocol: str, rows: Sequence[Row]) -> str:
    """Tables of one protocol."""
    ours = [row for row in rows if row["protocol"] == protocol]
    parts = [
        f"<h3>Protocol {html.escape(protocol)}</h3><p class=note>{html.escape(protocol_description(protocol))}.</p>"
    ]
    pooled = [row for row in ours if row["grouping"] == "pooled"]
    averaged = [row for row in ours if row["grouping"] == "per_condition"]
    if pooled:
        parts.append(_table(pooled, "All cells pooled, mean ± standard deviation over seeds or draws"))
    if averaged:
        parts.append(_table(averaged, averaged_over(ours)))
    parts += [f'<p class="note">{html.escape(note)}.</p>' for note in biased_floor_notes(ours)]
    return "".join(parts)


def _table(rows: Sequence[Row], caption: str) -> str:
    """Models down, metrics across."""
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    found = {(row["model"], row["metric"]): row for row in rows}
    head = "".join(
        f'<th scope="col">{html.escape(label)} <small>{html.escape(better)}</small></th>'
        for label, better in map(metric_label, metrics)
    )
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        first = next(row for row in rows if row["model"] == model)
        repeats = max(row["seeds"] for row in rows if row["model"] == model)
        word = "seed" if model != FLOOR else "draw"
        about = f"n = {first['n']:,}, {repeats} {word}{'' if repeats == 1 else 's'}"
        numbers = [_number(found.get((model, metric)), found.get((FLOOR, metric))) for metric in metrics]
        lines.append(f'<tr><th scope="row">{html.escape(model)} <small>{about}</small></th>{"".join(numbers)}</tr>')
    return (
        f'<div class="scroll" tabindex="0"><table><caption>{html.escape(caption)}</caption><thead><tr>'
        f'<th scope="col">model</th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def _number(row: Row | None, floor: Row | None) -> str:
    """One number of a table, shaded at the floor."""
    if row is None or row["mean"] is None:
        return "<td>-</td>"
    deviation = f" <small>± {row['std']:.2g}</small>" if row["std"] is not None else ""
    reached = row["model"] != FLOOR and floor is not None and at_floor(row, floor)
    shade = ' class="at-floor" title="at the floor"' if reached else ""
    return f"<td{shade}>{row['mean']:.4g}{deviation}</td>"


def _published_section(dataset: str) -> list[str]:
    """Published numbers of this data set, in a table of their own."""
    parts = []
    for word, (source, columns, lines) in PUBLISHED.items():
        if word not in dataset.lower():
            continue
        head = "".join(f'<th scope="col">{column}</th>' for column in columns)
        body = "".join(
            f'<tr><th scope="row">{name}</th>{"".join(f"<td>{number}</td>" for number in numbers)}</tr>'
            for name, *numbers in lines
        )
        parts.append(
            f'<h2>As published, another protocol</h2><p class="note">{PUBLISHED_NOTE}</p><div class="scroll"><table>'
            f'<caption>{source}</caption><thead><tr><th scope="col">model</th>{head}</tr></thead><tbody>{body}</tbody>'
            "</table></div>"
        )
    return parts


def _condition_section(rows: Sequence[Row]) -> list[str]:
    """Heat map of the conditions, and the worst of them."""
    protocol = next((p for p in MAP_PROTOCOLS if any(_is_condition(row, p) for row in rows)), None)
    if protocol is None:
        return []
    figure, worst = figures.condition_figure(rows, protocol, MAP_METRIC)
    generators = {row["model"] for row in rows} - {FLOOR}
    lines = "".join(
        f'<tr><th scope="row">{html.escape(condition)}</th><td>{html.escape(model)}</td><td>{value:.1f}</td></tr>'
        for condition, model, value in worst[:WORST_SHOWN]
    )
    label = METRICS[MAP_METRIC].label
    return [
        "<h2>Conditions</h2>",
        _picture(
            figure,
            f"{label} of each condition (protocol {protocol}): how many standard deviations of the floor it lies above "
            "the floor. Yellow is far from the real cells, dark is as near as real cells are to each other. The "
            "conditions that are worst for the first generator stand first; "
            f"{figures.CONDITIONS_SHOWN} are shown at most.",
            f"Heat map of conditions by {len(generators)} models",
        ),
        '<div class="scroll"><table><caption>Worst conditions of any model</caption><thead><tr><th scope="col">'
        f'condition</th><th scope="col">model</th><th scope="col">above the floor (sd)</th></tr></thead><tbody>'
        f"{lines}</tbody></table></div>",
    ]


def _is_condition(row: Row, protocol: str) -> bool:
    """Whether a row can stand in the heat map."""
    of_map = (row["protocol"], row["metric"], row["grouping"]) == (protocol, MAP_METRIC, "condition")
    return of_map and row["model"] == FLOOR and row["mean"] is not None and bool(row["std"])


def _pictures(
    model: str,
    generated: CellCounts,
    cells: Comparison,
    baseline: CellCounts,
    baseline_name: str,
    *,
    umap: bool,
    seed: int,
) -> list[str]:
    """All figures of one generator."""
    rng = np.random.default_rng(seed)
    real = _thinned(cells.real, rng)
    drawn = _thinned(generated, rng)
    counts = {"real": real.counts, model: drawn.counts, baseline_name: _thinned(baseline, rng).counts}
    embedding, method = figures.embedding_figure(real.counts, drawn.counts, umap=umap)
    parts = [
        _picture(
            embedding,
            f"{method} of 30 principal components of log1p(CP10k)"
            + (" (both sides together)" if method == "UMAP" else ", fitted on the real cells (the first two shown)")
            + ". Points are cells; lines hold the densest 30, 60 and 90 % of them.",
            f"{method} of real and of {model} cells with density contours",
        ),
        _picture(
            figures.genes_figure(counts),
            "Left and middle: one point for each gene; right: how many counts a cell has. A good generator lies on the "
            f"real cells. {baseline_name}: each gene drawn by itself from the training cells of the condition.",
            "Mean and variance, zeros, and library sizes of real and generated cells",
        ),
        _picture(
            figures.correlation_figure(counts),
            f"Gene-gene correlation of log1p counts over the {figures.CORRELATED_GENES} most variable genes of the "
            "real cells, in the same order in every matrix. Right: a point for each pair of genes; on the line the "
            "correlation is the real one, nearer to 0 than the line it is too weak.",
            "Correlation matrices of real and generated cells",
        ),
    ]
    if figures.has_perturbations(cells.real):
        changes = figures.differential_figure(cells.real, generated, cells.genes)
        if changes is not None:
            caption = (
                "The ten genes that the strongest perturbations move most in real cells (blue), and how far they move "
                "in generated ones (orange): the shorter the line between, the better. Both are measured from the real "
                "control cells of the same cell type. Genes are chosen where the real change is large, noise "
                "included, so a perfect generator falls somewhat short of it, too."
            )
            parts.append(_picture(changes, caption, "Top differential genes, real against generated"))
    return parts


def _thinned(cells: CellCounts, rng: np.random.Generator) -> CellCounts:
    """At most 2,000 random cells."""
    return cells.take(np.sort(rng.choice(len(cells), min(len(cells), CELLS_SHOWN), replace=False)))


def _picture(figure: Figure, caption: str, label: str) -> str:
    """A figure as inline SVG in the colours of the page."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": label}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = svg.replace(figures.INK, "currentColor")
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(label, quote=True)}"', 1)
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _distinct_ids(page: str) -> str:
    """Give every figure's elements ids of their own: matplotlib numbers them anew in each."""
    pieces = page.split("<figure>")
    for number, piece in enumerate(pieces[1:], start=1):
        piece = re.sub(r'\bid="([^"]+)"', rf'id="f{number}-\1"', piece)
        piece = re.sub(r'href="#([^"]+)"', rf'href="#f{number}-\1"', piece)
        pieces[number] = re.sub(r"url\(#([^)]+)\)", rf"url(#f{number}-\1)", piece)
    return "<figure>".join(pieces)
