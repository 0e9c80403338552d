"""Measure a checkpoint (its entropy curve, what sampling costs and gives under each schedule) and every stage's speed.

    dcm-benchmark entropy checkpoint/ --data shards/
    dcm-benchmark sampling checkpoint/ --real shards/test.h5ad --train shards/train.h5ad --out benchmark/
    dcm-benchmark data --out benchmark/
    dcm-benchmark training --out benchmark/
    dcm-benchmark metrics
    dcm-benchmark loading checkpoint/

The entropy curve comes from validation cells only; test cells are read to score what was drawn. Results go to stdout,
progress to stderr.
"""

import importlib.metadata
import json
import logging
import math
import platform
import sys
from pathlib import Path
from typing import Annotated, Literal

import datasets
import numpy as np
import torch
import transformers
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eval.benchmarks.data import main as data_benchmark
from eval.benchmarks.loading import main as loading_benchmark
from eval.benchmarks.metrics import main as metrics_benchmark
from eval.benchmarks.resources import PeakMemory, known_peak
from eval.benchmarks.sampling import PROTOCOL, Sampled, benchmark_sampling, summary
from eval.benchmarks.sampling_report import figure, last_line, notes, table
from eval.benchmarks.steps import main as training_benchmark
from eval.comparison.cells import CellCounts, from_anndata
from eval.drawing.checkpoint import load_checkpoint
from modeling_dcm.schedule_dcm import AUTO_TOLERANCE, as_curve, entropies, predicted_kl, reveal_schedule
from tokenization import DCMTokenizer
from training.data.cells import Cells
from training.data.command_line import user_errors
from training.data.files import written_aside
from training.data.h5ad import read_h5ad
from training.loop.entropy import validation_entropy

logger = logging.getLogger(__name__)

PACKAGES = ("discrete-cell-models", "numpy", "torch", "transformers")


def entropy(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    *,
    data: Path,
    cells: int = 512,
    seed: int = 0,
    store: bool = True,
) -> dict[str, list[float]]:
    """Measure what a gene still costs when j random others are known, on validation cells, and fit a smooth curve.

    Prints the points and what schedules are predicted to lose, draws CHECKPOINT/entropy_curve.png, and stores the curve
    in CHECKPOINT/config.json, where schedule="optimal" and steps="auto" find it.

    Args:
        checkpoint: Folder of a checkpoint.
        data: Folder of shards with validation cells; their genes are the checkpoint's.
        cells: Validation cells to measure on, at most.
        seed: Of the orders in which genes become known.
        store: Put the curve into the configuration; nothing else of it changes.
    """
    if not checkpoint.is_dir():
        raise FileNotFoundError(
            f"no folder {str(checkpoint)!r}: the curve is written into a checkpoint's folder; download one from the "
            "Hub with 'hf download ID --local-dir FOLDER'"
        )
    if cells < 2:
        raise ValueError(f"--cells {cells}: expected at least 2")
    model, tokenizer = load_checkpoint(str(checkpoint))
    _check_panel(data, tokenizer)
    model.to(_device())
    validation = Cells(data, "validation", tokenizer)
    measured, fitted = validation_entropy(model, validation, num_cells=cells, seed=seed)
    sys.stdout.write(_entropy_table(measured, fitted, len(tokenizer.genes)))
    picture = checkpoint / "entropy_curve.png"
    with written_aside(picture) as aside:
        _entropy_figure(measured, fitted, checkpoint.name).savefig(aside, format="png")
    if store:
        store_curve(checkpoint, fitted)
    logger.info("figure: %s%s", picture, f"\nstored in {checkpoint / 'config.json'}" if store else "; nothing stored")
    return fitted


def sampling(
    checkpoint: Annotated[str, tyro.conf.Positional],
    *,
    real: Path,
    train: Path | None = None,
    out: Path = Path("benchmark"),
    num_cells: int | None = None,
    seeds: int = 3,
    naive_cells: int = 8,
    batch_size: int = 256,
    unconditional: bool = False,
    dtype: Literal["float32", "bfloat16"] = "float32",
    peak_tflops: float | None = None,
) -> dict[str, float]:
    """Draw the cells of a real file under each schedule: speed, memory, and distance to the real cells.

    Beside the schedules stand the loop of the released code (timed) and its reveal rule (scored). Writes sampling.json,
    sampling.md and sampling.png; the last line printed is speedup_vs_naive=.. mmd2_minus_linear100=.. se=..

    Args:
        checkpoint: Folder of a checkpoint, or its id on the Hub.
        real: The h5ad file of real test cells: one cell is drawn for each, with its conditions.
        train: The h5ad file of real training cells, for the floor: the same numbers between real and real.
        out: Folder to write to.
        num_cells: Draw for this many of the real cells, a random choice; default all, but at most 2000.
        seeds: How often each setting draws.
        naive_cells: Cells that the released code's loop is timed on.
        batch_size: Cells of a chunk.
        unconditional: Draw without conditions from a model that has some.
        dtype: Precision of the weights and of the network's arithmetic.
        peak_tflops: The GPU's peak in TFLOP/s for the dtype; default: looked up by the device's name.
    """
    for name, value in {"num-cells": num_cells, "seeds": seeds, "naive-cells": naive_cells}.items():
        least = 2 if name == "num-cells" else 1
        if value is not None and value < least:
            raise ValueError(f"--{name} {value}: expected at least {least}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {str(out)!r} is a file; expected the name of a folder to write to")
    model, tokenizer = load_checkpoint(checkpoint)
    columns = [] if unconditional else _condition_columns(tokenizer)
    real_cells = _real_cells(real, tokenizer, columns)
    train_cells = None if train is None else _real_cells(train, tokenizer, columns)
    wanted = min(len(real_cells), PROTOCOL.max_cells if num_cells is None else num_cells)
    if wanted < len(real_cells):
        logger.info("%d of the %d cells of %s, a random choice", wanted, len(real_cells), real)
        rows = np.random.default_rng(0).choice(len(real_cells), wanted, replace=False)
        real_cells = real_cells.take(np.sort(rows))
    device = _device()
    model.to(device, getattr(torch, dtype)).eval()
    conditions = _condition_ids(real_cells, tokenizer)
    tflops = _gpu_peak(peak_tflops, getattr(torch, dtype)) if device == "cuda" else None
    sampled = Sampled(model, tokenizer, conditions, real_cells, seeds, batch_size)
    rows = benchmark_sampling(
        sampled,
        train=train_cells,
        num_naive=naive_cells,
        peak_flops=None if tflops is None else 1e12 * tflops,
    )
    header = {
        "checkpoint": Path(checkpoint).resolve().name if Path(checkpoint).exists() else checkpoint,
        "real": real.name,
        "conditions": columns,
        "dtype": dtype,
        "peak_tflops": tflops,
        **_description(sampled),
    }
    result = summary(rows)
    _write(out, header, rows, result)
    return result


def store_curve(checkpoint: Path, curve: dict[str, list[float]]) -> None:
    """Put an entropy curve into a checkpoint's config.json, written aside and renamed; nothing else of it changes."""
    path = checkpoint / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["entropy_curve"] = curve
    with written_aside(path) as aside:
        aside.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _entropy_table(measured: dict, fitted: dict, num_genes: int) -> str:
    """The measured points beside the fit, and what schedules lose by it."""
    curve = as_curve(fitted)
    h = entropies(curve, num_genes)
    lines = [f"{'j observed':>10}  {'h measured':>10}  {'error':>7}  {'h fitted':>8}   ({measured['cells']} cells)"]
    for j, nats, error in zip(measured["observed"], measured["entropy"], measured["error"]):
        lines.append(f"{int(j):>10}  {nats:>10.4f}  {error:>7.4f}  {h[int(j)]:>8.4f}")
    lines.append("\npredicted loss against one gene at a time, in nats per cell:")
    for schedule in ("cubic", "optimal"):
        losses = [
            f"{predicted_kl(reveal_schedule(num_genes, steps, schedule, curve), curve):.3f} at {steps} steps"
            for steps in (8, 20)
        ]
        auto = reveal_schedule(num_genes, "auto", schedule, curve)
        losses.append(
            f"steps='auto' takes {len(auto) - 1}, for {predicted_kl(auto, curve):.3f} (wanted: {AUTO_TOLERANCE:g})"
        )
        lines.append(f"  {schedule:<8} {', '.join(losses)}")
    return "\n".join(lines) + "\n"


def _entropy_figure(measured: dict, fitted: dict, name: str) -> Figure:
    """Measured points with error bars and the fitted curve over the number of observed genes."""
    canvas = Figure(figsize=(9, 5.5), dpi=120, layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.subplots()
    axes.errorbar(
        measured["observed"],
        measured["entropy"],
        measured["error"],
        fmt="o",
        color="#1f5fa8",
        ms=5,
        capsize=3,
        label=f"measured on {measured['cells']:,} validation cells (bars: standard error over cells)",
    )
    axes.plot(fitted["observed"], fitted["entropy"], color="#e8762d", lw=2, label="fit: decreasing and convex")
    axes.set_xscale("symlog", linthresh=1, linscale=0.4)
    axes.set_xlim(-0.1, None)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(
        title=f"{name}: what is known about a gene when others of its cell are known",
        xlabel="observed genes j of the cell, a random choice (logarithmic from 1 on)",
        ylabel="h(j), nats that another gene still costs",
    )
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return canvas


def _check_panel(data: Path, tokenizer: DCMTokenizer) -> None:
    """Shards name genes by their position, so their panel must be the checkpoint's."""
    theirs = DCMTokenizer.from_pretrained(data / "tokenizer").genes if (data / "tokenizer").is_dir() else None
    if theirs is None:
        raise FileNotFoundError(f"no tokenizer/ in {str(data)!r}; expected a folder that dcm-convert wrote")
    if theirs != tokenizer.genes:
        raise ValueError(
            f"{str(data)!r} has a panel of {len(theirs):,} genes ({', '.join(theirs[:3])}, ...), the checkpoint one of "
            f"{len(tokenizer.genes):,} ({', '.join(tokenizer.genes[:3])}, ...): expected the shards it was trained on"
        )


def _condition_columns(tokenizer: DCMTokenizer) -> list[str]:
    """Columns of obs that hold the model's conditions."""
    columns = ["cell_type"] if tokenizer.cell_types else []
    columns += ["perturbation"] if tokenizer.perturbations else []
    return columns + list(tokenizer.covariates)


def _real_cells(path: Path, tokenizer: DCMTokenizer, columns: list[str]) -> CellCounts:
    """Real cells over the checkpoint's panel, with the labels of its conditions."""
    adata = read_h5ad(path)
    missing = [column for column in columns if column not in adata.obs]
    if missing:
        raise ValueError(
            f"{str(path)!r} has no obs column {missing}, a condition of the checkpoint; its columns: "
            f"{', '.join(adata.obs.columns) or 'none'}; rename one, or draw without conditions with --unconditional"
        )
    return from_anndata(adata, name=str(path), conditions=columns, genes=tokenizer.genes)


def _condition_ids(cells: CellCounts, tokenizer: DCMTokenizer) -> dict[str, torch.Tensor]:
    """Conditions of the cells as ids (N, ..)."""
    labels = {name: cells.labels[name].tolist() for name in cells.labels}
    fixed = {name: labels.pop(name) for name in ("cell_type", "perturbation") if name in labels}
    ids = tokenizer.conditions(num_cells=len(cells), covariates=labels or None, **fixed)
    return {name: value for name, value in ids.items() if name != "num_cells"}


def _description(sampled: Sampled) -> dict[str, object]:
    """What a benchmark was made of, for its files."""
    model = sampled.model
    return {
        "cells": len(sampled.real),
        "genes": model.config.num_genes,
        "seeds": sampled.seeds,
        "batch_size": sampled.batch_size,
        "backbone": model.config.backbone,
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": _device_name(),
        "memory": PeakMemory.ON_GPU if model.device.type == "cuda" else PeakMemory.ON_CPU,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }


def _write(out: Path, header: dict, rows: list, result: dict[str, float]) -> None:
    """The three files, and the table on stdout."""
    what = f"{header['checkpoint']}: {header['cells']:,} cells x {header['genes']:,} genes against {header['real']}"
    how = f"{header['seeds']} seeds, chunks of {header['batch_size']}, {header['dtype']}, {header['device']}"
    text = table(rows)
    remarks = notes(rows, header["memory"])
    found = {name: value if math.isfinite(value) else None for name, value in result.items()}
    content = {**header, **found, "rows": [row.as_json() for row in rows]}
    with written_aside(out / "sampling.json") as aside:
        aside.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    with written_aside(out / "sampling.md") as aside:
        listed = "\n".join(f"- {remark}" for remark in remarks)
        aside.write_text(f"# {what}\n\n{how}\n\n{text}\n\n{listed}\n\n`{last_line(result)}`\n", encoding="utf-8")
    with written_aside(out / "sampling.png") as aside:
        figure(rows, title=f"Sampling from {what} ({header['seeds']} seeds)").savefig(aside, format="png")
    sys.stdout.write("\n".join([what, how, "", text, "", *remarks, last_line(result)]) + "\n")


def _gpu_peak(given: float | None, dtype: torch.dtype) -> float | None:
    """The GPU's peak, as given or by its name."""
    name = torch.cuda.get_device_name()
    found = known_peak(name, dtype) if given is None else given
    if found is None:
        logger.warning("the peak of %r is not known: pass --peak-tflops to see the utilisation", name)
    return found


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'' if threads == 1 else 's'}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cli() -> None:
    """Entry point of ``dcm-benchmark``."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    with user_errors():
        tyro.extras.subcommand_cli_from_dict(
            {
                "entropy": entropy,
                "sampling": sampling,
                "data": data_benchmark,
                "training": training_benchmark,
                "metrics": metrics_benchmark,
                "loading": loading_benchmark,
            }
        )


if __name__ == "__main__":
    cli()
