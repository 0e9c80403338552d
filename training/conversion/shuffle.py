"""Shuffle cells on disk: sort them into temporary files by split, and by the shard that a random order sends them to.

Letters: n cells of a split, m cells of a block, G genes of the panel.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

from training.conversion.join_files import InputCells, with_genes
from training.data.h5ad import BLOCK_CELLS
from training.data.shards import COUNTS

LENGTHS = np.dtype(np.int64)


@dataclass(frozen=True)
class StoredCells:
    """A temporary sparse matrix (n, G) to which cells are appended: three raw arrays in files beside ``path``."""

    path: Path  # without ending
    num_genes: int
    types: Mapping[str, np.dtype]  # of the arrays ``genes`` and ``expressions``

    def append(self, counts: csr_matrix) -> None:
        """Add cells (m, G) behind those so far."""
        arrays = {"genes": counts.indices, "expressions": counts.data, "lengths": np.diff(counts.indptr)}
        for name, values in arrays.items():
            with self.path.with_suffix(f".{name}").open("ab") as file:
                values.astype(self.types.get(name, LENGTHS)).tofile(file)

    def blocks(self) -> Iterator[csr_matrix]:
        """The cells in order, some thousands (m, G) at a time."""
        lengths = np.fromfile(self.path.with_suffix(".lengths"), LENGTHS)
        files = [self.path.with_suffix(f".{name}") for name in COUNTS]
        with files[0].open("rb") as genes, files[1].open("rb") as expressions:
            for start in range(0, len(lengths), BLOCK_CELLS):
                pointers = np.concatenate([[0], np.cumsum(lengths[start : start + BLOCK_CELLS])])
                indices = np.fromfile(genes, self.types["genes"], pointers[-1])
                values = np.fromfile(expressions, self.types["expressions"], pointers[-1])
                yield csr_matrix((values, indices, pointers), shape=(len(pointers) - 1, self.num_genes))


def sort_cells(
    cells: InputCells,
    panel: np.ndarray,
    splits: Mapping[str, np.ndarray],
    shards: Mapping[str, np.ndarray],
    folder: Path,
    types: Mapping[str, np.dtype],
) -> tuple[dict[str, StoredCells], dict[str, list[StoredCells]]]:
    """Sort all cells into temporary files in ``folder``, in the order of the input files.

    Args:
        panel: the genes to keep, positions among the joint ones, ascending.
        splits: (n,) positions of the cells of each split, ascending.
        shards: (n,) the shard that each of these goes to.

    Returns:
        The cells of each split, and those of each of its shards.
    """
    whole = {name: StoredCells(folder / name, len(panel), types) for name in splits}
    parts = {
        name: [StoredCells(folder / f"{name}-{shard:05d}", len(panel), types) for shard in range(of_cell.max() + 1)]
        for name, of_cell in shards.items()
    }
    position = np.full(len(cells.var), -1)
    position[panel] = np.arange(len(panel))
    for rows, counts, _ in cells.blocks("sorting cells"):
        counts = with_genes(counts, position, len(panel))
        for name, members in splits.items():
            here = slice(*np.searchsorted(members, [rows.start, rows.stop]))
            chosen = counts[members[here] - rows.start]
            whole[name].append(chosen)
            for shard in np.unique(shards[name][here]):
                parts[name][shard].append(chosen[np.flatnonzero(shards[name][here] == shard)])
    return whole, parts
