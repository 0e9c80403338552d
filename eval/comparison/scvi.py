"""Fit scVI on the training cells and draw from its prior, its aggregated posterior, or control cells moved there.

One model is trained with scvi-tools' defaults (its number of epochs too: 400 up to 20,000 cells, fewer above), every
condition column a categorical covariate of the decoder; where latents are moved, another one that is not told the
perturbation. Needs the extra ``baselines``.
Reference: Lopez et al., Nature Methods 15 (2018), 1053-1058.
"""

import contextlib
import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from scipy import sparse

from eval.comparison.baselines import ConditionMeans, Sampler, cells_by_labels, check_control, training_rows
from eval.comparison.cells import PERTURBATION, CellCounts
from tokenization.count_errors_dcm import library_size

CELLS_AT_ONCE = 512
SEED = 0


def fit(train: CellCounts, *, from_prior: bool, max_epochs: int | None = None) -> Sampler:
    """Return a sampler that gives every wanted cell a training cell of its condition (backing off as marginals do).

    ``z`` is drawn from the prior, or from that training cell's posterior. Default: scvi-tools' number of epochs.
    """
    known = _trained(train, max_epochs)
    source = training_rows(train, who="scVI")

    def sample(conditions: pd.DataFrame, rng: np.random.Generator) -> sparse.csr_matrix:
        donors = np.empty(len(conditions), dtype=np.int64)
        for labels, rows in cells_by_labels(conditions[list(train.labels)]):
            donors[rows] = rng.choice(source(labels), len(rows))
        z = rng.standard_normal((len(donors), known.mean.shape[1]))
        return known.decoded(z if from_prior else known.latents(donors, z), donors, rng)

    return sample


def fit_shift(train: CellCounts) -> Sampler:
    """Return a sampler that decodes control cells of the context, their ``z`` moved by the perturbation's mean shift.

    The shift is the difference of the mean latents of its cells and the control's, averaged over contexts where the
    context has none; of a combination without cells the sum of its parts', of what was never seen none.
    Reference: Lotfollahi, Wolf and Theis, Nature Methods 16 (2019), 715-721 (scGen).

    Raises:
        ValueError: no column of perturbations, or no control cells.
    """
    check_control(train)
    known = _trained(replace(train, labels=train.labels.drop(columns=PERTURBATION)))
    means = ConditionMeans(replace(train, counts=sparse.csr_matrix(known.mean)))
    position = list(train.labels).index(PERTURBATION)

    @functools.cache
    def shift(context: tuple[str, ...], name: str) -> np.ndarray:
        contexts = means.contexts_with(name, near=context)
        if name != train.control and contexts:
            return np.mean([means.of(c, name) - means.control(c) for c in contexts], axis=0)
        parts = name.split(train.separator) if train.separator else [name]
        return sum((shift(context, part) for part in parts if part != name), np.zeros(known.mean.shape[1]))

    def sample(conditions: pd.DataFrame, rng: np.random.Generator) -> sparse.csr_matrix:
        donors = np.empty(len(conditions), dtype=np.int64)
        moved = np.empty((len(donors), known.mean.shape[1]))
        for labels, rows in cells_by_labels(conditions[list(train.labels)]):
            context = (*labels[:position], *labels[position + 1 :])
            donors[rows] = rng.choice(means.control_rows(context), len(rows))
            moved[rows] = shift(context, labels[position])
        z = known.latents(donors, rng.standard_normal(moved.shape))
        return known.decoded(z + moved, donors, rng)

    return sample


@dataclass(frozen=True)
class _Trained:
    """A model, and what it knows of the n training cells."""

    model: Any
    covariates: torch.Tensor | None  # (n, columns) codes of their conditions
    mean: np.ndarray  # (n, dimensions) of q(z | x)
    variance: np.ndarray
    log_sizes: torch.Tensor  # (n, 1)

    def latents(self, donors: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """``z`` of cells (rows of the training cells) from standard normal noise."""
        return self.mean[donors] + np.sqrt(self.variance[donors]) * noise

    def decoded(self, z: np.ndarray, donors: np.ndarray, rng: np.random.Generator) -> sparse.csr_matrix:
        """Counts drawn at ``z``, with the conditions that the model is told and the library sizes of the donors."""
        blocks = []
        device = next(self.model.module.parameters()).device
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(int(rng.integers(2**31)))
            for start in range(0, len(donors), CELLS_AT_ONCE):
                rows = donors[start : start + CELLS_AT_ONCE]
                distribution = self.model.module.generative(
                    z=torch.from_numpy(z[start : start + CELLS_AT_ONCE]).float().to(device),
                    library=self.log_sizes[rows].to(device),
                    batch_index=torch.zeros((len(rows), 1), dtype=torch.long, device=device),
                    cat_covs=None if self.covariates is None else self.covariates[rows].to(device),
                )["px"]
                blocks.append(sparse.csr_matrix(distribution.sample().cpu().numpy().round().astype(np.int64)))
        return sparse.vstack(blocks, format="csr")


@functools.lru_cache(maxsize=1)
def _trained(train: CellCounts, max_epochs: int | None = None) -> _Trained:
    """An SCVI model trained on all training cells, which two baselines share."""
    import scvi

    columns = list(train.labels)
    obs = train.labels.set_axis([str(row) for row in range(len(train))])
    adata = anndata.AnnData(train.counts.astype(np.float32), obs=obs)
    with _seeded():
        scvi.model.SCVI.setup_anndata(adata, categorical_covariate_keys=columns or None)
        model = scvi.model.SCVI(adata)
        model.train(max_epochs=max_epochs)
        mean, variance = model.get_latent_representation(return_dist=True)
    model.module.eval()
    covariates = None
    if columns:
        codes = model.adata_manager.get_from_registry(scvi.REGISTRY_KEYS.CAT_COVS_KEY)
        covariates = torch.from_numpy(np.asarray(codes).astype(np.int64))
    log_sizes = np.log(np.maximum(library_size(train.counts), 1).astype(np.float32))[:, None]
    return _Trained(model, covariates, mean, variance, torch.from_numpy(log_sizes))


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Seed what scvi-tools draws from (weights, its own validation split, batches), and leave no trace of it."""
    import scvi

    before = scvi.settings.seed, np.random.get_state(), random.getstate()
    with torch.random.fork_rng():
        try:
            scvi.settings.seed = SEED
            yield
        finally:
            scvi.settings._seed = before[0]
            np.random.set_state(before[1])
            random.setstate(before[2])
