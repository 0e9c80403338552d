"""Compute what a generator without gene modules loses first, the variance along principal components, and copying.

Shapes: n cells, G genes, d components.
"""

import numpy as np
from scipy import linalg

from eval.metrics.blocks import Matrix, checked_pair, column_means, dense, distance_blocks

BANDS = {"1": slice(0, 1), "2_5": slice(1, 5), "6_10": slice(5, 10), "11_20": slice(10, 20), "21_40": slice(20, 40)}


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


def nearest_distance_ratio(x: Matrix, y: Matrix, train: Matrix, *, device: str | None = None) -> float:
    """Mean distance of ``x`` to its nearest cell of ``train``, over that of as many real cells ``y``.

    Far below 1, cells of ``train`` are copied; above 1, the cells lie where no real ones do.
    """
    means = []
    for cells in checked_pair(x, y, min_cells=1):
        nearest = np.full(cells.shape[0], np.inf)
        for rows, _, d2 in distance_blocks(cells, train, device=device):
            nearest[rows] = np.minimum(nearest[rows], d2.min(axis=1))
        means.append(np.sqrt(nearest).mean())
    return float(means[0] / means[1]) if means[1] > 0 else float("nan")
