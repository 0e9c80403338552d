"""What a conversion costs: time, peak memory and bytes on disk, each in a process of its own.

Cells are simulated twice over: with counts, and nearly without. What the second conversion needs is the program, its
libraries and the names of the cells; the counts' share of memory is what the first needs more. Knows nothing of
reading shards.
"""

import logging
import resource
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from eval.benchmarks.simulated_counts import counts_of_panel, write_simulated
from training.convert_h5ad import main as convert

MIB = 2**20
PARTS = {"test_fraction": 0.05, "validation_fraction": 0.05}  # few: 20,000 cells are to fill a bucket of training cells


@dataclass(frozen=True)
class Conversion:
    """Of one simulated file.

    Attributes:
        num_cells: cells of all parts.
        num_genes: genes of the panel.
        expressed: genes above 0 in a cell, on average.
        seconds: of the conversion, libraries loaded before.
        peak_mib: largest memory of the process.
        empty_mib: the same for as many cells with a count or two each.
        gzip_bytes: bytes per cell of the h5ad that was read, compressed with gzip as anndata does.
        shard_bytes: bytes per cell of the Parquet files.
        folder_bytes: bytes per cell of all that was written, its copies as h5ad with it.
    """

    num_cells: int
    num_genes: int
    expressed: float
    seconds: float
    peak_mib: float
    empty_mib: float
    gzip_bytes: float
    shard_bytes: float
    folder_bytes: float

    @property
    def counts_mib(self) -> float:
        """The counts' share of the peak."""
        return self.peak_mib - self.empty_mib

    @property
    def csr_mib(self) -> float:
        """What all counts would need in memory, as a sparse matrix of int32."""
        return 8 * self.num_cells * self.expressed / MIB


def measure_conversion(num_cells: int, num_genes: int, folder: Path, *, seed: int) -> Conversion:
    """Simulate cells, convert them to ``folder / "shards"``, which stays, and say what it cost."""
    empty = folder / "empty.h5ad"
    write_simulated(empty, num_cells, num_genes, counts_per_cell=1, seed=seed)
    _, empty_mib = _in_a_fresh_process(empty, folder / "empty")
    shutil.rmtree(folder / "empty")
    empty.unlink()
    source = folder / "cells.h5ad"
    stored = write_simulated(source, num_cells, num_genes, counts_per_cell=counts_of_panel(num_genes), seed=seed)
    seconds, peak_mib = _in_a_fresh_process(source, folder / "shards")
    written = [path for path in (folder / "shards").rglob("*") if path.is_file()]
    conversion = Conversion(
        num_cells=num_cells,
        num_genes=num_genes,
        expressed=stored / num_cells,
        seconds=seconds,
        peak_mib=peak_mib,
        empty_mib=empty_mib,
        gzip_bytes=source.stat().st_size / num_cells,
        shard_bytes=sum(path.stat().st_size for path in written if path.suffix == ".parquet") / num_cells,
        folder_bytes=sum(path.stat().st_size for path in written) / num_cells,
    )
    source.unlink()
    return conversion


def _in_a_fresh_process(source: Path, out: Path) -> tuple[float, float]:
    """What :func:`_converted` returns there: a process whose memory holds nothing else."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_say_nothing) as pool:
        return pool.submit(_converted, source, out).result()


def _say_nothing() -> None:
    logging.disable(logging.WARNING)  # nearly empty cells are like one another, which a conversion reports


def _converted(source: Path, out: Path) -> tuple[float, float]:
    """Seconds of the conversion, and the largest memory of this process in MiB."""
    start = time.perf_counter()
    convert(source, out=out, processes=1, **PARTS)
    return time.perf_counter() - start, _peak_mib()


def _peak_mib() -> float:
    status = Path("/proc/self/status")
    if status.is_file():  # of this program alone; the other number begins with what its parent needed
        return next(int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (MIB if sys.platform == "darwin" else 1024)
