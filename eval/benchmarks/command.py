"""Measure a checkpoint's entropy curve, its sampling, what a training step costs, or how near cells are before one.

    dcm-benchmark entropy checkpoint/ --data shards/
    dcm-benchmark sampling checkpoint/ --real shards/test.h5ad --train shards/train.h5ad --out benchmark/
    dcm-benchmark training --out benchmark/
    dcm-benchmark start --data shards/ --out benchmark/

The entropy curve comes from validation cells only; test cells are read to score what was drawn.
"""

import json
import logging
import math
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tokenization.labels_dcm import shortened
from training.data.command_line import run, versions_of
from training.data.files import check_folder, write_text

logger = logging.getLogger(__name__)

PACKAGES = ("discrete-cell-models", "numpy", "torch", "transformers")


def entropy(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    *,
    data: Path,
    cells: int = 512,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Measure what a gene still costs when j random others are known, on validation cells, and fit a smooth curve.

    Prints the points and what schedules are predicted to lose, and stores the curve in CHECKPOINT/config.json, of which
    nothing else changes.

    Args:
        checkpoint: Folder of a checkpoint.
        data: Folder of shards with validation cells; their genes are the checkpoint's.
        cells: Validation cells to measure on, at most.
        seed: Of the orders in which genes become known.
    """
    if not checkpoint.is_dir():
        way_out = "download a checkpoint with 'hf download ID --local-dir FOLDER'"
        raise FileNotFoundError(f"no folder {str(checkpoint)!r} to write the curve into: {way_out}")
    _expect_at_least(2, cells=cells)
    if not (data / "tokenizer").is_dir():
        raise FileNotFoundError(f"no tokenizer/ in {str(data)!r}; expected a folder that dcm-convert wrote")
    import torch

    from training.data.checkpoint import load_checkpoint
    from training.data.loader import Cells
    from training.loop.validation import validation_entropy

    model, tokenizer = load_checkpoint(str(checkpoint))
    theirs = type(tokenizer).from_pretrained(data / "tokenizer").genes
    if theirs != tokenizer.genes:  # shards name genes by their position
        raise ValueError(
            f"{str(data)!r} has a panel of {len(theirs):,} genes ({shortened(theirs, 3)}), the checkpoint one of "
            f"{len(tokenizer.genes):,} ({shortened(tokenizer.genes, 3)}): expected the shards it was trained on"
        )
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    validation = Cells(data, "validation", tokenizer)
    measured, fitted = validation_entropy(model, validation, num_cells=cells, seed=seed)
    sys.stdout.write(_entropy_table(measured, fitted, len(tokenizer.genes)))
    path = checkpoint / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"entropy_curve": fitted}
    write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
    logger.info("stored in %s", path)
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
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> dict[str, float]:
    """Draw the cells of a real file under each schedule: speed, memory, and distance to the real cells.

    Beside the schedules stands the released code's loop, timed. Writes sampling.json and .md; the last line printed is
    speedup_vs_naive=.. mmd2_minus_linear100=.. se=..

    Args:
        checkpoint: Folder of a checkpoint, or its id on the Hub.
        real: The h5ad file of real test cells: one cell is drawn for each, with its conditions.
        train: The h5ad file of real training cells, for the floor: the same numbers between real and real.
        out: Folder to write to.
        num_cells: Draw for this many of the real cells, a random choice; default all, but at most 2000.
        seeds: How often each setting draws.
        naive_cells: Cells that the released code's loop is timed on.
        batch_size: Cells of a chunk.
        dtype: Precision of the weights and of the network's arithmetic.
    """
    _expect_at_least(2, num_cells=num_cells)
    _expect_at_least(1, seeds=seeds, naive_cells=naive_cells)
    check_folder(out)
    import numpy as np
    import torch

    from eval.benchmarks import sampling as measured
    from eval.benchmarks.costs import device_name
    from eval.comparison.cells import from_anndata
    from eval.reports.tables import markdown_table
    from training.data.checkpoint import cast_weights, load_checkpoint
    from training.data.formats import read_counts

    model, tokenizer = load_checkpoint(checkpoint)
    names = {"conditions": tokenizer.known_conditions(), "genes": tokenizer.genes, "way_out": "rename one"}
    real_cells = from_anndata(read_counts(real), name=str(real), **names)
    train_cells = None if train is None else from_anndata(read_counts(train), name=str(train), **names)
    wanted = min(len(real_cells), measured.PROTOCOL.max_cells if num_cells is None else num_cells)
    if wanted < len(real_cells):
        logger.info("%d of the %d cells of %s, a random choice", wanted, len(real_cells), real)
        real_cells = real_cells.thinned(wanted, np.random.default_rng(0))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cast_weights(model.to(device).eval(), dtype)
    options = {"train": train_cells, "seeds": seeds, "batch_size": batch_size, "num_naive": naive_cells}
    rows = measured.benchmark_sampling(model, tokenizer, real_cells, **options)
    name = Path(checkpoint).resolve().name if Path(checkpoint).exists() else checkpoint
    result = measured.summary(rows)
    what = f"{name}: {len(real_cells):,} cells x {model.config.num_genes:,} genes against {real.name}"
    how = f"{seeds} seeds, chunks of {batch_size}, {model.config.backbone}, {dtype}, {device_name(device)}"
    content = {"what": what, "how": how, "rows": [row.as_json() for row in rows]}
    text = [how, markdown_table(measured.table(rows), numbers=True), *measured.notes(rows)]
    _write(out / "sampling", what, text, result, content)
    return result


def training(
    *,
    out: Path = Path("benchmark"),
    sizes: tuple[Literal["small", "5m", "10m", "20m"], ...] | None = None,
    genes: tuple[int, ...] | None = None,
    backbones: tuple[Literal["dit", "latent"], ...] = ("dit", "latent"),
    plain: bool = True,
    rounds: int = 5,
) -> dict[str, float]:
    """Time training steps on simulated counts: operations, cells/s, waiting, memory and utilisation of the peak.

    On a GPU in bf16, with blocks compiled. Writes training.json and .md; the last line printed is
    step_speedup=.. latent_vs_dit=..

    Args:
        out: Folder to write to.
        sizes: Shapes of networks; default small and 5m on a CPU, 5m, 10m and 20m on a GPU.
        genes: Numbers of genes; default 500 and 2,000, on a GPU 17,002 too.
        backbones: Which of the networks.
        plain: Measure a plain step too: every gene is asked, and the head has one stage.
        rounds: How often the compared steps take turns.
    """
    _expect_at_least(1, genes=min(genes or (1,)), rounds=rounds)
    check_folder(out)
    from eval.benchmarks import training as measured
    from eval.benchmarks.costs import device_name
    from eval.reports.tables import markdown_table

    accelerator = measured.start_accelerator()
    on_gpu = accelerator.device.type == "cuda"
    sizes = sizes or (("5m", "10m", "20m") if on_gpu else ("small", "5m"))
    genes = genes or ((500, 2000, 17_002) if on_gpu else (500, 2000))
    options = {"rounds": rounds, "accelerator": accelerator, "backbones": backbones, "plain": plain}
    rows, left_out = measured.measure_steps(sizes, genes, **options)
    result = measured.summarise_steps(rows)
    where = f"{device_name(accelerator.device)}, {'bf16' if on_gpu else 'float32'}"
    content = {"device": where, "left_out": left_out, "rows": [row.as_json() for row in rows]}
    table = markdown_table(measured.steps_table(rows, accelerator.device), numbers=True)
    text = [table, *(f"Left out: {reason}." for reason in left_out)]
    _write(out / "training", f"Training steps on {where}", text, result, content)
    return result


def start(*, data: Path, out: Path = Path("benchmark"), seeds: int = 3) -> dict[str, float]:
    """Time how long it takes until drawn cells are within 2 % of the floor: a network that starts from statistics of
    the training cells and is not trained, and scVI (extra `baselines`) after 10, 50, 100, ... epochs.

    Writes start.json and .md; the last line printed is start_seconds=.. start_w2=.. scvi_seconds=.. (nan: not reached).

    Args:
        data: Folder of shards; cells are drawn beside the validation cells.
        out: Folder to write to.
        seeds: How often each draws.
    """
    _expect_at_least(2, seeds=seeds)
    check_folder(out)
    import torch

    from eval.benchmarks import start as measured
    from eval.benchmarks.costs import device_name
    from eval.reports.tables import markdown_table

    rows = measured.time_starts(data, seeds=seeds)
    result = measured.summary(rows)
    content = {"device": device_name(torch.device("cpu")), "rows": [row.as_json() for row in rows]}
    title = f"Time to within 2 % of the floor: W2 of log1p counts to the validation cells of {data.name}"
    _write(out / "start", title, [markdown_table(measured.table(rows), numbers=True)], result, content)
    return result


def last_line(result: dict[str, float]) -> str:
    """The result in one line for machines."""
    return " ".join(f"{name}={value:.4g}" for name, value in result.items())


def _write(path: Path, title: str, text: list[str], result: dict[str, float], content: dict) -> None:
    """Write path.json and path.md; the text goes to stdout too."""
    found = {name: value if math.isfinite(value) else None for name, value in result.items()}
    whole = {**content, **found, "versions": versions_of(PACKAGES)}
    write_text(path.with_suffix(".json"), json.dumps(whole, indent=1, allow_nan=False) + "\n")
    write_text(path.with_suffix(".md"), "\n\n".join([f"# {title}", *text, f"`{last_line(result)}`"]) + "\n")
    sys.stdout.write("\n".join([title, *text, last_line(result)]) + "\n")


def _entropy_table(measured: dict, fitted: dict, num_genes: int) -> str:
    """The measured points beside the fit, and what schedules lose by it."""
    from eval.reports.tables import markdown_table
    from modeling_dcm.schedule_dcm import AUTO_TOLERANCE, as_curve, entropies, predicted_kl, reveal_schedule

    curve = as_curve(fitted)
    h = entropies(curve, num_genes)
    points = zip(measured["observed"], measured["entropy"], measured["error"])
    table = [[f"{j:.0f}", f"{nats:.4f}", f"{error:.4f}", f"{h[int(j)]:.4f}"] for j, nats, error in points]
    lines = [markdown_table([["j observed", "h measured", "error", "h fitted"], *table], numbers=True)]
    lines.append(f"\n{measured['cells']} cells; predicted loss against one gene at a time, in nats per cell:")
    for schedule in ("cubic", "optimal"):
        revealed = {steps: reveal_schedule(num_genes, steps, schedule, curve) for steps in (8, 20, "auto")}
        loss = {steps: predicted_kl(genes, curve) for steps, genes in revealed.items()}
        wanted = AUTO_TOLERANCE * num_genes
        auto = f"steps='auto' takes {len(revealed['auto']) - 1}, for {loss['auto']:.3f} (wanted: {wanted:g})"
        lines.append(f"  {schedule:<8} {loss[8]:.3f} at 8 steps, {loss[20]:.3f} at 20 steps, {auto}")
    return "\n".join(lines) + "\n"


def _expect_at_least(least: int, **options: int | None) -> None:
    for name, value in options.items():
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least {least}")


cli = partial(run, entropy, sampling, training, start)

if __name__ == "__main__":
    cli()
