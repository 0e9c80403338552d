"""Fit scVI on the training cells and draw from its prior or from its aggregated posterior.

One model is trained with scvi-tools' defaults (its number of epochs too: 400 up to 20,000 cells, fewer above), every
condition column a categorical covariate of the decoder. Needs the extra ``baselines``.
Reference: Lopez et al., Nature Methods 15 (2018), 1053-1058.
"""

import contextlib
import functools
import random
from collections.abc import Iterator
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from scipy import sparse

from eval.comparison.baselines import Sampler, cells_by_labels, training_rows
from eval.comparison.cells import CellCounts
from tokenization.count_checks_dcm import library_size

CELLS_AT_ONCE = 512
SEED = 0


def fit(train: CellCounts, *, from_prior: bool) -> Sampler:
    """Return a sampler that gives every wanted cell a training cell of its condition (backing off as marginals do).

    ``z`` is drawn from the prior, or from that training cell's posterior.
    """
    model, covariates, mean, variance = _trained(train)
    sizes = np.maximum(library_size(train.counts), 1).astype(np.float32)
    log_sizes = torch.from_numpy(np.log(sizes))[:, None]
    source = training_rows(train, who="scVI")

    def sample(conditions: pd.DataFrame, rng: np.random.Generator) -> sparse.csr_matrix:
        donors = np.empty(len(conditions), dtype=np.int64)
        for labels, rows in cells_by_labels(conditions[list(train.labels)]):
            donors[rows] = rng.choice(source(labels), len(rows))
        z = rng.standard_normal((len(donors), mean.shape[1]))
        if not from_prior:
            z = mean[donors] + np.sqrt(variance[donors]) * z
        blocks = []
        device = next(model.module.parameters()).device
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(int(rng.integers(2**31)))
            for start in range(0, len(donors), CELLS_AT_ONCE):
                rows = donors[start : start + CELLS_AT_ONCE]
                distribution = model.module.generative(
                    z=torch.from_numpy(z[start : start + CELLS_AT_ONCE]).float().to(device),
                    library=log_sizes[rows].to(device),
                    batch_index=torch.zeros((len(rows), 1), dtype=torch.long, device=device),
                    cat_covs=None if covariates is None else covariates[rows].to(device),
                )["px"]
                blocks.append(sparse.csr_matrix(distribution.sample().cpu().numpy().round().astype(np.int64)))
        return sparse.vstack(blocks, format="csr")

    return sample


@functools.lru_cache(maxsize=1)
def _trained(train: CellCounts) -> tuple[Any, torch.Tensor | None, np.ndarray, np.ndarray]:
    """An SCVI model trained on all training cells, which the two baselines share, and what it knows of the n cells.

    Returns:
        The model; (n, columns) codes of their conditions; (n, dimensions) means and variances of q(z | x).
    """
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
    return model, covariates, mean, variance


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
