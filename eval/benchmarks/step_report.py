"""Tables and the figure of the training benchmark, from its rows.

Knows nothing of how anything was measured.
"""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eval.benchmarks.step_results import Result, Row, exponent, median
from eval.benchmarks.step_variants import NO_BUDGET, OURS, PLAIN

COLOURS = {"dit": "#c62f2f", "latent": "#1f5fa8"}
FROM_GENES = 2000  # where the second exponent begins: below, what does not depend on genes counts too
SMALLEST_SHARE = 0.02
WORDS = {
    PLAIN: "every gene's logits, one-stage head, float32 log-softmax over all counts",
    NO_BUDGET: "every gene's logits of small counts; those of large counts where one occurs",
    OURS: "the same for the queried genes alone: what `dcm-train` does",
}


def tables(result: Result) -> str:
    """Markdown: steps, heads and losses, growth with genes, and where the time goes."""
    parts = ["## The whole step", _steps(result), "## Head and loss alone", _heads(result)]
    growth = [row for row in result.rows if row.part == "growth"]
    if growth:
        parts += ["## Growth with genes", _growth(growth)]
    if result.shares:
        parts += ["## Where the time of a step goes", _shares(result.shares)]
    return "\n\n".join(parts)


def notes(about: dict[str, object], result: Result) -> str:
    """What a reader of the tables must know."""
    counts = about["counts"]
    lines = [
        f"{about['device']}, {about['precision']}; {about['rounds']} rounds in which the compared steps take turns "
        "(two where a step takes more than 5 s); medians, in brackets the smallest and largest ratio of a round.",
        *(f"{name}: {words}." for name, words in WORDS.items()),
        "step: noise, forward and backward pass, clipping, optimiser, averages; not reading cells and logging.",
        f"Counts are simulated, at most {about['max_count']:,}: mean {counts['mean']:g} in a cell and gene, "
        f"{counts['above_0']:.0%} above 0, {counts['from_63_on']:.2%} from 63 on.",
        "growth: the same number of cells at every number of genes. A budget of queries that stops growing (by default "
        "at 2,048) flattens the curve of `latent` at the end.",
        "A budget of queried genes makes the gradient noisier: its speed is not free, that of `no budget` is.",
        f"peak: what stays between steps (weights, optimiser, averages) and the growth within one; {about['memory']}.",
        f"utilisation: model FLOPs (three forward passes) over {about['peak_tflops']:.3g} TFLOP/s, from "
        f"{about['peak_from']}.",
        *(f"Left out: {what}." for what in result.left_out),
    ]
    return "\n".join(f"- {line}" for line in lines)


def last_line(summary: dict[str, float]) -> str:
    """The benchmark's result in one line for machines."""
    return " ".join(f"{name}={value:.3g}" for name, value in summary.items())


def with_spread(ratios: Sequence[float]) -> str:
    """Median of ratios, with the smallest and the largest of them."""
    return f"{median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]" if ratios else ""


def _steps(result: Result) -> str:
    heading = ["size", "genes", "cells", "queried", "network, step", "parameters", "cells/s", "peak MiB", "utilisation"]
    lines = []
    for row in (row for row in result.rows if row.part == "step"):
        case = row.case
        at = {"size": case.size, "genes": case.genes}
        own = {**at, "backbone": case.backbone, "variant": case.variant}
        lines.append(
            [
                case.size,
                f"{case.genes:,}",
                f"{case.cells}",
                f"{case.queries if case.variant == OURS else case.genes:,}",
                case.name,
                f"{row.parameters / 1e6:.2f} M",
                f"{row.cells_per_second:,.3g}",
                f"{row.standing_mib + row.growth_mib:,.0f}",
                "" if row.utilisation is None else f"{row.utilisation:.0%}",
                with_spread(result.ratio("step", {**own, "variant": PLAIN}, own)),
                with_spread(result.ratio("step", {**at, "backbone": "dit", "variant": PLAIN}, own)),
            ]
        )
    return _table([*heading, "x its plain", "x plain dit"], lines)


def _heads(result: Result) -> str:
    lines = []
    for row in (row for row in result.rows if row.part == "head"):
        case = row.case
        own = {"size": case.size, "genes": case.genes, "backbone": case.backbone, "variant": case.variant}
        plain = result.find("head", **{**own, "variant": PLAIN})
        lines.append(
            [
                case.size,
                f"{case.genes:,}",
                f"{case.cells}",
                case.variant,
                f"{1e3 * row.median:,.3g}",
                f"{row.growth_mib:,.3g}",
                with_spread(result.ratio("head", {**own, "variant": PLAIN}, own)),
                f"{plain.growth_mib / row.growth_mib:.1f}" if plain else "",
            ]
        )
    return _table(["size", "genes", "cells", "variant", "ms", "MiB", "times faster", "times less memory"], lines)


def _growth(rows: list[Row]) -> str:
    lines = []
    for backbone in COLOURS:
        mine = [row for row in rows if row.case.backbone == backbone]
        for row in mine:
            seconds, memory = _per_cell(row)
            case = row.case
            line = [backbone, case.size, f"{case.genes:,}", f"{case.cells}", f"{1e3 * seconds:,.3g}", f"{memory:,.3g}"]
            lines.append(line)
        for name, some in (("all", mine), (f"from {FROM_GENES:,} genes", _upper(mine))):
            genes = [row.case.genes for row in some]
            slopes = [exponent(genes, values) for values in zip(*map(_per_cell, some))] or [float("nan")] * 2
            lines.append([backbone, f"exponent, {name}", "", "", *(f"{slope:.2f}" for slope in slopes)])
    return _table(["network", "size", "genes", "cells", "ms of a cell", "MiB of a cell"], lines)


def _shares(shares: dict[str, dict[str, float]]) -> str:
    kinds = sorted({kind for mine in shares.values() for kind in mine}, key=lambda kind: -max(_of(shares, kind)))
    lines = [
        [kind, *(f"{share:.0%}" for share in _of(shares, kind))]
        for kind in kinds
        if max(_of(shares, kind)) >= SMALLEST_SHARE
    ]
    return _table(["operations", *shares], lines)


def _of(shares: dict[str, dict[str, float]], kind: str) -> list[float]:
    return [mine.get(kind, 0.0) for mine in shares.values()]


def _table(heading: list[str], lines: list[list[str]]) -> str:
    """A Markdown table that is aligned as plain text too."""
    widths = [max(map(len, column)) for column in zip(heading, *lines)]
    rows = [heading, ["-" * width for width in widths], *lines]
    return "\n".join(f"| {' | '.join(text.ljust(width) for text, width in zip(row, widths))} |" for row in rows)


def _per_cell(row: Row) -> tuple[float, float]:
    """Seconds, and MiB of growth, of one cell."""
    return row.median / row.case.cells, row.growth_mib / row.case.cells


def _upper(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.case.genes >= FROM_GENES]


def figure(about: dict[str, object], result: Result) -> Figure:
    """Seconds and memory of a cell over genes, both axes logarithmic, with the exponents."""
    canvas = Figure(figsize=(12, 5.8), dpi=110, layout="constrained")
    FigureCanvasAgg(canvas)
    rows = [row for row in result.rows if row.part == "growth"]
    size = rows[0].case.size if rows else ""
    canvas.suptitle(f"One training step, size {size}, {about['device']}, {about['precision']}", fontsize=13)
    labels = ("milliseconds of a cell", "MiB that a cell adds within a step")
    for axes, label, index, factor in zip(canvas.subplots(1, 2), labels, (0, 1), (1e3, 1.0)):
        _panel(axes, rows, index, factor)
        axes.set_ylabel(label)
    return canvas


def _panel(axes: Axes, rows: list[Row], index: int, factor: float) -> None:
    for backbone, colour in COLOURS.items():
        mine = [row for row in rows if row.case.backbone == backbone]
        if not mine:
            continue
        genes = [row.case.genes for row in mine]
        costs = [factor * _per_cell(row)[index] for row in mine]
        upper = exponent([row.case.genes for row in _upper(mine)], [_per_cell(row)[index] for row in _upper(mine)])
        axes.plot(
            genes,
            costs,
            "o-",
            color=colour,
            label=f"{backbone}, cells of a step: {mine[0].case.cells}; genes^{exponent(genes, costs):.2f}, "
            f"from {FROM_GENES:,} genes on genes^{upper:.2f}",
        )
        if index == 0:
            low, high = ([factor * pick(row.seconds) / row.case.cells for row in mine] for pick in (min, max))
            axes.fill_between(genes, low, high, color=colour, alpha=0.2, lw=0)
    axes.set(xscale="log", yscale="log", xlabel="genes")
    numbers = sorted({row.case.genes for row in rows})
    axes.set_xticks(numbers, [f"{number:,}" for number in numbers])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.25, which="both")
    if rows:
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize=9)
