"""Draw the same cells under several schedules: speed, memory, predicted and real distance to real cells.

In come a checkpoint and real cells, out go rows of numbers, their table and their figure. Letters: N cells, G genes.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from eval.benchmarks.costs import Cost
from eval.benchmarks.naive_sampler import STEPS as NAIVE_STEPS
from eval.benchmarks.naive_sampler import forward_rule, naive_cells
from eval.comparison.cells import CellCounts
from eval.comparison.floor import FLOOR_DRAWS, Halves, floor_draws
from eval.comparison.protocols import PROTOCOLS, Reference, evaluate_pair, prepare_reference
from modeling_dcm import DCMForDenoising
from modeling_dcm.diffusion_dcm import reveal_probability
from modeling_dcm.schedule_dcm import as_curve, predicted_kl, reveal_schedule
from tokenization import DCMTokenizer

METRICS = ("mmd2", "correlation_slope", "correlation_pearson", "w2", "library_size_cv_ratio")
PROTOCOL = replace(PROTOCOLS["log"], pooled_metrics=METRICS, condition_metrics=())
DEFAULT_SCHEDULE = inspect.signature(DCMForDenoising.generate).parameters["schedule"].default
AUTO = f"auto, {DEFAULT_SCHEDULE}"
LINEAR_100, NAIVE, RELEASED, FLOOR = "linear 100", "naive loop", "released reveal rule", "floor"
SETTINGS: dict[str, tuple[int | str, str]] = {  # name: steps and schedule of `generate`
    "one step": (1, "linear"),
    "linear 20": (20, "linear"),
    LINEAR_100: (100, "linear"),
    "cosine 20": (20, "cosine"),
    "cubic 8": (8, "cubic"),
    "cubic 20": (20, "cubic"),
    "optimal 8": (8, "optimal"),
    "optimal 20": (20, "optimal"),
    "auto, optimal": ("auto", "optimal"),
    AUTO: ("auto", DEFAULT_SCHEDULE),
}
COLOURS = {"linear": "#1f5fa8", "cosine": "#8a5fb5", "cubic": "#e8762d", "optimal": "#2a8f4f", None: "#c62f2f"}
PANELS = {"mmd2": "MMD² to real cells, log1p counts: lower is better", "correlation_slope": "slope: 1 is right"}


@dataclass
class Row:
    """What was measured of one setting; None where that cannot be said."""

    name: str
    schedule: str | None = None
    network_calls: int | None = None  # for each chunk of cells
    cells_per_second: float | None = None  # of the draw alone, median over seeds (of the naive loop: over cells)
    peak_mib: float | None = None
    predicted_kl: float | None = None  # nats per cell lost against one gene at a time
    scores: dict[str, list[float]] = field(default_factory=dict)  # one value for each seed, or draw of the floor

    def mean(self, metric: str) -> float:
        """Mean of a metric over the seeds; nan if it was not measured."""
        return float(np.mean(self.scores[metric])) if self.scores.get(metric) else math.nan

    def std(self, metric: str) -> float:
        """Standard deviation over the seeds; nan for fewer than two."""
        values = self.scores.get(metric, ())
        return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan

    def as_json(self) -> dict[str, object]:
        """All numbers; None for what is not finite."""
        finite = {m: [v if math.isfinite(v) else None for v in values] for m, values in self.scores.items()}
        return {**asdict(self), "scores": finite}


@dataclass(frozen=True)
class Sampled:
    """What is drawn, and what it is held against."""

    model: DCMForDenoising  # in evaluation mode, on its device
    tokenizer: DCMTokenizer
    conditions: dict[str, torch.Tensor]  # (N, ..) of the real cells, none for an unconditional draw
    real: CellCounts  # N cells
    seeds: int  # how often each setting draws
    batch_size: int  # cells of a chunk
    train: CellCounts | None = None  # for the floor

    def generate(self, setting: str, *, seed: int, num_cells: int) -> torch.Tensor:
        """Ids (n, G) of a draw for the first ``num_cells`` real cells."""
        given = {name: ids[:num_cells] for name, ids in self.conditions.items()}
        how = dict(zip(("steps", "schedule"), SETTINGS[setting]))
        return self.model.generate(
            min(num_cells, len(self.real)), **given, **how, seed=seed, batch_size=self.batch_size
        )

    @cached_property
    def references(self) -> list[tuple[Reference, Halves]]:
        """What the draws in turn are compared with."""
        halves = [Halves(self.train, self.real, np.random.default_rng([0, draw])) for draw in range(FLOOR_DRAWS)]
        halves = halves if halves[0].conditions else halves[:1]
        return [(prepare_reference(half.compared, PROTOCOL), half) for half in halves]

    def decoded(self, ids: torch.Tensor, seed: int) -> CellCounts:
        return CellCounts(self.tokenizer.decode(ids, seed=seed).X, self.real.labels)

    def scores(self, draws: Iterable[CellCounts]) -> dict[str, list[float]]:
        """Each metric of every draw."""
        found = []
        for drawn, (reference, halves) in zip(draws, itertools.cycle(self.references)):
            found.append({score.metric: score.value for score in evaluate_pair(halves.beside(drawn), reference)})
        return {metric: [values[metric] for values in found] for metric in METRICS}

    def floor(self) -> Iterator[CellCounts]:
        """Draws of real cells in the place of drawn ones: of the training cells, or the other half."""
        for drawn, (_, halves) in zip(floor_draws(self.train, self.real), itertools.cycle(self.references)):
            yield halves.floor(drawn)

    def predicted_kl(self, revealed: Sequence[int]) -> float | None:
        """What a schedule loses, if the model has an entropy curve."""
        curve = as_curve(self.model.config.entropy_curve)
        return None if curve is None else predicted_kl(revealed, curve)


def benchmark_sampling(sampled: Sampled, *, num_naive: int = 8) -> list[Row]:
    """Rows of every setting that the model can do, of the naive loop (timed on ``num_naive`` cells), of the released
    reveal rule (scored), and of the floor if there are training cells."""
    has_curve = sampled.model.config.entropy_curve is not None
    settings = [name for name, how in SETTINGS.items() if has_curve or not {"auto", "optimal"} & set(how)]
    jobs: dict[str, Callable[[], Row]] = {name: partial(_measured, sampled, name) for name in settings}
    jobs |= {RELEASED: partial(_released, sampled), NAIVE: partial(_naive, sampled, num_naive)}
    if sampled.train is not None:
        jobs[FLOOR] = lambda: Row(FLOOR, scores=sampled.scores(sampled.floor()))
    rows = []
    with tqdm(jobs, desc="sampling benchmark", unit="setting", delay=1, disable=None) as bar:
        for name in bar:
            bar.set_postfix_str(name)
            rows.append(jobs[name]())
    return rows


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """Speed of the default ``auto`` over the naive loop's, and its MMD^2 against linear 100's; nan where not measured.

    ``se`` is the standard error of the difference of the two means over seeds, the variances of both added.
    """
    by_name = {row.name: row for row in rows}
    auto, linear, naive = (by_name.get(name, Row(name)) for name in (AUTO, LINEAR_100, NAIVE))
    variances = [row.std("mmd2") ** 2 / max(1, len(row.scores.get("mmd2", ()))) for row in (auto, linear)]
    return {
        "speedup_vs_naive": (auto.cells_per_second or math.nan) / (naive.cells_per_second or math.nan),
        "mmd2_minus_linear100": auto.mean("mmd2") - linear.mean("mmd2"),
        "se": math.sqrt(sum(variances)),
    }


def _measured(sampled: Sampled, setting: str) -> Row:
    """Draw with one setting under every seed."""
    model, n, (steps, schedule) = sampled.model, len(sampled.real), SETTINGS[setting]
    revealed = reveal_schedule(model.config.num_genes, steps, schedule, as_curve(model.config.entropy_curve))
    sampled.generate(setting, seed=0, num_cells=8)  # first uses of a shape cost more
    cost, draws = Cost(model.device), []
    for seed in range(sampled.seeds):
        with cost:
            ids = sampled.generate(setting, seed=seed, num_cells=n)
        draws.append(sampled.decoded(ids, seed))
    speed = (len(revealed) - 1, n / cost.median, cost.most_mib)
    return Row(setting, schedule, *speed, sampled.predicted_kl(revealed), sampled.scores(draws))


def _released(sampled: Sampled) -> Row:
    """Cells as the released code's reveal rule draws them: scored, not timed."""
    model, n = sampled.model, len(sampled.real)
    ids = (naive_cells(model, sampled.conditions, n, rule=forward_rule, seed=seed) for seed in range(sampled.seeds))
    scores = sampled.scores(sampled.decoded(drawn, seed) for seed, drawn in enumerate(ids))
    kl = sampled.predicted_kl([0, model.config.num_genes])
    return Row(RELEASED, None, NAIVE_STEPS, predicted_kl=kl, scores=scores)


def _naive(sampled: Sampled, num_cells: int) -> Row:
    """The plain loop, one cell at a time: timed with all threads and with one, whichever is faster, and not scored."""
    model, threads = sampled.model, torch.get_num_threads()
    costs = {number: Cost(model.device) for number in {1, threads}}
    for cell in range(min(num_cells, len(sampled.real))):
        given = {name: ids[cell : cell + 1] for name, ids in sampled.conditions.items()}
        for number, cost in costs.items():
            torch.set_num_threads(number)
            with cost:
                naive_cells(model, given, 1, rule=reveal_probability, seed=cell)
    torch.set_num_threads(threads)
    best = min(costs.values(), key=lambda cost: cost.median)
    return Row(NAIVE, None, NAIVE_STEPS, 1 / best.median, best.most_mib)


def table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Lines of the table, the header first; columns that no row fills are left out."""
    naive = next((row.cells_per_second for row in rows if row.name == NAIVE), None)

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    def score(row: Row, metric: str, digits: int) -> str:
        mean, std = row.mean(metric), row.std(metric)
        spread = "" if math.isnan(std) else f" ± {std:.{digits}f}"
        return "" if math.isnan(mean) else f"{mean:.{digits}f}{spread}"

    columns: dict[str, Callable[[Row], str]] = {
        "setting": lambda row: row.name,
        "calls": lambda row: number(row.network_calls, "d"),
        "cells/s": lambda row: number(row.cells_per_second, ",.4g"),
        "x naive": lambda row: number(row.cells_per_second / naive, ",.1f") if row.cells_per_second and naive else "",
        "peak MiB": lambda row: number(row.peak_mib, ",.0f"),
        "KL, nats/cell": lambda row: number(row.predicted_kl, ".3f"),
        "MMD²": lambda row: score(row, "mmd2", 5),
        "slope": lambda row: score(row, "correlation_slope", 3),
        "Pearson": lambda row: score(row, "correlation_pearson", 3),
        "W2": lambda row: score(row, "w2", 2),
        "library-size CV": lambda row: score(row, "library_size_cv_ratio", 3),
    }
    filled = {name: cells for name, text in columns.items() if any(cells := [text(row) for row in rows])}
    return [tuple(filled), *zip(*filled.values())]


def notes(rows: Sequence[Row]) -> list[str]:
    """What a reader of the table must know, a sentence or two to a column or row."""
    return [
        "calls: of the network, for each chunk of cells. cells/s: of the draw alone, median over seeds. peak MiB: "
        "growth of the GPU's memory in use while drawing.",
        "KL: what the schedule loses against one gene at a time, by the entropy curve."
        if any(row.predicted_kl is not None for row in rows)
        else "This checkpoint has no entropy curve: no KL, no optimal schedule, no auto; see 'dcm-benchmark entropy'.",
        "MMD², slope and correlation of gene-gene correlations, W2, ratio of the library size's coefficients of "
        "variation (1 is right): protocol log, all cells pooled, mean ± standard deviation over seeds.",
        f"{NAIVE}: one cell at a time, 100 linear steps, logits of every gene and count at each; timed, not scored.",
        f"{RELEASED}: the released code reveals genes at the forward rate: all of them in the first of its 100 calls, "
        "each drawn independently of the others.",
        f"{FLOOR}: real training cells in the place of drawn ones (in conditions without any, one half of the real "
        "cells beside the other, as every draw is); no sampler can be expected below it.",
    ]


def figure(rows: Sequence[Row], *, title: str) -> Figure:
    """MMD^2 and correlation slope against network calls: a point to a setting, the floor as a band."""
    canvas = Figure(figsize=(15, 7), dpi=100, layout="constrained")
    canvas.suptitle(title, fontsize=14)
    for axes, metric in zip(canvas.subplots(1, 2), PANELS):
        _panel(axes, rows, metric)
    canvas.legend(*canvas.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    return canvas


def _panel(axes: Axes, rows: Sequence[Row], metric: str) -> None:
    for floor in (row for row in rows if row.name == FLOOR):
        middle, spread = floor.mean(metric), 2 * floor.std(metric)
        label = f"floor: real cells, mean ± 2 sd of {len(floor.scores[metric])} draws"
        axes.axhspan(middle - spread, middle + spread, color="#9a9a9a", alpha=0.3, lw=0, label=label)
    for row in rows:
        if row.network_calls is None or math.isnan(row.mean(metric)):
            continue
        marker = "*" if row.name.startswith("auto") else "o" if row.schedule else "X"
        how = {"fmt": marker, "ms": 17 if marker == "*" else 10, "mec": "white", "capsize": 3}
        colour, std = COLOURS[row.schedule], np.nan_to_num(row.std(metric))
        axes.errorbar(row.network_calls, row.mean(metric), std, **how, color=colour, label=row.name)
    if metric == "mmd2":
        axes.set_yscale("symlog", linthresh=1e-3)
    calls = (1, 2, 5, 10, 20, 50, 100)
    axes.set_xscale("log")
    axes.set_xticks(calls, [str(number) for number in calls])
    axes.set_xticks([], minor=True)
    axes.set(title=PANELS[metric], xlabel="network calls for each chunk of cells")
    axes.grid(alpha=0.25)
