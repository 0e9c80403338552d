"""scVI as a baseline: cells from its prior, and from its aggregated posterior, through ``fit(train) -> sample``.

One model is trained with scvi-tools' defaults (its number of epochs too: 400 up to 20,000 cells, fewer above), every
condition column a categorical covariate of the decoder. Needs the
extra ``baselines``; knows nothing of files or metrics. Reference: Lopez et al., Nature Methods 15 (2018), 1053-1058.
"""

import contextlib
import functools
import importlib.util
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from scipy import sparse

from eval.comparison.baselines import Sampler, training_rows, wanted_conditions
from eval.comparison.labelled_counts import LabelledCounts

CELLS_AT_ONCE = 512
SEED = 0
MISSING = "scVI baselines need the package scvi-tools: pip install 'discrete-cell-models[baselines]'"


def scvi_prior(train: LabelledCounts) -> Sampler:
    """Decode ``z ~ N(0, I)`` with the condition and the library size of a random training cell of it.

    Raises:
        ValueError: scvi-tools is not installed.
    """
    return _sampler(train, from_prior=True)


def scvi_aggregated_posterior(train: LabelledCounts) -> Sampler:
    """Decode ``z ~ q(z | x)`` of a random training cell ``x`` of the condition, with its library size.

    Easier than the prior's task: each cell drawn starts from a real one.

    Raises:
        ValueError: scvi-tools is not installed.
    """
    return _sampler(train, from_prior=False)


def is_installed() -> bool:
    """Whether scvi-tools can be imported."""
    return importlib.util.find_spec("scvi") is not None


@dataclass(frozen=True)
class _Trained:
    """A trained SCVI model and what it knows of the training cells."""

    model: Any
    covariates: torch.Tensor | None  # (n, columns) codes of the conditions
    mean: np.ndarray  # (n, latent dimensions) of q(z | x)
    variance: np.ndarray


def _sampler(train: LabelledCounts, *, from_prior: bool) -> Sampler:
    """Sampler that gives every wanted cell a training cell of its condition (backing off as the marginals do)."""
    trained = _trained(train)
    sizes = np.asarray(train.counts.sum(axis=1), dtype=np.float32).ravel()
    log_sizes = torch.from_numpy(np.log(np.maximum(sizes, 1.0)))[:, None]

    def sample(conditions: pd.DataFrame, rng: np.random.Generator) -> sparse.csr_matrix:
        donors = np.empty(len(conditions), dtype=np.int64)
        for labels, rows in wanted_conditions(train, conditions):
            donors[rows] = rng.choice(training_rows(train, labels, who="scVI"), len(rows))
        z = rng.standard_normal((len(donors), trained.mean.shape[1]))
        if not from_prior:
            z = trained.mean[donors] + np.sqrt(trained.variance[donors]) * z
        blocks = []
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(int(rng.integers(2**31)))
            for start in range(0, len(donors), CELLS_AT_ONCE):
                rows = donors[start : start + CELLS_AT_ONCE]
                law = trained.model.module.generative(
                    z=torch.from_numpy(z[start : start + CELLS_AT_ONCE]).float(),
                    library=log_sizes[rows],
                    batch_index=torch.zeros((len(rows), 1), dtype=torch.long),
                    cat_covs=None if trained.covariates is None else trained.covariates[rows],
                )["px"]
                blocks.append(sparse.csr_matrix(law.sample().cpu().numpy().round().astype(np.int64)))
        return sparse.vstack(blocks, format="csr")

    return sample


@functools.lru_cache(maxsize=1)
def _trained(train: LabelledCounts) -> _Trained:
    """An SCVI model trained on all training cells; the two baselines share it."""
    if not is_installed():
        raise ValueError(MISSING)
    import scvi

    columns = list(train.labels)
    obs = train.labels.set_axis([str(row) for row in range(len(train))])
    adata = anndata.AnnData(train.counts.astype(np.float32), obs=obs)
    with _seeded():
        scvi.model.SCVI.setup_anndata(adata, categorical_covariate_keys=columns or None)
        model = scvi.model.SCVI(adata)
        model.train()
        mean, variance = model.get_latent_representation(return_dist=True)
    model.module.eval()
    covariates = None
    if columns:
        codes = model.adata_manager.get_from_registry(scvi.REGISTRY_KEYS.CAT_COVS_KEY)
        covariates = torch.from_numpy(np.asarray(codes).astype(np.int64))
    return _Trained(model, covariates, mean, variance)


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
