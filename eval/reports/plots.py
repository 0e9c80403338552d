"""The figure of an evaluation: generated against real cells in six panels.

Takes matrices of counts and returns a matplotlib figure. Knows nothing of files, conditions or scores; the numbers in
the panels' titles are for the eye, those of ``results.json`` are the ones to cite.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from scipy import linalg, sparse

from eval.metrics import gene_agreement as metrics

REAL, GENERATED, BASELINE = "#1f5fa8", "#e8762d", "#9a9a9a"


def comparison_figure(
    real: sparse.csr_matrix,
    generated: sparse.csr_matrix,
    baseline: sparse.csr_matrix,
    *,
    dataset: str,
    model: str,
    baseline_name: str,
) -> Figure:
    """Compare generated with real cells: embedding, library size, and per gene mean, variance, zeros and correlation.

    Args:
        real: (n, G) counts of real test cells.
        generated: (m, G) counts of generated cells.
        baseline: (k, G) counts of a baseline, drawn faintly behind.
        dataset: for the title.
        model: the generator's name.
        baseline_name: the baseline's name.
    """
    figure = Figure(figsize=(15, 9.4), layout="constrained")
    FigureCanvasAgg(figure)
    counts = {"real": real, model: generated, baseline_name: baseline}
    colours = dict(zip(counts, (REAL, GENERATED, BASELINE)))
    log1p = {name: cells.astype(np.float64).log1p().tocsr() for name, cells in counts.items()}
    axes = figure.subplots(2, 3)
    _embedding(axes[0, 0], log1p, colours)
    _library_sizes(axes[0, 1], counts, colours)
    means, variances = zip(*(metrics.mean_and_variance(cells) for cells in log1p.values()))
    _against_real(axes[0, 2], means, colours, "mean per gene", "mean log1p count", log=True)
    _against_real(axes[1, 0], variances, colours, "variance per gene", "variance of log1p count", log=True)
    zeros = [metrics.zero_fractions(cells) for cells in counts.values()]
    _against_real(axes[1, 1], zeros, colours, "zeros per gene", "share of cells at zero")
    pairs = [metrics.correlation_triangles(cells, log1p["real"]) for cells in log1p.values()]
    triangles = [pair[0] for pair in pairs]
    _against_real(axes[1, 2], triangles, colours, "gene pairs, 100 most variable genes", "correlation of log1p counts")
    sizes = f"{real.shape[0]:,} real, {generated.shape[0]:,} generated cells, {real.shape[1]:,} genes"
    figure.suptitle(f"{model} on {dataset}: {sizes}", fontsize=15)
    return figure


def _embedding(axes: Axes, log1p: dict[str, sparse.csr_matrix], colours: dict[str, str]) -> None:
    """The first two principal components of the real cells' log1p counts; real and generated in mixed order."""
    real, model, baseline = log1p
    centre = np.asarray(log1p[real].mean(axis=0)).ravel()
    components, share = _principal_components(log1p[real], centre)
    points = {name: cells @ components - centre @ components for name, cells in log1p.items()}
    axes.scatter(*points[baseline].T, s=5, c=colours[baseline], alpha=0.25, linewidths=0)
    both = np.concatenate([points[real], points[model]])
    colour = np.repeat([colours[real], colours[model]], [len(points[real]), len(points[model])])
    order = np.random.default_rng(0).permutation(len(both))
    axes.scatter(*both[order].T, s=7, c=colour[order], alpha=0.55, linewidths=0)
    for name in log1p:
        axes.scatter([], [], s=30, c=colours[name], label=name)
    axes.legend(loc="best", frameon=True, framealpha=0.9)
    axes.set(
        title="principal components of the real cells", xlabel=f"PC 1 ({share[0]:.0%})", ylabel=f"PC 2 ({share[1]:.0%})"
    )


def _principal_components(cells: sparse.csr_matrix, centre: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(G, 2) directions of largest variance, and the share of the total variance of each, through the Gram matrix."""
    gram = (cells @ cells.T).toarray()
    shift = cells @ centre
    gram += centre @ centre - shift[:, None] - shift[None, :]
    n = gram.shape[0]
    values, vectors = linalg.eigh(gram, subset_by_index=[n - 2, n - 1])
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    directions = cells.T @ vectors - np.outer(centre, vectors.sum(axis=0))
    lengths = np.linalg.norm(directions, axis=0)
    directions = directions / np.where(lengths > 0, lengths, 1)
    directions *= np.where(directions[np.abs(directions).argmax(axis=0), [0, 1]] < 0, -1, 1)  # one sign for every run
    total = np.trace(gram)
    return directions, values / total if total > 0 else np.zeros(2)


def _library_sizes(axes: Axes, counts: dict[str, sparse.csr_matrix], colours: dict[str, str]) -> None:
    """Histograms of the cells' totals on a logarithmic axis."""
    sizes = {name: np.asarray(cells.sum(axis=1)).ravel() + 1 for name, cells in counts.items()}
    joined = np.concatenate(list(sizes.values()))
    bins = np.geomspace(joined.min(), joined.max() + 1, 40)
    for name in reversed(list(sizes)):
        weights = np.full(sizes[name].size, 1 / sizes[name].size)
        axes.hist(sizes[name], bins=bins, weights=weights, histtype="step", lw=2, color=colours[name], label=name)
    axes.set(title="library size", xlabel="counts per cell + 1", ylabel="share of cells", xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _against_real(
    axes: Axes,
    values: Sequence[np.ndarray],
    colours: dict[str, str],
    title: str,
    label: str,
    *,
    log: bool = False,
) -> None:
    """Scatter of a quantity of the baseline and of the model against the real cells', with the diagonal.

    On logarithmic axes what is 0 stands at the lower edge, half the smallest positive value. The Pearson correlation in
    the corner is that of the values themselves.
    """
    names = list(colours)
    agreement = [f"{name}: r = {_correlation(values[0], other):.3f}" for name, other in zip(names[1:], values[1:])]
    if log:
        positive = [v[v > 0] for v in values if (v > 0).any()]
        lowest = min(v.min() for v in positive) / 2 if positive else 1e-3
        values = [np.log10(np.maximum(v, lowest)) for v in values]
    everything = np.concatenate(values) if values[0].size else np.array([0.0, 1.0])
    low, high = everything.min(), everything.max()
    pad = 0.04 * (high - low) or 0.1
    limits = np.array([low - pad, high + pad])
    size, opacity = (10, 0.6) if values[0].size < 2000 else (3, 0.35)
    at = (lambda v: 10**v) if log else (lambda v: v)
    axes.plot(at(limits), at(limits), c="black", lw=1, zorder=4)
    axes.scatter(at(values[0]), at(values[2]), s=size, c=colours[names[2]], alpha=opacity, linewidths=0, zorder=2)
    axes.scatter(at(values[0]), at(values[1]), s=size, c=colours[names[1]], alpha=opacity, linewidths=0, zorder=3)
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8}
    axes.text(0.03, 0.97, "\n".join(agreement), transform=axes.transAxes, va="top", bbox=box, zorder=5)
    axes.set(title=title, xlabel=f"{label}, real", ylabel=f"{label}, generated")
    axes.set(xlim=at(limits), ylim=at(limits), xscale="log" if log else "linear", yscale="log" if log else "linear")
    axes.set_box_aspect(1)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation, nan where a side is constant."""
    return float(np.corrcoef(a, b)[0, 1]) if a.size > 1 and a.std() > 0 and b.std() > 0 else float("nan")
