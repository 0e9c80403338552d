"""Draw the figures of an evaluation: generated against real cells, as matplotlib figures.

Every letter and line has the colour ``INK``, which an HTML page can replace by its own. Numbers in the figures are for
the eye; those of ``results.json`` are the ones to cite. A figure takes ``counts``: three names (real cells, a
generator, a baseline), in this order, with the (n, G) counts of each.
"""

import importlib.util
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from scipy import sparse, stats
from scipy.spatial.distance import squareform

from eval.comparison.cells import CellCounts, Comparison
from eval.comparison.protocols import FEW_CELLS, log_cp10k, principal_components
from eval.metrics import gene_agreement as metrics
from eval.metrics.by_name import model_label
from tokenization.count_errors_dcm import library_size

INK = "#010203"
INK_PARTS = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
STYLE = dict.fromkeys(INK_PARTS, INK) | {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 11,
    "legend.frameon": False,
    "svg.fonttype": "none",
}
# twenty colours that can be told apart on white and on black
PALETTE = [matplotlib.colors.to_hex(colour) for colour in matplotlib.colormaps["tab20"].colors]
PALETTE = PALETTE[::2] + PALETTE[1::2]
COLOURS = REAL, GENERATED, BASELINE = "#3b82c4", "#e8762d", "#8c8c8c"
CELLS_DRAWN = 2000
BANDWIDTH = 0.1  # of the density, in standard deviations of all cells: clusters are tighter than Scott's rule says
DENSITY_SHARES = (0.9, 0.6, 0.3)  # of the cells inside each contour
GENES_DRAWN = 10
PERTURBATIONS_DRAWN = 6
CORRELATED_GENES = 100
PAIRS = f"pairs of {CORRELATED_GENES} variable genes", "correlation"  # title and axes of their panel


def cells_to_draw(
    cells: Comparison, baseline: CellCounts, *, baseline_name: str, seed: int
) -> dict[str, dict[str, CellCounts]]:
    """Return for each generator real cells, those of its first file, and a baseline's, by name: at most 2,000 each."""
    rng = np.random.default_rng(seed)
    real, drawn = (side.thinned(CELLS_DRAWN, rng) for side in (cells.real, baseline))
    generated = {model: files[0].thinned(CELLS_DRAWN, rng) for model, files in cells.generated.items()}
    return {model: {"real": real, model: ours, baseline_name: drawn} for model, ours in generated.items()}


@matplotlib.rc_context(STYLE)
def overview_figure(cells: dict[str, CellCounts], *, dataset: str) -> Figure:
    """Draw eight panels: principal components of each kind of cells, coloured by label, library sizes, and per gene
    mean, variance, zeros and correlation."""
    figure, axes = _figure(2, 4, (17, 9.2))
    counts = {name: side.counts for name, side in cells.items()}
    points, labels = _components(counts)
    _coloured(axes[0, :3], points, cells, labels)
    _gene_panels([axes[0, 3], *axes[1, :3]], counts)
    _against_real(axes[1, 3], _correlations(counts), *PAIRS)
    (real, genes), (generated, _), _ = (side.shape for side in counts.values())
    sizes = f"{real:,} real, {generated:,} generated cells, {genes:,} genes"
    figure.suptitle(f"{list(counts)[1]} on {dataset}: {sizes}", fontsize=15)
    return figure


@matplotlib.rc_context(STYLE)
def embedding_figure(cells: dict[str, CellCounts], *, umap: bool) -> tuple[Figure, str]:
    """Draw real and generated cells in two dimensions, coloured by label, and both with density contours (the paper's
    Figure 2).

    Args:
        cells: two kinds by name, the real ones first.
        umap: UMAP of 30 principal components (fitted on the real cells' log1p CP10k) where umap-learn is installed,
            else PCA, the first two of them.

    Returns:
        The figure, and the method.
    """
    is_umap = umap and importlib.util.find_spec("umap") is not None
    points, labels = _components({name: side.counts for name, side in cells.items()})
    together = np.concatenate(list(points.values()))
    if is_umap:
        from umap import UMAP

        together = UMAP(n_neighbors=min(15, len(together) - 1), random_state=0, n_jobs=1).fit_transform(together)
        labels = ["UMAP 1", "UMAP 2"]
    first = len(next(iter(cells.values())))
    points = dict(zip(points, np.split(together[:, :2].astype(np.float64), [first])))
    figure, panels = _figure(1, 3, (13, 4.8))
    _coloured(panels[:2], points, cells, labels)
    low, high = (np.array(edges) for edges in zip(panels[0].get_xlim(), panels[0].get_ylim()))
    order = np.random.default_rng(0).permutation(len(together))  # neither kind of cells on top
    colour = np.repeat(COLOURS[:2], [len(found) for found in points.values()])
    panels[2].scatter(*together[order, :2].T, s=6, c=colour[order], alpha=0.5, linewidths=0, rasterized=True)
    for (name, found), colour in zip(points.items(), COLOURS):
        panels[2].scatter([], [], s=6, c=colour, label=model_label(name))  # for the legend
        _contours(panels[2], found, colour, low, high)
    panels[2].set(title="both", xlabel=labels[0], ylabel=labels[1], xticks=[], yticks=[])
    panels[2].set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    _legend_below(panels[2])
    return figure, "UMAP" if is_umap else "PCA"


@matplotlib.rc_context(STYLE)
def genes_figure(counts: dict[str, sparse.csr_matrix]) -> Figure:
    """Draw library sizes, and each gene's mean, variance and zeros against those of the real cells."""
    figure, panels = _figure(1, 4, (14, 3.9))
    _gene_panels(panels, counts)
    return figure


@matplotlib.rc_context(STYLE)
def correlation_figure(counts: dict[str, sparse.csr_matrix]) -> Figure:
    """Draw gene-gene correlations of log1p counts over the most variable real genes: matrices, and pairs."""
    triangles = _correlations(counts)
    figure, panels = _figure(1, len(counts) + 1, (3.5 * (len(counts) + 1), 3.9))
    truth = next(iter(triangles.values()))
    order = np.argsort(np.linalg.eigh(_square(truth))[1][:, -1])  # along the first eigenvector, so that blocks show
    limit = max(0.1, float(np.quantile(np.abs(truth), 0.99))) if truth.size else 1.0
    for axes, (name, triangle) in zip(panels, triangles.items()):
        matrix = _square(triangle)[np.ix_(order, order)]
        image = axes.imshow(matrix, vmin=-limit, vmax=limit, cmap="RdBu_r", interpolation="nearest")
        axes.set(title=model_label(name), xticks=[], yticks=[])
    figure.colorbar(image, ax=panels[: len(counts)], location="bottom", shrink=0.4, aspect=30, label="correlation")
    _against_real(panels[-1], triangles, *PAIRS)
    return figure


@matplotlib.rc_context(STYLE)
def differential_figure(real: CellCounts, generated: CellCounts, genes: Sequence[str]) -> Figure | None:
    """Draw the ten genes that each of the strongest perturbations moves most, in real and in generated cells.

    Change: mean log1p(CP10k) minus that of the real control cells of the same cell type. Perturbations are those with
    the largest real change among conditions with 20 or more cells on both sides; None if there are none.
    """
    changes = _changes(real, generated)
    if not changes:
        return None
    strongest = sorted(changes.items(), key=lambda item: -np.sort(np.abs(item[1][0]))[-GENES_DRAWN:].sum())
    drawn = strongest[:PERTURBATIONS_DRAWN]
    columns = min(3, len(drawn))
    lines = -(-len(drawn) // columns)
    figure, panels = _figure(lines, columns, (4.4 * columns, 3.6 * lines))
    panels = np.ravel(panels)
    for axes in panels[len(drawn) :]:
        axes.set_visible(False)
    for axes, (condition, (truth, ours)) in zip(panels, drawn):
        top = np.argsort(-np.abs(truth), kind="stable")[:GENES_DRAWN][::-1]
        height = np.arange(top.size)
        axes.hlines(height, truth[top], ours[top], color=BASELINE, lw=1.2)
        axes.scatter(truth[top], height, c=REAL, s=34, label="real", zorder=3)
        axes.scatter(ours[top], height, c=GENERATED, s=34, marker="D", label="generated", zorder=3)
        axes.axvline(0, c=INK, lw=0.8)
        axes.set_yticks(height, [genes[gene] for gene in top])
        axes.set(title=condition, xlabel="change from control, mean log1p(CP10k)")
    panels[0].legend(loc="best")
    return figure


def _figure(lines: int, columns: int, size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    """Return a figure and its axes (lines x columns, or one line's)."""
    figure = Figure(figsize=size, layout="constrained", dpi=110)
    return figure, figure.subplots(lines, columns)


def _components(counts: dict[str, sparse.csr_matrix]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Project log1p(CP10k) on the principal components of the first cells, and say what the first two axes are."""
    values = {name: log_cp10k(cells) for name, cells in counts.items()}
    first = next(iter(values.values()))
    project = principal_components(first)
    points = {name: project(cells) for name, cells in values.items()}
    points = {name: np.pad(found, ((0, 0), (0, max(0, 2 - found.shape[1])))) for name, found in points.items()}
    total = max(metrics.mean_and_variance(first)[1].sum(), 1e-12)
    shares = next(iter(points.values())).var(axis=0)[:2] / total
    return points, [f"PC {axis} ({share:.0%} of variance)" for axis, share in enumerate(shares, start=1)]


def _coloured(
    panels: Sequence[Axes], points: dict[str, np.ndarray], cells: dict[str, CellCounts], labels: Sequence[str]
) -> None:
    """Draw each kind of cells in a panel of its own, with the same limits, coloured by the first condition that has a
    few labels."""
    together = np.concatenate(list(points.values()))[:, :2]
    low, high = np.quantile(together, [0.001, 0.999], axis=0)
    pad = 0.08 * np.maximum(high - low, 1e-9)
    tables = {name: side.labels for name, side in cells.items()}
    number = next(iter(tables.values())).nunique()
    column = next((name for name in number.index if 1 < number[name] <= len(PALETTE)), None)
    groups = [] if column is None else sorted(set(next(iter(tables.values()))[column]))
    for axes, (name, found), colour in zip(panels, points.items(), COLOURS):
        of_cell = np.full(len(found), colour, dtype=object)
        for group, of_group in zip(groups, PALETTE):
            of_cell[(tables[name][column] == group).to_numpy()] = of_group
        axes.scatter(*found[:, :2].T, s=7, c=list(of_cell), alpha=0.7, linewidths=0, rasterized=True)
        axes.set(title=f"{model_label(name)}, {len(found):,} cells", xlabel=labels[0], ylabel=labels[1])
        axes.set(xlim=(low[0] - pad[0], high[0] + pad[0]), ylim=(low[1] - pad[1], high[1] + pad[1]))
        axes.set(xticks=[], yticks=[])
    for group, colour in zip(groups, PALETTE):
        panels[0].scatter([], [], s=7, c=colour, label=group)
    if groups:
        _legend_below(panels[0])


def _legend_below(axes: Axes) -> None:
    """Put the legend under the panel, where no cell is."""
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.09), "ncols": 3}
    axes.legend(**place, markerscale=2.5, fontsize=9, handletextpad=0.1, columnspacing=1)


def _contours(axes: Axes, points: np.ndarray, colour: str, low: np.ndarray, high: np.ndarray) -> None:
    """Draw lines around the densest 90, 60 and 30 % of the cells."""
    if len(points) < 10 or np.linalg.matrix_rank(points - points.mean(axis=0)) < 2:
        return
    density = stats.gaussian_kde(points.T, bw_method=BANDWIDTH)
    levels = np.unique(np.quantile(density(points.T), [1 - share for share in DENSITY_SHARES]))
    grid = np.meshgrid(*(np.linspace(low[axis], high[axis], 80) for axis in (0, 1)))
    heights = density(np.stack([side.ravel() for side in grid])).reshape(grid[0].shape)
    axes.contour(*grid, heights, levels=levels, colors=colour, linewidths=1.4)


def _gene_panels(panels: Sequence[Axes], counts: dict[str, sparse.csr_matrix]) -> None:
    """Fill four panels: library sizes, and mean, variance and zeros of each gene against the real cells'."""
    moments = [metrics.mean_and_variance(cells.astype(np.float64).log1p()) for cells in counts.values()]
    means, variances = (dict(zip(counts, of_genes)) for of_genes in zip(*moments))
    zeros = {name: metrics.zero_fractions(cells) for name, cells in counts.items()}
    _library_sizes(panels[0], counts)
    _against_real(panels[1], means, "mean of each gene", "mean log1p count", log=True)
    _against_real(panels[2], variances, "variance of each gene", "variance of log1p count", log=True)
    _against_real(panels[3], zeros, "zeros of each gene", "share of cells at zero")


def _library_sizes(axes: Axes, counts: dict[str, sparse.csr_matrix]) -> None:
    """Draw histograms of the cells' totals on a logarithmic axis."""
    sizes = {name: library_size(cells) + 1 for name, cells in counts.items()}
    joined = np.concatenate(list(sizes.values()))
    bins = np.geomspace(joined.min(), joined.max() + 1, 40)
    for name, colour in reversed(list(zip(sizes, COLOURS))):
        weights = np.full(sizes[name].size, 1 / sizes[name].size)
        axes.hist(sizes[name], bins=bins, weights=weights, histtype="step", lw=2, color=colour, label=model_label(name))
    axes.set(title="library size", xlabel="counts per cell + 1", ylabel="share of cells", xscale="log")
    decades = np.log10(bins[-1] / bins[0])
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 1.3 else (1, 3) if decades < 2.2 else (1,)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(y=0.35)
    axes.legend(loc="upper left")


def _against_real(axes: Axes, values: dict[str, np.ndarray], title: str, label: str, *, log: bool = False) -> None:
    """Scatter a quantity of generator and baseline against the real cells', with the diagonal.

    On logarithmic axes what is 0 stands at the lower edge, half the smallest positive value. The Pearson correlation in
    the legend is that of the values themselves.
    """
    names, real = list(values), next(iter(values.values()))
    agreement = {name: f"{model_label(name)}, r = {metrics.pearson(real, values[name]):.3f}" for name in names[1:]}
    if log:
        positive = [v[v > 0] for v in values.values() if (v > 0).any()]
        lowest = min(v.min() for v in positive) / 2 if positive else 1e-3
        values = {name: np.log10(np.maximum(v, lowest)) for name, v in values.items()}
    everything = np.concatenate(list(values.values())) if real.size else np.array([0.0, 1.0])
    pad = 0.04 * np.ptp(everything) or 0.1
    limits = np.array([everything.min() - pad, everything.max() + pad])
    size, opacity = (10, 0.6) if real.size < 2000 else (3, 0.35)
    at = (lambda v: 10**v) if log else (lambda v: v)
    axes.plot(at(limits), at(limits), c=INK, lw=1, zorder=4)
    for name, colour, layer in list(zip(names, COLOURS, (0, 3, 2)))[1:]:
        points = at(values[names[0]]), at(values[name])
        axes.scatter(
            *points, s=size, c=colour, alpha=opacity, linewidths=0, zorder=layer, rasterized=True, label=agreement[name]
        )
    axes.legend(loc="upper left", markerscale=(40 / size) ** 0.5, handletextpad=0.1, borderaxespad=0, fontsize=9)
    axes.set(title=title, xlabel=f"{label}, real", ylabel=f"{label}, generated")
    axes.set(xlim=at(limits), ylim=at(limits), xscale="log" if log else "linear", yscale="log" if log else "linear")
    axes.set_box_aspect(1)


def _correlations(counts: dict[str, sparse.csr_matrix]) -> dict[str, np.ndarray]:
    """Compute the gene-gene correlations (upper triangles) of log1p counts over the most variable real genes."""
    values = {name: cells.astype(np.float64).log1p().tocsr() for name, cells in counts.items()}
    real = next(iter(values.values()))
    return {name: metrics.correlation_triangles(cells, real, CORRELATED_GENES)[0] for name, cells in values.items()}


def _square(triangle: np.ndarray) -> np.ndarray:
    """Build the symmetric matrix with ones on the diagonal from its upper triangle."""
    matrix = squareform(triangle)
    return matrix + np.eye(len(matrix))


def _changes(real: CellCounts, generated: CellCounts) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Compute each perturbed condition's mean log1p(CP10k) minus the real controls', in real and generated cells."""
    changes = {}
    for condition, rows in real.rows_by_condition.items():
        controls, ours = real.control_rows(condition), generated.rows_by_condition.get(condition, rows[:0])
        if controls is None or min(rows.size, controls.size, ours.size) < FEW_CELLS:
            continue
        chosen = (real.counts[rows], generated.counts[ours], real.counts[controls])
        truth, drawn, control = (np.asarray(log_cp10k(counts).mean(axis=0)).ravel() for counts in chosen)
        changes[condition] = (truth - control, drawn - control)
    return changes
