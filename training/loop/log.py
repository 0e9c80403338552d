"""Show how a run goes: `training.jsonl`, trackers, a bar on a terminal, a readable line elsewhere, and curves.

Numbers of one interval are averaged over its steps and over the processes.
"""

import json
import logging
import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from modeling_dcm import DCMConfig
from modeling_dcm.layers_dcm import NUM_BUMPS
from training.config import TrainConfig
from training.data.files import write_text, written_aside
from training.loop.batches import TrainBatches
from training.loop.step import MEASURED, check_finite

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30
UNITS = {"elbo": "nats per gene", "validation_elbo": "nats per gene", "memory_gib": "GiB"}
PANELS = {  # of the curves: title, and the lines of the log that it shows, with their legend
    "ELBO, nats per gene": {"elbo": "training", "validation_elbo": "validation"},
    "loss": {"loss": "training", "validation_loss": "validation"},
    "gradient norm": {"gradient_norm": None},
    "learning rate": {"learning_rate": None},
    "cells per second": {"cells_per_second": None},
    "FLOP utilisation": {"flop_utilisation": None},
}
SCORES = {"MMD\N{SUPERSCRIPT TWO}": "mmd2", "W2": "w2", "correlation slope": "correlation_slope"}
SCORES |= {"variance of components": "component_variance"}
for title, name in SCORES.items():
    PANELS[f"generated: {title}"] = {f"score_{name}": "generated", f"score_{name}_floor": "floor"}
# dense 16-bit matrix products, FLOP/s, from the makers' data sheets; the first name found in the device's name counts
PEAK_FLOPS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


class TrainingLog:
    """Collects the numbers of steps. Every process has one and calls it alike; the main process writes.

    ``start`` steps are done already: lines of later ones are dropped from the log. ``utilisation_per_cell`` is the
    share of one second of the device's peak that a cell needs; None where it is not known. ``batches`` are what may
    have been waited for.
    """

    def __init__(
        self,
        config: TrainConfig,
        start: int,
        accelerator: Accelerator,
        utilisation_per_cell: float | None,
        batches: TrainBatches | None = None,
    ):
        self.config, self.accelerator, self.batches, self.waited = config, accelerator, batches, 0.0
        self.utilisation_per_cell = utilisation_per_cell
        self.path = config.out / "training.jsonl"
        self.terminal = sys.stderr.isatty() or "ipykernel" in sys.modules  # a notebook has bars, too
        shows_bar = accelerator.is_main_process and self.terminal
        self.bar = tqdm(total=config.max_steps, initial=start, unit="step", desc="training", disable=not shows_bar)
        self.skipped = 0  # steps in a row up to now
        self.unchecked: list[torch.Tensor] = []
        self.interval: list[list[float]] = []
        self.rates: list[float] = []
        self.since = time.perf_counter()
        self.last_line = self.seconds_per_step = 0.0
        if accelerator.is_main_process:
            config.out.mkdir(parents=True, exist_ok=True)
            kept = [line for line in read_log(config.out) if line["step"] <= start]
            write_text(self.path, "".join(f"{json.dumps(line)}\n" for line in kept))

    def note(self, measured: tuple[torch.Tensor, ...], learning_rate: float) -> None:
        """Keep the numbers of one step, :data:`MEASURED`, still on the device: reading them would make it wait."""
        self.unchecked.append(torch.stack([value.detach().float() for value in measured]))
        self.rates.append(learning_rate)
        self.bar.update(1)

    def check(self, step: int) -> None:
        """Average the numbers up to ``step`` over the processes; all of them raise ``NotFinite`` where one is not."""
        if not self.unchecked:
            return
        means = self.accelerator.reduce(torch.stack(self.unchecked), "mean").tolist()
        self.unchecked = []
        self.interval += means
        is_scaled = self.accelerator.scaler is not None
        self.skipped = check_finite(means, step - len(means) + 1, self.skipped, is_scaled=is_scaled)

    def line(self, step: int) -> None:
        """Write the means of the interval that ends with ``step``."""
        self.check(step)
        columns = dict(zip(MEASURED, zip(*self.interval)))
        columns["gradient_norm"] = [norm for norm in columns["gradient_norm"] if math.isfinite(norm)]
        means = {name: sum(column) / len(column) for name, column in columns.items() if column}
        if self.accelerator.scaler is not None:
            means["skipped_steps"] = len(self.interval) - len(columns["gradient_norm"])
        means["learning_rate"] = sum(self.rates) / len(self.rates)
        now = time.perf_counter()
        cells = len(self.interval) * self.config.batch_size * self.config.gradient_accumulation_steps
        of_process = cells / (now - self.since)
        means["cells_per_second"] = per_second = of_process * self.accelerator.num_processes
        if self.batches is not None:
            means["share_waiting"] = (self.batches.waited - self.waited) / (now - self.since)
            self.waited = self.batches.waited
        means["memory_gib"] = peak_memory(self.accelerator.device)
        if self.utilisation_per_cell is not None:
            means["flop_utilisation"] = self.utilisation_per_cell * of_process
        self.bar.set_postfix_str(f"loss {means['loss']:.4f}, {per_second:.0f} cells/s")
        self.seconds_per_step = (now - self.since) / len(self.interval)
        self.write({"step": step, **means})
        self.interval, self.rates, self.since = [], [], now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what is done inside the block out of cells per second."""
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began

    def write(self, values: dict[str, float]) -> None:
        """Append one line to the log, and hand it to the trackers."""
        numbers = {name: value for name, value in values.items() if name != "step"}
        self.accelerator.log(numbers, step=values["step"])
        if not self.accelerator.is_main_process:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")
        now = time.perf_counter()
        is_wanted = now - self.last_line > SECONDS_BETWEEN_LINES or "loss" not in values
        if not self.terminal and is_wanted:
            logger.info(self._readable(values["step"], numbers))
            self.last_line = now

    def _readable(self, step: int, numbers: dict[str, float]) -> str:
        """``step 1,200 of 6,000, 13 min left: loss 0.532, elbo 0.611 nats per gene, ...``"""
        steps = self.config.max_steps
        minutes = (steps - step) * self.seconds_per_step / 60
        left = f", {minutes:.0f} min left" if step < steps and self.seconds_per_step else ""
        words = {name: name.removesuffix("_gib").replace("_", " ") for name in numbers}
        said = [f"{words[name]} {value:.4g} {UNITS.get(name, '')}".strip() for name, value in numbers.items()]
        return f"step {step:,} of {steps:,}{left}: {', '.join(said)}"

    def close(self) -> None:
        self.bar.close()


def read_log(out: Path) -> list[dict[str, float]]:
    """Lines of the log of the run in ``out``, if there is one; of a killed run the last may be cut off: left out."""
    path, lines = out / "training.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def loss_still_falling(out: Path) -> float | None:
    """Return by how much per 1,000 steps the validation loss fell between its last two measurements; None if that was
    under 1 % of it, or there were not two."""
    measured = [(line["step"], line["validation_loss"]) for line in read_log(out) if "validation_loss" in line]
    if len(measured) < 2:
        return None
    (before, higher), (step, loss) = measured[-2:]
    return 1000 * (higher - loss) / (step - before) if higher - loss > 0.01 * abs(loss) else None


def draw_curves(out: Path) -> Path | None:
    """Draw `training_curves.png` from the log of the run in ``out``; None when there is nothing to draw yet."""
    path, lines = out / "training_curves.png", read_log(out)
    known = {name for line in lines for name in line}
    panels = [title for title, names in PANELS.items() if known & set(names)]
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows), layout="constrained")
    for title, axes in zip(panels, figure.subplots(rows, columns, squeeze=False).flat):
        for name, label in PANELS[title].items():
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                few = "." if len(points) < 30 else ""
                style = "--" if name.endswith("_floor") else "-"
                axes.plot(*zip(*points), linestyle=style, marker=few, linewidth=1.2, label=label)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, fontsize=8)
    for axes in list(figure.axes)[len(panels) :]:
        axes.remove()
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=110)
    return path


def peak_flops(device: torch.device) -> float | None:
    """Return the peak FLOP/s of a device by its name, for dense 16-bit matrix products; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def training_flops(config: DCMConfig, genes: int, queries: int | None = None) -> float:
    """Return the floating-point operations of forward and backward pass for one cell: three forward passes.

    By formula, of products of matrices and attention: a counter does not see into the kernels of flash attention. What
    is computed again with gradient checkpointing is left out, as is usual for a model's own operations.
    """
    D, M, layers = config.hidden_size, config.num_latents, config.num_hidden_layers
    Q = genes if queries is None else min(queries, genes)
    level = 2 * NUM_BUMPS * D if config.cell_summary else 0  # of one gene
    condition = 2 * D * D * (6 * layers + 6 + len(config.condition_names))

    def block(queries: int, keys: int, projected: int) -> float:
        """Of a block in which ``queries`` tokens attend to ``keys``, after ``projected`` products of width D."""
        of_tokens = 2 * D * D * (queries * (1 + 2 * config.mlp_ratio) + projected)
        return of_tokens + 4 * queries * keys * D

    if config.backbone == "dit":
        blocks = (layers - 1) * block(genes, genes, 3 * genes) + block(Q, genes, 3 * genes) + genes * level
    else:
        blocks = block(M, genes, 2 * genes + M) + layers * block(M, M, 3 * M) + block(Q, M, 2 * M + Q) + Q * level
        condition += 2 * D * D * 12
    head = 2 * Q * D * (config.num_small + 1)
    return 3.0 * (blocks + condition + head)


def peak_memory(device: torch.device) -> float:
    """Return the most memory so far, GiB: tensors on a GPU, or the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
