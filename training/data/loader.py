"""Read shards: whole batches of cells as tensors, and the batch sampler that says which cells.

Parquet becomes a memory-mapped Arrow table (cached by ``datasets``); the buffers of its two list columns *are* a sparse
matrix, so a batch is made without a Python loop over values. What is too large for a second copy on disk is read by
``streaming.py``, whose ``open_cells`` opens either.

Letters: N cells of the split, B cells of a batch, G genes of the panel, M perturbations of a combination, C covariates,
P panels of measured genes.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from scipy.sparse import csr_matrix

from tokenization import DCMTokenizer
from tokenization.labels_dcm import read_text
from training.data.remote import open_shard, shard_files
from training.data.shards import COUNTS, LIBRARY_SIZE, NOT_LABELS, PANEL, MergedLabels, shard_features

logger = logging.getLogger(__name__)


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
        folder = Path(folder)
        files = shard_files(folder, split)
        if not files:
            raise FileNotFoundError(
                f"no {split}/*.parquet in {str(folder)!r}; expected a folder that dcm-convert wrote"
            )
        self.folder = folder
        self.split = split
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
        self.measured = self._read_panels() if PANEL in names else np.ones((1, len(self.tokenizer.genes)), dtype=bool)
        self.conditions = self._condition_ids()
        self._warned = False

    def __len__(self) -> int:
        return self._num_cells

    def __getitem__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """A batch.

        Returns:
            ``input_ids`` (B, G), PAD where a gene was not measured, in the narrowest integers that hold every id: a
            batch of many genes takes most of its time to write zeros, and the device widens them. In int64
            ``library_size`` (B,) and the ``conditions`` of these cells.

        Raises:
            IndexError: an index is not one of the split's cells.
            ValueError: a training cell has a count above the tokenizer's ``max_count``; elsewhere such counts are
                clipped, with one warning.
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
        """Batches of this process, of ``batch_size`` cells in an order by ``seed``, epoch after epoch without end.

        The first ``start`` of them are left out, and not read: where a run that is resumed goes on.
        """
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
        """Labels (N,) of a condition: ``cell_type``, ``perturbation`` or a covariate's name.

        Raises:
            ValueError: the shards have no such condition.
        """
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
        """Row pointers (B + 1,), genes and counts of cells (B,), as :meth:`SparseRows.take`."""
        return self._rows.take(rows)

    def _sampler(self, **options: int) -> "GlobalBatchSampler":
        return GlobalBatchSampler(len(self), **options)

    def _checked(self, rows: Sequence[int]) -> np.ndarray:
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(f"cells {rows.min()} to {rows.max()} of {len(self):,}; expected 0 to {len(self) - 1:,}")
        return rows

    def _read_panels(self) -> np.ndarray:
        """Which genes (P, G) were measured in the cells of each panel."""
        path = self.folder / "panels.json"
        if not path.is_file():
            raise FileNotFoundError(f"no panels.json in {str(self.folder)!r}, though cells have panels; convert again")
        panels = json.loads(read_text(path))
        return np.stack([~np.isin(self.tokenizer.genes, panels[name]["missing_genes"]) for name in self._names[PANEL]])

    def _condition_ids(self) -> dict[str, torch.Tensor]:
        known = self.tokenizer.known_conditions()
        if set(known) - set(self._codes):
            raise ValueError(
                f"the shards have the conditions {sorted(self._codes)} but the tokenizer {sorted(known)}; take the "
                "tokenizer of the shards"
            )
        return self.tokenizer.condition_ids({name: self.labels(name) for name in known})

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


# --- rows of two list columns as a sparse matrix ----------------------------------------------------------------------


class SparseRows:
    """N sparse rows, looked at where they lie: two Arrow columns of lists, ``positions`` and the ``values`` there. Only
    the rows asked for are copied.

    Raises:
        ValueError: a row has another number of positions than of values.
    """

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


# --- which cells ------------------------------------------------------------------------------------------------------

# Streams of random numbers of their own: conversion shuffles cells by the permutation of (seed, split), and the same
# permutation again puts them back in the order of their file. They stand last, as numpy pads seeds with zeros.
ORDER, FLOOR = 1, 2


class GlobalBatchSampler:
    """Batches of this process: its share of every *global* batch, of one order that all processes know.

    Cells are shuffled by (seed, epoch) alone; position j of global batch i is the same cell however many processes
    share the work: process ``rank`` of ``world_size`` gets positions ``rank * batch_size`` to
    ``(rank + 1) * batch_size``. What is left after the last full global batch is dropped (another rest each epoch);
    data smaller than one global batch are repeated to fill it.

    Raises:
        ValueError: a number is below its smallest value, or ``rank`` is not below ``world_size``.
    """

    def __init__(self, num_cells: int, *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        for name, value in (("num_cells", num_cells), ("batch_size", batch_size), ("world_size", world_size)):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; expected 0 to {world_size - 1}")
        self.num_cells = num_cells
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed

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
