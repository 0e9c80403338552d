"""Baselines that every generator is shown beside, all through one interface: ``fit(train) -> sample(conditions, rng)``.

``conditions`` is a data frame with one row per wanted cell and the training cells' condition columns; what comes back
are integer counts, one row per wanted cell. Knows nothing of files or metrics.
"""

import logging
from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy import sparse

from eval.labelled_counts import SEPARATOR, LabelledCounts

logger = logging.getLogger(__name__)

Sampler = Callable[[pd.DataFrame, np.random.Generator], sparse.csr_matrix]
GENES_AT_ONCE = 512


def independent_marginals(train: LabelledCounts) -> Sampler:
    """Draw every gene by itself from the training cells of the condition: right marginals, no gene-gene structure.

    A condition without training cells backs off to the cells that share its leading columns (its cell type, say), and
    at last to all of them; which conditions did is logged.
    """
    columns = list(train.labels)
    by_gene = train.counts.tocsc()

    def sample(conditions: pd.DataFrame, rng: np.random.Generator) -> sparse.csr_matrix:
        wanted = conditions.reset_index(drop=True)[columns]
        groups = wanted.groupby(columns, sort=True).indices if columns else {(): np.arange(len(wanted))}
        order, blocks = [], []
        for labels, rows in groups.items():
            source = _training_rows(train, labels if isinstance(labels, tuple) else (labels,))
            blocks.append(_resampled(by_gene[source], len(rows), rng))
            order.append(rows)
        return sparse.vstack(blocks, format="csr")[np.argsort(np.concatenate(order), kind="stable")]

    return sample


def _training_rows(train: LabelledCounts, labels: tuple[str, ...]) -> np.ndarray:
    """Training cells of a condition, or of as many of its leading columns as some training cell shares."""
    matches = np.ones(len(train), dtype=bool)
    for position, column in enumerate(train.labels):
        narrower = matches & (train.labels[column] == labels[position]).to_numpy()
        if not narrower.any():
            logger.warning(
                "marginals: no training cell of %s; drawn from the %d cells of %s",
                SEPARATOR.join(labels),
                matches.sum(),
                SEPARATOR.join(labels[:position]) or "the whole training file",
            )
            break
        matches = narrower
    return np.flatnonzero(matches)


def _resampled(source: sparse.csc_matrix, num_cells: int, rng: np.random.Generator) -> sparse.csr_matrix:
    """(num_cells, G) counts, each gene drawn with replacement and independently from its column of ``source``."""
    blocks = []
    for start in range(0, source.shape[1], GENES_AT_ONCE):
        dense = source[:, start : start + GENES_AT_ONCE].toarray()
        drawn = rng.integers(dense.shape[0], size=(num_cells, dense.shape[1]))
        blocks.append(sparse.csr_matrix(np.take_along_axis(dense, drawn, axis=0)))
    return sparse.hstack(blocks, format="csr")
