"""Write a tiny checkpoint folder with random weights, as training writes them."""

import json
from pathlib import Path

import torch

from modeling_dcm import DCMForDenoising
from modeling_dcm.conditioning_dcm import ANY, LIBRARY_QUANTILES
from tokenization import DCMTokenizer
from training.config import TrainConfig
from training.loop.resume import add_shipped_files

GENES = ["KLF1", "TGFBR2", "GATA1", "ACTB", "HBB", "MYC", "FOS"]
LABELS = {
    "cell_types": ["k562", "hepg2", "rpe1"],
    "perturbations": ["KLF1", "TGFBR2", "GATA1", "control"],
    "control": "control",
    "covariates": {"donor": ["d1", "d2"], "day": ["0", "1", "2"]},
}


def write_tiny_checkpoint(folder: Path, model: DCMForDenoising, *, count_bins: list[int] | None = None) -> Path:
    """Save ``model``, which ``make_model(conditioned=True)`` made, and a tokenizer that fits it."""
    K, sizes = model.config.max_count, model.library_sizes
    sizes.keys = torch.full((1, sizes.keys.shape[1]), ANY)
    sizes.quantiles = torch.linspace(0, 19, LIBRARY_QUANTILES)[None]
    model.config.library_size_groups = len(sizes.keys)
    model.save_pretrained(folder)
    DCMTokenizer(genes=GENES, max_count=K, count_bins=count_bins, **LABELS).save_pretrained(folder)
    options = TrainConfig(data=Path("home/me/shards"), out=Path("home/me/checkpoint")).options()
    (folder / "training_options.json").write_text(json.dumps(options, default=str))
    add_shipped_files(folder)
    return folder
