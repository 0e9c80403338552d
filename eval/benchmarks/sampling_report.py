"""The table and the figure of a sampling benchmark, from its rows.

Knows nothing of how anything was measured.
"""

import math
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from eval.benchmarks.sampling import AUTO, FLOOR, NAIVE, RELEASED, Row

COLOURS = {"linear": "#1f5fa8", "cosine": "#8a5fb5", "cubic": "#e8762d", "optimal": "#2a8f4f"}
RELEASED_COLOUR, FLOOR_COLOUR = "#c62f2f", "#9a9a9a"
PANELS = {
    "mmd2": "MMD² to real cells, log1p counts: lower is better",
    "correlation_slope": "gene-gene correlations against real cells': slope 1 is right",
}
BUSY = 0.8  # less of one core than this, and other work had the rest
LABEL_PIXELS = (6.2, 13.0)  # of a character of a label, at the figure's 100 dots per inch


def _with_spread(row: Row, metric: str, digits: int) -> str:
    mean, std = row.mean(metric), row.std(metric)
    if math.isnan(mean):
        return ""
    return f"{mean:.{digits}f}" + ("" if math.isnan(std) else f" ± {std:.{digits}f}")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def table(rows: Sequence[Row]) -> str:
    """A Markdown table that is aligned as plain text too; columns that no row fills are left out."""
    naive = next((row.cells_per_second for row in rows if row.name == NAIVE), None)

    def speedup(row: Row) -> str:
        return f"{row.cells_per_second / naive:,.1f}" if row.cells_per_second and naive else ""

    columns: dict[str, Callable[[Row], str]] = {
        "calls": lambda row: _number(row.network_calls, "d"),
        "cells/s": lambda row: _number(row.cells_per_second, ",.4g"),
        "x naive": speedup,
        "peak MiB": lambda row: _number(row.peak_mib, ",.0f"),
        "FLOP use": lambda row: _number(row.utilisation, ".1%"),
        "KL, nats/cell": lambda row: _number(row.predicted_kl, ".3f"),
        "MMD²": lambda row: _with_spread(row, "mmd2", 5),
        "slope": lambda row: _with_spread(row, "correlation_slope", 3),
        "Pearson": lambda row: _with_spread(row, "correlation_pearson", 3),
        "W2": lambda row: _with_spread(row, "w2", 2),
        "library-size CV": lambda row: _with_spread(row, "library_size_cv_ratio", 3),
    }
    filled = {name: [text(row) for row in rows] for name, text in columns.items()}
    filled = {"setting": [row.name for row in rows]} | {name: cells for name, cells in filled.items() if any(cells)}
    widths = {name: max(len(name), *map(len, cells)) for name, cells in filled.items()}

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if name == "setting" else cell.rjust(width)
            for cell, (name, width) in zip(cells, widths.items())
        ]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * width if name == "setting" else "-" * (width - 1) + ":") for name, width in widths.items()]
    return "\n".join([line(list(filled)), line(rule), *map(line, zip(*filled.values()))])


def notes(rows: Sequence[Row], memory: str) -> list[str]:
    """What a reader of the table must know, one sentence or two to a column or row."""
    names = {row.name for row in rows}
    lines = [
        "calls: of the network, for each chunk of cells. cells/s: of the draw alone, median over seeds.",
        f"peak MiB: {memory}.",
        "KL: what the schedule loses against one gene at a time, predicted by the entropy curve."
        if any(row.predicted_kl is not None for row in rows)
        else "This checkpoint has no entropy curve: no predicted KL, no optimal schedule, no auto. Measure it with "
        "'dcm-benchmark entropy CHECKPOINT --data shards/'.",
        "MMD², slope and correlation of gene-gene correlations, W2, ratio of the library size's coefficients of "
        "variation (1 is right): protocol log, all cells pooled, mean ± standard deviation over seeds.",
        f"{NAIVE}: the same checkpoint, one cell at a time, 100 linear steps, logits of every gene and count at each. "
        "The law is linear 100's, so it is timed on a few cells and not scored.",
        f"{RELEASED}: the loop of the released code, which reveals genes at the forward rate: the first of its 100 "
        "calls reveals all of them, and every gene is drawn independently of the others.",
    ]
    busy = [row for row in rows if row.cpu_share is not None and row.cpu_share < BUSY]
    if busy:
        lines.append(
            f"Other work had the processor while {len(busy)} of the rows were timed (down to "
            f"{min(row.cpu_share for row in busy):.0%} of one core was left): do not trust their speeds."
        )
    if FLOOR in names:
        lines.append(f"{FLOOR}: real training cells in the place of drawn ones; no sampler can be expected below it.")
    return lines


def last_line(summary: dict[str, float]) -> str:
    """The benchmark's result in one line for machines."""
    return " ".join(f"{name}={value:.4g}" for name, value in summary.items())


def figure(rows: Sequence[Row], *, title: str) -> Figure:
    """MMD^2 and correlation slope against network calls, one labelled point to a setting, the floor as a band."""
    canvas = Figure(figsize=(15, 7), dpi=100, layout="constrained")
    FigureCanvasAgg(canvas)
    canvas.suptitle(title, fontsize=14)
    for axes, metric in zip(canvas.subplots(1, 2), PANELS):
        _panel(axes, rows, metric)
    canvas.legend(*canvas.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    canvas.draw_without_rendering()
    canvas.set_layout_engine("none")  # labels are placed for the axes as they are now
    for axes, metric in zip(canvas.axes, PANELS):
        _label_points(axes, [row for row in rows if _is_point(row, metric)], metric)
    return canvas


def _is_point(row: Row, metric: str) -> bool:
    return row.network_calls is not None and not math.isnan(row.mean(metric))


def _panel(axes: Axes, rows: Sequence[Row], metric: str) -> None:
    points = [row for row in rows if _is_point(row, metric)]
    floor = next((row for row in rows if row.name == FLOOR), None)
    if floor is not None:
        middle, spread = floor.mean(metric), 2 * floor.std(metric)
        label = f"floor: real training cells, mean ± 2 sd of {len(floor.scores[metric])} draws"
        axes.axhspan(middle - spread, middle + spread, color=FLOOR_COLOUR, alpha=0.3, lw=0, label=label)
        axes.axhline(middle, color=FLOOR_COLOUR, lw=1)
    if metric == "correlation_slope":
        axes.axhline(1.0, color="black", lw=0.8, ls=":")
    for schedule, colour in COLOURS.items():
        of_schedule = sorted((row for row in points if row.schedule == schedule), key=lambda row: row.network_calls)
        if of_schedule:
            _errorbars(axes, of_schedule, metric, colour=colour, fmt="o-", label=f"{schedule} schedule")
    for row in points:
        if row.name.startswith("auto"):
            _errorbars(axes, [row], metric, colour=COLOURS[row.schedule], fmt="*", ms=17)
    released = [row for row in points if row.name == RELEASED]
    if released:
        label = "the released code's reveal rule: all genes in the first of 100 calls"
        _errorbars(axes, released, metric, colour=RELEASED_COLOUR, fmt="X", ms=11, label=label)
    axes.set_xscale("log")
    axes.set_xlim(0.8, 320)
    calls = (1, 2, 5, 10, 20, 50, 100)
    axes.set_xticks(calls, [str(number) for number in calls])
    axes.set_xticks([], minor=True)
    axes.set(title=PANELS[metric], xlabel="network calls for each chunk of cells", ylabel="slope")
    if metric == "mmd2":
        noise = [abs(row.mean(metric)) for row in points if row.mean(metric) < 0]
        noise += [] if floor is None else [abs(middle - spread), abs(middle + spread)]
        largest = max(row.mean(metric) for row in points)
        linear = 10.0 ** math.ceil(math.log10(max([*noise, largest / 30, 1e-6])))
        axes.set_ylabel("MMD²")
        if largest > linear:
            axes.set_yscale("symlog", linthresh=linear)
            axes.set_ylabel(f"MMD² (axis linear below {linear:g}, logarithmic above)")
    axes.grid(alpha=0.25)
    axes.margins(y=0.12)


def _errorbars(axes: Axes, rows: Sequence[Row], metric: str, *, colour: str, fmt: str, ms: float = 8, label=None):
    std = [0.0 if math.isnan(row.std(metric)) else row.std(metric) for row in rows]
    calls, means = [row.network_calls for row in rows], [row.mean(metric) for row in rows]
    axes.errorbar(
        calls, means, std, fmt=fmt, color=colour, ms=ms, lw=1.2, capsize=3, mec="white", zorder=3, label=label
    )


def _label_points(axes: Axes, rows: Sequence[Row], metric: str) -> None:
    """Write each point's name where it covers no point and no other name, with a line to the point if it is far."""
    at = {row.name: axes.transData.transform((row.network_calls, row.mean(metric))) for row in rows}
    taken = [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in at.values()]
    inside = axes.get_window_extent()
    for row in sorted(rows, key=lambda row: (at[row.name][1], row.name)):
        x, y = at[row.name]
        text = f"{row.name} (the default)" if row.name == AUTO else row.name
        width, height = LABEL_PIXELS[0] * len(text), LABEL_PIXELS[1]
        boxes = [
            Bbox.from_bounds(x + (10 if right else -10 - width), y + sign * shift - height / 2, width, height)
            for shift in range(0, 330, 7)
            for sign in (1, -1)
            for right in (True, False)
        ]
        free = (b for b in boxes if inside.contains(b.x0, b.y0) and inside.contains(b.x1, b.y1))
        box = next((b for b in free if not any(b.overlaps(other) for other in taken)), boxes[0])
        taken.append(box)
        is_right = box.x0 > x
        offset = ((box.x0 if is_right else box.x1) - x, (box.y0 + box.y1) / 2 - y)
        axes.annotate(
            text,
            (row.network_calls, row.mean(metric)),
            xytext=offset,
            textcoords="offset pixels",
            ha="left" if is_right else "right",
            va="center",
            fontsize=9.5,
            color=COLOURS.get(row.schedule, RELEASED_COLOUR),
            path_effects=[withStroke(linewidth=3, foreground="white")],
            arrowprops={"arrowstyle": "-", "lw": 0.6, "color": "#555555"} if abs(offset[1]) > 10 else None,
        )
