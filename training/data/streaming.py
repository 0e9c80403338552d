"""Read shards block by block, straight from Parquet: for data too large for the copy that ``datasets`` would make.

A block is a row group of about 4,096 cells, which the conversion has shuffled. Each epoch deals the blocks to the
processes in a seeded order, and permutes the cells of a few blocks at a time; so the order is known without reading,
and a resumed run reads nothing that it leaves out.
Letters: N cells of the split, B cells of a batch, M blocks.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tokenization import DCMTokenizer
from training.data.loader import ORDER, Cells, GlobalBatchSampler, SparseRows, to_csr
from training.data.remote import open_shard
from training.data.shards import COUNTS

BLOCKS_IN_MEMORY = 4
RANDOM_BLOCKS = 64  # at least, that random cells are of
FILES_AT_ONCE = 16  # that are opened: from elsewhere each takes several requests


def open_cells(
    folder: str | Path,
    split: str,
    tokenizer: DCMTokenizer | None = None,
    *,
    streaming: bool = False,
) -> Cells:
    """One split of a shards folder, memory-mapped or streaming. See :class:`Cells` for arguments and errors.

    Memory-mapped cells are read in any order at the same speed, from an Arrow copy that ``datasets`` makes once in its
    cache (of about the size of the counts in memory). Streaming needs no copy; ``batches`` are shuffled by blocks, and
    what is asked for in another order is read slowly.

    Raises:
        ValueError: a shard is damaged; the message names it. Streaming finds damaged counts when it comes to them.
    """
    with _damage_named(Path(folder) / split):
        return (StreamedCells if streaming else Cells)(folder, split, tokenizer)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turn what Arrow and ``datasets`` raise inside the block into one ValueError, if a shard of ``path`` is damaged.

    ``path`` is a shard or a folder of shards. They are read again to find the one: libraries do not say which it was.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # there is no one kind of error for broken bytes
        for file in sorted(path.glob("*.parquet")) if path.is_dir() else [path] * path.is_file():
            why = _damage(file)
            if why:
                raise ValueError(
                    f"the shard {str(file)!r} is damaged ({why}): copy it again, or run dcm-convert again"
                ) from error
        raise


def _damage(file: Path) -> str | None:
    """What Arrow says to a file that it cannot read, in one line; None for one that it can."""
    try:
        for _ in pq.ParquetFile(file).iter_batches():
            pass
    except Exception as why:
        return " ".join(str(why).split())
    return None


def _opened(file: str) -> tuple[pq.ParquetFile, pa.Table]:
    """A shard, and all of its columns but the counts."""
    opened = open_shard(file)
    return opened, opened.read(columns=[name for name in opened.schema_arrow.names if name not in COUNTS])


class StreamedCells(Cells):
    """Cells of Parquet row groups, of which the last few read are in memory."""

    def _open(self, files: Sequence[str]) -> tuple[datasets.Features, pa.Table]:
        self._paths = files
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            opened = list(pool.map(_opened, files))
        self._files = [file for file, _ in opened]
        metadata = [file.metadata for file in self._files]
        self._places = [(i, group) for i, m in enumerate(metadata) for group in range(m.num_row_groups)]
        sizes = [metadata[i].row_group(group).num_rows for i, group in self._places]
        self._first_cells = np.cumsum([0, *sizes])  # (M + 1,)
        self._blocks: OrderedDict[int, SparseRows] = OrderedDict()  # the last used is the last
        self._num_cells = int(self._first_cells[-1])
        # of merged parts not all may have panels
        table = pa.concat_tables((table for _, table in opened), promote_options="default")
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


class BlockBatchSampler(GlobalBatchSampler):
    """Batches of this process from its own blocks of cells.

    Blocks are dealt anew each epoch, by (seed, epoch) alone; the cells of :data:`BLOCKS_IN_MEMORY` blocks at a time
    are then permuted. All processes have the same number of batches in every epoch: as many as the fewest cells that
    any deal can give to a process; what is left is dropped (another rest each epoch). ``first_cells`` (M + 1,) are the
    first cell of each block, and the number of cells.

    Raises:
        ValueError: as :class:`GlobalBatchSampler`; also when a process could get less than one batch.
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
