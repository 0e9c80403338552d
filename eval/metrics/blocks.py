"""Check matrices of cells; compute moments, and products and squared distances of all pairs, in bounded memory.

What the metrics are computed from. Every sum and product is taken in float64.

Shapes: ``n`` cells of ``x``, ``m`` cells of ``y``, ``d`` genes (or components).
"""

from collections.abc import Iterator

import numpy as np
from scipy import sparse

Matrix = np.ndarray | sparse.csr_matrix | sparse.csr_array

BLOCK_CELLS = 1024
LOUD_SHARE = 0.1  # a gene on in more of the cells is multiplied faster as a dense column than as a sparse one


def checked(x: Matrix, name: str, *, min_cells: int) -> Matrix:
    """Return ``x`` as a 2-D array, or as a CSR matrix with one value per place; refuse what no metric is defined for.

    Raises:
        ValueError: not (cells, genes), fewer cells than ``min_cells``, or values that are not finite.
    """
    x = x.tocsr() if sparse.issparse(x) else np.asarray(x)
    if sparse.issparse(x) and not x.has_canonical_format:
        x = x.copy()
        x.sum_duplicates()
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"{name} has shape {x.shape}: expected (cells, genes) with one gene or more")
    if x.shape[0] < min_cells:
        raise ValueError(f"{name} has {x.shape[0]} cells: expected {min_cells} or more")
    values = x.data if sparse.issparse(x) else x
    if not np.isfinite(values).all():
        raise ValueError(f"{name} has {int((~np.isfinite(values)).sum()):,} values that are NaN or infinite")
    return x


def checked_pair(x: Matrix, y: Matrix, *, min_cells: int, names: tuple[str, str] = ("x", "y")) -> tuple[Matrix, Matrix]:
    """Check both sides, and that they have the same number of genes; a ValueError says what is wrong."""
    x, y = checked(x, names[0], min_cells=min_cells), checked(y, names[1], min_cells=min_cells)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"{names[0]} has {x.shape[1]} genes and {names[1]} has {y.shape[1]}: expected the same genes")
    return x, y


def blocks(n: int, *, at_least: int = 0) -> list[slice]:
    """Slices that cover ``n`` rows, each of ``BLOCK_CELLS`` rows (of ``at_least``, if that is more) but the last."""
    size = max(BLOCK_CELLS, at_least)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def dense(x: Matrix, rows: slice) -> np.ndarray:
    """Some rows of ``x`` as a dense float64 array."""
    block = x[rows]
    return (block.toarray() if sparse.issparse(block) else block).astype(np.float64, copy=False)


def column_means(x: Matrix) -> np.ndarray:
    """(d,) means of the columns."""
    return np.asarray(x.sum(axis=0, dtype=np.float64)).ravel() / x.shape[0]


def mean_and_variance(x: Matrix) -> tuple[np.ndarray, np.ndarray]:
    """(d,) means and (d,) variances (n - 1 in the denominator) of the genes; a constant gene has variance exactly 0."""
    x = checked(x, "x", min_cells=2)
    mean = column_means(x)
    squares = sum(_squares_around(x[rows], mean) for rows in blocks(x.shape[0]))
    largest, smallest = x.max(axis=0), x.min(axis=0)
    if sparse.issparse(x):
        largest, smallest = largest.toarray().ravel(), smallest.toarray().ravel()
    return mean, np.where(largest == smallest, 0.0, squares / (x.shape[0] - 1))


def nonzero_shares(x: Matrix) -> np.ndarray:
    """(d,) share of the cells in which each gene is not zero."""
    nonzero = x.count_nonzero(axis=0) if sparse.issparse(x) else np.count_nonzero(x, axis=0)
    return np.asarray(nonzero, dtype=np.float64) / x.shape[0]


def squared_norms(x: Matrix) -> np.ndarray:
    """(n,) squared lengths of the rows."""
    if sparse.issparse(x):
        values = x.astype(np.float64)
        return np.asarray(values.multiply(values).sum(axis=1)).ravel()
    return np.concatenate([(dense(x, rows) ** 2).sum(axis=1) for rows in blocks(x.shape[0])])


def distance_blocks(x: Matrix, y: Matrix, *, upper: bool = False) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Yield (rows, columns, squared distances) for blocks of pairs; ``upper`` skips the blocks below the diagonal."""
    norms_x, norms_y = squared_norms(x), squared_norms(y)
    for rows, columns, d2 in product_blocks(x, y, upper=upper):
        d2 *= -2
        d2 += norms_x[rows, None]
        d2 += norms_y[None, columns]
        yield rows, columns, np.maximum(d2, 0, out=d2)


def product_blocks(x: Matrix, y: Matrix, *, upper: bool = False) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Yield (rows, columns, x[rows] y[columns]^T) in float64; ``upper`` skips the blocks below the diagonal.

    A gene that is zero in most cells of two sparse sides is multiplied as a sparse column, any other as a dense one: of
    17,002 genes that are on in a tenth of the cells few are loud, and the product is far faster.
    """
    quiet_x = quiet_y = None
    if sparse.issparse(x) and sparse.issparse(y):
        loud = nonzero_shares(x) * nonzero_shares(y) > LOUD_SHARE**2
        quiet_x, quiet_y = (cells[:, ~loud].astype(np.float64) for cells in (x, y))
        x, y = x[:, loud], y[:, loud]
    for rows in blocks(x.shape[0]):
        block_x = dense(x, rows)
        for columns in blocks(y.shape[0]):
            if upper and columns.start < rows.start:
                continue
            products = block_x @ dense(y, columns).T
            if quiet_x is not None:
                products += (quiet_x[rows] @ quiet_y[columns].T).toarray()
            yield rows, columns, products


def _squares_around(x: Matrix, mean: np.ndarray) -> np.ndarray:
    """(d,) sums of squared deviations from ``mean``; of a sparse matrix without a dense copy."""
    if not sparse.issparse(x):
        return ((x - mean) ** 2).sum(axis=0)
    stored = np.bincount(x.indices, (x.data - mean[x.indices]) ** 2, minlength=mean.size)
    return stored + (x.shape[0] - np.bincount(x.indices, minlength=mean.size)) * mean**2
