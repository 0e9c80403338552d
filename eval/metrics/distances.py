"""Distances between two samples of cells, as plain functions ``(n, d), (m, d) -> float``.

By convention ``x`` holds the generated cells and ``y`` the real ones (cells in rows, numpy or scipy sparse); every sum
is taken in float64 and by blocks of cells, so memory is bounded. ``device`` ("cuda", "cuda:1", ...) moves the matrix
products and decompositions there, still in float64; None is the CPU. Knows nothing of files, AnnData, conditions or
protocols: which space the cells are in (counts, log1p, principal components) is the caller's choice, and so are the
units.

Shapes: ``n`` cells of ``x``, ``m`` cells of ``y``, ``d`` genes (or components).
"""

from collections.abc import Sequence

import numpy as np
import ot
import torch
from scipy import linalg, sparse
from scipy.optimize import linear_sum_assignment

from eval.metrics.blocks import (
    Matrix,
    blocks,
    checked,
    checked_pair,
    dense,
    distance_blocks,
    nonzero_shares,
    product_blocks,
    squared_norms,
    stacked,
)

MEDIAN_CELLS = 5000
EMD_ITERATIONS = 50_000_000
TIE_TOLERANCE = 1e-10
SQUARED_FROM = 1000
EIGENVALUE_ERROR = 1e-15
SQUARED_TOLERANCE = 1e-8


def mmd2(
    x: Matrix,
    y: Matrix,
    *,
    bandwidths: Sequence[float] | None = None,
    biased: bool = False,
    device: str | None = None,
) -> float:
    """Squared maximum mean discrepancy with Gaussian kernels (Eq. 7).

    ``1/(n(n-1)) sum_{i != j} k(x_i, x_j) + 1/(m(m-1)) sum_{i != j} k(y_i, y_j) - 2/(nm) sum_{ij} k(x_i, y_j)`` with
    ``k(a, b) = sum_sigma exp(-|a - b|^2 / (2 sigma^2))``. The unbiased form may be negative; ``biased`` divides by
    ``n^2`` and ``m^2`` with ``i = j`` included. No unit; one kernel cannot give more than 2.
    Reference: Gretton et al., JMLR 13 (2012), 723-773.

    Args:
        x: (n, d) generated cells.
        y: (m, d) real cells.
        bandwidths: the sigmas, in the units of ``x``; their kernels are summed. None is ``[median_bandwidth(y)]``.
        biased: the V-statistic instead of the U-statistic; between samples of one law it is about
            ``(1/n + 1/m) (kernels - mean kernel sum of two cells)``, not 0.
        device: where to multiply.

    Raises:
        ValueError: different numbers of genes, values that are not finite, a bandwidth that is not positive, or fewer
            than two cells a side (unbiased).
    """
    x, y = checked_pair(x, y, min_cells=1 if biased else 2)
    n, m = x.shape[0], y.shape[0]
    if bandwidths is None and 2 <= m <= MEDIAN_CELLS:  # the median has seen every pair of y: no need to multiply again
        pairs = _pair_distances(y, device)
        sigmas = [_median_sigma(pairs)]
        within_y = 2 * _kernel_sum(pairs, sigmas)
    else:
        sigmas = [median_bandwidth(y, device=device)] if bandwidths is None else [float(sigma) for sigma in bandwidths]
        if not sigmas or not all(np.isfinite(sigma) and sigma > 0 for sigma in sigmas):
            raise ValueError(f"bandwidths={sigmas}: expected one or more positive numbers")
        within_y = _kernel_sum_within(y, sigmas, device)
    within_x = _kernel_sum_within(x, sigmas, device)
    between = sum(_kernel_sum(d2, sigmas) for _, _, d2 in distance_blocks(x, y, device=device))
    if biased:  # the diagonal: k(x_i, x_i) = 1 for every kernel
        return float((within_x + n * len(sigmas)) / n**2 + (within_y + m * len(sigmas)) / m**2 - 2 * between / (n * m))
    return float(within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * between / (n * m))


def median_bandwidth(y: Matrix, *, device: str | None = None) -> float:
    """Kernel width by the median rule: ``sigma^2 = median_{i<j} |y_i - y_j|^2 / 2``, in the units of ``y``.

    Where more than half of the pairs are identical the mean takes the median's place, and where all are, sigma is 1.
    Above 5,000 cells the pairs are those of 5,000 evenly spaced ones.

    Raises:
        ValueError: fewer than two cells, or values that are not finite.
    """
    y = checked(y, "y", min_cells=2)
    if y.shape[0] > MEDIAN_CELLS:
        y = y[np.linspace(0, y.shape[0] - 1, MEDIAN_CELLS).astype(np.int64)]
    return _median_sigma(_pair_distances(y, device))


def w2(x: Matrix, y: Matrix, *, device: str | None = None) -> float:
    """2-Wasserstein distance between the two empirical distributions (Eq. 8), its square root taken.

    ``W2^2 = 1/n min_pi sum_i |x_i - y_pi(i)|^2``: an exact matching for equal sizes, else the exact transport plan with
    uniform weights (POT's network simplex). Units of ``x``. It falls as n grows and is not zero between two samples of
    one law: compare it only at equal n, and with the floor. The (n, m) cost matrix is held in memory.
    Reference: Peyre and Cuturi, Computational Optimal Transport (2019), section 2.

    Raises:
        ValueError: different numbers of genes, no cells, or values that are not finite.
        RuntimeError: the network simplex did not converge.
    """
    x, y = checked_pair(x, y, min_cells=1)
    n, m = x.shape[0], y.shape[0]
    cost = np.empty((n, m))
    for rows, columns, d2 in distance_blocks(x, y, device=device):
        cost[rows, columns] = d2
    if n == m:
        matched = linear_sum_assignment(cost)
        return float(np.sqrt(cost[matched].mean()))
    value, log = ot.emd2([], [], cost, numItermax=EMD_ITERATIONS, log=True)
    if log["warning"] is not None:
        raise RuntimeError(f"exact transport of {n} to {m} cells did not converge: {log['warning']}")
    return float(np.sqrt(max(float(value), 0.0)))


def w2_gaussian(x: Matrix, y: Matrix, *, device: str | None = None) -> float:
    """2-Wasserstein distance between Gaussians with the two samples' moments (Eq. 9), its square root taken.

    ``W2^2 = |mu_x - mu_y|^2 + tr(S_x) + tr(S_y) - 2 |A B^T|_*`` where ``A`` and ``B`` are the centred cells over
    ``sqrt(n - 1)`` and ``sqrt(m - 1)``: the nuclear norm equals ``tr((S_x^1/2 S_y S_x^1/2)^1/2)``, so no d x d matrix
    is built unless d is the smaller side. Units of ``x``; sees means and covariances only.
    Reference: Dowson and Landau, J. Multivariate Analysis 12 (1982), 450-455.

    Raises:
        ValueError: different numbers of genes, fewer than two cells a side, or values that are not finite.
    """
    x, y = checked_pair(x, y, min_cells=2)
    mean_x, variance_x = mean_and_variance(x)
    mean_y, variance_y = mean_and_variance(y)
    (a, a_mean), (b, b_mean) = _short_side(x, mean_x), _short_side(y, mean_y)
    cross = np.empty((a.shape[0], b.shape[0]))
    for rows, columns, products in product_blocks(a, b, device=device):
        cross[rows, columns] = products
    # (a - 1 a_mean^T)(b - 1 b_mean^T)^T, without a dense copy of either side
    cross -= np.asarray(a @ b_mean).reshape(-1, 1)
    cross -= np.asarray(b @ a_mean).reshape(1, -1)
    cross += a_mean @ b_mean
    nuclear = _nuclear_norm(cross, device) / np.sqrt((x.shape[0] - 1) * (y.shape[0] - 1))
    squared = ((mean_x - mean_y) ** 2).sum() + variance_x.sum() + variance_y.sum() - 2 * nuclear
    return float(np.sqrt(max(squared, 0.0)))


def correlation_agreement(x: Matrix, y: Matrix, num_genes: int = 100) -> tuple[float, float]:
    """Whether genes are correlated in ``x`` as they are in ``y``: (Pearson, slope) over pairs of genes.

    The gene-gene Pearson correlations of the ``num_genes`` most variable genes of ``y`` (fewer if fewer vary) are
    taken on both sides; the upper triangles are compared by their Pearson correlation and by the least-squares slope of
    ``x``'s on ``y``'s: below 1 correlations are too weak. Noise in ``y`` lowers the slope too, so with few cells the
    ideal is not 1 but the floor's. A gene that is constant in ``x`` has correlation 0 with every other. No unit.

    Returns:
        (nan, nan) if fewer than three genes vary in ``y`` or if all correlations of ``y`` are equal; the Pearson
        correlation alone is nan where all those of ``x`` are equal.

    Raises:
        ValueError: different numbers of genes, fewer than two cells a side, or values that are not finite.
    """
    x, y = checked_pair(x, y, min_cells=2)
    upper_x, upper_y = correlation_triangles(x, y, num_genes)
    if upper_y.size < 3 or np.ptp(upper_y) == 0:
        return float("nan"), float("nan")
    slope = float(((upper_x - upper_x.mean()) * (upper_y - upper_y.mean())).sum() / (upper_y.var() * upper_y.size))
    return _pearson(upper_x, upper_y), slope


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


def mean_r2(x: Matrix, y: Matrix) -> float:
    """Coefficient of determination of the genes' means: ``1 - sum_g (mu_x - mu_y)^2 / sum_g (mu_y - avg mu_y)^2``.

    No unit; 1 is ideal, below 0 is worse than a constant. nan if all genes of ``y`` have one mean.

    Raises:
        ValueError: different numbers of genes, no cells, or values that are not finite.
    """
    x, y = checked_pair(x, y, min_cells=1)
    return _r2(_column_means(x), _column_means(y))


def variance_r2(x: Matrix, y: Matrix) -> float:
    """Coefficient of determination of the genes' variances (n - 1 in the denominator), as ``mean_r2`` of the means.

    Raises:
        ValueError: different numbers of genes, fewer than two cells a side, or values that are not finite.
    """
    x, y = checked_pair(x, y, min_cells=2)
    return _r2(mean_and_variance(x)[1], mean_and_variance(y)[1])


def zero_fraction_error(x: Matrix, y: Matrix) -> float:
    """Mean over genes of ``|share of cells at zero in x - share of cells at zero in y|``; 0 is ideal, no unit.

    Raises:
        ValueError: different numbers of genes, no cells, or values that are not finite.
    """
    x, y = checked_pair(x, y, min_cells=1)
    return float(np.abs(zero_fractions(x) - zero_fractions(y)).mean())


def zero_fractions(x: Matrix) -> np.ndarray:
    """(d,) share of the cells in which each gene is zero."""
    return 1.0 - nonzero_shares(x)


def library_size_cv_ratio(x: Matrix, y: Matrix) -> float:
    """Coefficient of variation of the library size in ``x`` over that in ``y`` (give counts); 1 is ideal, no unit.

    The library size is a cell's sum over genes, its coefficient of variation the standard deviation over the mean.
    nan if either side has no counts at all or if all library sizes of ``y`` are equal.

    Raises:
        ValueError: different numbers of genes, fewer than two cells a side, or values that are not finite.
    """
    x, y = checked_pair(x, y, min_cells=2)
    cv = []
    for cells in (x, y):
        sizes = np.asarray(cells.sum(axis=1, dtype=np.float64)).ravel()
        cv.append(sizes.std(ddof=1) / sizes.mean() if sizes.mean() > 0 else float("nan"))
    return float(cv[0] / cv[1]) if cv[1] > 0 else float("nan")


def nearest_neighbour_accuracy(x: Matrix, y: Matrix, *, device: str | None = None) -> float:
    """Leave-one-out accuracy of a 1-nearest-neighbour classifier that tells ``x`` from ``y``.

    0.5 is ideal (at equal sizes); above, the two are told apart; below, ``x`` lies closer to ``y`` than ``y`` to itself
    (copies). The two sides can cancel, so read it beside ``nearest_neighbour_accuracies``. No unit.
    Reference: Lopez-Paz and Oquab, ICLR 2017 (arXiv:1610.06545).

    Raises:
        ValueError: different numbers of genes, fewer than two cells a side, or values that are not finite.
    """
    of_x, of_y = nearest_neighbour_accuracies(x, y, device=device)
    return (of_x * x.shape[0] + of_y * y.shape[0]) / (x.shape[0] + y.shape[0])


def nearest_neighbour_accuracies(x: Matrix, y: Matrix, *, device: str | None = None) -> tuple[float, float]:
    """Share of the cells of ``x``, and of ``y``, whose nearest other cell is of their own side; 0.5 is ideal for both.

    Where one sample is less spread than the other, all nearest neighbours may be of one side: the shares are then near
    0 and 1, and their mean a misleading 0.5. Cells at equal smallest distance share the vote. No unit.
    Reference: Xu et al., An empirical study on evaluation metrics of GANs (arXiv:1806.07755), section 2.

    Raises:
        ValueError: different numbers of genes, fewer than two cells a side, or values that are not finite.
    """
    x, y = checked_pair(x, y, min_cells=2)
    cells = sparse.vstack([x, y], format="csr") if sparse.issparse(x) and sparse.issparse(y) else stacked(x, y)
    is_x = np.arange(cells.shape[0]) < x.shape[0]
    norms = squared_norms(cells)
    own_side = np.empty(cells.shape[0])
    for rows in blocks(cells.shape[0]):
        d2 = np.concatenate([block for _, _, block in distance_blocks(cells[rows], cells, device=device)], axis=1)
        d2[np.arange(d2.shape[0]), np.arange(rows.start, rows.stop)] = np.inf
        nearest = d2 <= d2.min(axis=1, keepdims=True) + TIE_TOLERANCE * (1 + norms[rows, None])
        own_side[rows] = (nearest & (is_x[rows, None] == is_x[None, :])).sum(axis=1) / nearest.sum(axis=1)
    return float(own_side[is_x].mean()), float(own_side[~is_x].mean())


def pearson_delta(x: Matrix, y: Matrix, control: Matrix) -> float:
    """Pearson correlation over genes of the mean shifts: ``corr(mu_x - mu_control, mu_y - mu_control)``.

    1 is ideal; nan if either shift is the same for every gene. No unit. Give log-normalised cells to compare with
    others. Reference: Roohani, Huang and Leskovec, Nature Biotechnology 42 (2024), 927-935 (GEARS).

    Raises:
        ValueError: different numbers of genes, no cells, or values that are not finite.
    """
    x, y = checked_pair(x, y, min_cells=1)
    _, control = checked_pair(y, control, min_cells=1, names=("y", "control"))
    at_control = _column_means(control)
    return _pearson(_column_means(x) - at_control, _column_means(y) - at_control)


def mean_and_variance(x: Matrix) -> tuple[np.ndarray, np.ndarray]:
    """(d,) means and (d,) variances (n - 1 in the denominator) of the genes; a constant gene has variance exactly 0.

    Raises:
        ValueError: fewer than two cells, or values that are not finite.
    """
    x = checked(x, "x", min_cells=2)
    mean = _column_means(x)
    squares = sum(_squares_around(x[rows], mean) for rows in blocks(x.shape[0]))
    largest, smallest = x.max(axis=0), x.min(axis=0)
    if sparse.issparse(x):
        largest, smallest = largest.toarray().ravel(), smallest.toarray().ravel()
    return mean, np.where(largest == smallest, 0.0, squares / (x.shape[0] - 1))


def _nuclear_norm(matrix: np.ndarray, device: str | None) -> float:
    """Sum of the singular values, computed on ``device``; ``matrix`` may be overwritten.

    A large matrix is squared first, and its eigenvalues taken: faster, but an eigenvalue is known to
    ``e = EIGENVALUE_ERROR lambda_max`` only, a singular value to ``e / max(sigma, sqrt(e))``. Where these add up to
    more than 1e-8 of the sum (cells that repeat, say), the singular values themselves are computed after all.
    """
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    if device is not None:
        return float(torch.linalg.svdvals(torch.from_numpy(np.ascontiguousarray(matrix)).to(device)).sum())
    if matrix.shape[0] >= SQUARED_FROM:
        eigenvalues = linalg.eigvalsh(matrix @ matrix.T, overwrite_a=True, check_finite=False)
        error = EIGENVALUE_ERROR * eigenvalues[-1]
        values = np.sqrt(np.maximum(eigenvalues, error))
        if (error / values).sum() <= SQUARED_TOLERANCE * values.sum():
            return float(np.sqrt(np.maximum(eigenvalues, 0)).sum())
    return float(linalg.svdvals(matrix, overwrite_a=True, check_finite=False).sum())


def _pair_distances(y: Matrix, device: str | None) -> np.ndarray:
    """(m (m-1) / 2,) squared distances of all pairs of cells, each pair once."""
    pairs = []
    for rows, columns, d2 in distance_blocks(y, y, upper=True, device=device):
        pairs.append(d2[np.triu_indices_from(d2, k=1)] if rows == columns else d2.ravel())
    return np.concatenate(pairs)


def _median_sigma(pairs: np.ndarray) -> float:
    """The median rule for a kernel's width, as ``median_bandwidth`` says it."""
    typical = float(np.median(pairs))
    if typical == 0:
        typical = float(pairs.mean())
    return float(np.sqrt(typical / 2)) if typical > 0 else 1.0


def _kernel_sum(d2: np.ndarray, sigmas: Sequence[float]) -> float:
    """Sum of all kernels over all pairs of a block of squared distances."""
    return float(sum(np.exp(d2 / (-2 * sigma**2)).sum() for sigma in sigmas))


def _kernel_sum_within(x: Matrix, sigmas: Sequence[float], device: str | None) -> float:
    """``sum_{i != j} k(x_i, x_j)``."""
    total = 0.0
    for rows, columns, d2 in distance_blocks(x, x, upper=True, device=device):
        if rows == columns:
            np.fill_diagonal(d2, np.inf)  # exp(-inf) = 0: a cell is not its own partner
            total += _kernel_sum(d2, sigmas)
        else:
            total += 2 * _kernel_sum(d2, sigmas)
    return total


def _column_means(x: Matrix) -> np.ndarray:
    """(d,) means of the columns."""
    return np.asarray(x.sum(axis=0, dtype=np.float64)).ravel() / x.shape[0]


def _squares_around(x: Matrix, mean: np.ndarray) -> np.ndarray:
    """(d,) sums of squared deviations from ``mean``; of a sparse matrix without a dense copy."""
    if not sparse.issparse(x):
        return ((x - mean) ** 2).sum(axis=0)
    stored = np.bincount(x.indices, (x.data - mean[x.indices]) ** 2, minlength=mean.size)
    return stored + (x.shape[0] - np.bincount(x.indices, minlength=mean.size)) * mean**2


def _short_side(x: Matrix, mean: np.ndarray) -> tuple[Matrix, np.ndarray]:
    """Return ``(a, shift)`` with ``(a - shift)^T (a - shift)`` equal to the scatter matrix of ``x`` and at most d rows.

    Where ``x`` has no more rows than columns: itself when sparse, itself centred when dense. Else the R of its centred
    QR decomposition, block by block.
    """
    n, d = x.shape
    if n <= d:
        return (x, mean) if sparse.issparse(x) else (dense(x, slice(None)) - mean, np.zeros(d))
    r = np.empty((0, d))
    for rows in blocks(n, at_least=2 * d):  # short blocks would factorise r again and again
        (r,) = linalg.qr(np.concatenate([r, dense(x, rows) - mean]), mode="r", overwrite_a=True)
        r = r[:d]
    return r, np.zeros(d)


def _gene_correlations(x: Matrix) -> np.ndarray:
    """(d, d) Pearson correlations of the columns, 0 beside a constant column."""
    centred = dense(x, slice(None))
    varies = centred.max(axis=0) > centred.min(axis=0)
    centred = centred - centred.mean(axis=0)
    length = np.sqrt((centred**2).sum(axis=0))
    unit = np.where(varies, centred / np.where(varies, length, 1.0), 0.0)
    return np.clip(unit.T @ unit, -1.0, 1.0)


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation of two vectors; nan if either is constant."""
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / scale) if scale > 0 else float("nan")


def _r2(predicted: np.ndarray, true: np.ndarray) -> float:
    """Coefficient of determination; nan if ``true`` is constant."""
    total = ((true - true.mean()) ** 2).sum()
    return float(1 - ((predicted - true) ** 2).sum() / total) if total > 0 else float("nan")
