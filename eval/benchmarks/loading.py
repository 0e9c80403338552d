"""How long a checkpoint takes in a fresh process until there is a cell: import, loading, the first cell, the next.

Beside it stands a model of the 20M size with random weights. Each measurement is a process of its own that imports
transformers only (`fresh_load.py`) and takes code and weights from the folder. Knows nothing of quality.

    dcm-benchmark loading checkpoint/ --out loading.md
"""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import tyro

from eval.benchmarks import fresh_load
from modeling_dcm import SIZES, DCMConfig, DCMForDenoising
from tokenization import DCMTokenizer
from training.data.command_line import run
from training.data.files import written_aside

NUM_GENES, NUM_PERTURBATIONS, CELL_TYPES = 2_000, 2_000, ("hepg2", "jurkat", "k562", "rpe1")  # the paper's Table 2
VECTOR_DIM = 1280  # of ESM-2, 650M parameters
MAX_COUNT = 1_000
STAGES = ("import", "load", "first cell", "next cell")
PACKAGES = ("numpy", "torch", "transformers")

Seconds = dict[str, tuple[float, float]]


def main(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    *,
    repeats: int = 3,
    steps: int = 20,
    size: str = "20m",
    out: Path | None = None,
) -> dict[str, float]:
    """Time loading and the first cell of a checkpoint, and of a model with random weights, in fresh processes.

    The last line printed is load_s=.. first_cell_s=.. SIZE_load_s=.. SIZE_first_cell_s=.., seconds of the clock.

    Args:
        checkpoint: Folder of a checkpoint.
        repeats: Processes for each; medians are printed.
        steps: Network calls for a cell.
        size: Name among the paper's sizes of the model with random weights.
        out: Markdown file to write the table to; default none.
    """
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"no checkpoint folder {str(checkpoint)!r}")
    for name, value in {"repeats": repeats, "steps": steps}.items():
        if value < 1:
            raise ValueError(f"--{name} {value}: expected at least 1")
    if size not in SIZES:
        raise ValueError(f"--size {size}: expected one of {', '.join(SIZES)}")
    with tempfile.TemporaryDirectory(prefix="dcm-loading-") as home:
        folders = {checkpoint.resolve().name: checkpoint.resolve(), f"{size}, random": Path(home) / "random"}
        write_random_checkpoint(Path(home) / "random", size)
        described = {name: _described(folder) for name, folder in folders.items()}
        measured = {name: measure(folder, steps, repeats) for name, folder in folders.items()}
    text = _report(described, measured, steps, repeats)
    result = {}
    for prefix, seconds in zip(("", f"{size}_"), measured.values()):
        result |= {f"{prefix}load_s": seconds["load"][0], f"{prefix}first_cell_s": seconds["first cell"][0]}
    text += "\n" + " ".join(f"{name}={value:.2f}" for name, value in result.items()) + "\n"
    if out is not None:
        with written_aside(out) as aside:
            aside.write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return result


def write_random_checkpoint(folder: Path, size: str, *, num_genes: int = NUM_GENES) -> None:
    """Save a model of a paper's size, conditioned as for its Table 2, with random weights, and its tokenizer."""
    perturbations = [f"gene{i}" for i in range(NUM_PERTURBATIONS - 1)] + ["control"]
    config = DCMConfig(
        **SIZES[size],
        num_genes=num_genes,
        max_count=MAX_COUNT,
        num_cell_types=len(CELL_TYPES),
        num_perturbations=len(perturbations),
        perturbation_dim=VECTOR_DIM,
        cell_summary=False,
        gene_output_bias=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        DCMForDenoising(config).save_pretrained(folder)
    DCMTokenizer(
        genes=[f"gene{i}" for i in range(num_genes)],
        max_count=MAX_COUNT,
        cell_types=list(CELL_TYPES),
        perturbations=perturbations,
        control="control",
    ).save_pretrained(folder)


def measure(folder: Path, steps: int, repeats: int) -> Seconds:
    """Median seconds of each stage, of the clock and of the processor.

    Raises:
        ValueError: a fresh process cannot use the folder; the message is the last line of its error.
    """
    found = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(prefix="dcm-fresh-") as home:
            own = {"HF_HUB_OFFLINE": "1", "HF_HOME": home, "HF_MODULES_CACHE": str(Path(home) / "modules")}
            command = [sys.executable, "-I", fresh_load.__file__, str(folder), str(steps)]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | own, cwd=home, check=False)
        if done.returncode:
            raise ValueError(
                f"a fresh process cannot use {str(folder)!r}: {''.join(done.stderr.strip().splitlines()[-1:])}"
            )
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return {name: tuple(statistics.median(each[name][i] for each in found) for i in range(2)) for name in STAGES}


def _described(folder: Path) -> str:
    """What a folder holds: megabytes of weights, genes, backbone."""
    config = json.loads((folder / "config.json").read_text())
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
    return f"{size:,.1f} MB | {config['num_genes']:,} | {config['backbone']}"


def _report(described: dict[str, str], measured: dict[str, Seconds], steps: int, repeats: int) -> str:
    lines = [f"| checkpoint | weights | genes | backbone | {' | '.join(STAGES)} |", "|---" * (4 + len(STAGES)) + "|"]
    for name, seconds in measured.items():
        cells = [f"{clock:.2f} ({cpu:.2f})" for clock, cpu in seconds.values()]
        lines.append(f"| {name} | {described[name]} | {' | '.join(cells)} |")
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES)
    where = f"the CPU, {torch.get_num_threads()} threads (Python {platform.python_version()}, {versions})"
    return (
        "\n".join(lines) + "\n\n"
        f"Seconds of the clock (of the processor), medians of {repeats} fresh processes; one cell at a time, {steps} "
        "network calls each. *import* is `import transformers` with torch, *load* tokenizer and model from a folder "
        f"with `trust_remote_code=True`. On {where}.\n"
    )


def cli() -> None:
    """Entry point of ``python -m eval.benchmarks.loading``."""
    run(main)


if __name__ == "__main__":
    cli()
