"""Compute the spaces that published evaluations compare cells in: log-normalised counts, and their components.

A space that is fitted sees the real test cells alone, so it is the same for every model.

Shapes: ``n`` cells, ``G`` genes, ``d`` components.
"""

from collections.abc import Callable

import numpy as np
from scipy import linalg, sparse

from training.data.variable_genes import FEWEST_GENES, GeneTotals, seurat_v3_variances, top_genes

TARGET_SUM = 1e4
COMPONENTS = 30
VARIABLE_GENES = 2000

Projection = Callable[[sparse.csr_matrix], np.ndarray]


def log_cp10k(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """``log(1 + 10^4 c / sum_g c)`` over the genes given; a cell without counts stays zero."""
    counts = counts.astype(np.float64)
    totals = np.asarray(counts.sum(axis=1)).ravel()
    scale = np.divide(TARGET_SUM, totals, out=np.zeros_like(totals), where=totals > 0)
    return sparse.csr_matrix(sparse.diags_array(scale) @ counts).log1p()


def principal_components(values: sparse.csr_matrix, genes: np.ndarray | None = None) -> Projection:
    """Fit at most 30 principal components; what comes back centres any cells by *these* means and projects them.

    Args:
        values: (n, G) real cells, log-normalised.
        genes: columns to use; None is all.

    Returns:
        A function (m, G) -> (m, d) with ``d = min(30, n - 1, genes)``. Signs are arbitrary, distances are not.
    """
    chosen = np.arange(values.shape[1]) if genes is None else genes
    dense = values[:, chosen].toarray().astype(np.float64)
    mean = dense.mean(axis=0)
    dense -= mean
    number = max(1, min(COMPONENTS, dense.shape[0] - 1, dense.shape[1]))
    directions = _leading_directions(dense, number)

    def project(cells: sparse.csr_matrix) -> np.ndarray:
        return np.asarray(cells[:, chosen] @ directions) - mean @ directions

    return project


def variable_genes(counts: sparse.csr_matrix, number: int = VARIABLE_GENES) -> np.ndarray:
    """Ascending columns of the ``number`` most variable genes by seurat_v3; all of them where there are no more.

    Where too few genes vary for its fit of variance on mean, the genes of largest variance.
    """
    if counts.shape[1] <= number:
        return np.arange(counts.shape[1])
    totals = GeneTotals(counts.shape[1])
    totals.add(counts)
    if (totals.variance > 0).sum() < FEWEST_GENES:
        return top_genes(totals.variance, number)
    return top_genes(seurat_v3_variances(totals, [counts]), number)


def _leading_directions(centred: np.ndarray, number: int) -> np.ndarray:
    """(G, number) eigenvectors of the scatter matrix with the largest eigenvalues, through its smaller Gram matrix."""
    n, width = centred.shape
    if width <= n:
        _, vectors = linalg.eigh(centred.T @ centred, subset_by_index=[width - number, width - 1])
        return vectors[:, ::-1]
    _, vectors = linalg.eigh(centred @ centred.T, subset_by_index=[n - number, n - 1])
    directions = centred.T @ vectors[:, ::-1]
    lengths = np.linalg.norm(directions, axis=0)
    return directions / np.where(lengths > 0, lengths, 1.0)
