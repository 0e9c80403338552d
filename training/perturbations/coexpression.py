"""Vectors of genes from the cells themselves: each gene's loadings on what varies together among training controls.

Needs no language model and no protein, but a gene of the panel that the controls express. Looks at training cells
only. Letters: N control cells, G genes, S cell types, C components.
"""

import logging

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import LinearOperator, svds

from training.data.loader import Cells

logger = logging.getLogger(__name__)

TARGET_SUM = 1e4


def coexpression_vectors(cells: Cells, num_components: int) -> dict[str, np.ndarray]:
    """Compute a vector (C,) float32 for each gene that the training controls express.

    Principal components of log1p counts per 10,000 of the controls (of all cells, where no perturbation is known),
    centred within each cell type, so that types do not pass for coexpression. A loading is the component's weight
    times its standard deviation; the sign of a component makes its largest weight positive; all loadings are divided
    by their root mean square over the genes, one number for all of them. C is at most one less than controls and genes.

    Raises:
        ValueError: cells of another split, no controls, or too many components.
    """
    if cells.split != "train":
        raise ValueError(f"coexpression of the {cells.split} split; expected train: other cells are held out")
    controls = _controls(cells)
    counts = cells.csr(controls)
    N, G = counts.shape
    if not 1 <= num_components < min(N, G):
        raise ValueError(f"components is {num_components}; expected 1 to {min(N, G) - 1} ({N} controls, {G} genes)")
    type_ids = cells.conditions.get("cell_type_ids")
    types = np.zeros(N, dtype=np.int64) if type_ids is None else type_ids.numpy()[controls]
    loadings = _loadings(_log_normalised(counts), np.unique(types, return_inverse=True)[1], num_components)
    expressed = np.flatnonzero(np.diff(counts.tocsc().indptr))
    scale = np.sqrt(np.mean(loadings[expressed] ** 2))
    logger.info("coexpression of %d controls: %d of %d genes are expressed", N, len(expressed), G)
    return {cells.tokenizer.genes[gene]: (loadings[gene] / scale).astype(np.float32) for gene in expressed}


def _controls(cells: Cells) -> np.ndarray:
    tokenizer = cells.tokenizer
    if not tokenizer.perturbations:
        return np.arange(len(cells))
    if tokenizer.control is None:
        raise ValueError("the shards name no control: coexpression is measured among controls; convert with --control")
    ids = cells.conditions["perturbation_ids"].numpy()
    rows = np.flatnonzero(ids[:, 0] == tokenizer.perturbations.index(tokenizer.control))
    if not len(rows):
        raise ValueError(f"no training cell has the control {tokenizer.control!r}: coexpression is measured among them")
    return rows


def _log_normalised(counts: csr_matrix) -> csr_matrix:
    totals = np.asarray(counts.sum(axis=1)).ravel()
    data = np.log1p(counts.data * np.repeat(TARGET_SUM / np.maximum(totals, 1), np.diff(counts.indptr)))
    return csr_matrix((data, counts.indices, counts.indptr), shape=counts.shape)


def _loadings(x: csr_matrix, types: np.ndarray, C: int) -> np.ndarray:
    """Loadings (G, C) of the principal components of ``x`` (N, G) centred within ``types`` (N,), largest first.

    The centred matrix is never built: it is ``x`` less the mean of each cell's type, as an operator.
    """
    N, G = x.shape
    member = csr_matrix((np.ones(N), (np.arange(N), types)))  # (N, S)
    means = (member.T @ x).toarray() / np.asarray(member.sum(axis=0)).ravel()[:, None]  # (S, G)
    centred = LinearOperator(
        shape=(N, G),
        matvec=lambda v: x @ v.ravel() - member @ (means @ v.ravel()),
        rmatvec=lambda u: x.T @ u.ravel() - means.T @ (member.T @ u.ravel()),
        dtype=np.float64,
    )
    start = np.random.default_rng(0).standard_normal(min(N, G))
    _, deviations, weights = svds(centred, k=C, v0=start, solver="arpack")
    order = np.argsort(-deviations)
    weights, deviations = weights[order], deviations[order]
    signs = np.sign(weights[np.arange(C), np.abs(weights).argmax(axis=1)])
    return (weights * (signs * deviations / np.sqrt(max(1, N - 1)))[:, None]).T
