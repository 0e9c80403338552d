"""The figures of the HTML report: real against generated cells, each as one matplotlib figure.

Takes counts, labels and rows; returns figures whose lines and letters have the colour ``INK``, which the report
replaces by the page's own, so that they can be read on a light and on a dark page. Knows nothing of HTML or of files.
"""

import importlib.util
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import sparse, stats

from eval.comparison.cells import PERTURBATION, CellCounts
from eval.comparison.spaces import log_cp10k, principal_components
from eval.metrics import gene_agreement as metrics
from eval.reports.tables import FLOOR, Row

INK = "#010203"
STYLE = {
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.facecolor": "none",
    "legend.edgecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 11,
    "svg.fonttype": "none",
}
REAL, GENERATED, BASELINE = "#3b82c4", "#e8762d", "#8c8c8c"
BANDWIDTH = (
    0.1  # of the density, in standard deviations of all cells: clusters are tighter than Scott's rule takes them
)
DENSITY_SHARES = (0.9, 0.6, 0.3)  # of the cells inside each contour
CONDITIONS_SHOWN = 40
GENES_SHOWN = 10
PERTURBATIONS_SHOWN = 6
CORRELATED_GENES = 100


def embedding_figure(real: sparse.csr_matrix, generated: sparse.csr_matrix, *, umap: bool) -> tuple[Figure, str]:
    """Real and generated cells in two dimensions with density contours (the paper's Figure 2), and the method's name.

    UMAP of 30 principal components (fitted on the real cells' log1p CP10k) where umap-learn is installed and wanted,
    else the first two of them.
    """
    values = log_cp10k(real)
    project = principal_components(values)
    points = np.concatenate([project(values), project(log_cp10k(generated))])
    method = "PCA"
    if umap and importlib.util.find_spec("umap") is not None:
        from umap import UMAP

        points, method = (
            UMAP(n_neighbors=min(15, len(points) - 1), random_state=0, n_jobs=1).fit_transform(points),
            "UMAP",
        )
    points = np.pad(points, ((0, 0), (0, max(0, 2 - points.shape[1]))))[:, :2].astype(np.float64)
    sides = {"real": points[: real.shape[0]], "generated": points[real.shape[0] :]}
    figure, (left, middle, right) = _figure(1, 3, (13, 4.4))
    low, high = np.quantile(points, [0.001, 0.999], axis=0)
    pad = 0.08 * np.maximum(high - low, 1e-9)
    for axes, shown in ((left, ("real",)), (middle, ("generated",)), (right, ("real", "generated"))):
        for name in shown:
            colour = REAL if name == "real" else GENERATED
            if len(shown) == 1:
                axes.scatter(*sides[name].T, s=5, c=colour, alpha=0.5, linewidths=0, rasterized=True)
            _contours(axes, sides[name], colour, low - pad, high + pad)
        axes.set(xlim=(low[0] - pad[0], high[0] + pad[0]), ylim=(low[1] - pad[1], high[1] + pad[1]))
        axes.set(xticks=[], yticks=[], xlabel=f"{method} 1", ylabel=f"{method} 2")
        axes.set_title(
            f"{shown[0]}, {len(sides[shown[0]]):,} cells" if len(shown) == 1 else "both: real blue, generated orange"
        )
    return figure, method


def genes_figure(counts: dict[str, sparse.csr_matrix]) -> Figure:
    """Mean against variance, zeros against mean, and library sizes, of real, generated and baseline cells."""
    figure, (variance, zeros, sizes) = _figure(1, 3, (13, 4.2))
    colours = dict(zip(counts, (REAL, GENERATED, BASELINE)))
    baseline, generated = list(counts)[2], list(counts)[1]
    order = [baseline, *[name for name in counts if name not in (baseline, generated)], generated]
    for name in order:
        size = 5 if name == generated else 16  # in front, and small enough to see what lies behind
        mean, var = metrics.mean_and_variance(counts[name].astype(np.float64))
        on = (mean > 0) & (var > 0)
        variance.scatter(
            mean[on], var[on], s=size, c=colours[name], alpha=0.5, linewidths=0, rasterized=True, label=name
        )
        share = metrics.zero_fractions(counts[name])
        zeros.scatter(
            mean[mean > 0],
            share[mean > 0],
            s=size,
            c=colours[name],
            alpha=0.5,
            linewidths=0,
            rasterized=True,
            label=name,
        )
    totals = {name: np.asarray(cells.sum(axis=1)).ravel() + 1 for name, cells in counts.items()}
    joined = np.concatenate(list(totals.values()))
    bins = np.geomspace(joined.min(), joined.max() + 1, 40)
    for name in order:
        weights = np.full(totals[name].size, 1 / totals[name].size)
        sizes.hist(totals[name], bins=bins, weights=weights, histtype="step", lw=1.8, color=colours[name], label=name)
    variance.set(title="mean and variance of each gene", xlabel="mean count", ylabel="variance of counts")
    variance.set(xscale="log", yscale="log")
    zeros.set(title="zeros of each gene", xlabel="mean count", ylabel="share of cells at zero", xscale="log")
    sizes.set(title="library size", xlabel="counts per cell + 1", ylabel="share of cells", xscale="log")
    sizes.margins(y=0.35)
    for axes, place in ((variance, "upper left"), (zeros, "lower left"), (sizes, "upper left")):
        axes.legend(loc=place, markerscale=2)
    return figure


def correlation_figure(counts: dict[str, sparse.csr_matrix]) -> Figure:
    """Gene-gene correlations of log1p counts over the most variable real genes: matrices, and pairs."""
    values = {name: cells.astype(np.float64).log1p().tocsr() for name, cells in counts.items()}
    real = values[next(iter(values))]
    number = metrics.most_variable_genes(real, CORRELATED_GENES).size
    triangles = {
        name: metrics.correlation_triangles(cells, real, CORRELATED_GENES)[0] for name, cells in values.items()
    }
    truth = triangles[next(iter(values))]
    figure, panels = _figure(1, len(counts) + 1, (3.5 * (len(counts) + 1), 3.9))
    order = _similar_together(_square(truth, number))
    limit = max(0.1, float(np.quantile(np.abs(truth), 0.99))) if truth.size else 1.0
    for axes, (name, triangle) in zip(panels, triangles.items()):
        matrix = _square(triangle, number)[np.ix_(order, order)]
        image = axes.imshow(matrix, vmin=-limit, vmax=limit, cmap="RdBu_r", interpolation="nearest")
        axes.set(title=name, xticks=[], yticks=[])
    figure.colorbar(image, ax=panels[: len(counts)], location="bottom", shrink=0.4, aspect=30, label="correlation")
    for name, colour in reversed(list(zip(list(triangles)[1:], (GENERATED, BASELINE)))):
        panels[-1].scatter(truth, triangles[name], s=4, c=colour, alpha=0.4, linewidths=0, rasterized=True, label=name)
    if truth.size:
        ends = [truth.min(), truth.max()]
        panels[-1].plot(ends, ends, c=INK, lw=1)
    panels[-1].set(title="every pair of genes", xlabel="correlation, real", ylabel="correlation, generated")
    panels[-1].legend(loc="upper left", markerscale=3)
    return figure


def condition_figure(rows: Sequence[Row], protocol: str, metric: str) -> tuple[Figure, list[tuple[str, str, float]]]:
    """Heat map of conditions x models: how many floor standard deviations a distance is above the floor.

    Returns:
        The figure (the conditions with the largest excess of any generator first, at most 40), and all of (condition,
        model, excess) from the worst on.
    """
    excess = _excess(rows, protocol, metric)
    models = list(dict.fromkeys(model for model, _ in excess))
    conditions = list(dict.fromkeys(condition for _, condition in excess))
    first = models[0]
    conditions.sort(key=lambda condition: -excess.get((first, condition), -np.inf))
    shown = conditions[:CONDITIONS_SHOWN]
    matrix = np.array([[excess.get((model, condition), np.nan) for model in models] for condition in shown])
    figure, axes = _figure(1, 1, (3.6 + 1.15 * len(models), 2.3 + 0.27 * len(shown)))
    image = axes.imshow(matrix, aspect="auto", vmin=0, vmax=10, cmap="viridis", interpolation="nearest")
    for (row, column), value in np.ndenumerate(matrix):
        if np.isfinite(value):
            axes.text(
                column,
                row,
                f"{round(value, 1) + 0.0:.1f}",
                ha="center",
                va="center",
                fontsize=9,
                color=_on_viridis(value / 10),
            )
    axes.set_xticks(range(len(models)), [model.replace("_", "\n") for model in models])
    axes.set_yticks(range(len(shown)), shown)
    axes.xaxis.tick_top()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    label = "standard deviations of the floor above the floor (2 or less: at the floor)"
    figure.colorbar(image, ax=axes, location="bottom", label=label, extend="both", pad=0.02, fraction=0.03, aspect=40)
    worst = sorted(((condition, model, value) for (model, condition), value in excess.items()), key=lambda t: -t[2])
    return figure, worst


def differential_figure(real: CellCounts, generated: CellCounts, genes: Sequence[str]) -> Figure | None:
    """The ten genes that each of the strongest perturbations moves most, in real and in generated cells.

    Change: mean log1p(CP10k) minus that of the real control cells of the same cell type. Perturbations are those with
    the largest real change among conditions with 20 or more cells on both sides; None if there are none.
    """
    ours, theirs = generated.rows_by_condition, real.rows_by_condition
    changes = {}
    for condition, rows in theirs.items():
        controls = real.control_rows(condition)
        if controls is None or min(rows.size, controls.size, ours.get(condition, rows[:0]).size) < 20:
            continue
        means = [_mean_log(real.counts[rows]), _mean_log(generated.counts[ours[condition]])]
        control = _mean_log(real.counts[controls])
        changes[condition] = (means[0] - control, means[1] - control)
    if not changes:
        return None
    strongest = sorted(changes, key=lambda condition: -np.sort(np.abs(changes[condition][0]))[-GENES_SHOWN:].sum())
    shown = strongest[:PERTURBATIONS_SHOWN]
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    figure, panels = _figure(lines, columns, (4.4 * columns, 3.6 * lines), squeeze=False)
    for axes in panels.ravel()[len(shown) :]:
        axes.set_visible(False)
    for axes, condition in zip(panels.ravel(), shown):
        truth, drawn = changes[condition]
        top = np.argsort(-np.abs(truth), kind="stable")[:GENES_SHOWN][::-1]
        height = np.arange(top.size)
        axes.hlines(height, truth[top], drawn[top], color=BASELINE, lw=1.2)
        axes.scatter(truth[top], height, c=REAL, s=34, label="real", zorder=3)
        axes.scatter(drawn[top], height, c=GENERATED, s=34, marker="D", label="generated", zorder=3)
        axes.axvline(0, c=INK, lw=0.8)
        axes.set_yticks(height, [genes[gene] for gene in top])
        axes.set(title=condition, xlabel="change from control, mean log1p(CP10k)")
    panels.ravel()[0].legend(loc="best")
    return figure


def has_perturbations(real: CellCounts) -> bool:
    """Whether there are perturbed cells and controls to compare them with."""
    return PERTURBATION in real.labels and real.control in set(real.labels[PERTURBATION])


def _figure(lines: int, columns: int, size: tuple[float, float], *, squeeze: bool = True) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(lines, columns, squeeze=squeeze)


def _contours(axes: Axes, points: np.ndarray, colour: str, low: np.ndarray, high: np.ndarray) -> None:
    """Lines around the densest 90, 60 and 30 % of the cells."""
    if len(points) < 10 or np.linalg.matrix_rank(points - points.mean(axis=0)) < 2:
        return
    density = stats.gaussian_kde(points.T, bw_method=BANDWIDTH)
    levels = np.unique(np.quantile(density(points.T), [1 - share for share in DENSITY_SHARES]))
    grid = np.meshgrid(*(np.linspace(low[axis], high[axis], 80) for axis in (0, 1)))
    heights = density(np.stack([side.ravel() for side in grid])).reshape(grid[0].shape)
    axes.contour(*grid, heights, levels=levels, colors=colour, linewidths=1.4)


def _excess(rows: Sequence[Row], protocol: str, metric: str) -> dict[tuple[str, str], float]:
    """(model, condition) -> (mean - floor's mean) / floor's standard deviation."""
    ours = [r for r in rows if (r["protocol"], r["metric"], r["grouping"]) == (protocol, metric, "condition")]
    floors = {row["condition"]: row for row in ours if row["model"] == FLOOR and row["mean"] is not None and row["std"]}
    return {
        (row["model"], row["condition"]): (row["mean"] - floors[row["condition"]]["mean"])
        / floors[row["condition"]]["std"]
        for row in ours
        if row["model"] != FLOOR and row["condition"] in floors and row["mean"] is not None
    }


def _square(triangle: np.ndarray, number: int) -> np.ndarray:
    """Symmetric matrix with ones on the diagonal from its upper triangle."""
    matrix = np.zeros((number, number))
    matrix[np.triu_indices(number, k=1)] = triangle
    return matrix + matrix.T + np.eye(number)


def _similar_together(matrix: np.ndarray) -> np.ndarray:
    """Order of the genes along the first eigenvector, so that blocks show."""
    return np.argsort(np.linalg.eigh(matrix)[1][:, -1]) if len(matrix) else np.arange(0)


def _mean_log(counts: sparse.csr_matrix) -> np.ndarray:
    return np.asarray(log_cp10k(counts).mean(axis=0)).ravel()


def _on_viridis(share: float) -> str:
    """A colour that can be read on a cell of the heat map."""
    return "#ffffff" if share < 0.6 else "#111111"
