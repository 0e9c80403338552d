"""Compute distances between two samples of cells, as plain functions ``(n, d), (m, d) -> float``.

``x`` holds the generated cells and ``y`` the real ones (cells in rows, numpy or scipy sparse). Every sum is taken in
float64 and by blocks of cells, so memory is bounded. Knows nothing of files, conditions or protocols: the space of the
cells (counts, log1p, principal components) is the caller's choice, and so are the units. A ValueError is raised where
genes differ in number, a side has too few cells (one for W2 and the biased MMD, else two), or a value is not finite.

Shapes: ``n`` cells of ``x``, ``m`` cells of ``y``, ``d`` genes (or components).
"""

from collections.abc import Sequence

import numpy as np
from scipy import linalg, sparse
from scipy.optimize import linear_sum_assignment

from eval.metrics.blocks import (
    Matrix,
    blocks,
    checked,
    checked_pair,
    dense,
    distance_blocks,
    mean_and_variance,
    product_blocks,
    squared_norms,
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
) -> float:
    """Squared maximum mean discrepancy with Gaussian kernels (Eq. 7).

    ``1/(n(n-1)) sum_{i != j} k(x_i, x_j) + 1/(m(m-1)) sum_{i != j} k(y_i, y_j) - 2/(nm) sum_{ij} k(x_i, y_j)`` with
    ``k(a, b) = sum_sigma exp(-|a - b|^2 / (2 sigma^2))``. The unbiased form may be negative; ``biased`` divides by
    ``n^2`` and ``m^2`` with ``i = j`` included. No unit; one kernel cannot give more than 2.
    Without ``bandwidths``, the sigmas in the units of ``x``, there is one: ``median_bandwidth(y)``.

    Between samples of one distribution the biased form (the V-statistic) is not 0, but about
    ``(1/n + 1/m) (kernels - mean kernel sum of two cells)``.
    Reference: Gretton et al., JMLR 13 (2012), 723-773.
    """
    x, y = checked_pair(x, y, min_cells=1 if biased else 2)
    n, m = x.shape[0], y.shape[0]
    sigmas = [median_bandwidth(y)] if bandwidths is None else [float(sigma) for sigma in bandwidths]
    if not sigmas or not all(np.isfinite(sigma) and sigma > 0 for sigma in sigmas):
        raise ValueError(f"bandwidths={sigmas}: expected one or more positive numbers")
    within_x, within_y = (_kernel_sum_within(cells, sigmas) for cells in (x, y))
    between = sum(_kernel_sum(d2, sigmas) for _, _, d2 in distance_blocks(x, y))
    if biased:  # the diagonal: k(x_i, x_i) = 1 for every kernel
        return float((within_x + n * len(sigmas)) / n**2 + (within_y + m * len(sigmas)) / m**2 - 2 * between / (n * m))
    return float(within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * between / (n * m))


def median_bandwidth(y: Matrix) -> float:
    """Kernel width by the median rule: ``sigma^2 = median_{i<j} |y_i - y_j|^2 / 2``, in the units of ``y``.

    Where more than half of the pairs are identical the mean takes the median's place, and where all are, sigma is 1.
    Above 5,000 cells the pairs are those of 5,000 evenly spaced ones.
    """
    y = checked(y, "y", min_cells=2)
    if y.shape[0] > MEDIAN_CELLS:
        y = y[np.linspace(0, y.shape[0] - 1, MEDIAN_CELLS).astype(np.int64)]
    pairs = []
    for rows, columns, d2 in distance_blocks(y, y, upper=True):
        pairs.append(d2[np.triu_indices_from(d2, k=1)] if rows == columns else d2.ravel())
    typical = float(np.median(np.concatenate(pairs))) or float(np.mean(np.concatenate(pairs)))
    return float(np.sqrt(typical / 2)) if typical > 0 else 1.0


def w2(x: Matrix, y: Matrix) -> float:
    """2-Wasserstein distance between the two empirical distributions (Eq. 8), its square root taken.

    ``W2^2 = 1/n min_pi sum_i |x_i - y_pi(i)|^2``: an exact matching for equal sizes, else the exact transport plan with
    uniform weights (POT's network simplex). Units of ``x``. It falls as n grows and is not zero between two samples of
    one distribution: compare it only at equal n, and with the floor. The (n, m) cost matrix is held in memory.
    Reference: Peyre and Cuturi, Computational Optimal Transport (2019), section 2.

    Raises:
        RuntimeError: the network simplex did not converge.
    """
    x, y = checked_pair(x, y, min_cells=1)
    n, m = x.shape[0], y.shape[0]
    cost = np.empty((n, m))
    for rows, columns, d2 in distance_blocks(x, y):
        cost[rows, columns] = d2
    if n == m:
        matched = linear_sum_assignment(cost)
        return float(np.sqrt(cost[matched].mean()))
    import ot  # imports torch and more: seconds

    value, log = ot.emd2([], [], cost, numItermax=EMD_ITERATIONS, log=True)
    if log["warning"] is not None:
        raise RuntimeError(f"exact transport of {n} to {m} cells did not converge: {log['warning']}")
    return float(np.sqrt(max(float(value), 0.0)))


def w2_gaussian(x: Matrix, y: Matrix) -> float:
    """2-Wasserstein distance between Gaussians with the two samples' moments (Eq. 9), its square root taken.

    ``W2^2 = |mu_x - mu_y|^2 + tr(S_x) + tr(S_y) - 2 |A B^T|_*`` where ``A`` and ``B`` are the centred cells over
    ``sqrt(n - 1)`` and ``sqrt(m - 1)``: the nuclear norm equals ``tr((S_x^1/2 S_y S_x^1/2)^1/2)``, so no d x d matrix
    is built unless d is the smaller side. Units of ``x``; sees means and covariances only.
    Reference: Dowson and Landau, J. Multivariate Analysis 12 (1982), 450-455.
    """
    x, y = checked_pair(x, y, min_cells=2)
    mean_x, variance_x = mean_and_variance(x)
    mean_y, variance_y = mean_and_variance(y)
    (a, a_mean), (b, b_mean) = _short_side(x, mean_x), _short_side(y, mean_y)
    cross = np.empty((a.shape[0], b.shape[0]))
    for rows, columns, products in product_blocks(a, b):
        cross[rows, columns] = products
    # (a - 1 a_mean^T)(b - 1 b_mean^T)^T, without a dense copy of either side
    cross -= np.asarray(a @ b_mean).reshape(-1, 1)
    cross -= np.asarray(b @ a_mean).reshape(1, -1)
    cross += a_mean @ b_mean
    nuclear = _nuclear_norm(cross) / np.sqrt((x.shape[0] - 1) * (y.shape[0] - 1))
    squared = ((mean_x - mean_y) ** 2).sum() + variance_x.sum() + variance_y.sum() - 2 * nuclear
    return float(np.sqrt(max(squared, 0.0)))


def nearest_neighbour_accuracy(x: Matrix, y: Matrix) -> tuple[float, float]:
    """Leave-one-out accuracy of a 1-nearest-neighbour classifier that tells ``x`` from ``y``: over all cells, on ``y``.

    0.5 is ideal (at equal sizes); above, the two are told apart; below, ``x`` lies closer to ``y`` than ``y`` to itself
    (copies). Where one sample is less spread than the other, all nearest neighbours may be of one side: the accuracy is
    then near 1 on one side, near 0 on the other, and a misleading 0.5 over both. Cells at equal smallest distance share
    the vote. No unit.
    References: Lopez-Paz and Oquab, ICLR 2017 (arXiv:1610.06545); Xu et al. (arXiv:1806.07755), section 2.
    """
    x, y = checked_pair(x, y, min_cells=2)
    if sparse.issparse(x) and sparse.issparse(y):
        cells = sparse.vstack([x, y], format="csr")
    else:
        cells = np.concatenate([dense(side, slice(None)) for side in (x, y)])
    is_x = np.arange(cells.shape[0]) < x.shape[0]
    norms = squared_norms(cells)
    own_side = np.empty(cells.shape[0])
    for rows in blocks(cells.shape[0]):
        d2 = np.concatenate([block for _, _, block in distance_blocks(cells[rows], cells)], axis=1)
        d2[np.arange(d2.shape[0]), np.arange(rows.start, rows.stop)] = np.inf
        nearest = d2 <= d2.min(axis=1, keepdims=True) + TIE_TOLERANCE * (1 + norms[rows, None])
        own_side[rows] = (nearest & (is_x[rows, None] == is_x[None, :])).sum(axis=1) / nearest.sum(axis=1)
    of_x, of_y, n, m = own_side[is_x].mean(), own_side[~is_x].mean(), x.shape[0], y.shape[0]
    return float((of_x * n + of_y * m) / (n + m)), float(of_y)


def nearest_distance_ratio(x: Matrix, y: Matrix, train: Matrix) -> float:
    """Mean distance of ``x`` to its nearest cell of ``train``, over that of as many real cells ``y``.

    Far below 1, cells of ``train`` are copied; above 1, the cells lie where no real ones do.
    """
    means = []
    for cells in checked_pair(x, y, min_cells=1):
        nearest = np.full(cells.shape[0], np.inf)
        for rows, _, d2 in distance_blocks(cells, train):
            nearest[rows] = np.minimum(nearest[rows], d2.min(axis=1))
        means.append(np.sqrt(nearest).mean())
    return float(means[0] / means[1]) if means[1] > 0 else float("nan")


def _nuclear_norm(matrix: np.ndarray) -> float:
    """Sum of the singular values; ``matrix`` may be overwritten.

    A large matrix is squared first, and its eigenvalues taken: faster, but an eigenvalue is known to
    ``e = EIGENVALUE_ERROR lambda_max`` only, a singular value to ``e / max(sigma, sqrt(e))``. Where these add up to
    more than 1e-8 of the sum (cells that repeat, say), the singular values themselves are computed after all.
    """
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    if matrix.shape[0] >= SQUARED_FROM:
        eigenvalues = linalg.eigvalsh(matrix @ matrix.T, overwrite_a=True, check_finite=False)
        error = EIGENVALUE_ERROR * eigenvalues[-1]
        values = np.sqrt(np.maximum(eigenvalues, error))
        if (error / values).sum() <= SQUARED_TOLERANCE * values.sum():
            return float(np.sqrt(np.maximum(eigenvalues, 0)).sum())
    return float(linalg.svdvals(matrix, overwrite_a=True, check_finite=False).sum())


def _kernel_sum(d2: np.ndarray, sigmas: Sequence[float]) -> float:
    """Sum of all kernels over all pairs of a block of squared distances."""
    return float(sum(np.exp(d2 / (-2 * sigma**2)).sum() for sigma in sigmas))


def _kernel_sum_within(x: Matrix, sigmas: Sequence[float]) -> float:
    """``sum_{i != j} k(x_i, x_j)``."""
    total = 0.0
    for rows, columns, d2 in distance_blocks(x, x, upper=True):
        if rows == columns:
            np.fill_diagonal(d2, np.inf)  # exp(-inf) = 0: a cell is not its own partner
            total += _kernel_sum(d2, sigmas)
        else:
            total += 2 * _kernel_sum(d2, sigmas)
    return total


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
