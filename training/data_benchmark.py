"""How fast cells leave shards: our two readers, and what people use otherwise, on the same cells in the same run.

    python -m training.data_benchmark shards/

Every reader gives the dense counts (B, G) of random training cells as a tensor. Nothing here knows how a reader works,
and no model runs. Letters: B cells of a batch, G genes.
"""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import datasets
import numpy as np
import torch
import tyro
from tqdm import tqdm

from tokenization.command_line import run
from tokenization.files import read_h5ad
from training.stream import open_cells

ROUNDS = 3
READERS = ("map-style", "streaming", "in-memory CSR", "backed AnnData rows", "Python-list rows")

Reader = Callable[[np.ndarray], torch.Tensor]


def main(
    shards: Annotated[Path, tyro.conf.Positional],
    split: str = "train",
    batch_sizes: tuple[int, ...] = (64, 512),
    seconds: float = 2.0,
    seed: int = 0,
) -> dict[str, dict[int, float]]:
    """Measure cells per second of every way to read a split, and print a table.

    The readers take turns, and the best of three rounds counts, so that a busy machine slows all of them alike.

    Args:
        shards: folder that dcm-convert wrote.
        split: train, validation or test.
        batch_sizes: cells per batch.
        seconds: time for each reader, batch size and round, at least one batch.
        seed: of the order of the cells.

    Returns:
        Cells per second of each reader at each batch size; streaming is left out where the split is too small for it.

    Raises:
        FileNotFoundError: the folder has no such split.
        ValueError: a number is out of range.
    """
    if not seconds > 0 or not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"seconds={seconds}, batch_sizes={batch_sizes}; expected numbers above 0")
    cells = open_cells(shards, split)
    streamed = open_cells(shards, split, streaming=True)
    matrix = cells.csr()
    readers = _yardsticks(shards, split, matrix) | {"map-style": lambda rows: cells[rows]["counts"]}
    sampled = {B: _random_rows(len(cells), B, seed) for B in batch_sizes}
    flowing: dict[int, Iterator] = {}
    for B in batch_sizes:
        batches = streamed.batches(batch_size=B, seed=seed)
        try:
            next(batches)
        except ValueError:  # too few cells for one batch
            continue
        flowing[B] = batches
    best: dict[str, dict[int, float]] = {name: {} for name in READERS}
    jobs = [(B, name) for _ in range(ROUNDS) for B in batch_sizes for name in READERS]
    for B, name in tqdm(jobs, desc="reading cells", delay=1, disable=None):
        if name == "streaming":
            if B not in flowing:
                continue
            rate = _cells_per_second(lambda: next(flowing[B])["counts"], B, seconds)  # noqa: B023 (called at once)
        else:
            rate = _cells_per_second(lambda: readers[name](next(sampled[B])), B, seconds)  # noqa: B023
        best[name][B] = max(rate, best[name].get(B, 0.0))
    N, G = matrix.shape
    sys.stdout.write(f"{N:,} cells of {split}, {G:,} genes, {matrix.nnz / N:,.0f} of them above 0 in a cell\n")
    sys.stdout.write(_table(best, batch_sizes))
    return best


def _yardsticks(shards: Path, split: str, matrix) -> dict[str, Reader]:
    """Readers that people use otherwise; the matrix in memory keeps its int32, no reader checks or clips a count."""
    G = matrix.shape[1]
    files = [str(path) for path in sorted((shards / split).glob("*.parquet"))]
    rows_of_lists = datasets.load_dataset("parquet", data_files={split: files}, split=split)
    backed = read_h5ad(shards / f"{split}.h5ad", backed=True)

    def from_backed(rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([backed.X[int(row)].toarray() for row in rows]))

    def from_lists(rows: np.ndarray) -> torch.Tensor:
        counts = torch.zeros(len(rows), G, dtype=torch.int64)
        for cell, row in zip(counts, rows):
            lists = rows_of_lists[int(row)]
            cell[torch.tensor(lists["genes"], dtype=torch.int64)] = torch.tensor(lists["expressions"])
        return counts

    return {
        "in-memory CSR": lambda rows: torch.from_numpy(matrix[rows].toarray()),
        "backed AnnData rows": from_backed,
        "Python-list rows": from_lists,
    }


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


def _table(best: dict[str, dict[int, float]], batch_sizes: tuple[int, ...]) -> str:
    """Markdown: cells per second of each reader, and against the matrix in memory; then the two ratios asked for."""
    lines = ["| reader |" + "".join(f" cells/s, B={B} | of in-memory |" for B in batch_sizes)]
    lines.append("|---|" + "---|---|" * len(batch_sizes))
    memory, lists = best["in-memory CSR"], best["Python-list rows"]
    for name, rates in best.items():
        row = [f" {rates[B]:,.0f} | {rates[B] / memory[B]:.2f} |" if B in rates else " - | - |" for B in batch_sizes]
        lines.append(f"| {name} |" + "".join(row))
    ours = best["map-style"]
    for B in batch_sizes:
        lines.append(f"B={B} map_over_memory={ours[B] / memory[B]:.2f} map_over_lists={ours[B] / lists[B]:.1f}")
    return "\n".join(lines) + "\n"


def cli() -> None:
    """Run the measurement from the command line."""
    datasets.disable_progress_bars()
    run(main)


if __name__ == "__main__":
    cli()
