"""Notice cells without a count and cells that are there twice, while counts pass by in blocks.

Knows nothing of files, labels and splits. Eight bytes are kept for each cell.

Shapes: m cells of a block, N cells in all.
"""

import numpy as np
from scipy.sparse import csr_matrix

FEWEST_GENES = 25  # expressed in a cell; with fewer, two cells may well have the same counts by chance


class CellTally:
    """Tally of the cells added so far."""

    def __init__(self):
        self._fingerprints: list[np.ndarray] = []
        self._expressed: list[np.ndarray] = []

    def add(self, counts: csr_matrix) -> None:
        """Add a block of cells (m, genes) with sorted genes and no stored zeros."""
        self._fingerprints.append(fingerprints(counts))
        self._expressed.append(np.diff(counts.indptr).astype(np.int32))

    def merge(self, others: "CellTally") -> None:
        """Add other cells behind those so far."""
        self._fingerprints += others._fingerprints
        self._expressed += others._expressed

    @property
    def empty(self) -> np.ndarray:
        """Positions of cells without any count."""
        return np.flatnonzero(np.concatenate(self._expressed) == 0)

    @property
    def repeated(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions of cells whose counts are all those of an earlier cell, and for each of them that cell."""
        rich = np.flatnonzero(np.concatenate(self._expressed) >= FEWEST_GENES)
        values, first, group = np.unique(
            np.concatenate(self._fingerprints)[rich], return_index=True, return_inverse=True
        )
        again = np.flatnonzero(first[group] != np.arange(len(rich))) if len(values) < len(rich) else np.array([], int)
        return rich[again], rich[first[group[again]]]


def fingerprints(counts: csr_matrix) -> np.ndarray:
    """A number (m,) uint64 for each cell: equal for equal counts, different for others but for one pair in 10^19.

    The sum, modulo 2^64, of a mixed (gene, count) pair for each expressed gene (splitmix64's finaliser).
    """
    mixed = counts.indices.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + counts.data.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(mixed, dtype=np.uint64)])
    return sums[counts.indptr[1:]] - sums[counts.indptr[:-1]]
