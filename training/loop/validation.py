"""Look at validation cells during training: the loss, a small score of generated cells, at last the entropy curve.

The shards are opened once; noise and seeds are always the same, so that numbers of different steps can be compared.
Never looks at test cells. Letters: N cells.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import cycle

import numpy as np
import torch
from tqdm import tqdm

from eval.metrics.distances import median_bandwidth, mmd2, w2
from eval.metrics.gene_agreement import BANDS, component_variance_ratio, correlation_agreement, principal_directions
from modeling_dcm import DCMForDenoising
from modeling_dcm.generation_dcm import dropout_off
from modeling_dcm.schedule_dcm import fit_entropy
from modeling_dcm.scoring_dcm import measure_entropy
from tokenization import DCMTokenizer
from training.config import TrainConfig
from training.data.loader import FLOOR, Cells
from training.data.shards import shard_files
from training.loop.batches import TrainBatches
from training.loop.start import open_cells
from training.loop.step import averaged_weights

logger = logging.getLogger(__name__)

FLOOR_DRAWS = 3
FLOOR_POOL = 100_000  # training cells that the floor is drawn from, at most
LEAST_SCORE = 1e-3
COMPONENT_CELLS = 2000  # training cells that principal components are fitted on, at most
ENTROPY_BATCH = 64


@dataclass(frozen=True)
class Reference:
    """Validation cells that generated ones are compared with, as log1p counts."""

    genes: np.ndarray  # (G,) which were measured in all cells
    real: np.ndarray  # (n, genes)
    width: float  # of the kernel
    directions: np.ndarray  # (genes, d) principal components of training cells
    floor: dict[str, float]  # what training cells score

    def compare(self, x: np.ndarray) -> dict[str, float]:
        """Scores of cells (n, genes); ``variance_...`` for each band of components. Those that are nan are left out."""
        correlation, slope = correlation_agreement(x, self.real)
        scores = {"mmd2": mmd2(x, self.real, bandwidths=[self.width]), "w2": w2(x, self.real)}
        scores |= {"correlation": correlation, "correlation_slope": slope}
        for name, band in BANDS.items():
            scores[f"variance_{name}"] = component_variance_ratio(x, self.real, self.directions, band)
        return {name: value for name, value in scores.items() if np.isfinite(value)}


class Validation:
    """Validation cells of a run, for the averaged weights of its model.

    ``autocast`` makes the context of the run's precision: flash attention, for one, knows no other.
    """

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: DCMTokenizer,
        training_cells: Cells,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.config, self.tokenizer, self.training_cells, self.autocast = config, tokenizer, training_cells, autocast
        has_cells = bool(shard_files(config.shards, "validation"))
        self.cells = open_cells(config, "validation", tokenizer) if has_cells else None
        self.quiet = replace(config, label_dropout=0.0, query_genes=None, state_dropout=0.0)
        self.reference: Reference | None = None

    @torch.no_grad()
    def losses(self, model: DCMForDenoising, ema: list[torch.Tensor]) -> dict[str, float]:
        """Return ``validation_loss`` and ``validation_elbo`` (nats per gene); nothing without cells."""
        if not self.cells:
            return {}
        rows = list(range(min(len(self.cells), self.config.validation_cells)))
        measured = self.cells.measured.mean(axis=1)[self.cells.panel[rows]]  # share of the panel, of each cell
        sums = {"validation_loss": 0.0, "validation_elbo": 0.0}
        state = model.state if model.config.state_dim else None
        quiet = TrainBatches(None, self.quiet, model.config, device=model.device, state=state)
        with averaged_weights(model, ema), self.autocast(), dropout_off(model):
            for index in range(0, len(rows), self.config.batch_size):
                batch = self.cells[rows[index : index + self.config.batch_size]]
                cells = measured[index : index + self.config.batch_size].sum()
                inputs = quiet.noised(batch, index)
                share = cells / measured.sum()
                if "state" in inputs:  # told the state, it is no bound on the cells' likelihood
                    told = model(**inputs, return_logits=False).loss.item()
                    sums["validation_loss_told"] = sums.get("validation_loss_told", 0.0) + told * share
                    inputs["state"] = None
                output = model(**inputs, return_logits=False)
                sums["validation_loss"] += output.loss.item() * share
                sums["validation_elbo"] += output.elbo.item() * share
        return sums

    def score(self, model: DCMForDenoising, ema: list[torch.Tensor]) -> dict[str, float]:
        """Compare generated cells of the validation cells' conditions with these cells, on log1p counts.

        ``score_mmd2`` (Eq. 7, unbiased, one RBF with the median width of the validation cells), ``score_w2`` (Eq. 8),
        ``score_correlation`` and ``score_correlation_slope`` of the 100 most variable genes, and
        ``score_component_variance``, the mean over bands of the training cells' components; each also as
        ``..._floor``, of training cells of the same conditions. ``score_distance`` is the sum of |log(value / floor)|
        over W2, slope and the bands' mean |log|: how far the cells are from the floor. Genes that were not measured in
        all of these cells are left out. None with fewer than two cells, or no gene.
        """
        if not self.cells or len(self.cells) < 2:
            return {}
        number = min(len(self.cells), self.config.score_cells)
        self.reference = reference = self.reference or self._reference(number)
        if reference is None:
            return {}
        conditions = {name: ids[:number] for name, ids in self.cells.conditions.items()}
        options = {"seed": self.config.seed, "batch_size": self.config.batch_size}
        with averaged_weights(model, ema) as averaged, self.autocast():
            ids = averaged.generate(number, **conditions, **options)
        found = reference.compare(_log1p(self.tokenizer.decode(ids).X)[:, reference.genes])
        return _with_distance(found, reference.floor)

    def _reference(self, number: int) -> Reference | None:
        """The first validation cells, and training cells of the same conditions as their floor."""
        rng, train = np.random.default_rng([self.config.seed, 0, FLOOR]), self.training_cells
        draws = [_alike(train, self.cells, number, rng) for _ in range(FLOOR_DRAWS)]
        fitted = np.sort(train.random_cells(np.arange(len(train)), COMPONENT_CELLS, rng))
        genes = _always_measured(self.cells, np.arange(number))
        genes &= _always_measured(train, np.concatenate([*draws, fitted]))
        if not genes.any():
            logger.warning("no gene was measured in all validation and training cells: there are no scores")
            return None
        real = _log1p(self.cells.csr(range(number)))[:, genes]
        directions = principal_directions(_log1p(train.csr(fitted))[:, genes])
        reference = Reference(genes, real, median_bandwidth(real), directions, {})
        floors = [reference.compare(_log1p(train.csr(rows))[:, genes]) for rows in draws]
        floor = {name: float(np.mean([found[name] for found in floors])) for name in floors[0]}
        return replace(reference, floor=floor)

    def entropy_curve(self, model: DCMForDenoising) -> dict[str, list[float]] | None:
        """Measure the entropy curve of ``model``, as it is; None without cells in which every gene was measured."""
        if not self.cells or not _complete_cells(self.cells, 1):
            logger.info("no validation cells in which every gene was measured: the checkpoint has no entropy curve")
            return None
        with self.autocast():
            return validation_entropy(model, self.cells, seed=self.config.seed)[1]


def validation_entropy(
    model: DCMForDenoising, cells: Cells, *, num_cells: int = 256, seed: int = 0
) -> tuple[dict, dict[str, list[float]]]:
    """Measure (see :func:`measure_entropy`) the first validation ``cells``, and fit the entropy curve. Cells in which a
    gene of the panel was not measured are left out: their curve would end early."""
    rows = _complete_cells(cells, num_cells)

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        starts = range(0, len(rows), ENTROPY_BATCH)
        for start in tqdm(starts, desc="entropy curve", unit="batch", delay=1, disable=None):
            batch = cells[rows[start : start + ENTROPY_BATCH]]
            batch["input_ids"] = batch["input_ids"].long()
            library_size = batch.pop("library_size").float()
            if model.config.state_dim:
                batch["state"] = model.state(batch["input_ids"].to(model.device), library_size.to(model.device))
            yield batch | ({"library_size": library_size} if model.config.library_size_conditioning else {})

    measured = measure_entropy(model, batches(), seed=seed)
    return measured, fit_entropy(measured, len(cells.tokenizer.genes))


def _complete_cells(cells: Cells, number: int) -> list[int]:
    """The first ``number`` cells in which every gene was measured, or as many as there are."""
    is_complete = cells.measured.all(axis=1)[cells.panel]
    return np.flatnonzero(is_complete)[:number].tolist()


def _with_distance(found: dict[str, float], floor: dict[str, float]) -> dict[str, float]:
    """Scores and their floor by their names in the log, and ``score_distance``; bands of components by their mean."""
    both = {name for name in found if name in floor}
    off = {name: abs(math.log(max(found[name], LEAST_SCORE) / max(floor[name], LEAST_SCORE))) for name in both}
    bands = [name for name in both if name.startswith("variance_")]
    shown = {}
    for suffix, values in (("", found), ("_floor", floor)):
        shown |= {f"score_{name}{suffix}": value for name, value in values.items() if not name.startswith("variance_")}
        if bands:
            shown[f"score_component_variance{suffix}"] = sum(values[name] for name in bands) / len(bands)
    if bands and {"w2", "correlation_slope"} <= off.keys():
        shown["score_distance"] = off["w2"] + off["correlation_slope"] + sum(off[name] for name in bands) / len(bands)
    return shown


def _always_measured(cells: Cells, rows: np.ndarray) -> np.ndarray:
    """Which genes (G,) were measured in all of these cells."""
    return cells.measured[cells.panel[rows]].all(axis=0)


def _log1p(counts) -> np.ndarray:
    return np.log1p(np.asarray(counts.todense(), dtype=np.float64))


def _alike(train: Cells, cells: Cells, number: int, rng: np.random.Generator) -> np.ndarray:
    """A training cell (number,) with the conditions of each of the first ``cells``, or any where there is none; each
    once as far as they go."""
    pool = train.random_cells(np.arange(len(train)), FLOOR_POOL, rng)

    def labels(of: Cells, rows: np.ndarray) -> list[tuple[int, ...]]:
        columns = [ids[rows].reshape(len(rows), -1) for ids in of.conditions.values()]
        return [tuple(row) for row in torch.cat(columns, dim=1).tolist()] if columns else [()] * len(rows)

    alike = defaultdict(list)
    for row, label in zip(pool.tolist(), labels(train, pool)):
        alike[label].append(row)
    draws = defaultdict(lambda: cycle(pool.tolist()), {label: cycle(found) for label, found in alike.items()})
    return np.array([next(draws[label]) for label in labels(cells, np.arange(number))])
