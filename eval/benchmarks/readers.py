"""How fast cells leave shards: our two readers, and what people use otherwise, on the same cells in the same run.

Every reader gives the dense counts (B, G) of random training cells as a tensor. Readers take turns, so that a machine
that is busy with something else slows all of them alike, and are compared within a round. Nothing here knows how a
reader works, and no model runs. Letters: B cells of a batch, G genes.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
from tqdm import tqdm

from training.data.cells import Cells
from training.data.h5ad import read_h5ad
from training.data.streaming import open_cells

MAP_STYLE, STREAMING, IN_MEMORY = "map-style", "streaming", "in-memory CSR"
WIDENED, BACKED = "map-style, widened to int64", "backed AnnData by row"
PYTHON_LISTS, SINGLE_LISTS = "Python-list rows of a batch", "Python-list rows one by one"
READERS = (MAP_STYLE, STREAMING, WIDENED, IN_MEMORY, BACKED, PYTHON_LISTS, SINGLE_LISTS)

Reader = Callable[[np.ndarray], torch.Tensor]


@dataclass(frozen=True)
class Rates:
    """Cells per second of each reader at each batch size in each round; where cells are too few to stream, none."""

    rounds: dict[str, dict[int, list[float]]]

    def of(self, reader: str, B: int) -> float | None:
        """Cells per second in the median round."""
        found = self.rounds[reader].get(B)
        return None if found is None else statistics.median(found)

    def ratio(self, reader: str, yardstick: str, B: int) -> tuple[float, float, float] | None:
        """How many times as fast as a yardstick: median, smallest and largest of the rounds."""
        found = self.rounds[reader].get(B)
        if found is None:
            return None
        ratios = [ours / theirs for ours, theirs in zip(found, self.rounds[yardstick][B], strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)


def measure_readers(shards: Path, *, batch_sizes: tuple[int, ...], seconds: float, rounds: int, seed: int) -> Rates:
    """Read random training cells in every way, ``seconds`` in each round, one batch at least."""
    readers = whole_readers(shards)
    streamed = open_cells(shards, "train", streaming=True)
    found: dict[str, dict[int, list[float]]] = {name: {} for name in READERS}
    jobs = [(B, name) for B in batch_sizes for _ in range(rounds) for name in READERS]
    flowing = {B: streamed.batches(batch_size=B, seed=seed) for B in batch_sizes if _can_stream(streamed, B)}
    sampled = {B: _random_rows(len(streamed), B, seed) for B in batch_sizes}
    for B, name in tqdm(jobs, desc="reading cells", delay=1, disable=None):
        if name != STREAMING:
            rate = _cells_per_second(lambda: readers[name](next(sampled[B])), B, seconds)  # noqa: B023 (called at once)
        elif B in flowing:
            rate = _cells_per_second(lambda: next(flowing[B])["input_ids"], B, seconds)  # noqa: B023
        else:
            continue
        found[name].setdefault(B, []).append(rate)
    return Rates(found)


def whole_readers(shards: Path) -> dict[str, Reader]:
    """Readers of training cells by their numbers; the matrix in memory is int32, as it is in an h5ad file."""
    cells = open_cells(shards, "train")
    matrix = cells.csr()
    files = [str(path) for path in sorted((shards / "train").glob("*.parquet"))]
    table = datasets.load_dataset("parquet", data_files={"train": files}, split="train")
    return {
        MAP_STYLE: lambda rows: cells[rows]["input_ids"],
        WIDENED: lambda rows: cells[rows]["input_ids"].long(),
        IN_MEMORY: lambda rows: torch.from_numpy(matrix[rows].toarray()),
        BACKED: _backed_rows(shards),
        PYTHON_LISTS: partial(_from_lists, table.__getitems__, matrix.shape[1]),
        SINGLE_LISTS: partial(_from_lists, lambda rows: map(table.__getitem__, rows), matrix.shape[1]),
    }


def _backed_rows(shards: Path) -> Reader:
    X = read_h5ad(shards / "train.h5ad", backed=True).X
    return lambda rows: torch.from_numpy(np.concatenate([X[int(row)].toarray() for row in rows]))


def _from_lists(read: Callable[[list[int]], Iterable[dict[str, list[int]]]], G: int, rows: np.ndarray) -> torch.Tensor:
    """What a DataLoader's collate function does with the rows that ``datasets`` gives by default, in short."""
    counts = np.zeros((len(rows), G), dtype=np.int64)
    for cell, lists in zip(counts, read(rows.tolist())):
        cell[lists["genes"]] = lists["expressions"]
    return torch.from_numpy(counts)


def _can_stream(cells: Cells, B: int) -> bool:
    try:
        next(cells.batches(batch_size=B, seed=0))
    except ValueError:  # too few cells for one batch
        return False
    return True


def _random_rows(num_cells: int, B: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng([seed, B])
    while True:
        yield rng.integers(num_cells, size=B)


def _cells_per_second(read: Callable[[], torch.Tensor], B: int, seconds: float) -> float:
    start, batches = time.perf_counter(), 0
    while not batches or time.perf_counter() - start < seconds:
        read()
        batches += 1
    return batches * B / (time.perf_counter() - start)
