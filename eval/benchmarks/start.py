"""Time how long it takes until drawn cells are about as near to real cells as other real cells are.

In come shards; out go rows: seconds on this machine, and the distance to the validation cells of what is drawn: by a
network that starts from statistics and has not been trained, and by scVI after more and more epochs.
"""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from eval.comparison import scvi
from eval.comparison.cells import CellCounts, from_anndata
from eval.comparison.floor import FLOOR, FLOOR_DRAWS, floor_draws
from eval.metrics.distances import w2
from training.config import TrainConfig, read_config
from training.data.formats import read_counts
from training.loop.start import build_model, build_tokenizer, open_cells

NEAR = 1.02  # of the floor
OURS, SCVI = "not trained", "scVI"
EPOCHS = (10, 50, 100, 200, 400)


@dataclass(frozen=True)
class Row:
    """What draws, seconds until it could, and W2 of log1p counts to the validation cells, of each draw."""

    name: str
    seconds: float
    distances: list[float]

    @property
    def mean(self) -> float:
        return float(np.mean(self.distances))

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def time_starts(data: Path, *, seeds: int) -> list[Row]:
    """The floor, our start with states of training cells and with drawn ones, and scVI until both its posterior and its
    prior are near."""
    config = TrainConfig(**read_config(Path("laptop")) | {"data": data, "out": data})
    tokenizer = build_tokenizer(config)
    names = {"conditions": tokenizer.known_conditions(), "genes": tokenizer.genes}
    train, real = (from_anndata(read_counts(data / f"{s}.h5ad"), name=s, **names) for s in ("train", "validation"))
    rows = [_row(FLOOR, 0.0, real, [draw.counts for draw in floor_draws(train, real, draws=FLOOR_DRAWS)])]
    began = time.perf_counter()
    model = build_model(config, tokenizer, open_cells(config, "train", tokenizer)).eval()
    seconds = time.perf_counter() - began
    labels = {name: real.labels[name].tolist() for name in real.labels}
    given = tokenizer.conditions(
        cell_type=labels.pop("cell_type", None),
        perturbation=labels.pop("perturbation", None),
        covariates=labels or None,
        num_cells=len(real),
    )
    for state in ("bank", "prior"):
        draws = [tokenizer.decode(model.generate(**given, state=state, seed=s)).X for s in range(seeds)]
        rows.append(_row(f"{OURS}, states: {state}", seconds, real, draws))
    for number in EPOCHS:
        began = time.perf_counter()
        samplers = {f: scvi.fit(train, from_prior=f == "prior", max_epochs=number) for f in ("posterior", "prior")}
        seconds = time.perf_counter() - began
        for state, sample in samplers.items():
            draws = [sample(real.labels, np.random.default_rng(seed)) for seed in range(seeds)]
            rows.append(_row(f"{SCVI}, {number} epochs, {state}", seconds, real, draws))
        if all(row.mean <= NEAR * rows[0].mean for row in rows[-2:]):
            break
    return rows


def _row(name: str, seconds: float, real: CellCounts, draws: list) -> Row:
    x = real.counts.log1p()
    return Row(name, seconds, [w2(draw.log1p(), x) for draw in draws])


def table(rows: list[Row]) -> list[tuple[str, ...]]:
    """Lines of the table, the header first."""
    lines = [("drawn by", "seconds", "W2", "against the floor")]
    for row in rows:
        distance = f"{row.mean:.3f} ± {np.std(row.distances, ddof=1):.3f}"
        lines.append((row.name, f"{row.seconds:.1f}", distance, f"{100 * (row.mean / rows[0].mean - 1):+.1f} %"))
    return lines


def summary(rows: list[Row]) -> dict[str, float]:
    """Seconds and W2 of our start with states of training cells, and the seconds until scVI's posterior is near."""
    ours = next(row for row in rows if row.name.startswith(OURS))
    near = [
        r.seconds for r in rows if r.name.startswith(SCVI) and "posterior" in r.name and r.mean <= NEAR * rows[0].mean
    ]
    return {"start_seconds": ours.seconds, "start_w2": ours.mean, "scvi_seconds": next(iter(near), math.nan)}
