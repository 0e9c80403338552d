"""What a training step costs: cells/s, memory and utilisation by size, backbone and genes, beside a plain step.

    dcm-benchmark training --out benchmark/
    python -m eval.benchmarks.steps --out benchmark/

On a GPU in bf16 with the paper's sizes, else on the CPU in float32 with a small size and the paper's `5m`. Counts are
simulated; the networks, noise, optimiser and averages are those of training (`step_variants.py`). Writes training.json,
training.md and training.png; knows nothing of how a table looks (`step_report.py`) or how a cost is measured
(`step_costs.py`).
"""

import importlib.metadata
import json
import logging
import math
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from tqdm import tqdm

from eval.benchmarks.step_costs import MEMORY, MIB, interleaved, memory_growth, product_rate, shares_of_operations
from eval.benchmarks.step_report import figure, last_line, notes, tables
from eval.benchmarks.step_results import Result, Row, fits, median
from eval.benchmarks.step_variants import (
    OURS,
    PLAIN,
    SHAPES,
    Case,
    Training,
    simulated_batch,
    start_accelerator,
    variants,
)
from training.data.command_line import run
from training.data.files import written_aside
from training.loop.throughput import peak_flops, training_flops

logger = logging.getLogger(__name__)

SIZES_ON_CPU, SIZES_ON_GPU = ("small", "5m"), ("5m", "10m", "20m")
TOKENS_ON_CPU, TOKENS_ON_GPU = 4_096, 262_144
MAX_QUERIES = 2048  # of the configuration for 17,002 genes; those for 2,000 genes ask a quarter of them
GROWTH_CELLS = {"dit": 1, "latent": 8}  # times as many as fit into the tokens at the most genes
HEADLINE_GENES = 2000
SLOW = 5.0  # seconds of a step, above which two rounds must do
PACKAGES = ("discrete-cell-models", "accelerate", "torch", "transformers")


@dataclass(frozen=True)
class Plan:
    """What is measured, and for how long."""

    sizes: tuple[str, ...]
    genes: tuple[int, ...]
    growth_genes: tuple[int, ...]
    tokens: int
    query_genes: int | None
    max_count: int
    rounds: int
    seconds: float
    longest: float
    compile: bool

    def case(self, size: str, genes: int, *, cells: int | None = None, backbone: str = "dit") -> Case:
        """The case of this plan; its variant is OURS."""
        queries = min(MAX_QUERIES, max(1, genes // 4)) if self.query_genes is None else min(self.query_genes, genes)
        cells = max(1, self.tokens // genes) if cells is None else cells
        return Case(size, backbone, genes, cells, self.max_count, queries)


def main(
    *,
    sizes: tuple[Literal["small", "5m", "10m", "20m"], ...] | None = None,
    genes: tuple[int, ...] = (500, 2000, 17_002),
    growth_genes: tuple[int, ...] = (500, 1000, 2000, 4000, 8000, 17_002),
    tokens: int | None = None,
    query_genes: int | None = None,
    max_count: int = 1000,
    rounds: int = 3,
    seconds: float = 0.5,
    longest: float = 20.0,
    compile: bool = False,
    out: Path = Path("benchmark"),
) -> dict[str, float]:
    """Measure training steps of simulated cells, beside the plain step, which computes every logit.

    Writes training.json, training.md and training.png; the last line printed is
    step_speedup=.. head_memory_ratio=.. latent_vs_dit=..

    Args:
        sizes: Shapes of networks; default small and 5m on a CPU, 5m, 10m and 20m on a GPU.
        genes: Numbers of genes of the tables.
        growth_genes: Numbers of genes of the plot, for the first of the sizes.
        tokens: Cells times genes of a step, at least one cell; default 4,096 on a CPU, 262,144 on a GPU.
        query_genes: Masked genes of each cell whose logits training asks for; default a quarter of the genes, at most
            2,048, as in the configurations.
        max_count: The largest count.
        rounds: How often the compared steps take turns; two where a step takes more than 5 seconds.
        seconds: Least time of a turn, which is at least one step.
        longest: Leave out what is predicted to take more seconds a step, and say so.
        compile: Compile the blocks of every network, the plain step's too.
        out: Folder to write to.

    Raises:
        ValueError: a number is out of range, or ``out`` is a file.
    """
    accelerator = start_accelerator()
    on_gpu = accelerator.device.type == "cuda"
    plan = Plan(
        tuple(sizes or (SIZES_ON_GPU if on_gpu else SIZES_ON_CPU)),
        tuple(sorted(genes)),
        tuple(sorted(growth_genes)),
        tokens or (TOKENS_ON_GPU if on_gpu else TOKENS_ON_CPU),
        query_genes,
        max_count,
        rounds,
        seconds,
        longest,
        compile,
    )
    _check(plan, tokens, query_genes, out)
    peak = peak_flops(accelerator.device) or product_rate(accelerator.device)
    result = measure(plan, accelerator, peak)
    summary = summarise(result, plan)
    _write(out, header(plan, accelerator, peak), result, summary)
    return summary


def measure(plan: Plan, accelerator: Accelerator, peak: float) -> Result:
    """All rows of the plan; ``peak`` FLOP/s are what utilisation is a share of."""
    result = Result()
    jobs: list[Callable[[], None]] = []
    for size in plan.sizes:
        for genes in plan.genes:
            jobs.append(lambda size=size, genes=genes: _side_by_side(result, plan, size, genes, accelerator, peak))
    jobs.append(lambda: _growth(result, plan, accelerator))
    jobs.append(lambda: _shares(result, plan, accelerator))
    for job in tqdm(jobs, desc="training steps", delay=1, disable=None):
        _if_memory_lasts(job, result, accelerator)
    return result


def _if_memory_lasts(job: Callable[[], None], result: Result, accelerator: Accelerator) -> None:
    """Do a job; one that needs more memory than the GPU has is left out."""
    try:
        job()
    except torch.OutOfMemoryError as error:
        result.left_out.append(f"one comparison, for want of memory on the GPU ({str(error).splitlines()[0]})")
    accelerator.free_memory()


def _side_by_side(result: Result, plan: Plan, size: str, genes: int, accelerator: Accelerator, peak: float) -> None:
    """Steps, and heads and losses, of every variant at one size and number of genes."""
    device = accelerator.device
    cases = []
    for case in variants(plan.case(size, genes)):
        expected = _expected_seconds(result, case)
        if expected > plan.longest:
            result.left_out.append(
                f"{size} {case.name} at {genes:,} genes: a step of {case.cells} would take about {expected:.0f} s, "
                f"judging by fewer genes (--longest {plan.longest:g})"
            )
            continue
        cases.append(case)
    trainings = {case: Training(case, accelerator, compiled=plan.compile) for case in cases}
    rows = {}
    for case, training in trainings.items():
        if plan.compile:
            training.step()
        growth = memory_growth(training.step, device)
        rows[case] = Row(case, "step", [], growth, training.standing_bytes() / MIB)
        rows[case].parameters = sum(parameter.numel() for parameter in training.network.parameters())
        rows[case].flops = training_flops(training.model, training.batch())
    steps = {case.name: training.step for case, training in trainings.items()}
    taken = _turns(steps, plan, device)
    for case, row in rows.items():
        row.seconds = taken[case.name]
        row.utilisation = row.flops / row.median / peak
        result.rows.append(row)
    heads = {case: training.head_step() for case, training in trainings.items() if case.backbone == "dit"}
    memory = {case: memory_growth(head, device) for case, head in heads.items()}
    taken = _turns({case.name: head for case, head in heads.items()}, plan, device)
    result.rows += [Row(case, "head", taken[case.name], memory[case]) for case in heads]


def _growth(result: Result, plan: Plan, accelerator: Accelerator) -> None:
    """Steps of training over numbers of genes, each network with the same number of cells at all of them."""
    rows, steps, device = {}, {}, accelerator.device
    for backbone, times in GROWTH_CELLS.items():
        cells = times * max(1, plan.tokens // max(plan.growth_genes))
        for genes in plan.growth_genes:
            case = plan.case(plan.sizes[0], genes, cells=cells, backbone=backbone)
            expected = _expected_seconds(Result(list(rows.values())), case, part="growth")
            if expected > plan.longest:
                result.left_out.append(f"{backbone} at {genes:,} genes in the plot: about {expected:.0f} s a step")
                continue
            training = Training(case, accelerator, compiled=plan.compile)
            if plan.compile:
                training.step()
            growth = memory_growth(training.step, device)
            first = interleaved({"": training.step}, device, rounds=1, seconds=0.0)[""]
            steps[f"{backbone} {genes}"] = training.step
            rows[f"{backbone} {genes}"] = Row(case, "growth", first, growth, training.standing_bytes() / MIB)
    for name, seconds in _turns(steps, plan, device).items():
        rows[name].seconds = seconds
    result.rows += rows.values()


def _shares(result: Result, plan: Plan, accelerator: Accelerator) -> None:
    """Which operations the steps of both backbones go to, at the headline's size and genes."""
    size, genes = headline(result, plan)
    for backbone in GROWTH_CELLS:
        training = Training(plan.case(size, genes, backbone=backbone), accelerator, compiled=plan.compile)
        training.step()
        result.shares[backbone] = shares_of_operations(training.step, accelerator.device)


def _turns(works: dict[str, Callable[[], None]], plan: Plan, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each work in turns; the first turn is not counted where that costs little."""
    first = interleaved(works, device, rounds=1, seconds=0.0)
    if max((seconds[0] for seconds in first.values()), default=0.0) > SLOW:
        again = interleaved(works, device, rounds=max(0, min(2, plan.rounds) - 1), seconds=plan.seconds)
        return {name: first[name] + again[name] for name in works}
    return interleaved(works, device, rounds=plan.rounds, seconds=plan.seconds)


def _expected_seconds(result: Result, case: Case, part: str = "step") -> float:
    """Seconds of a step by the time at fewer genes: `dit` grows with their square, `latent` with their number."""
    same = {name: getattr(case, name) for name in ("size", "backbone", "variant")}
    known = [row for row in result.rows if row.part == part and fits(row.case, same) and row.case.genes < case.genes]
    if not known:
        return 0.0
    last = known[-1]
    power = 2 if case.backbone == "dit" else 1
    return last.median / last.case.cells * case.cells * (case.genes / last.case.genes) ** power


def headline(result: Result, plan: Plan) -> tuple[str, int]:
    """Size and genes of the last line: the largest size with all variants, at the genes nearest to 2,000."""
    genes = min(plan.genes, key=lambda number: abs(math.log(number / HEADLINE_GENES)))
    whole = [
        size
        for size in plan.sizes
        if all(result.find("step", **asdict(case)) for case in variants(plan.case(size, genes)))
    ]
    width = {name: shape["hidden_size"] for name, shape in SHAPES.items()}
    return max(whole or plan.sizes, key=width.__getitem__), genes


def summarise(result: Result, plan: Plan) -> dict[str, float]:
    """The numbers of the last line; nan where something was left out."""
    size, genes = headline(result, plan)
    at = {"size": size, "genes": genes}
    plain, ours = ({**at, "backbone": "dit", "variant": variant} for variant in (PLAIN, OURS))
    heads = [result.find("head", **which) for which in (plain, ours)]
    return {
        "step_speedup": median(result.ratio("step", plain, ours)),
        "head_memory_ratio": heads[0].growth_mib / heads[1].growth_mib if all(heads) else float("nan"),
        "latent_vs_dit": median(result.ratio("step", plain, {**at, "backbone": "latent", "variant": OURS})),
    }


def header(plan: Plan, accelerator: Accelerator, peak: float) -> dict[str, object]:
    """What the measurement was made of, for its files."""
    device = accelerator.device
    cells = simulated_batch(plan.case(plan.sizes[0], plan.genes[-1], cells=8))["input_ids"]
    on_gpu = device.type == "cuda"
    threads = torch.get_num_threads()
    known = peak_flops(device) is not None
    return {
        **asdict(plan),
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU, {threads} thread{'s' * (threads > 1)}",
        "precision": "bf16" if accelerator.mixed_precision == "bf16" else "float32",
        "peak_tflops": peak / 1e12,
        "peak_from": "the maker's data sheet" if known else "float32 products of 1,024 x 1,024 matrices in this run",
        "memory": MEMORY,
        "counts": {
            "mean": round(float(cells.float().mean()), 3),
            "above_0": round(float((cells > 0).float().mean()), 4),
            "from_63_on": round(float((cells >= 63).float().mean()), 5),
        },
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _check(plan: Plan, tokens: int | None, query_genes: int | None, out: Path) -> None:
    least = {"genes": min(plan.genes, default=0), "growth-genes": min(plan.growth_genes, default=0)}
    least |= {"tokens": 1 if tokens is None else tokens, "query-genes": 1 if query_genes is None else query_genes}
    least |= {"max-count": plan.max_count, "rounds": plan.rounds}
    for name, value in least.items():
        if value < 1:
            raise ValueError(f"--{name} {value}: expected at least 1")
    if plan.seconds < 0 or plan.longest <= 0:
        raise ValueError(f"--seconds {plan.seconds:g} --longest {plan.longest:g}: expected seconds, longest above 0")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {str(out)!r} is a file; expected the name of a folder to write to")


def _write(out: Path, about: dict, result: Result, summary: dict[str, float]) -> None:
    """The three files, and the tables on stdout."""
    found = {name: value if math.isfinite(value) else None for name, value in summary.items()}
    content = {**about, **found, "left_out": result.left_out, "shares": result.shares}
    content["rows"] = [row.as_json() for row in result.rows]
    with written_aside(out / "training.json") as aside:
        aside.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    text = f"{tables(result)}\n\n{notes(about, result)}\n\n{last_line(summary)}\n"
    with written_aside(out / "training.md") as aside:
        aside.write_text(f"# Training steps on {about['device']}\n\n{text}", encoding="utf-8")
    with written_aside(out / "training.png") as aside:
        figure(about, result).savefig(aside, format="png")
    sys.stdout.write(text)


def cli() -> None:
    """Run the measurement from the command line."""
    run(main)


if __name__ == "__main__":
    cli()
