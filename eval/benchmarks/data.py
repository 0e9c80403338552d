"""Measure conversion and reading of simulated cells: time, memory, bytes on disk, and cells per second.

    dcm-benchmark data --out eval/results

or, without the other benchmarks, ``python -m eval.benchmarks.data --out eval/results``. Results go to stdout,
progress to stderr. Knows nothing of models.
"""

import importlib.metadata
import json
import logging
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import torch

from eval.benchmarks.conversion import measure_conversion
from eval.benchmarks.data_report import Measured, last_line, summary, tables
from eval.benchmarks.readers import measure_readers
from training.data.command_line import run
from training.data.files import written_aside

logger = logging.getLogger(__name__)

PACKAGES = ("discrete-cell-models", "anndata", "datasets", "h5py", "numpy", "pyarrow", "scipy", "torch")


def main(
    *,
    out: Path | None = None,
    num_cells: tuple[int, ...] = (200_000, 20_000),
    num_genes: tuple[int, ...] = (2_000, 17_002),
    memory_cells: tuple[int, ...] = (50_000, 40_000),
    batch_sizes: tuple[int, ...] = (64, 512),
    seconds: float = 0.5,
    rounds: int = 7,
    scratch: Path | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Simulate cells, convert them to shards and read those, beside what people use otherwise.

    Prints tables; the last line is loader_vs_csr=.. loader_vs_lists=.. bytes_vs_gzip=.., all for the panel of most
    genes: cells per second of map-style or streaming at the batch size where they do worst, over those of a sparse
    matrix in memory and of the Python lists of datasets; bytes of shards over those of an h5ad file with gzip.

    Args:
        out: Folder for data.json and data.md; without it they are not written.
        num_cells: Cells of each simulated file.
        num_genes: Genes of each of them.
        memory_cells: Another number of cells for each of them, converted too: the peak memory is to be the same.
        batch_sizes: Cells per batch.
        seconds: Time for each reader in each round, at least one batch.
        rounds: How often the readers take turns.
        scratch: Existing folder for temporary files, 2 GB at the default sizes; default the system's.
        seed: Of the cells and their order.

    Returns:
        The numbers of the last line.

    Raises:
        ValueError: A number is out of range, or OUT is a file.
    """
    options = {"num_cells": num_cells, "num_genes": num_genes, "memory_cells": memory_cells, "batch_sizes": batch_sizes}
    options |= {"seconds": seconds, "rounds": rounds, "seed": seed}
    _check(options, out)
    measured = []
    for N, G, other in zip(num_cells, num_genes, memory_cells):
        with _scratch(scratch) as folder:
            logger.info("%s genes: converting %s and %s simulated cells", f"{G:,}", f"{N:,}", f"{other:,}")
            with tempfile.TemporaryDirectory(dir=folder) as aside:
                compared = measure_conversion(other, G, Path(aside), seed=seed)
            conversion = measure_conversion(N, G, folder, seed=seed)
            reading = {"batch_sizes": batch_sizes, "seconds": seconds, "rounds": rounds, "seed": seed}
            measured.append(Measured(conversion, compared, measure_readers(folder / "shards", **reading)))
    result, text = summary(measured), tables(measured)
    if out is not None:
        _write(out, options, measured, text)
    sys.stdout.write(f"{text}\n{last_line(result)}\n")
    return result


def _check(options: dict[str, object], out: Path | None) -> None:
    lengths = {name: len(options[name]) for name in ("num_cells", "num_genes", "memory_cells")}
    if len(set(lengths.values())) != 1 or not lengths["num_cells"]:
        raise ValueError(
            f"num_cells, num_genes and memory_cells have {list(lengths.values())} numbers; expected as many"
        )
    least = {"num_cells": 100, "num_genes": 10, "memory_cells": 100, "batch_sizes": 1, "rounds": 1}
    for name, smallest in least.items():
        values = options[name] if isinstance(options[name], tuple) else (options[name],)
        if not values or min(values) < smallest:
            raise ValueError(f"{name}={options[name]}; expected {smallest} or more")
    if not options["seconds"] > 0:
        raise ValueError(f"seconds={options['seconds']}; expected more than 0")
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"--out {str(out)!r} is a file; expected the name of a folder to write to")


@contextmanager
def _scratch(parent: Path | None) -> Iterator[Path]:
    """A temporary folder, where ``datasets`` keeps its cache too as long as it exists."""
    before = datasets.config.HF_DATASETS_CACHE
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        try:
            yield Path(folder)
        finally:
            datasets.config.HF_DATASETS_CACHE = before


def _write(out: Path, options: dict[str, object], measured: list[Measured], text: str) -> None:
    """Both files; of folders they name no more than what was typed."""
    typed = [("--out", out if not out.is_absolute() else out.name)]
    typed += [(f"--{name.replace('_', '-')}", value) for name, value in options.items() if value != _default(name)]
    words = [str(word) for name, value in typed for word in (name, *(value if isinstance(value, tuple) else (value,)))]
    command = shlex.join(["dcm-benchmark", "data", *words])
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
    machine = {"system": platform.system(), "processors": os.cpu_count(), "threads": torch.get_num_threads()}
    result = summary(measured)
    content = {"command": command, **machine, "versions": versions, **options, **result}
    content["measured"] = [one.as_json() for one in measured]
    with written_aside(out / "data.json") as aside:
        aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    how = ", ".join(f"{name} {version}" for name, version in versions.items())
    head = (
        f"# Conversion and reading of simulated cells\n\n`{command}`\n\n{machine['system']}, {machine['processors']} "
    )
    head += f"processors, {machine['threads']} of them for PyTorch; {how}.\n"
    with written_aside(out / "data.md") as aside:
        aside.write_text(f"{head}\n{text}\n`{last_line(result)}`\n", encoding="utf-8")


def _default(option: str) -> object:
    return main.__kwdefaults__[option]


def cli() -> None:
    """Run the measurement from the command line."""
    datasets.disable_progress_bars()
    run(main)


if __name__ == "__main__":
    cli()
