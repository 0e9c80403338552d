"""Every option of training, its one default and its help text; configuration files and command line override them.

A YAML file in `configs/` sets some, the command line sets others, in that order. Knows nothing of data and networks.
"""

import difflib
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Literal, get_args, get_origin

import yaml


@dataclass(frozen=True)
class TrainConfig:
    """Train a Discrete Cell Model on shards."""

    data: Path
    """Folder of shards that dcm-convert wrote."""
    out: Path
    """Folder of the checkpoint; made if missing."""
    config: Path | None = None
    """YAML file with any of these options."""
    resume: bool = False
    """Go on from the newest state under OUT/checkpoints, if there is one."""
    perturbation_embeddings: Path | None = None
    """Safetensors table, one vector for each perturbation's name; frozen. Without it vectors are learned."""

    # network
    size: Literal["5m", "10m", "20m"] | None = None
    """One of the paper's shapes; sets layers, width and heads."""
    backbone: Literal["dit", "latent"] = "latent"
    """dit: attention over genes (the paper's); latent: cost linear in genes."""
    hidden_size: int = 64
    """Width."""
    num_hidden_layers: int = 3
    """Blocks."""
    num_attention_heads: int = 4
    """Heads of each attention."""
    mlp_ratio: float = 4.0
    """Hidden width of the blocks' MLP over the width."""
    num_latents: int = 64
    """Latents of the latent backbone."""
    dropout: float = 0.0
    """In attention and MLP."""
    cell_summary: bool = True
    """Feed the sum over observed genes to AdaLN; False is the paper's conditioning."""
    gene_output_bias: int = 64
    """Counts with a bias of their own for each gene in the head."""
    conditions: str = "all"
    """Conditions to learn: all, none, or names separated by commas."""
    library_size_conditioning: bool = True
    """Tell the network each cell's total count."""
    condition_tokens: bool = False
    """Give the network one token for each condition besides AdaLN."""

    # objective
    loss_weighting: Literal["uniform", "elbo"] = "uniform"
    """uniform: every masked gene counts alike; elbo: the likelihood bound."""
    label_dropout: float = 0.1
    """Probability of dropping each condition of a cell."""
    query_genes: int | None = 128
    """Masked genes of each cell whose logits are computed; none: all. Fewer are cheaper and noisier."""

    # optimisation
    batch_size: int = 64
    """Cells of one process in one step."""
    gradient_accumulation_steps: int = 1
    """Batches summed before the optimiser steps."""
    max_steps: int = 2000
    """Steps of the optimiser."""
    learning_rate: float = 2e-3
    """Peak of AdamW's rate."""
    learning_rate_schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: cosine decay to zero at max_steps, or constant."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    """On matrices only."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    ema_decay: float = 0.999
    """Of the averaged weights, which are what is evaluated and saved."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the forward pass."""
    gradient_checkpointing: bool = False
    """Recompute activations to save memory."""
    attn: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation."""
    seed: int = 0
    """Of weights, order of cells, noise and label dropout."""

    # what is written, and when
    log_every: int = 20
    """Steps between lines of training.jsonl."""
    validate_every: int = 250
    """Steps between validations."""
    validation_cells: int = 512
    """Validation cells looked at, at most."""
    save_every: int = 500
    """Steps between states under OUT/checkpoints."""

    def __post_init__(self):
        for name in (
            "batch_size",
            "gradient_accumulation_steps",
            "max_steps",
            "log_every",
            "validate_every",
            "save_every",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")
        if self.query_genes is not None and self.query_genes < 1:
            raise ValueError(f"query_genes={self.query_genes}, expected at least 1, or none for all")
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}, expected above 0")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay}, expected in [0, 1)")


def read_config(path: Path) -> dict[str, object]:
    """Options of a YAML file.

    Raises:
        FileNotFoundError: no such file; the message lists the files beside it.
        ValueError: not a mapping, an unknown option (the message names the nearest one), or a value of another type.
    """
    if not path.is_file():
        near = sorted(str(file) for file in path.parent.glob("*.yaml"))
        raise FileNotFoundError(f"no config file {str(path)!r}; there are: {', '.join(near) or 'none'}")
    try:
        options = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{str(path)!r} is not YAML ({error})") from error
    if not isinstance(options, dict):
        raise ValueError(f"{str(path)!r} holds {type(options).__name__}, expected a mapping of options")
    known = {field.name: field.type for field in fields(TrainConfig)}
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
            raise ValueError(f"{str(path)!r}: unknown option {name!r}; did you mean {near!r}?")
    return {name: _typed(path, name, value, known[name]) for name, value in options.items()}


def _typed(path: Path, name: str, value: object, annotation: object) -> object:
    """The value of a YAML file as the option's type; YAML reads paths, and numbers such as 2e-3, as text."""
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    for kind in kinds:
        if get_origin(kind) is Literal:
            if value in get_args(kind):
                return value
        elif kind is Path and isinstance(value, str):
            return Path(value)
        elif kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
            try:
                return float(value)
            except ValueError:
                continue
        elif type(value) is kind:
            return value
    expected = " or ".join(str(get_args(kind) or kind.__name__) for kind in kinds).replace("NoneType", "null")
    raise ValueError(f"{str(path)!r}: {name}={value!r}, expected {expected}")
