"""Read shards: whole batches of cells as tensors, and the batch sampler that says which cells.

Parquet becomes a memory-mapped Arrow table (cached by ``datasets``); the buffers of its two list columns *are* a sparse
matrix, so a batch is made without a Python loop over cells. Knows nothing of models, noise and devices.

Shapes: N cells of the split, B cells of a batch, G genes of the panel, P perturbations of a combination, C covariates.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from scipy.sparse import csr_matrix

from tokenization import DCMTokenizer
from tokenization.conditions_dcm import CELL_TYPE, PERTURBATION

logger = logging.getLogger(__name__)


class Cells(torch.utils.data.Dataset):
    """One split of a shards folder. Indices in whole batches: ``cells[[3, 1, 4]]``, or a DataLoader with
    ``batch_sampler=GlobalBatchSampler(...)`` and ``collate_fn=Cells.collate``.

    Args:
        folder: what ``dcm-convert`` wrote.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        tokenizer: default the one in the folder.

    Attributes:
        tokenizer: the vocabularies.
        conditions: int64 tensors of the whole split: ``cell_type_ids`` (N,), ``perturbation_ids`` (N, P) and
            ``covariate_ids`` (N, C), those that the data have.

    Raises:
        FileNotFoundError: the folder has no such split.
        ValueError: the tokenizer knows conditions that the shards lack; those that it does not know are left out.
    """

    def __init__(self, folder: str | Path, split: str, tokenizer: DCMTokenizer | None = None):
        files = sorted(str(path) for path in (Path(folder) / split).glob("*.parquet"))
        if not files:
            raise FileNotFoundError(
                f"no {split}/*.parquet in {str(folder)!r}; expected a folder that dcm-convert wrote"
            )
        self.split = split
        self.tokenizer = tokenizer or DCMTokenizer.from_pretrained(Path(folder) / "tokenizer")
        table = datasets.load_dataset("parquet", data_files={split: files}, split=split)
        self._features = table.features
        self._table = table.with_format("arrow")
        self.conditions = self._condition_ids()
        self._warned = False

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int | Sequence[int]) -> dict[str, torch.Tensor]:
        """A batch for several indices; for one index, one cell without the batch dimension."""
        if isinstance(index, (int, np.integer)):
            return {name: values[0] for name, values in self.__getitems__([int(index)]).items()}
        return self.__getitems__(index)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """A batch.

        Returns:
            ``counts`` (B, G) count ids, ``library_size`` (B,) the totals before clipping, and the ``conditions`` of
            these cells. All int64.

        Raises:
            ValueError: a training cell has a count above the tokenizer's ``max_count``; elsewhere such counts are
                clipped, with one warning.
        """
        indices = np.asarray(indices, dtype=np.int64)
        counts = self._to_csr(self._table[indices], np.int64)
        library_size = np.asarray(counts.sum(axis=1)).ravel()
        if counts.nnz:
            self._clip(counts.data)
            counts.data = self.tokenizer.count_ids(counts.data)
        batch = {"counts": torch.from_numpy(counts.toarray()), "library_size": torch.from_numpy(library_size)}
        rows = torch.from_numpy(indices)
        return batch | {name: ids[rows] for name, ids in self.conditions.items()}

    @staticmethod
    def collate(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """For a DataLoader's ``collate_fn``: batches arrive whole from the data set."""
        return batch

    def csr(self) -> csr_matrix:
        """Counts of the whole split (N, G), int32, before clipping."""
        return self._to_csr(self._table[:], np.int32)

    def labels(self, condition: str) -> np.ndarray:
        """Full labels (N,) of a condition: ``cell_type``, ``perturbation`` or a covariate's name.

        Raises:
            ValueError: the shards have no such condition.
        """
        known = [name for name in self._features if name not in ("genes", "expressions")]
        if condition not in known:
            raise ValueError(f"no condition {condition!r} in the shards; they have: {', '.join(known) or 'none'}")
        codes = self._table.with_format("numpy", columns=[condition])[:][condition]
        return np.array(self._features[condition].names, dtype=object)[codes]

    def _condition_ids(self) -> dict[str, torch.Tensor]:
        known = {
            *([CELL_TYPE] * bool(self.tokenizer.cell_types)),
            *([PERTURBATION] * bool(self.tokenizer.perturbations)),
        }
        known |= set(self.tokenizer.covariates)
        here = set(self._features) - {"genes", "expressions"}
        if not known <= here:
            raise ValueError(f"the shards have the conditions {sorted(here)} but the tokenizer {sorted(known)}")
        ids = {}
        if CELL_TYPE in known:
            ids["cell_type_ids"] = self.tokenizer.cell_type_ids(self.labels(CELL_TYPE))
        if PERTURBATION in known:
            ids["perturbation_ids"] = self.tokenizer.perturbation_ids(self.labels(PERTURBATION))
        if self.tokenizer.covariates:
            columns = {name: self.labels(name) for name in self.tokenizer.covariates}
            ids["covariate_ids"] = self.tokenizer.covariate_ids(columns)
        return ids

    def _to_csr(self, table: pa.Table, dtype: type) -> csr_matrix:
        """The sparse matrix (rows, G) that the two list columns are."""
        genes, expressions = (_one_array(table.column(name)) for name in ("genes", "expressions"))
        offsets = genes.offsets.to_numpy()
        indices = genes.flatten().to_numpy(zero_copy_only=True).astype(np.int32)
        data = expressions.flatten().to_numpy(zero_copy_only=True).astype(dtype)
        return csr_matrix((data, indices, offsets - offsets[0]), shape=(len(genes), len(self.tokenizer.genes)))

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


def _one_array(column: pa.ChunkedArray) -> pa.ListArray:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


class GlobalBatchSampler(torch.utils.data.Sampler[list[int]]):
    """Batches of this process: its piece of every *global* batch, of one order that all processes know.

    Cells are shuffled by (seed, epoch) alone; position j of global batch i is the same cell however many processes
    share the work: process ``rank`` of ``world_size`` gets positions ``rank * batch_size`` to
    ``(rank + 1) * batch_size``. What is left after the last full global batch is dropped (another rest each epoch);
    data smaller than one global batch are repeated to fill it.

    Args:
        num_cells: cells of the data set.
        batch_size: cells per process and batch.
        rank: this process.
        world_size: number of processes.
        seed: seeds the order of every epoch.

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
        self.epoch = 0

    @property
    def sampler(self) -> "GlobalBatchSampler":
        """Itself: accelerate hands the epoch to ``batch_sampler.sampler``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; call it before iterating."""
        self.epoch = epoch

    def __len__(self) -> int:
        return max(1, self.num_cells // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        global_size = self.batch_size * self.world_size
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_cells)
        if self.num_cells < global_size:
            order = np.resize(order, global_size)
        for batch in range(len(self)):
            start = batch * global_size + self.rank * self.batch_size
            yield order[start : start + self.batch_size].tolist()
