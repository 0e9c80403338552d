"""Rows of two Arrow list columns as a sparse matrix, without a Python object per value.

The buffers of the columns *are* a sparse matrix in pieces: numpy looks at them where they lie, in a memory-mapped file
or not, and only the rows asked for are copied. Knows nothing of files, genes' names and labels.
Letters: N rows in all, B rows asked for, G columns of the matrix.
"""

import numpy as np
import pyarrow as pa
from scipy.sparse import csr_matrix


class SparseRows:
    """N sparse rows: their columns ``positions`` and the ``values`` there, two Arrow columns of lists.

    Raises:
        ValueError: a row has another number of positions than of values.
    """

    def __init__(self, positions: pa.ChunkedArray, values: pa.ChunkedArray):
        self._views = [(_values(here), _values(there)) for here, there in zip(positions.chunks, values.chunks)]
        offsets = [chunk.offsets.to_numpy() for chunk in positions.chunks]
        lengths = [len(chunk) for chunk in positions.chunks]
        others = [chunk.offsets.to_numpy() for chunk in values.chunks]
        if lengths != [len(chunk) for chunk in values.chunks] or any(map(_differ, offsets, others)):
            raise ValueError("rows have other numbers of genes than of counts: the shards are damaged; convert again")
        empty = np.zeros(0, dtype=np.int32)
        self._begins = np.concatenate([empty, *(ends[:-1] for ends in offsets)])  # (N,) within the row's chunk
        self._ends = np.concatenate([empty, *(ends[1:] for ends in offsets)])
        self._first_rows = np.cumsum([0, *lengths])

    def __len__(self) -> int:
        return len(self._begins)

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows (B,) as ``indptr`` (B + 1,) int64, positions and values in the types of the columns."""
        if not len(rows):
            return np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int32)
        begins, ends = self._begins[rows], self._ends[rows]
        indptr = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(ends - begins, out=indptr[1:])
        chunks = np.searchsorted(self._first_rows, rows, side="right") - 1
        # neighbours in the file are one piece
        starts = np.flatnonzero((np.diff(rows, prepend=-2) != 1) | (np.diff(chunks, prepend=-1) != 0))
        lasts = np.append(starts[1:], len(rows)) - 1
        pieces = list(zip(chunks[starts].tolist(), begins[starts].tolist(), ends[lasts].tolist()))
        positions, values = (
            np.concatenate([self._views[chunk][column][begin:end] for chunk, begin, end in pieces]) for column in (0, 1)
        )
        return indptr, positions, values


def to_csr(indptr: np.ndarray, positions: np.ndarray, values: np.ndarray, G: int) -> csr_matrix:
    """The matrix (B, G) of what :meth:`SparseRows.take` returned; values keep their type."""
    return csr_matrix((values, positions.astype(np.int32), indptr), shape=(len(indptr) - 1, G))


def _values(chunk: pa.ListArray) -> np.ndarray:
    return chunk.values.to_numpy(zero_copy_only=True)


def _differ(offsets: np.ndarray, others: np.ndarray) -> bool:
    return not np.array_equal(np.diff(offsets), np.diff(others))
