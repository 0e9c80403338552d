"""Time and memory of the two costly metrics at full size, and of the usual way as the yardstick.

Gaussian W2 and MMD^2 of 5,000 against 5,000 simulated sparse cells x 17,002 genes, and at 2,000 genes Gaussian W2 by
``scipy.linalg.sqrtm`` of the covariances beside ours. Knows nothing of files, models or protocols.

    python -m eval.metrics_benchmark
"""

import logging
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable

import numpy as np
from scipy import linalg, sparse

from eval import metrics
from tokenization.command_line import run

logger = logging.getLogger(__name__)

LEVEL_SD = 1.9  # of the log mean of genes: a tenth of 17,002 genes are on in a cell of 2,800 counts
COUNTS_PER_CELL = 2800
CELLS_AT_ONCE = 500


def main(
    num_cells: int = 5000, num_genes: int = 17_002, yardstick_genes: int = 2000, device: str | None = None
) -> None:
    """Time Gaussian W2 and MMD^2 of simulated cells, each in a process of its own, with its largest memory.

    Args:
        num_cells: Cells on each side.
        num_genes: Genes of the full-size comparison.
        yardstick_genes: Genes of the comparison with the square root of a matrix.
        device: Where to compute, such as cuda; default the CPU.
    """
    for metric in (metrics.mmd2, metrics.w2_gaussian):
        _report(metric.__name__, metric, num_cells, num_genes, device)
    _report("w2_gaussian", metrics.w2_gaussian, num_cells, yardstick_genes, device)
    _report("w2_gaussian by sqrtm", w2_gaussian_by_square_roots, num_cells, yardstick_genes, None)


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
    root = linalg.sqrtm(s_x)
    cross = linalg.sqrtm(root @ s_y @ root).real
    squared = ((x.mean(axis=0) - y.mean(axis=0)) ** 2).sum() + np.trace(s_x) + np.trace(s_y) - 2 * np.trace(cross)
    return float(np.sqrt(max(squared, 0.0)))


def _report(name: str, metric: Callable[..., float], num_cells: int, num_genes: int, device: str | None) -> None:
    """Measure in a fresh process, whose largest memory is the metric's, and print one line."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        value, seconds, cpu_seconds, gigabytes = pool.apply(_measured, (metric, num_cells, num_genes, device))
    logger.info(
        "%s, %d against %d cells x %d genes: %.4g in %.1f s (%.1f s of CPU), %.2f GiB",
        name,
        num_cells,
        num_cells,
        num_genes,
        value,
        seconds,
        cpu_seconds,
        gigabytes,
    )


def _measured(
    metric: Callable[..., float], num_cells: int, num_genes: int, device: str | None
) -> tuple[float, float, float, float]:
    """Value, seconds, seconds of CPU, and the largest memory of the process in GiB, the cells themselves included."""
    x, y = (simulated_cells(num_cells, num_genes, seed=seed) for seed in (0, 1))
    start, cpu_start = time.perf_counter(), time.process_time()
    value = metric(x, y, device=device)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return value, seconds, cpu_seconds, largest / (2**30 if sys.platform == "darwin" else 2**20)


def cli() -> None:
    """Run the measurement from the command line."""
    run(main)


if __name__ == "__main__":
    cli()
