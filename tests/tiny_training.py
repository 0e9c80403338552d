"""Trainings that take a second or two, and a comparison of files of drawn cells."""

from pathlib import Path

import anndata
import pandas as pd

from training.config import TrainConfig
from training.convert_h5ad import main as convert
from training.train import main as train

TINY_TRAINING = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_latents": 4,
    "batch_size": 8,
    "max_steps": 6,
    "warmup_steps": 2,
    "query_genes": 6,
    "log_every": 3,
    "validate_every": 6,
    "validation_cells": 16,
    "save_every": 3,
    "trackers": "none",
}


def tiny_training(data: Path, out: Path, **options: object) -> TrainConfig:
    """Train on shards ``data`` into ``out``; ``options`` win over :data:`TINY_TRAINING`."""
    return TrainConfig(data=data, out=out, **{**TINY_TRAINING, **options})


def two_steps(shards: Path, out: Path) -> Path:
    """A checkpoint with cell types, perturbations and library sizes after two steps of training."""
    return train(tiny_training(shards, out, max_steps=2))


def shards_of_two_panels(cells_h5ad: Path, folder: Path) -> Path:
    """Shards of the same cells, in the second half of which only 4 of the 15 genes were measured."""
    cells = anndata.read_h5ad(cells_h5ad)
    files = (folder / "all.h5ad", folder / "few.h5ad")
    for file, part in zip(files, (cells[: len(cells) // 2], cells[len(cells) // 2 :, :4])):
        part.copy().write_h5ad(file)
    keys = {"cell_type_key": "cell_type", "perturbation_key": "perturbation"}
    return convert(files, out=folder / "shards", join="union", **keys)


def assert_same_file(a: Path, b: Path) -> None:
    """Two h5ad files of drawn cells hold the same bytes and labels."""
    first, second = anndata.read_h5ad(a), anndata.read_h5ad(b)
    for array in ("indptr", "indices", "data"):
        x, y = getattr(first.X, array), getattr(second.X, array)
        assert x.dtype == y.dtype
        assert x.tobytes() == y.tobytes()
    pd.testing.assert_frame_equal(first.obs, second.obs)
    pd.testing.assert_frame_equal(first.var, second.var)
    assert first.uns.keys() == second.uns.keys()
    assert dict(first.uns["dcm_sampling"]) == dict(second.uns["dcm_sampling"])
