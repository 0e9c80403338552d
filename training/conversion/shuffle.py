"""Shuffle cells on disk: sort them into temporary files by split, and by the shard that a random order sends them to.

Every run of input files has temporary files of its own, so several processes can sort at once.

Letters: n cells of a split, m cells of a block, G genes of the panel.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

from training.conversion.join_files import FileCells, with_genes
from training.data.shards import COUNTS
from training.data.workers import Report

LENGTHS = np.dtype(np.int64)


@dataclass(frozen=True)
class ShuffledSplit:
    """The cells of one split, or some of them.

    Attributes:
        name: of the split.
        cells: (n,) positions among all cells, ascending.
        shards: (n,) the shard that each of them goes to.
    """

    name: str
    cells: np.ndarray
    shards: np.ndarray

    def within(self, rows: slice) -> "ShuffledSplit":
        """Those of consecutive cells."""
        first, last = np.searchsorted(self.cells, [rows.start, rows.stop])
        return ShuffledSplit(self.name, self.cells[first:last], self.shards[first:last])


@dataclass(frozen=True)
class StoredCells:
    """A temporary sparse matrix (n, G) to which cells are appended: four raw arrays in files beside ``path``.

    Attributes:
        path: without ending; without files there are no cells.
        num_genes: G.
        types: of the arrays ``genes`` and ``expressions``.
    """

    path: Path
    num_genes: int
    types: Mapping[str, np.dtype]

    def append(self, counts: csr_matrix) -> None:
        """Add cells (m, G) behind those so far."""
        arrays = {"genes": counts.indices, "expressions": counts.data, "lengths": np.diff(counts.indptr)}
        for name, values in (arrays | {"appended": np.array([counts.shape[0]])}).items():
            with self.path.with_suffix(f".{name}").open("ab") as file:
                values.astype(self.types.get(name, LENGTHS)).tofile(file)

    def read(self) -> csr_matrix:
        """All cells (n, G)."""
        if not self.path.with_suffix(".lengths").exists():
            return csr_matrix((0, self.num_genes), dtype=self.types["expressions"])
        genes, expressions = (np.fromfile(self.path.with_suffix(f".{name}"), self.types[name]) for name in COUNTS)
        return self._matrix(genes, expressions, np.fromfile(self.path.with_suffix(".lengths"), LENGTHS))

    def blocks(self) -> Iterator[csr_matrix]:
        """The cells in the blocks (m, G) in which they were appended, never all in memory."""
        if not self.path.with_suffix(".lengths").exists():
            return
        lengths, sizes = (np.fromfile(self.path.with_suffix(f".{name}"), LENGTHS) for name in ("lengths", "appended"))
        files = [self.path.with_suffix(f".{name}") for name in COUNTS]
        with files[0].open("rb") as genes, files[1].open("rb") as expressions:
            for here in np.split(lengths, np.cumsum(sizes)[:-1]):
                stored = int(here.sum())
                yield self._matrix(
                    np.fromfile(genes, self.types["genes"], stored),
                    np.fromfile(expressions, self.types["expressions"], stored),
                    here,
                )

    def _matrix(self, genes: np.ndarray, expressions: np.ndarray, lengths: np.ndarray) -> csr_matrix:
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        return csr_matrix((expressions, genes, indptr), shape=(len(lengths), self.num_genes))


def in_order(folder: Path, run: int) -> Path:
    """Where all cells of a split and run stand, in the order of the files."""
    return folder / f"all_{run:04d}"


def of_shard(folder: Path, shard: int, run: int) -> Path:
    """Where those of them stand that go to one shard."""
    return folder / f"{shard:05d}_{run:04d}"


def runs_of_files(files: Sequence[FileCells], number: int) -> list[list[FileCells]]:
    """At most ``number`` runs of consecutive files, with about as many cells each."""
    middles = np.array([file.rows.start + file.rows.stop for file in files]) / 2
    run_of_file = (middles * number / files[-1].rows.stop).astype(int)
    return [[file for file, here in zip(files, run_of_file) if here == run] for run in np.unique(run_of_file)]


def sort_cells(
    folder: Path,
    run: int,
    files: Sequence[FileCells],
    panel: np.ndarray,
    splits: Sequence[ShuffledSplit],
    types: Mapping[str, np.dtype],
    *,
    report: Report,
) -> None:
    """Append the cells of some files to the temporary files of each split, those of the earlier files first.

    Args:
        folder: with a folder for each split.
        run: number of these files.
        files: consecutive ones.
        panel: the genes to keep, positions among the joint ones, ascending.
        splits: the cells of these files.
        types: of the arrays ``genes`` and ``expressions``.
        report: is told the cells of each block.
    """
    position = np.full(len(files[0].measured), -1)
    position[panel] = np.arange(len(panel))
    for file in files:
        for rows, counts in file.blocks(report):
            counts = with_genes(counts, position, len(panel))
            for split in splits:
                here = split.within(rows)
                if not len(here.cells):
                    continue
                chosen = counts[here.cells - rows.start]
                StoredCells(in_order(folder / split.name, run), len(panel), types).append(chosen)
                for shard in np.unique(here.shards).tolist():
                    path = of_shard(folder / split.name, shard, run)
                    StoredCells(path, len(panel), types).append(chosen[np.flatnonzero(here.shards == shard)])
