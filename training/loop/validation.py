"""Look at validation cells during training: the loss, a small score of generated cells, at last the entropy curve.

The shards are opened once; noise and seeds are always the same, so that numbers of different steps can be compared.
Never looks at test cells. Letters: N cells.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

from eval.metrics.distances import median_bandwidth, mmd2
from eval.metrics.gene_agreement import correlation_agreement
from modeling_dcm import DCMForDenoising
from modeling_dcm.generation_dcm import dropout_off
from modeling_dcm.schedule_dcm import fit_entropy
from modeling_dcm.scoring_dcm import measure_entropy
from tokenization import DCMTokenizer
from training.config import TrainConfig
from training.data.loader import FLOOR, Cells
from training.loop.batches import noised
from training.loop.optimiser import averaged_weights
from training.loop.start import open_cells

logger = logging.getLogger(__name__)

SCORE_STEPS = 20  # of sampling
ENTROPY_BATCH = 64


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
        has_cells = any((config.data / "validation").glob("*.parquet"))
        self.cells = open_cells(config, "validation", tokenizer) if has_cells else None
        self.quiet = replace(config, label_dropout=0.0, query_genes=None, state_dropout=0.0)
        self.reference: tuple[np.ndarray, np.ndarray, float, dict[str, float]] | None = None

    @torch.no_grad()
    def losses(self, model: DCMForDenoising, ema: list[torch.Tensor]) -> dict[str, float]:
        """Return ``validation_loss`` and ``validation_elbo`` (nats per gene); nothing without cells."""
        if not self.cells:
            return {}
        rows = list(range(min(len(self.cells), self.config.validation_cells)))
        measured = self.cells.measured.mean(axis=1)[self.cells.panel[rows]]  # share of the panel, of each cell
        sums = {"validation_loss": 0.0, "validation_elbo": 0.0}
        with averaged_weights(model, ema), self.autocast(), dropout_off(model):
            for index in range(0, len(rows), self.config.batch_size):
                batch = self.cells[rows[index : index + self.config.batch_size]]
                cells = measured[index : index + self.config.batch_size].sum()
                inputs = noised(batch, self.quiet, self.tokenizer, index, 0, 1, model.device, model.state)
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

        ``score_mmd2`` (Eq. 7, unbiased, one RBF with the median width of the validation cells), and
        ``score_correlation`` and ``score_correlation_slope`` of the 100 most variable genes; each also as
        ``..._floor``, of as many training cells. Genes that were not measured in all of these cells are left out. None
        with fewer than two cells, or no gene.
        """
        if not self.cells or len(self.cells) < 2:
            return {}
        number = min(len(self.cells), self.config.score_cells)
        if self.reference is None:
            rows = np.random.default_rng([self.config.seed, 0, FLOOR]).permutation(len(self.training_cells))[:number]
            rows = np.sort(rows)
            genes = _always_measured(self.cells, np.arange(number)) & _always_measured(self.training_cells, rows)
            if not genes.any():
                logger.warning("no gene was measured in all validation and training cells: there are no scores")
                return {}
            real = _log1p(self.cells.csr(range(number)))[:, genes]
            width = median_bandwidth(real)
            floor = _agreement(_log1p(self.training_cells.csr(rows))[:, genes], real, width)
            self.reference = genes, real, width, {f"{name}_floor": value for name, value in floor.items()}
        genes, real, width, floor = self.reference
        conditions = {name: ids[:number] for name, ids in self.cells.conditions.items()}
        options = {"steps": SCORE_STEPS, "seed": self.config.seed, "batch_size": self.config.batch_size}
        with averaged_weights(model, ema) as averaged, self.autocast():
            ids = averaged.generate(number, **conditions, **options)
        return _agreement(_log1p(self.tokenizer.decode(ids).X)[:, genes], real, width) | floor

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
    """Measure (see :func:`measure_entropy`) the first validation ``cells``, and fit the entropy curve.

    Cells in which a gene of the panel was not measured are left out: their curve would end early.

    Raises:
        ValueError: there is no cell in which every gene was measured.
    """
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


def _always_measured(cells: Cells, rows: np.ndarray) -> np.ndarray:
    """Which genes (G,) were measured in all of these cells."""
    return cells.measured[cells.panel[rows]].all(axis=0)


def _log1p(counts) -> np.ndarray:
    return np.log1p(np.asarray(counts.todense(), dtype=np.float64))


def _agreement(x: np.ndarray, real: np.ndarray, width: float) -> dict[str, float]:
    correlation, slope = correlation_agreement(x, real)
    distance = mmd2(x, real, bandwidths=[width])
    scores = {"score_mmd2": distance, "score_correlation": correlation, "score_correlation_slope": slope}
    return {name: value for name, value in scores.items() if np.isfinite(value)}
