"""The optimiser, its rate, and the averaged weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.tensor import DTensor

from modeling_dcm import DCMForDenoising
from training.config import TrainConfig


def build_optimizer(model: DCMForDenoising, config: TrainConfig) -> torch.optim.AdamW:
    """Build AdamW; weight decay is on matrices only, neither on biases nor on embeddings."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    matrices = [p for p in model.parameters() if p.ndim > 1 and id(p) not in embeddings]
    others = [p for p in model.parameters() if p.ndim <= 1 or id(p) in embeddings]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.99), fused=True)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the rate of a step: linear warm-up, then cosine to zero at ``max_steps`` or constant."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.learning_rate_schedule == "constant":
        return config.learning_rate * warmup
    return config.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * step / config.max_steps))


@torch.no_grad()
def update_average(ema: list[torch.Tensor], model: torch.nn.Module, step: int, decay: float) -> None:
    """Move the exponential average of the weights, in float32, faster at the start."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(ema, [own_part(parameter.detach()).float() for parameter in model.parameters()], 1 - decay)


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor that FSDP2 has split over the processes; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def split_like(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The tensor of which this process holds ``part``, split as ``like`` is, if that is split."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def whole_averages(ema: list[torch.Tensor], model: torch.nn.Module) -> list[torch.Tensor]:
    """Averages of a ``model`` that is split, of which each process holds its part, put together; all must call it."""

    split = [split_like(part, parameter) for part, parameter in zip(ema, model.parameters(), strict=True)]
    return [average.full_tensor() if isinstance(average, DTensor) else average for average in split]


@contextmanager
def averaged_weights(model: DCMForDenoising, ema: list[torch.Tensor]) -> Iterator[DCMForDenoising]:
    """Context in which the model has the averaged weights, and compiled blocks run as they are written.

    A model is looked at in batches of all shapes, and each would be compiled anew.
    """
    _swap(model, ema)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield model
    finally:
        _swap(model, ema)


def _swap(model: DCMForDenoising, ema: list[torch.Tensor]) -> None:
    for parameter, average in zip(model.parameters(), ema, strict=True):
        kept = parameter.detach().clone()
        parameter.data.copy_(average)
        average.copy_(kept)
