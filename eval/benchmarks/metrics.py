"""Time and memory of the two costly metrics at full size, and of the usual way as the yardstick.

Gaussian W2 and MMD^2 of 5,000 against 5,000 simulated sparse cells x 17,002 genes, and at 2,000 genes Gaussian W2 by
``scipy.linalg.sqrtm`` of the covariances beside ours. Each is measured in a process of its own. Knows nothing of files,
models or protocols.

    dcm-benchmark metrics --out metrics.md
"""

import importlib.metadata
import multiprocessing
import platform
import resource
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import linalg, sparse
from threadpoolctl import threadpool_info

from eval.metrics import distances as metrics
from training.data.command_line import run
from training.data.files import written_aside

LEVEL_SD = 1.9  # of the log mean of genes: a tenth of 17,002 genes are on in a cell of 2,800 counts
COUNTS_PER_CELL = 2800
CELLS_AT_ONCE = 500
PACKAGES = ("numpy", "scipy", "torch")


@dataclass(frozen=True)
class Measured:
    """One metric of two samples: its value, seconds, seconds of CPU, and the process's largest memory in GiB."""

    name: str
    num_cells: int
    num_genes: int
    value: float
    seconds: float
    cpu_seconds: float
    gibibytes: float
    threads: int


def main(
    num_cells: int = 5000,
    num_genes: int = 17_002,
    yardstick_genes: int = 2000,
    device: str | None = None,
    out: Path | None = None,
) -> dict[str, float]:
    """Time Gaussian W2 and MMD^2 of simulated cells, each in a process of its own, with its largest memory.

    The last line printed is mmd2_and_w2_gaussian_s=.. peak_gib=.. sqrtm_speedup=..

    Args:
        num_cells: Cells on each side.
        num_genes: Genes of the full-size comparison.
        yardstick_genes: Genes of the comparison with the square root of a matrix.
        device: Where to compute, such as cuda; default the CPU.
        out: Markdown file to write the table to; default none.
    """
    for name, value in {"num-cells": num_cells, "num-genes": num_genes, "yardstick-genes": yardstick_genes}.items():
        if value < 2:
            raise ValueError(f"--{name} {value}: expected at least 2")
    found = [_measured(metric, num_cells, num_genes, device) for metric in (metrics.mmd2, metrics.w2_gaussian)]
    found.append(_measured(metrics.w2_gaussian, num_cells, yardstick_genes, device))
    found.append(_measured(w2_gaussian_by_square_roots, num_cells, yardstick_genes, device))
    result = {
        "mmd2_and_w2_gaussian_s": found[0].seconds + found[1].seconds,
        "peak_gib": max(found[0].gibibytes, found[1].gibibytes),
        "sqrtm_speedup": found[3].seconds / found[2].seconds,
    }
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES)
    where = f"the CPU, {found[0].threads} BLAS threads" if device is None else device
    text = (
        f"{_table(found)}\n\nOn {where} (Python {platform.python_version()}, {versions}). Memory is the largest of a "
        "process that simulates the cells, holds them and computes the metric.\n\n"
        + " ".join(f"{name}={value:.2f}" for name, value in result.items())
        + "\n"
    )
    if out is not None:
        with written_aside(out) as aside:
            aside.write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return result


def simulated_cells(num_cells: int, num_genes: int, *, seed: int) -> sparse.csr_matrix:
    """(num_cells, num_genes) log1p counts as sparse as droplet data: log-normal levels, gamma noise, Poisson counts."""
    level = np.random.default_rng(0).lognormal(0.0, LEVEL_SD, num_genes)
    level *= COUNTS_PER_CELL / level.sum()
    rng = np.random.default_rng([1, seed])
    blocks = []
    for start in range(0, num_cells, CELLS_AT_ONCE):
        rows = min(CELLS_AT_ONCE, num_cells - start)
        noise = rng.gamma(2.0, 0.5, (rows, num_genes)) * rng.lognormal(0.0, 0.4, (rows, 1))
        blocks.append(sparse.csr_matrix(rng.poisson(level * noise).astype(np.float64)))
    return sparse.vstack(blocks, format="csr").log1p()


def w2_gaussian_by_square_roots(x: sparse.csr_matrix, y: sparse.csr_matrix, *, device: str | None = None) -> float:
    """Eq. 9 as it is printed, through genes x genes matrices and their square roots; ``device`` is not used."""
    x, y = x.toarray(), y.toarray()
    s_x, s_y = np.cov(x.T), np.cov(y.T)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", linalg.LinAlgWarning)  # genes that are never on make them singular
        root = linalg.sqrtm(s_x).real
        cross = linalg.sqrtm(root @ s_y @ root).real
    squared = ((x.mean(axis=0) - y.mean(axis=0)) ** 2).sum() + np.trace(s_x) + np.trace(s_y) - 2 * np.trace(cross)
    return float(np.sqrt(max(squared, 0.0)))


def _measured(metric: Callable[..., float], num_cells: int, num_genes: int, device: str | None) -> Measured:
    """Measure in a fresh process, whose largest memory is the metric's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (metric, num_cells, num_genes, device))


def _measure(metric: Callable[..., float], num_cells: int, num_genes: int, device: str | None) -> Measured:
    """Simulate both samples and compute one metric of them."""
    x, y = (simulated_cells(num_cells, num_genes, seed=seed) for seed in (0, 1))
    start, cpu_start = time.perf_counter(), time.process_time()
    value = metric(x, y, device=device)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    threads = max((pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"), default=1)
    return Measured(metric.__name__, num_cells, num_genes, value, seconds, cpu_seconds, largest, threads)


def _table(found: Sequence[Measured]) -> str:
    """A Markdown table, one line for each measurement."""
    lines = ["| metric | cells a side | genes | value | s | s of CPU | GiB |", "|---|---|---|---|---|---|---|"]
    for one in found:
        size = f"{one.num_cells:,} | {one.num_genes:,} | {one.value:.6g}"
        lines.append(f"| `{one.name}` | {size} | {one.seconds:.1f} | {one.cpu_seconds:.1f} | {one.gibibytes:.2f} |")
    return "\n".join(lines)


def cli() -> None:
    """Run the measurement from the command line."""
    run(main)


if __name__ == "__main__":
    cli()
