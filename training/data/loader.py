"""Read shards: whole batches of cells as tensors, memory-mapped or streaming, and the samplers that say which cells.

Memory-mapped, Parquet becomes an Arrow table (cached by ``datasets``); the buffers of its two list columns *are* a
sparse matrix, so a batch is made without a Python loop over values. What is too large for a second copy on disk is
streamed: a block is a row group of about 4,096 cells, which the conversion has shuffled; each epoch deals the blocks to
the processes in a seeded order, and permutes the cells of a few blocks at a time, so that the order is known without
reading, and a resumed run reads nothing that it leaves out.

Letters: N cells of the split, B cells of a batch, G genes of the panel, M perturbations of a combination, C covariates,
P panels of measured genes, U blocks.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy.sparse import csr_matrix

from tokenization import DCMTokenizer
from training.data.shards import (
    COUNTS,
    LIBRARY_SIZE,
    NOT_LABELS,
    PANEL,
    MergedLabels,
    measured_of,
    open_shard,
    shard_features,
    shard_files,
)

logger = logging.getLogger(__name__)

BLOCKS_IN_MEMORY = 4
RANDOM_BLOCKS = 64  # at least, that random cells are of
FILES_AT_ONCE = 16  # that are opened: from elsewhere each takes several requests
# Streams of random numbers of their own: conversion shuffles cells by the permutation of (seed, split), and the same
# permutation again puts them back in the order of their file. They stand last, as numpy pads seeds with zeros.
ORDER, FLOOR = 1, 2


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turn what is raised inside the block into one ValueError if a shard is damaged, ``path`` or one in that folder:
    they are read again to find it, as libraries do not say which it was."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # there is no one kind of error for broken bytes
        for file in sorted(path.glob("*.parquet")) if path.is_dir() else [path] * path.is_file():
            try:
                for _ in pq.ParquetFile(file).iter_batches():
                    pass
            except Exception as damage:
                why = " ".join(str(damage).split())
                way_out = "copy it again, or run dcm-convert again"
                raise ValueError(f"the shard {str(file)!r} is damaged ({why}): {way_out}") from error
        raise


# --- memory-mapped ----------------------------------------------------------------------------------------------------


class Cells:
    """One split of a shards folder, read in whole batches: ``cells[[3, 1, 4]]`` or ``cells.batches(...)``.

    Args:
        folder: what ``dcm-convert`` wrote.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        tokenizer: default the one in the folder.

    Attributes:
        tokenizer: the vocabularies.
        conditions: int64 tensors of the whole split: ``cell_type_ids`` (N,), ``perturbation_ids`` (N, M) and
            ``covariate_ids`` (N, C), those that the data have; -1 where a cell has no label.
        library_size: (N,) int64, total counts over the panel before clipping.
        panel: (N,) the panel of each cell.
        measured: (P, G) which genes were measured in the cells of each panel.

    Raises:
        FileNotFoundError: the folder has no such split.
        ValueError: the tokenizer knows conditions that the shards lack (those that it does not know are left out), or
            an older ``dcm-convert`` wrote them.
    """

    def __init__(self, folder: str | Path, split: str, tokenizer: DCMTokenizer | None = None):
        self.folder = folder = Path(folder)
        self.split = split
        files = shard_files(folder, split)
        if not files:
            raise FileNotFoundError(f"no {split}/*.parquet in {str(folder)!r}; expected what dcm-convert wrote")
        self.tokenizer = tokenizer or DCMTokenizer.from_pretrained(folder / "tokenizer")
        self._type_of_ids = np.min_scalar_type(-self.tokenizer.pad_token_id - 1)
        self._merged = MergedLabels.read(folder)
        features, columns = self._open(files)
        if LIBRARY_SIZE not in columns.column_names:
            raise ValueError(
                f"the shards in {str(folder)!r} have no column {LIBRARY_SIZE!r}: an older dcm-convert wrote them; "
                "convert again"
            )
        self.library_size = torch.from_numpy(columns[LIBRARY_SIZE].to_numpy().copy())
        names = [name for name in columns.column_names if name not in NOT_LABELS]
        self._codes = {name: columns[name].fill_null(-1).to_numpy() for name in names}
        if self._merged is None:
            self._names = {name: features[name].names for name in names}
        else:
            sizes, self._names = [open_shard(file).metadata.num_rows for file in files], self._merged.labels
            self._codes = {name: self._merged.recoded(name, of, files, sizes) for name, of in self._codes.items()}
        self.panel = self._codes.pop(PANEL, np.zeros(len(self), dtype=np.int64))
        self.measured = np.ones((1, len(self.tokenizer.genes)), dtype=bool)
        if PANEL in names:
            self.measured = measured_of(folder, self.tokenizer.genes, self._names[PANEL])
        known = self.tokenizer.known_conditions()
        if set(known) - set(self._codes):
            raise ValueError(
                f"the shards have the conditions {sorted(self._codes)} but the tokenizer {sorted(known)}; take the "
                "tokenizer of the shards"
            )
        self.conditions = self.tokenizer.condition_ids({name: self.labels(name) for name in known})
        self._warned = False

    def __len__(self) -> int:
        return self._num_cells

    def __getitem__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """A batch: ``library_size`` (B,) and ``conditions`` of these cells (int64), and ``input_ids`` (B, G), PAD where
        a gene was not measured, in the narrowest integers that hold every id: a batch of many genes takes most of its
        time to write zeros, and the device widens them.

        A count above the tokenizer's ``max_count`` is a ValueError in training cells; elsewhere it is clipped, with one
        warning.
        """
        rows = self._checked(indices)
        indptr, genes, expressions = self._take(rows)
        if len(expressions):
            self._clip(expressions)
        ids = expressions if self.tokenizer.count_bins is None else self.tokenizer.count_ids(expressions)
        ids = ids.astype(self._type_of_ids, copy=False)  # without bins a count is its own id
        input_ids = to_csr(indptr, genes, ids, len(self.tokenizer.genes)).toarray()
        not_measured = self.not_measured(rows)
        if not_measured is not None:
            input_ids[not_measured] = self.tokenizer.pad_token_id
        index = torch.from_numpy(rows)
        batch = {"input_ids": torch.from_numpy(input_ids), "library_size": self.library_size[index]}
        return batch | {name: ids[index] for name, ids in self.conditions.items()}

    def batches(
        self, *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, start: int = 0
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Batches of this process in an order by ``seed``, epoch after epoch without end; the first ``start`` of them
        are left out, and not read: where a run that is resumed goes on."""
        sampler = self._sampler(batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)
        epoch, skip = divmod(start, len(sampler))
        while True:
            for index, rows in enumerate(sampler.epoch(epoch)):
                if index >= skip:
                    yield self[rows]
            epoch, skip = epoch + 1, 0

    def random_cells(self, among: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
        """``number`` of the cells ``among`` (n,), or all where these are fewer, in random order."""
        return rng.permutation(among)[:number]

    def csr(self, rows: Sequence[int] | None = None) -> csr_matrix:
        """Counts of some cells, or of the whole split (N, G), int32, before clipping; 0 where not measured."""
        rows = np.arange(len(self)) if rows is None else self._checked(rows)
        indptr, genes, expressions = self._take(rows)
        return to_csr(indptr, genes, expressions.astype(np.int32), len(self.tokenizer.genes))

    def not_measured(self, rows: Sequence[int]) -> np.ndarray | None:
        """Which genes (B, G) were not measured in cells ``rows`` (B,); None where all were, in every cell."""
        return None if len(self.measured) == 1 else ~self.measured[self.panel[rows]]

    def labels(self, condition: str) -> pd.Categorical:
        """Labels (N,) of a condition: ``cell_type``, ``perturbation`` or a covariate's name."""
        if condition not in self._codes:
            there = ", ".join(self._codes) or "none"
            raise ValueError(f"no condition {condition!r} in the shards; they have: {there}")
        return pd.Categorical.from_codes(self._codes[condition], categories=self._names[condition])

    def _open(self, files: Sequence[str]) -> tuple[datasets.Features, pa.Table]:
        """Features and columns of the shards; sets the number of cells and what ``_take`` reads."""
        features, merged = None, self._merged
        if merged is not None:
            features = shard_features(len(self.tokenizer.genes), merged.largest_count, merged.labels)
        data_files = {self.split: files}
        shards = datasets.load_dataset("parquet", data_files=data_files, split=self.split, features=features)
        table = shards.data.table
        self._num_cells = len(table)
        self._rows = SparseRows(*(table.column(name) for name in COUNTS))
        return shards.features, table

    def _take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._rows.take(rows)  # pointers, genes and counts

    def _sampler(self, **options: int) -> "GlobalBatchSampler":
        return GlobalBatchSampler(len(self), **options)

    def _checked(self, rows: Sequence[int]) -> np.ndarray:
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(f"cells {rows.min()} to {rows.max()} of {len(self):,}; expected 0 to {len(self) - 1:,}")
        return rows

    def _clip(self, counts: np.ndarray) -> None:
        """Clip counts at ``max_count`` in place; raise instead for training cells."""
        largest = int(counts.max())
        limit = self.tokenizer.max_count
        if largest <= limit:
            return
        if self.split == "train":
            raise ValueError(
                f"a training cell has the count {largest:,} above max_count={limit:,}; convert the data again"
            )
        if not self._warned:
            logger.warning("%s cells have counts above max_count=%d (such as %d): clipped", self.split, limit, largest)
            self._warned = True
        np.minimum(counts, limit, out=counts)


class SparseRows:
    """N sparse rows, looked at where they lie: two Arrow columns of lists, ``positions`` and the ``values`` there. Only
    the rows asked for are copied."""

    def __init__(self, positions: pa.ChunkedArray, values: pa.ChunkedArray):
        chunks = list(zip(positions.chunks, values.chunks))
        self._views = [[chunk.values.to_numpy(zero_copy_only=True) for chunk in pair] for pair in chunks]
        offsets, others = ([chunk.offsets.to_numpy() for chunk in column.chunks] for column in (positions, values))
        lengths = [len(chunk) for chunk in positions.chunks]
        if lengths != [len(chunk) for chunk in values.chunks] or not all(
            np.array_equal(np.diff(here), np.diff(there)) for here, there in zip(offsets, others)
        ):
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
        # neighbours in the file are copied together
        starts = np.flatnonzero((np.diff(rows, prepend=-2) != 1) | (np.diff(chunks, prepend=-1) != 0))
        lasts = np.append(starts[1:], len(rows)) - 1
        spans = list(zip(chunks[starts].tolist(), begins[starts].tolist(), ends[lasts].tolist()))
        positions, values = (
            np.concatenate([self._views[chunk][column][begin:end] for chunk, begin, end in spans]) for column in (0, 1)
        )
        return indptr, positions, values


def to_csr(indptr: np.ndarray, positions: np.ndarray, values: np.ndarray, G: int) -> csr_matrix:
    """The matrix (B, G) of what :meth:`SparseRows.take` returned; values keep their type."""
    return csr_matrix((values, positions.astype(np.int32), indptr), shape=(len(indptr) - 1, G))


# --- streaming --------------------------------------------------------------------------------------------------------


class StreamedCells(Cells):
    """Cells of Parquet row groups, of which the last few read are in memory."""

    def _open(self, files: Sequence[str]) -> tuple[datasets.Features, pa.Table]:
        self._paths = files

        def labels(file: pq.ParquetFile) -> pa.Table:
            return file.read(columns=[name for name in file.schema_arrow.names if name not in COUNTS])

        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            self._files = list(pool.map(open_shard, files))
            tables = list(pool.map(labels, self._files))
        metadata = [file.metadata for file in self._files]
        self._places = [(i, group) for i, m in enumerate(metadata) for group in range(m.num_row_groups)]
        sizes = [metadata[i].row_group(group).num_rows for i, group in self._places]
        self._first_cells = np.cumsum([0, *sizes])  # (U + 1,)
        self._blocks: OrderedDict[int, SparseRows] = OrderedDict()  # the last used is the last
        self._num_cells = int(self._first_cells[-1])
        # of merged parts not all may have panels
        table = pa.concat_tables(tables, promote_options="default")
        return datasets.Features.from_arrow_schema(self._files[0].schema_arrow), table

    def random_cells(self, among: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
        """As :meth:`Cells.random_cells`, from a few of many blocks: each one is read for the sake of one of its cells.

        Their cells were shuffled by the conversion, within its part of merged shards; blocks are of all parts.
        """
        num_blocks = len(self._places)
        wanted = max(RANDOM_BLOCKS, -(-2 * number * num_blocks // len(self)))
        if wanted < num_blocks:
            chosen = rng.permutation(num_blocks)[:wanted]
            among = among[np.isin(np.searchsorted(self._first_cells, among, side="right") - 1, chosen)]
        return super().random_cells(among, number, rng)

    def _take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        blocks = np.searchsorted(self._first_cells, rows, side="right") - 1
        places, taken = [], []
        for block in sorted(np.unique(blocks).tolist(), key=lambda block: block not in self._blocks):
            places.append(np.flatnonzero(blocks == block))
            taken.append(self._block(block).take(rows[places[-1]] - self._first_cells[block]))
        lengths = np.concatenate([np.diff(indptr) for indptr, _, _ in taken])
        genes, expressions = (np.concatenate([part[array] for part in taken]) for array in (1, 2))
        found = to_csr(np.append(0, np.cumsum(lengths)), genes, expressions, len(self.tokenizer.genes))
        found = found[np.argsort(np.concatenate(places))]
        return found.indptr.astype(np.int64), found.indices, found.data

    def _block(self, block: int) -> SparseRows:
        """Genes and counts of a block."""
        if block in self._blocks:
            self._blocks.move_to_end(block)
        else:
            file, group = self._places[block]
            with _damage_named(Path(self._paths[file])):
                table = self._files[file].read_row_group(group, columns=list(COUNTS))
            while len(self._blocks) >= BLOCKS_IN_MEMORY:
                self._blocks.popitem(last=False)
            self._blocks[block] = SparseRows(*(table.column(name) for name in COUNTS))
        return self._blocks[block]

    def _sampler(self, **options: int) -> "BlockBatchSampler":
        return BlockBatchSampler(self._first_cells, **options)


# --- which cells ------------------------------------------------------------------------------------------------------


class GlobalBatchSampler:
    """Batches of this process: its share of every *global* batch, of one order that all processes know.

    Cells are shuffled by (seed, epoch) alone; position j of global batch i is the same cell however many processes
    share the work: process ``rank`` of ``world_size`` gets positions ``rank * batch_size`` to
    ``(rank + 1) * batch_size``. What is left after the last full global batch is dropped (another rest each epoch);
    data smaller than one global batch are repeated to fill it.
    """

    def __init__(self, num_cells: int, *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.num_cells, self.batch_size, self.seed = num_cells, batch_size, seed
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return max(1, self.num_cells // (self.batch_size * self.world_size))

    def epoch(self, number: int) -> Iterator[list[int]]:
        """Yield the cells of each batch of an epoch."""
        global_size = self.batch_size * self.world_size
        order = np.random.default_rng([self.seed, number, ORDER]).permutation(self.num_cells)
        if self.num_cells < global_size:
            order = np.resize(order, global_size)
        for batch in range(len(self)):
            start = batch * global_size + self.rank * self.batch_size
            yield order[start : start + self.batch_size].tolist()


class BlockBatchSampler(GlobalBatchSampler):
    """Batches of this process from its own blocks of cells.

    Blocks are dealt anew each epoch, by (seed, epoch) alone; the cells of :data:`BLOCKS_IN_MEMORY` blocks at a time
    are then permuted. All processes have the same number of batches in every epoch: as many as the fewest cells that
    any deal can give to a process; what is left is dropped (another rest each epoch). ``first_cells`` (U + 1,) are the
    first cell of each block, and the number of cells.
    """

    def __init__(self, first_cells: np.ndarray, *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        super().__init__(int(first_cells[-1]), batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)
        self.first_cells = first_cells
        sizes = np.sort(np.diff(first_cells))
        fewest = int(sizes[: len(sizes) // world_size].sum())
        self._num_batches = fewest // batch_size
        if not self._num_batches:
            raise ValueError(
                f"{self.num_cells:,} cells in {len(sizes):,} blocks leave a process as few as {fewest:,} of them, less "
                f"than a batch of {batch_size:,}; do not stream data this small (streaming=False)"
            )

    def __len__(self) -> int:
        return self._num_batches

    def epoch(self, number: int) -> Iterator[list[int]]:
        """Yield the cells of each batch of an epoch."""
        num_blocks = len(self.first_cells) - 1
        order = np.random.default_rng([self.seed, number, ORDER]).permutation(num_blocks)
        mine = order[self.rank :: self.world_size]
        waiting = np.zeros(0, dtype=np.int64)
        left = len(self)
        for window in range(0, len(mine), BLOCKS_IN_MEMORY):
            here = mine[window : window + BLOCKS_IN_MEMORY]
            cells = np.concatenate([np.arange(*self.first_cells[block : block + 2]) for block in here])
            rng = np.random.default_rng([self.seed, number, self.rank, window, ORDER])
            waiting = np.concatenate([waiting, rng.permutation(cells)])
            for _ in range(min(left, len(waiting) // self.batch_size)):
                yield waiting[: self.batch_size].tolist()
                waiting, left = waiting[self.batch_size :], left - 1


# --- either -----------------------------------------------------------------------------------------------------------


def open_cells(
    folder: str | Path, split: str, tokenizer: DCMTokenizer | None = None, *, streaming: bool = False
) -> Cells:
    """One split of a shards folder; see :class:`Cells` for arguments and errors.

    Memory-mapped cells are read in any order at the same speed, from an Arrow copy that ``datasets`` makes once in its
    cache (of about the size of the counts in memory). Streaming needs no copy; ``batches`` are shuffled by blocks, and
    what is asked for in another order is read slowly.

    Raises:
        ValueError: a shard is damaged; the message names it. Streaming finds damaged counts when it comes to them.
    """
    with _damage_named(Path(folder) / split):
        return (StreamedCells if streaming else Cells)(folder, split, tokenizer)
