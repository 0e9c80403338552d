"""Measure what a training step costs, by size, backbone and number of genes, beside a plain step.

A step is what `training/train.py` does between two lines of its log: noise for a global batch, forward and backward
pass, clipping, the optimiser, the averages. The plain step asks every gene, and its head has one stage over all counts.
Letters: B cells, G genes.
"""

import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from eval.benchmarks.costs import interleaved, product_rate
from modeling_dcm import SIZES, DCMConfig, DCMForDenoising
from training.config import TrainConfig
from training.loop.batches import noised
from training.loop.log import peak_flops, training_flops
from training.loop.optimiser import build_optimizer, update_average
from training.loop.processes import build_accelerator
from training.loop.run import take_step
from training.loop.start import attention_implementation

SHAPES = {"small": {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}, **SIZES}
PLAIN, OURS = "plain", "ours"
TOKENS = {"cpu": 4_096, "cuda": 262_144}  # cells times genes of a step
MAX_QUERIES = 2048
MAX_COUNT = 500
MEAN_COUNT = 1.5  # of a gene in a cell: deep data
OPTIONS = TrainConfig(data=Path("."), out=Path("."), trackers="none", conditions="none")


@dataclass
class Case:
    """One network on one batch, and what its steps cost, once they are measured."""

    size: str
    backbone: str
    variant: str
    genes: int  # G
    cells: int  # B
    parameters: int = 0
    flops: float = 0.0  # of a step
    seconds: list[float] = field(default_factory=list)  # of each step
    memory_mib: float | None = None

    @property
    def name(self) -> str:
        return f"{self.size}, {self.backbone}, {self.variant}"

    @property
    def cells_per_second(self) -> float:
        return self.cells / statistics.median(self.seconds)

    def as_json(self) -> dict[str, object]:
        return {**asdict(self), "cells_per_second": self.cells_per_second}


class Training:
    """One network in training on simulated cells: ``step()`` takes the next step."""

    def __init__(self, case: Case, accelerator: Accelerator):
        self.case, self.accelerator = case, accelerator
        queries = min(MAX_QUERIES, max(1, case.genes // 4)) if case.variant == OURS else None
        self.config = replace(OPTIONS, backbone=case.backbone, query_genes=queries)
        torch.manual_seed(0)
        shape = DCMConfig(
            **SHAPES[case.size],
            num_genes=case.genes,
            max_count=MAX_COUNT,
            backbone=case.backbone,
            num_latents=self.config.num_latents,
            library_size_conditioning=True,
            gene_output_bias=self.config.gene_output_bias if case.variant == OURS else 0,
        )
        how = (accelerator.device, accelerator.mixed_precision)
        shape._attn_implementation = attention_implementation(self.config, *how)
        self.network = DCMForDenoising(shape)
        optimizer = build_optimizer(self.network, self.config)
        self.model, self.optimizer = accelerator.prepare(self.network.train(), optimizer)
        self.ema = [parameter.detach().clone().float() for parameter in self.network.parameters()]
        self.batches = self._batches()

    def step(self) -> None:
        """Everything from noise to averages, once."""
        take_step(self.model, self.optimizer, self.batches, self.accelerator, self.config)
        update_average(self.ema, self.network, 0, self.config.ema_decay)

    def flops(self) -> float:
        """Floating-point operations of a step, by the counter."""
        return training_flops(self.model, next(self.batches))

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        rng = np.random.default_rng(0)
        rates = rng.gamma(0.3, MEAN_COUNT / 0.3, self.case.genes)  # a few loud genes, many silent ones
        counts = torch.from_numpy(rng.poisson(rates * rng.gamma(4, 1 / 4, (self.case.cells, 1))))
        cells = {"input_ids": counts.clamp(max=MAX_COUNT), "library_size": counts.sum(dim=1)}
        for index in count():
            yield noised(cells, self.config, self.network.config, index, 0, 1, self.accelerator.device)


def start_accelerator() -> Accelerator:
    """One process on the GPU in bf16, or on the CPU in float32."""
    return build_accelerator(replace(OPTIONS, mixed_precision="bf16" if torch.cuda.is_available() else "no"))


def measure_steps(
    sizes: tuple[str, ...], genes: tuple[int, ...], *, rounds: int, accelerator: Accelerator
) -> tuple[list[Case], list[str]]:
    """Rows of both backbones, ours and plain, which take turns at each size and number of genes; what was left out."""
    device = accelerator.device
    rows, left_out = [], []
    jobs = [(size, number) for size in sizes for number in sorted(genes)]
    for size, number in tqdm(jobs, desc="training steps", delay=1, disable=None):
        cells = max(1, TOKENS[device.type] // number)
        found, works = {}, {}
        for case in (Case(size, b, variant, number, cells) for b in ("dit", "latent") for variant in (PLAIN, OURS)):
            try:
                training = Training(case, accelerator)
                training.step()
            except torch.OutOfMemoryError as error:
                left_out.append(f"{case.name} at {number:,} genes: {str(error).splitlines()[0]}")
                continue
            case.parameters, case.flops = training.network.num_parameters(), training.flops()
            found[case.name], works[case.name] = case, training.step
        for name, cost in interleaved(works, device, rounds=rounds).items():
            found[name].seconds, found[name].memory_mib = cost.seconds, cost.most_mib
        rows += found.values()
        accelerator.free_memory()
    return rows, left_out


def summarise_steps(rows: list[Case]) -> dict[str, float]:
    """The numbers of the last line, at the last size and genes: medians of ratios of turns; nan without them."""
    last = {(row.backbone, row.variant): row.seconds for row in rows if row.genes == rows[-1].genes}

    def ratio(above: tuple[str, str], below: tuple[str, str]) -> float:
        pairs = zip(last.get(above, ()), last.get(below, ()))
        return statistics.median([a / b for a, b in pairs] or [math.nan])

    return {
        "step_speedup": ratio(("dit", PLAIN), ("dit", OURS)),
        "latent_vs_dit": ratio(("dit", PLAIN), ("latent", OURS)),
    }


def steps_table(rows: list[Case], device: torch.device) -> list[tuple[str, ...]]:
    """Lines of the table, the header first."""
    peak = peak_flops(device) or product_rate(device)
    lines = [("network", "genes", "cells", "parameters", "cells/s", "s/step", "MiB", "FLOP use")]
    for row in rows:
        memory = "" if row.memory_mib is None else f"{row.memory_mib:,.0f}"
        seconds = statistics.median(row.seconds)
        numbers = (f"{row.genes:,}", f"{row.cells:,}", f"{row.parameters / 1e6:.1f} M")
        numbers += (f"{row.cells_per_second:,.3g}", f"{seconds:.3g}", memory, f"{row.flops / seconds / peak:.1%}")
        lines.append((row.name, *numbers))
    return lines
