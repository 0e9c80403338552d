"""Draw the same cells under several schedules, and measure speed, memory, predicted and real distance to real cells.

Returns rows of numbers; knows nothing of files and of how the numbers are shown. Letters: N cells, G genes.
"""

import inspect
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from eval.benchmarks.naive_sampler import STEPS as NAIVE_STEPS
from eval.benchmarks.naive_sampler import forward_rule, naive_cells, reverse_rule
from eval.benchmarks.resources import PeakMemory, Timer, count_flops
from eval.comparison.baselines import FLOOR_DRAWS, floor_draws
from eval.comparison.cells import CellCounts
from eval.comparison.protocols import PROTOCOLS, Reference, evaluate_pair, prepare_reference
from modeling_dcm import DCMForDenoising
from modeling_dcm.schedule_dcm import as_curve, predicted_kl, reveal_schedule
from tokenization import DCMTokenizer

logger = logging.getLogger(__name__)

METRICS = ("mmd2", "correlation_slope", "correlation_pearson", "w2", "library_size_cv_ratio")
PROTOCOL = replace(PROTOCOLS["log"], pooled_metrics=METRICS, condition_metrics=())
DEFAULT_SCHEDULE = inspect.signature(DCMForDenoising.generate).parameters["schedule"].default

AUTO = f"auto, {DEFAULT_SCHEDULE}"
LINEAR_100 = "linear 100"
NAIVE = "naive loop"
RELEASED = "released reveal rule"
FLOOR = "floor"


@dataclass(frozen=True)
class Setting:
    """One way to sample: the arguments ``steps`` and ``schedule`` of ``generate``."""

    name: str
    steps: int | str
    schedule: str

    @property
    def needs_curve(self) -> bool:
        return self.steps == "auto" or self.schedule == "optimal"


SETTINGS = (
    Setting("one step", 1, "linear"),
    Setting("linear 20", 20, "linear"),
    Setting(LINEAR_100, 100, "linear"),
    Setting("cosine 20", 20, "cosine"),
    Setting("cubic 8", 8, "cubic"),
    Setting("cubic 20", 20, "cubic"),
    Setting("optimal 8", 8, "optimal"),
    Setting("optimal 20", 20, "optimal"),
    *(Setting(f"auto, {name}", "auto", name) for name in dict.fromkeys(("optimal", DEFAULT_SCHEDULE))),
)


@dataclass
class Row:
    """What was measured of one setting; None where that cannot be said.

    Attributes:
        network_calls: for each chunk of cells.
        cells_per_second: of the draw alone, median over seeds (of the naive loop: over cells).
        cpu_share: seconds of the processor over those of the clock while that was timed. Far below 1 on a CPU, other
            work had the processor and the speed says little.
        predicted_kl: nats per cell lost against one gene at a time.
        utilisation: floating-point operations per second over the device's peak.
        scores: metric of :data:`METRICS` -> one value for each seed, or draw of the floor.
    """

    name: str
    schedule: str | None = None
    network_calls: int | None = None
    cells_per_second: float | None = None
    cpu_share: float | None = None
    peak_mib: float | None = None
    predicted_kl: float | None = None
    utilisation: float | None = None
    scores: dict[str, list[float]] = field(default_factory=dict)

    def mean(self, metric: str) -> float:
        """Mean of a metric over the seeds; nan if it was not measured."""
        values = self.scores.get(metric, ())
        return float(np.mean(values)) if len(values) else float("nan")

    def std(self, metric: str) -> float:
        """Standard deviation over the seeds; nan for fewer than two."""
        values = self.scores.get(metric, ())
        return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")

    def as_json(self) -> dict[str, object]:
        """All numbers, with mean and standard deviation of each metric."""
        means = {m: {"mean": _finite(self.mean(m)), "std": _finite(self.std(m))} for m in self.scores}
        return {**asdict(self), "scores": {m: means[m] | {"values": list(map(_finite, self.scores[m]))} for m in means}}


@dataclass(frozen=True)
class Sampled:
    """What is drawn, and what it is held against.

    Attributes:
        model: in evaluation mode, on its device.
        tokenizer: turns ids into counts.
        conditions: ids (N, ..) of the real cells' conditions, none for an unconditional draw.
        real: the N real cells; their labels are those of ``conditions``.
        seeds: how often each setting draws.
        batch_size: cells of a chunk.
    """

    model: DCMForDenoising
    tokenizer: DCMTokenizer
    conditions: dict[str, torch.Tensor]
    real: CellCounts
    seeds: int
    batch_size: int

    def generate(self, setting: Setting, *, seed: int, num_cells: int | None = None) -> torch.Tensor:
        """Ids (N, G) of a draw, or of its first ``num_cells`` cells."""
        n = len(self.real) if num_cells is None else min(num_cells, len(self.real))
        given = {name: ids[:n] for name, ids in self.conditions.items()}
        return self.model.generate(
            n, **given, steps=setting.steps, schedule=setting.schedule, seed=seed, batch_size=self.batch_size
        )

    def scores(self, ids: torch.Tensor, reference: Reference, seed: int) -> dict[str, float]:
        """The metrics of drawn cells."""
        counts = self.tokenizer.decode(ids, seed=seed).X
        return _scores(CellCounts(counts, self.real.labels), reference)


def benchmark_sampling(
    sampled: Sampled, *, train: CellCounts | None = None, num_naive: int = 8, peak_flops: float | None = None
) -> list[Row]:
    """Rows of every setting that the model can do, of the two yardsticks, and of the floor.

    Args:
        sampled: what is drawn.
        train: real training cells, for the floor.
        num_naive: cells of the naive loop, which is timed only.
        peak_flops: of the device, per second; None leaves the utilisation out.
    """
    curve = as_curve(sampled.model.config.entropy_curve)
    reference = prepare_reference(sampled.real, PROTOCOL)
    settings = [setting for setting in SETTINGS if curve is not None or not setting.needs_curve]
    draws = (len(settings) + 1) * sampled.seeds + 1 + (FLOOR_DRAWS if train is not None else 0)
    rows = []
    with logging_redirect_tqdm(), tqdm(total=draws, unit="draw", desc="benchmark", disable=None) as bar:
        for setting in settings:
            bar.set_postfix_str(setting.name)
            rows.append(_measured(sampled, setting, reference, peak_flops, bar.update))
            _log(rows[-1])
        bar.set_postfix_str("yardsticks")
        rows.append(_released(sampled, reference, bar.update))
        _log(rows[-1])
        rows.append(_naive(sampled, num_naive))
        bar.update()
        _log(rows[-1])
        if train is not None:
            bar.set_postfix_str(FLOOR)
            scores = []
            for drawn in floor_draws(train, sampled.real):
                scores.append(_scores(drawn, reference))
                bar.update()
            rows.append(Row(FLOOR, scores=_by_metric(scores)))
            _log(rows[-1])
    return rows


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """Speed of the default ``auto`` over the naive loop's, and its MMD^2 against linear 100's; nan where not measured.

    ``se`` is the standard error of the difference of the two means over seeds, the variances of both added.
    """
    by_name = {row.name: row for row in rows}
    auto, linear, naive = (by_name.get(name, Row(name)) for name in (AUTO, LINEAR_100, NAIVE))
    known = None not in (auto.cells_per_second, naive.cells_per_second)
    variances = [row.std("mmd2") ** 2 / max(1, len(row.scores.get("mmd2", ()))) for row in (auto, linear)]
    return {
        "speedup_vs_naive": auto.cells_per_second / naive.cells_per_second if known else float("nan"),
        "mmd2_minus_linear100": auto.mean("mmd2") - linear.mean("mmd2"),
        "se": math.sqrt(sum(variances)),
    }


def _measured(
    sampled: Sampled, setting: Setting, reference: Reference, peak_flops: float | None, done: Callable[[], object]
) -> Row:
    """Draw with one setting under every seed."""
    model, n = sampled.model, len(sampled.real)
    curve = as_curve(model.config.entropy_curve)
    revealed = reveal_schedule(model.config.num_genes, setting.steps, setting.schedule, curve)
    row = Row(setting.name, setting.schedule, len(revealed) - 1)
    row.predicted_kl = None if curve is None else predicted_kl(revealed, curve)
    sampled.generate(setting, seed=0, num_cells=8)  # first uses of a shape cost more
    timer, scores, peaks = Timer(), [], []
    for seed in range(sampled.seeds):
        with PeakMemory(model.device) as memory, timer:
            ids = sampled.generate(setting, seed=seed)
        peaks.append(memory.mib)
        scores.append(sampled.scores(ids, reference, seed))
        done()
    row.cells_per_second, row.cpu_share = n / timer.median, _share(timer, model)
    row.peak_mib = None if None in peaks else max(peaks)
    row.scores = _by_metric(scores)
    if peak_flops is not None:
        chunk = min(sampled.batch_size, n)
        flops = count_flops(lambda: sampled.generate(setting, seed=0, num_cells=chunk))
        row.utilisation = flops / chunk * row.cells_per_second / peak_flops
    return row


def _released(sampled: Sampled, reference: Reference, done: Callable[[], object]) -> Row:
    """Cells as the released code's reveal rule draws them. Its speed is not measured: that of the loop is, in another
    row, and the calls after everything is revealed are left out here."""
    scores = []
    for seed in range(sampled.seeds):
        ids = naive_cells(sampled.model, sampled.conditions, len(sampled.real), rule=forward_rule, seed=seed)
        scores.append(sampled.scores(ids, reference, seed))
        done()
    curve = as_curve(sampled.model.config.entropy_curve)
    kl = None if curve is None else predicted_kl([0, sampled.model.config.num_genes], curve)
    return Row(RELEASED, None, NAIVE_STEPS, predicted_kl=kl, scores=_by_metric(scores))


def _naive(sampled: Sampled, num_cells: int) -> Row:
    """The plain loop, one cell at a time: timed, not scored.

    On a CPU with as many threads as the others and with one, whichever is faster: the work of one cell is too little
    to share, and waiting for each other must not make the yardstick slow.
    """
    model = sampled.model
    threads = torch.get_num_threads()
    timers = {number: Timer() for number in {1, threads}}
    given = {name: ids[:1] for name, ids in sampled.conditions.items()}
    naive_cells(model, given, 1, rule=reverse_rule, steps=2)
    with PeakMemory(model.device) as memory:
        for cell in range(min(num_cells, len(sampled.real))):
            given = {name: ids[cell : cell + 1] for name, ids in sampled.conditions.items()}
            for number, timer in timers.items():
                torch.set_num_threads(number)
                with timer:
                    naive_cells(model, given, 1, rule=reverse_rule, seed=cell)
    torch.set_num_threads(threads)
    best = min(timers.values(), key=lambda timer: timer.median)
    return Row(NAIVE, None, NAIVE_STEPS, 1 / best.median, _share(best, model), memory.mib)


def _share(timer: Timer, model: DCMForDenoising) -> float | None:
    return timer.cpu_share if model.device.type == "cpu" else None


def _scores(drawn: CellCounts, reference: Reference) -> dict[str, float]:
    return {score.metric: score.value for score in evaluate_pair(drawn, reference) if score.grouping == "pooled"}


def _by_metric(scores: Iterable[dict[str, float]]) -> dict[str, list[float]]:
    scores = list(scores)
    return {metric: [score[metric] for score in scores] for metric in METRICS}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _log(row: Row) -> None:
    """One line for who follows a log; a terminal has the bar."""
    parts = [f"{row.network_calls} calls" if row.network_calls else None]
    parts += [f"{row.cells_per_second:.3g} cells/s" if row.cells_per_second else None]
    parts += [f"MMD2 {row.mean('mmd2'):.5f}, slope {row.mean('correlation_slope'):.3f}" if row.scores else None]
    logger.info("%s: %s", row.name, ", ".join(filter(None, parts)))
