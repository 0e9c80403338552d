"""Options of trainings that take a second or two. Knows nothing of any property."""

from pathlib import Path

from training.config import TrainConfig

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
