"""Draw the same cells under several schedules: speed, memory, predicted and real distance to real cells.

In come a checkpoint and real cells, out go rows of numbers and their table. Letters: N cells, G genes, K largest count.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial

import numpy as np
import torch
from tqdm.auto import tqdm

from eval.benchmarks.costs import Cost
from eval.comparison.cells import CellCounts
from eval.comparison.floor import FLOOR_DRAWS, Halves, floor_draws
from eval.comparison.protocols import PROTOCOLS, Reference, evaluate_pair, prepare_reference
from modeling_dcm import DCMForDenoising
from modeling_dcm.diffusion_dcm import keyed_generator, reveal_probability
from modeling_dcm.schedule_dcm import as_curve, predicted_kl, reveal_schedule
from tokenization import DCMTokenizer

METRICS = ("mmd2", "correlation_slope", "correlation_pearson", "w2", "library_size_cv_ratio")
PROTOCOL = replace(PROTOCOLS["log"], pooled_metrics=METRICS, condition_metrics=())
DEFAULT_SCHEDULE = inspect.signature(DCMForDenoising.generate).parameters["schedule"].default
AUTO = f"auto, {DEFAULT_SCHEDULE}"
LINEAR_100, NAIVE, FLOOR = "linear 100", "naive loop", "floor"
NAIVE_STEPS = 100
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
    """Rows of every setting that the model can do, the naive loop (timed on ``num_naive`` cells), and the floor."""
    has_curve = sampled.model.config.entropy_curve is not None
    settings = [name for name, how in SETTINGS.items() if has_curve or not {"auto", "optimal"} & set(how)]
    jobs: dict[str, Callable[[], Row]] = {name: partial(_measured, sampled, name) for name in settings}
    jobs[NAIVE] = partial(_naive, sampled, num_naive)
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


def _naive(sampled: Sampled, num_cells: int) -> Row:
    """The plain loop, one cell at a time: timed with all threads and with one, whichever is faster, and not scored."""
    model, threads = sampled.model, torch.get_num_threads()
    costs = {number: Cost(model.device) for number in {1, threads}}
    for cell in range(min(num_cells, len(sampled.real))):
        given = {name: ids[cell : cell + 1] for name, ids in sampled.conditions.items()}
        for number, cost in costs.items():
            torch.set_num_threads(number)
            with cost:
                naive_cells(model, given, 1, seed=cell)
    torch.set_num_threads(threads)
    best = min(costs.values(), key=lambda cost: cost.median)
    return Row(NAIVE, None, NAIVE_STEPS, 1 / best.median, best.most_mib)


@torch.no_grad()
def naive_cells(
    model: DCMForDenoising,
    conditions: dict[str, torch.Tensor],
    num_cells: int,
    *,
    seed: int = 0,
    steps: int = NAIVE_STEPS,
) -> torch.Tensor:
    """Draw count ids (N, G) by the loop over time as the released code has it, but for its reveal rule: a yardstick.

    At each of ``steps`` equal steps from t = 1 to 0, logits of every count are computed at every gene, revealed or not,
    and one joint draw decides for each masked gene between the counts and staying masked. ``conditions`` (N, ..) are
    those of ``generate``; the loop ends early once nothing is masked, as what is revealed never changes.
    """
    mask, generator = model.config.mask_token_id, keyed_generator(seed, device=model.device)
    given = {name: ids.to(model.device) for name, ids in conditions.items()}
    if model.config.library_size_conditioning:
        labels = [given.get(name) for name in ("cell_type_ids", "perturbation_ids", "covariate_ids")]
        given["library_size"] = model.library_sizes.draw(num_cells, *labels, generator)
    times = torch.linspace(1.0, 0.0, steps + 1, device=model.device)
    x_t = torch.full((num_cells, model.config.num_genes), mask, device=model.device)
    for t, s in itertools.pairwise(times):
        if not bool((x_t == mask).any()):
            break
        p = model(x_t, **given).logits.float().softmax(dim=-1)  # (N, G, K+1)
        reveal = reveal_probability(t, s, model.config.noise_eps)
        joint = torch.cat([reveal * p, (1 - reveal).expand(*p.shape[:2], 1)], dim=-1)  # (N, G, K+2), the last is MASK
        drawn = torch.multinomial(joint.flatten(0, 1), 1, generator=generator).view_as(x_t)
        x_t = torch.where(x_t == mask, drawn, x_t)
    return x_t.cpu()


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
        f"{FLOOR}: real training cells in the place of drawn ones (in conditions without any, one half of the real "
        "cells beside the other, as every draw is); no sampler can be expected below it.",
    ]
