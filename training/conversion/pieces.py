"""Sort cells into temporary files: by part of the split, and by the shard that a random order gives them to.

Each run of input files makes files of its own, so several processes can sort at once. A *piece* is three raw arrays:
``genes`` and ``expressions`` of the expressed genes of its cells, one cell after the other, and ``lengths``, how many
each has. Knows nothing of Parquet and h5ad, and of how cells were chosen.

Shapes: n cells of a part, m cells of a block, G genes of the panel.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

from training.conversion.inputs import FileCells, with_genes
from training.data.workers import Report


@dataclass(frozen=True)
class Cells:
    """Sparse cells: the positions of their expressed genes, ascending, the counts there, and (m,) how many."""

    genes: np.ndarray
    expressions: np.ndarray
    lengths: np.ndarray

    def take(self, order: np.ndarray) -> "Cells":
        """These cells in another order."""
        lengths = self.lengths[order]
        ends = np.cumsum(lengths)
        starts = (np.cumsum(self.lengths) - self.lengths)[order]
        small = np.int32 if len(self.genes) < 2**31 else np.int64  # half the memory of the largest temporary arrays
        gather = np.arange(lengths.sum(), dtype=small)
        gather += np.repeat((starts - ends + lengths).astype(small), lengths)
        return Cells(self.genes[gather], self.expressions[gather], lengths)


@dataclass(frozen=True)
class Part:
    """Some cells of one part of the split.

    Attributes:
        name: of the part.
        cells: (n,) positions among all cells, ascending.
        shards: (n,) the shard that each of them goes to.
    """

    name: str
    cells: np.ndarray
    shards: np.ndarray

    def of(self, rows: slice) -> "Part":
        """Those of consecutive cells."""
        first, last = np.searchsorted(self.cells, [rows.start, rows.stop])
        return Part(self.name, self.cells[first:last], self.shards[first:last])


def runs_of_files(files: Sequence[FileCells], number: int) -> list[list[FileCells]]:
    """At most ``number`` runs of consecutive files, with about as many cells each."""
    middles = np.array([file.rows.start + file.rows.stop for file in files]) / 2
    run_of_file = (middles * number / files[-1].rows.stop).astype(int)
    return [[file for file, here in zip(files, run_of_file) if here == run] for run in np.unique(run_of_file)]


def write_pieces(
    folder: Path,
    run: int,
    files: Sequence[FileCells],
    panel: np.ndarray,
    parts: Sequence[Part],
    types: Mapping[str, np.dtype],
    *,
    report: Report,
) -> dict[str, list[int]]:
    """Write the cells of some files to pieces, those of the earlier files first.

    Args:
        folder: with a folder for each part.
        run: number of the pieces.
        files: consecutive ones.
        panel: the genes to keep, positions among the joint ones, ascending.
        parts: of the split, with the cells of these files.
        types: of ``genes`` and ``expressions``.
        report: is told the cells of each block.

    Returns:
        For each part, how many cells each block gave it.
    """
    position = np.full(len(files[0].measured), -1)
    position[panel] = np.arange(len(panel))
    given: dict[str, list[int]] = {part.name: [] for part in parts}
    for file in files:
        for rows, counts in file.blocks(report):
            counts = with_genes(counts, position, len(panel))
            for part in parts:
                here = part.of(rows)
                if len(here.cells):
                    given[part.name].append(len(here.cells))
                    _append(folder / part.name, run, counts[here.cells - rows.start], here.shards, types)
    return given


def _append(folder: Path, run: int, counts: csr_matrix, shards: np.ndarray, types: Mapping[str, np.dtype]) -> None:
    """Append cells to the pieces of a part: to the one in order, and to those of the shards (m,) that they go to."""
    _write(in_order(folder, run), counts, types)
    for shard in np.unique(shards):
        _write(of_shard(folder, int(shard), run), counts[np.flatnonzero(shards == shard)], types)


def _write(piece: Path, counts: csr_matrix, types: Mapping[str, np.dtype]) -> None:
    values = {"genes": counts.indices, "expressions": counts.data}
    for name, dtype in types.items():
        with piece.with_suffix(f".{name}").open("ab") as file:
            values[name].astype(dtype).tofile(file)
    with piece.with_suffix(".lengths").open("ab") as file:
        np.diff(counts.indptr).astype(np.int64).tofile(file)


def in_order(folder: Path, run: int) -> Path:
    """The piece with all cells of a part and run, in the order of the files."""
    return folder / f"all_{run:04d}"


def of_shard(folder: Path, shard: int, run: int) -> Path:
    """The piece with those of them that go to one shard."""
    return folder / f"{shard:05d}_{run:04d}"


def read_pieces(pieces: Sequence[Path], types: Mapping[str, np.dtype]) -> Cells:
    """The cells of several pieces, one after the other; those that have none need not exist."""
    found = [piece for piece in pieces if piece.with_suffix(".lengths").exists()]
    arrays = {
        name: np.concatenate([np.fromfile(piece.with_suffix(f".{name}"), dtype) for piece in found])
        for name, dtype in {**types, "lengths": np.dtype(np.int64)}.items()
    }
    return Cells(**arrays)


def read_blocks(piece: Path, sizes: Sequence[int], types: Mapping[str, np.dtype]) -> Iterator[Cells]:
    """The cells of a piece in blocks of the given numbers of cells, never all in memory."""
    if not sizes:
        return
    lengths = np.fromfile(piece.with_suffix(".lengths"), np.int64)
    with piece.with_suffix(".genes").open("rb") as genes, piece.with_suffix(".expressions").open("rb") as expressions:
        for here in np.split(lengths, np.cumsum(sizes)[:-1]):
            stored = int(here.sum())
            yield Cells(
                np.fromfile(genes, types["genes"], stored),
                np.fromfile(expressions, types["expressions"], stored),
                here,
            )
