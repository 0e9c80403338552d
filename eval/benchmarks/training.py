"""Measure what a training step costs, by size, backbone and number of genes, beside a plain step.

A step is what `training/train.py` does between two lines of its log: cells made dense, noise, forward and backward
pass, clipping, the optimiser, the averages. The plain step asks every gene, and its head has one stage over all counts.
Letters: B cells, G genes.
"""

import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from scipy.sparse import csr_matrix
from tqdm import tqdm

from eval.benchmarks.costs import Operations, interleaved, product_rate
from modeling_dcm import SIZES, DCMConfig, DCMForDenoising
from training.config import TrainConfig
from training.loop.accelerator import attention_implementation, build_accelerator, compile_blocks, compiles
from training.loop.batches import TrainBatches
from training.loop.log import peak_flops, training_flops
from training.loop.step import build_optimizer, take_step, update_average

SHAPES = {"small": {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 1}, **SIZES}
PLAIN, OURS = "plain", "ours"
TOKENS = {"cpu": 4_096, "cuda": 262_144}  # cells times genes of a step
STEPS = {"cpu": 1, "cuda": 5}  # of a turn
BATCHES = 4  # of different cells
MAX_QUERIES = 2048
MAX_COUNT = 500
MEAN_COUNT = 1.5  # of a gene in a cell: deep data
OPTIONS = TrainConfig(data=Path("."), out=Path("."), trackers="none", conditions="none")


@dataclass
class Case:
    """One network on batches of one size, and what its steps cost, once they are measured."""

    size: str
    backbone: str
    variant: str
    genes: int  # G
    cells: int  # B
    parameters: int = 0
    operations: int = 0  # of a step, see `Operations`
    flops: float = 0.0  # of a step, by formula
    seconds: list[float] = field(default_factory=list)  # of each step
    waiting: float = 0.0  # share of them that the step waited for cells
    memory_mib: float | None = None

    @property
    def name(self) -> str:
        return f"{self.size}, {self.backbone}, {self.variant}"

    @property
    def cells_per_second(self) -> float:
        return self.cells / statistics.median(self.seconds)

    def as_json(self) -> dict[str, object]:
        return {**asdict(self), "cells_per_second": self.cells_per_second}


class SimulatedCells:
    """Cells in memory, of which each batch is made dense as those of shards are."""

    def __init__(self, G: int, batch_size: int):
        rng = np.random.default_rng(0)
        rates = rng.gamma(0.3, MEAN_COUNT / 0.3, G)  # a few loud genes, many silent ones
        counts = [rng.poisson(rates * rng.gamma(4, 1 / 4, (batch_size, 1))) for _ in range(BATCHES)]
        self.measured = np.ones((1, G), dtype=bool)
        self.counts = [csr_matrix(np.minimum(of_batch, MAX_COUNT), dtype=np.int16) for of_batch in counts]

    def batches(self, *, start: int, **order: int) -> Iterator[dict[str, torch.Tensor]]:
        """The same few batches over and over."""
        for index in count(start):
            counts = self.counts[index % BATCHES]
            total = torch.from_numpy(np.asarray(counts.sum(axis=1, dtype=np.int64))[:, 0])
            yield {"input_ids": torch.from_numpy(counts.toarray()), "library_size": total}


class Training:
    """One network in training on simulated cells."""

    def __init__(self, case: Case, accelerator: Accelerator, cells: SimulatedCells):
        self.accelerator = accelerator
        queries = min(MAX_QUERIES, max(1, case.genes // 4)) if case.variant == OURS else None
        self.config = replace(OPTIONS, backbone=case.backbone, query_genes=queries, batch_size=case.cells)
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
        device = accelerator.device
        shape._attn_implementation = attention_implementation(self.config, device, accelerator.mixed_precision)
        self.network = DCMForDenoising(shape)
        optimizer = build_optimizer(self.network, self.config)
        if compiles(self.config, device):
            compile_blocks(self.network)
        self.model, self.optimizer = accelerator.prepare(self.network.train(), optimizer)
        self.ema = [parameter.detach().clone().float() for parameter in self.network.parameters()]
        self.train_batches = TrainBatches(cells, self.config, shape, rank=0, world=1, device=device)
        self.batches = self.train_batches.starting_at(0)
        case.parameters = self.network.num_parameters()
        case.flops = case.cells * training_flops(shape, case.genes, queries)

    def steps(self, number: int) -> None:
        """Everything from cells to averages, so many times."""
        for _ in range(number):
            take_step(self.model, self.optimizer, self.batches, self.accelerator, self.config)
            update_average(self.ema, self.network, 0, self.config.ema_decay)


def start_accelerator() -> Accelerator:
    """One process on the GPU in bf16, or on the CPU in float32."""
    return build_accelerator(replace(OPTIONS, mixed_precision="bf16" if torch.cuda.is_available() else "no"))


def measure_steps(
    sizes: tuple[str, ...],
    genes: tuple[int, ...],
    *,
    rounds: int,
    accelerator: Accelerator,
    backbones: tuple[str, ...] = ("dit", "latent"),
    plain: bool = True,
) -> tuple[list[Case], list[str]]:
    """Rows of ``backbones``, ours and plain, which take turns at each size and number of genes; what was left out."""
    device = accelerator.device
    variants = (PLAIN, OURS) if plain else (OURS,)
    rows, left_out = [], []
    jobs = [(size, number) for size in sizes for number in sorted(genes)]
    for size, number in tqdm(jobs, desc="training steps", delay=1, disable=None):
        cells = max(1, TOKENS[device.type] // number)
        steps = STEPS[device.type]
        shared, found, trainings = SimulatedCells(number, cells), {}, {}
        for case in (Case(size, backbone, variant, number, cells) for backbone in backbones for variant in variants):
            try:
                training = Training(case, accelerator, shared)
                training.steps(2 * steps)
                with torch.compiler.set_stance("force_eager"), Operations() as operations:
                    training.steps(1)
            except torch.OutOfMemoryError as error:
                left_out.append(f"{case.name} at {number:,} genes: {str(error).splitlines()[0]}")
                continue
            case.operations, training.train_batches.waited = operations.number, 0.0
            found[case.name], trainings[case.name] = case, training
        works = {name: partial(training.steps, steps) for name, training in trainings.items()}
        for name, cost in interleaved(works, device, rounds=rounds).items():
            found[name].waiting = trainings[name].train_batches.waited / sum(cost.seconds)
            found[name].seconds, found[name].memory_mib = [turn / steps for turn in cost.seconds], cost.most_mib
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
    header = ("network", "genes", "cells", "parameters", "operations", "cells/s", "s/step", "waiting", "MiB")
    lines = [(*header, "TFLOP/s", "of peak")]
    for row in rows:
        memory = "" if row.memory_mib is None else f"{row.memory_mib:,.0f}"
        seconds = statistics.median(row.seconds)
        numbers = (f"{row.genes:,}", f"{row.cells:,}", f"{row.parameters / 1e6:.1f} M", f"{row.operations:,}")
        numbers += (f"{row.cells_per_second:,.3g}", f"{seconds:.3g}", f"{row.waiting:.1%}", memory)
        numbers += (f"{row.flops / seconds / 1e12:.3g}", f"{row.flops / seconds / peak:.1%}")
        lines.append((row.name, *numbers))
    return lines
