"""Draw the same cells under several schedules: speed, memory, predicted and real distance to real cells.

In come a checkpoint and real cells, out go rows of numbers and their table. Letters: N cells, G genes, K largest count.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
from tqdm.auto import tqdm

from eval.benchmarks.costs import Cost
from eval.comparison.cells import CellCounts, Comparison
from eval.comparison.floor import FLOOR, score_models
from eval.comparison.protocols import PROTOCOLS
from modeling_dcm import DCMForDenoising
from modeling_dcm.diffusion_dcm import keyed_generator, reveal_probability
from modeling_dcm.schedule_dcm import as_curve, predicted_kl, reveal_schedule
from tokenization import DCMTokenizer

METRICS = ("mmd2", "correlation_slope", "correlation_pearson", "w2", "library_size_cv_ratio")
PROTOCOL = replace(PROTOCOLS["log"], pooled_metrics=METRICS, condition_metrics=())
DEFAULT_SCHEDULE = inspect.signature(DCMForDenoising.generate).parameters["schedule"].default
AUTO = f"auto, {DEFAULT_SCHEDULE}"
LINEAR_100, NAIVE = "linear 100", "naive loop"
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


def benchmark_sampling(
    model: DCMForDenoising,
    tokenizer: DCMTokenizer,
    real: CellCounts,
    *,
    train: CellCounts | None = None,
    seeds: int = 3,
    batch_size: int = 256,
    num_naive: int = 8,
) -> list[Row]:
    """Rows of every setting that the model can do, the naive loop, timed on ``num_naive`` cells, and, with training
    cells, the floor. The ``model`` is in evaluation mode, on its device; one cell is drawn for each real one."""
    curve, conditions = as_curve(model.config.entropy_curve), tokenizer.condition_ids(real.labels)
    settings = {name: how for name, how in SETTINGS.items() if curve or not {"auto", "optimal"} & set(how)}
    rows, drawn = [], {}
    with tqdm(settings.items(), desc="sampling benchmark", unit="setting", delay=1, disable=None) as bar:
        for name, (steps, schedule) in bar:
            bar.set_postfix_str(name)
            cost, drawn[name] = Cost(model.device), []
            how = {"steps": steps, "schedule": schedule, "batch_size": batch_size}
            few = {name: ids[:8] for name, ids in conditions.items()}
            model.generate(min(8, len(real)), **few, **how)  # first uses of a shape cost more
            for seed in range(seeds):
                with cost:
                    ids = model.generate(len(real), **conditions, **how, seed=seed)
                drawn[name].append(CellCounts(tokenizer.decode(ids, seed=seed).X, real.labels))
            revealed = reveal_schedule(model.config.num_genes, steps, schedule, curve)
            kl = None if curve is None else predicted_kl(revealed, curve)
            rows.append(Row(name, schedule, len(revealed) - 1, len(real) / cost.median, cost.most_mib, kl))
    rows += [_naive(model, conditions, min(num_naive, len(real))), *[Row(FLOOR)] * (train is not None)]
    ((_, scores),) = score_models(Comparison(real, train, drawn, tokenizer.genes, None), [PROTOCOL], {})
    for row in rows:
        by_metric = [{score.metric: score.value for score in sample} for sample in scores.get(row.name, ())]
        row.scores = {metric: [values[metric] for values in by_metric] for metric in METRICS} if by_metric else {}
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


def _naive(model: DCMForDenoising, conditions: dict[str, torch.Tensor], num_cells: int) -> Row:
    """The plain loop, one cell at a time: timed with all threads and with one, whichever is faster, and not scored."""
    threads = torch.get_num_threads()
    costs = {number: Cost(model.device) for number in {1, threads}}
    for cell in range(num_cells):
        given = {name: ids[cell : cell + 1] for name, ids in conditions.items()}
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
