"""What can be seen of a run: `training.jsonl`, trackers, a bar on a terminal, a readable line elsewhere, and curves.

Numbers of one interval are averaged over its steps and over the processes, and must be finite. Knows nothing of how
they came about.
"""

import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from training.config import TrainConfig
from training.data.files import written_aside
from training.loop.throughput import peak_memory

logger = logging.getLogger(__name__)

MEASURED = ("loss", "elbo", "gradient_norm")
SECONDS_BETWEEN_LINES = 30
MOST_SKIPPED = 30  # steps in a row whose gradient overflows in fp16: the scale, 2^16 at first, is halved each time
UNITS = {"elbo": "nats per gene", "validation_elbo": "nats per gene", "memory_gib": "GiB"}


class NotFinite(ValueError):  # noqa: N818 (a user's mistake like every ValueError, with the step it happened at)
    """A step's loss or gradient norm is not a finite number."""

    def __init__(self, step: int, what: str, value: float):
        super().__init__(f"the {what.replace('_', ' ')} is {value} at step {step}")
        self.step = step


class TrainingLog:
    """Collects the numbers of steps. Every process has one and calls it alike; the main process writes."""

    def __init__(self, config: TrainConfig, start: int, accelerator: Accelerator, utilisation_per_cell: float | None):
        self.config, self.accelerator = config, accelerator
        self.is_main = accelerator.is_main_process
        self.utilisation_per_cell = utilisation_per_cell
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=config.max_steps,
            initial=start,
            unit="step",
            desc="training",
            disable=not (self.is_main and self.terminal),
        )
        self.skipped = 0  # steps in a row up to now
        self.unchecked: list[torch.Tensor] = []
        self.interval: list[list[float]] = []
        self.rates: list[float] = []
        self.since = time.perf_counter()
        self.last_line = 0.0
        self.seconds_per_step = 0.0
        if self.is_main:
            config.out.mkdir(parents=True, exist_ok=True)
            self._forget_after(start)

    def _forget_after(self, start: int) -> None:
        """Drop the lines of steps that will be taken again."""
        path = self.config.out / "training.jsonl"
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if _is_of_step_before(line, start)]
            with written_aside(path) as aside:
                aside.write_text("".join(f"{line}\n" for line in lines))

    def note(self, measured: tuple[torch.Tensor, ...], learning_rate: float) -> None:
        """Keep the numbers of one step, :data:`MEASURED`, still on the device: reading them would make it wait."""
        self.unchecked.append(torch.stack([value.detach().float() for value in measured]))
        self.rates.append(learning_rate)
        self.bar.update(1)

    def check(self, step: int) -> None:
        """Average the numbers up to ``step`` over the processes.

        With fp16 a step whose gradient overflows is skipped and the loss scaled down for the next one: that is allowed,
        but not :data:`MOST_SKIPPED` times in a row.

        Raises:
            NotFinite: with the first step that has no finite loss or gradient norm, in every process alike.
        """
        if not self.unchecked:
            return
        means = self.accelerator.reduce(torch.stack(self.unchecked), "mean").tolist()
        first = step - len(means) + 1
        self.unchecked = []
        self.interval += means
        for number, values in enumerate(means, start=first):
            broken = {what: value for what, value in zip(MEASURED, values) if not math.isfinite(value)}
            is_skipped = list(broken) == ["gradient_norm"] and self.accelerator.scaler is not None
            self.skipped = self.skipped + 1 if is_skipped else 0
            if broken and (not is_skipped or self.skipped > MOST_SKIPPED):
                raise NotFinite(number, *next(iter(broken.items())))

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
        per_second = cells * self.accelerator.num_processes / (now - self.since)
        means["cells_per_second"] = per_second
        memory = peak_memory(self.accelerator.device)
        if memory is not None:
            means["memory_gib"] = memory
        if self.utilisation_per_cell is not None:
            means["flop_utilisation"] = self.utilisation_per_cell * per_second / self.accelerator.num_processes
        self.bar.set_postfix_str(f"loss {means['loss']:.4f}, {per_second:.0f} cells/s")
        self.seconds_per_step = (now - self.since) / len(self.interval)
        self.write({"step": step, **means})
        self.interval, self.rates, self.since = [], [], now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside the block does not count in cells per second."""
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began

    def write(self, values: dict[str, float]) -> None:
        """Append one line to the log, and hand it to the trackers."""
        numbers = {name: value for name, value in values.items() if name != "step"}
        self.accelerator.log(numbers, step=values["step"])
        if not self.is_main:
            return
        with (self.config.out / "training.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")
        now = time.perf_counter()
        is_wanted = now - self.last_line > SECONDS_BETWEEN_LINES or "loss" not in values
        if not self.terminal and is_wanted:
            logger.info(self._readable(values))
            self.last_line = now

    def _readable(self, values: dict[str, float]) -> str:
        """``step 1,200 of 6,000, 13 min left: loss 0.532, elbo 0.611 nats per gene, ...``"""
        step, steps = values["step"], self.config.max_steps
        minutes = (steps - step) * self.seconds_per_step / 60
        left = f", {minutes:.0f} min left" if step < steps and self.seconds_per_step else ""
        said = [f"{_words(name)} {value:.4g} {UNITS.get(name, '')}" for name, value in values.items() if name != "step"]
        return f"step {step:,} of {steps:,}{left}: {', '.join(part.strip() for part in said)}"

    def close(self) -> None:
        self.bar.close()


def _words(name: str) -> str:
    return name.removesuffix("_gib").replace("_", " ")


def _is_of_step_before(line: str, start: int) -> bool:
    try:
        return json.loads(line)["step"] <= start
    except json.JSONDecodeError:  # cut off when the run was killed
        return False
