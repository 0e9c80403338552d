"""Look at every count once, and choose the genes: all, those of a list, or the most variable of the training cells.

Which cells are trained on is told, and only these can reach the choice.

Shapes: m cells of a block, N cells in all, G joint genes.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from training.conversion.join_files import InputCells
from training.data.files import read_list
from training.data.variable_genes import GeneTotals, seurat_v3_variances, top_genes

logger = logging.getLogger(__name__)

FEWEST_GENES = 25  # expressed in a cell; with fewer, two cells may well have the same counts by chance


def read_gene_list(path: Path) -> list[str]:
    """Genes of ``--genes``, as :func:`training.data.files.read_list`; one that is named twice is a ValueError, too."""
    genes = read_list(path, "--genes")
    repeated = sorted({gene for gene in genes if genes.count(gene) > 1}) if len(set(genes)) < len(genes) else []
    if repeated:
        raise ValueError(
            f"{str(path)!r} names {len(repeated):,} genes twice ({', '.join(repeated[:5])}); once is enough"
        )
    return genes


@dataclass(frozen=True)
class Panel:
    """The genes that are kept, and what their counts are like."""

    genes: np.ndarray  # their positions among the joint genes, ascending
    largest: int  # count of any cell, which sizes the columns of the shards and nothing else
    largest_in_training: int
    zero_genes: int  # how many have no count in training


def choose_panel(cells: InputCells, train: np.ndarray, n_top_genes: int | None) -> Panel:
    """Validate every value, and choose the genes: all, or the ``n_top_genes`` most variable of the cells ``train``.

    Raises:
        ValueError: a value is no count, the training cells have no count, or there are too few genes or cells.
    """
    num_genes = len(cells.var)
    if n_top_genes is not None and not 1 <= n_top_genes <= num_genes:
        raise ValueError(f"--n-top-genes is {n_top_genes:,}; expected 1 to {num_genes:,}, the genes of the data")
    in_train = np.zeros(len(cells.obs), dtype=bool)
    in_train[train] = True
    training, tally = GeneTotals(num_genes), CellTally()
    largest = np.zeros(num_genes, dtype=np.int64)
    for rows, counts, measured in cells.blocks("checking counts", check=True):
        training.add(counts[in_train[rows]], measured)
        tally.add(counts)
        largest = np.maximum(largest, counts.max(axis=0).toarray().ravel())
    tally.warn(cells.obs.index)
    genes = np.arange(num_genes)
    if n_top_genes is not None:
        blocks = (counts[in_train[rows]] for rows, counts, _ in cells.blocks("choosing genes by the cells"))
        genes = top_genes(seurat_v3_variances(training, blocks), n_top_genes)
    in_training = training.largest[genes]
    if not in_training.any():
        where = " and ".join(of_file.file.source for of_file in cells.files)
        raise ValueError(f"{where} has no count above 0 in the {len(train):,} training cells")
    return Panel(
        genes=genes,
        largest=int(largest[genes].max()),
        largest_in_training=int(in_training.max()),
        zero_genes=int((in_training == 0).sum()),
    )


# --- cells without a count, and cells that are there twice -----------------------------------------------------------


class CellTally:
    """Tally of the cells added so far; eight bytes are kept for each."""

    def __init__(self):
        self._fingerprints: list[np.ndarray] = []
        self._expressed: list[np.ndarray] = []

    def add(self, counts: csr_matrix) -> None:
        """Add a block of cells (m, genes) with sorted genes and no stored zeros."""
        self._fingerprints.append(fingerprints(counts))
        self._expressed.append(np.diff(counts.indptr).astype(np.int32))

    def warn(self, names: pd.Index) -> None:
        """Warn of cells without counts, and of cells that are there twice under two names."""
        expressed = np.concatenate(self._expressed)
        empty = np.flatnonzero(expressed == 0)
        if len(empty):
            shown = ", ".join(names[empty[:3]])
            logger.warning("%s cells have no count at all (%s); they are kept: drop them", f"{len(empty):,}", shown)
        rich = np.flatnonzero(expressed >= FEWEST_GENES)
        prints = np.concatenate(self._fingerprints)[rich]
        _, first, group = np.unique(prints, return_index=True, return_inverse=True)
        again = np.flatnonzero(first[group] != np.arange(len(rich)))
        if len(again):
            logger.warning(
                "%s cells have exactly the counts of another cell (%s those of %s); they are kept: drop copies, or "
                "test cells may be training cells",
                f"{len(again):,}",
                names[rich[again[0]]],
                names[rich[first[group[again[0]]]]],
            )


def fingerprints(counts: csr_matrix) -> np.ndarray:
    """A number (m,) uint64 for each cell: equal for equal counts, different for others but for one pair in 10^19.

    The sum, modulo 2^64, of the hash of a (gene, count) pair for each expressed gene.
    """
    pairs = counts.indices.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + counts.data.astype(np.uint64)
    mixed = pd.util.hash_array(pairs)
    sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(mixed, dtype=np.uint64)])
    return sums[counts.indptr[1:]] - sums[counts.indptr[:-1]]
