"""Compute whether genes behave alike in two samples of cells: correlations and principal components, means, variances,
zeros, library sizes.

As in ``distances``: ``x`` (n, d) holds the generated cells, ``y`` (m, d) the real ones. A ValueError is raised where
their genes differ in number, a side has too few cells (two for a variance or a correlation, else one), or a value is
not finite. No metric here has a unit.
"""

import numpy as np
from scipy import linalg

from eval.metrics.blocks import Matrix, checked_pair, column_means, dense, mean_and_variance, nonzero_shares

# of principal components
BANDS = {"1": slice(0, 1), "2_5": slice(1, 5), "6_10": slice(5, 10), "11_20": slice(10, 20), "21_40": slice(20, 40)}


def correlation_agreement(x: Matrix, y: Matrix, num_genes: int = 100) -> tuple[float, float]:
    """Compute whether genes are correlated in ``x`` as they are in ``y``: (Pearson, slope) over pairs of genes.

    The gene-gene Pearson correlations of the ``num_genes`` most variable genes of ``y`` (fewer if fewer vary) are
    taken on both sides; the upper triangles are compared by their Pearson correlation and by the least-squares slope of
    ``x``'s on ``y``'s: below 1 correlations are too weak. Noise in ``y`` lowers the slope too, so with few cells the
    ideal is not 1 but the floor's. A gene that is constant in ``x`` has correlation 0 with every other.

    Returns:
        (nan, nan) if fewer than three genes vary in ``y`` or if all correlations of ``y`` are equal; the Pearson
        correlation alone is nan where all those of ``x`` are equal.
    """
    x, y = checked_pair(x, y, min_cells=2)
    upper_x, upper_y = correlation_triangles(x, y, num_genes)
    if upper_y.size < 3 or np.ptp(upper_y) == 0:
        return float("nan"), float("nan")
    slope = float(((upper_x - upper_x.mean()) * (upper_y - upper_y.mean())).sum() / (upper_y.var() * upper_y.size))
    return pearson(upper_x, upper_y), slope


def correlation_triangles(x: Matrix, y: Matrix, num_genes: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Upper triangles of both gene-gene correlation matrices over the ``num_genes`` most variable genes of ``y``."""
    genes = most_variable_genes(y, num_genes)
    upper = np.triu_indices(genes.size, k=1)
    return _gene_correlations(x[:, genes])[upper], _gene_correlations(y[:, genes])[upper]


def most_variable_genes(y: Matrix, num_genes: int) -> np.ndarray:
    """Columns of the ``num_genes`` largest variances, largest first; constant genes are never among them."""
    _, variance = mean_and_variance(y)
    order = np.argsort(-variance, kind="stable")[:num_genes]
    return order[variance[order] > 0]


def principal_directions(cells: Matrix, number: int = 40) -> np.ndarray:
    """Return the first principal components (G, d) of cells (n, G), with ``d = min(number, n - 1, G)``."""
    return leading_directions(dense(cells, slice(None)) - column_means(cells), number)


def leading_directions(centred: np.ndarray, number: int) -> np.ndarray:
    """(G, d) eigenvectors of the scatter matrix with the largest eigenvalues, through the smaller Gram matrix."""
    n, width = centred.shape
    number = max(1, min(number, n - 1, width))
    if width <= n:
        _, vectors = linalg.eigh(centred.T @ centred, subset_by_index=[width - number, width - 1])
        return vectors[:, ::-1]
    _, vectors = linalg.eigh(centred @ centred.T, subset_by_index=[n - number, n - 1])
    directions = centred.T @ vectors[:, ::-1]
    lengths = np.linalg.norm(directions, axis=0)
    return directions / np.where(lengths > 0, lengths, 1.0)


def component_variance_ratio(x: Matrix, y: Matrix, directions: np.ndarray, band: slice) -> float:
    """Variance of ``x`` along a band of ``directions`` (G, d), over that of ``y``: 1 is best, nan without the band.

    Below 1, genes vary together less than in real cells: what drawing each gene for itself loses.
    """
    x, y = checked_pair(x, y, min_cells=2)
    along = directions[:, band]
    if not along.shape[1]:
        return float("nan")
    ours, theirs = (np.var(cells @ along, axis=0, ddof=1).sum() for cells in (x, y))
    return float(ours / theirs) if theirs > 0 else float("nan")


def mean_r2(x: Matrix, y: Matrix) -> float:
    """Coefficient of determination of the genes' means: ``1 - sum_g (mu_x - mu_y)^2 / sum_g (mu_y - avg mu_y)^2``.

    1 is ideal, below 0 is worse than a constant. nan if all genes of ``y`` have one mean.
    """
    x, y = checked_pair(x, y, min_cells=1)
    return _r2(column_means(x), column_means(y))


def variance_r2(x: Matrix, y: Matrix) -> float:
    """Coefficient of determination of the genes' variances (n - 1 in the denominator), as ``mean_r2`` of the means."""
    x, y = checked_pair(x, y, min_cells=2)
    return _r2(mean_and_variance(x)[1], mean_and_variance(y)[1])


def zero_fraction_error(x: Matrix, y: Matrix) -> float:
    """Mean over genes of ``|share of cells at zero in x - share of cells at zero in y|``; 0 is ideal."""
    x, y = checked_pair(x, y, min_cells=1)
    return float(np.abs(zero_fractions(x) - zero_fractions(y)).mean())


def zero_fractions(x: Matrix) -> np.ndarray:
    """(d,) share of the cells in which each gene is zero."""
    return 1.0 - nonzero_shares(x)


def library_size_cv_ratio(x: Matrix, y: Matrix) -> float:
    """Coefficient of variation of the library size in ``x`` over that in ``y`` (give counts); 1 is ideal.

    The library size is a cell's sum over genes, its coefficient of variation the standard deviation over the mean.
    nan if either side has no counts at all or if all library sizes of ``y`` are equal.
    """
    x, y = checked_pair(x, y, min_cells=2)
    cv = []
    for cells in (x, y):
        sizes = np.asarray(cells.sum(axis=1, dtype=np.float64)).ravel()
        cv.append(sizes.std(ddof=1) / sizes.mean() if sizes.mean() > 0 else float("nan"))
    return float(cv[0] / cv[1]) if cv[1] > 0 else float("nan")


def pearson_delta(x: Matrix, y: Matrix, control: Matrix, y_control: Matrix | None = None) -> float:
    """Pearson correlation over genes of the mean shifts: ``corr(mu_x - mu_control, mu_y - mu_control)``.

    1 is ideal; nan if either shift is the same for every gene. Give log-normalised cells to compare with others. The
    noise of control cells that both shifts start from is taken for agreement; with ``y_control`` each has its own.
    Reference: Roohani, Huang and Leskovec, Nature Biotechnology 42 (2024), 927-935 (GEARS).
    """
    x, y = checked_pair(x, y, min_cells=1)
    shifts = []
    for cells, origin in ((x, control), (y, control if y_control is None else y_control)):
        cells, origin = checked_pair(cells, origin, min_cells=1, names=("cells", "control"))
        shifts.append(column_means(cells) - column_means(origin))
    return pearson(*shifts)


def _gene_correlations(x: Matrix) -> np.ndarray:
    """(d, d) Pearson correlations of the columns, 0 beside a constant column."""
    centred = dense(x, slice(None))
    varies = centred.max(axis=0) > centred.min(axis=0)
    centred = centred - centred.mean(axis=0)
    length = np.sqrt((centred**2).sum(axis=0))
    unit = np.where(varies, centred / np.where(varies, length, 1.0), 0.0)
    return np.clip(unit.T @ unit, -1.0, 1.0)


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation of two vectors; nan if either is constant."""
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / scale) if scale > 0 else float("nan")


def _r2(predicted: np.ndarray, true: np.ndarray) -> float:
    """Coefficient of determination; nan if ``true`` is constant."""
    total = ((true - true.mean()) ** 2).sum()
    return float(1 - ((predicted - true) ** 2).sum() / total) if total > 0 else float("nan")
