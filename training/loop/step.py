"""One step: the optimiser and its rate, losses that must be finite, the averaged weights."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, repeat

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from modeling_dcm import DCMForDenoising
from training.config import TrainConfig

MEASURED = ("loss", "elbo", "gradient_norm")  # in each step
MOST_SKIPPED = 30  # steps in a row whose gradient overflows in fp16: the scale, 2^16 at first, is halved each time


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


def take_step(
    model, optimizer, batches, accelerator: Accelerator, config: TrainConfig, *, several_panels: bool = False
) -> tuple[torch.Tensor, ...]:
    """Take one step of the optimiser over one global batch; return loss, elbo and gradient norm of this process.

    A loss is a sum over a batch's measured genes by their number, and the processes' losses and those of accumulated
    batches are averaged. Where the cells are of ``several_panels`` each is weighted so that the average is the sum over
    all of them by the number of all measured genes.
    """
    loss = elbo = 0.0
    of_step, weights = islice(batches, config.gradient_accumulation_steps), repeat(1.0)
    if several_panels:
        of_step = list(of_step)
        pad = accelerator.unwrap_model(model).config.pad_token_id
        measured = torch.stack([(batch["labels"] != pad).sum() for batch in of_step]).float()
        weights = measured / accelerator.reduce(measured, "mean").mean().clamp(min=1)
    for batch, weight in zip(of_step, weights):
        with accelerator.accumulate(model):
            output = model(**batch)
            accelerator.backward(output.loss * weight)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), config.clip_norm)
                norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            optimizer.step()
            optimizer.zero_grad()
        loss += output.loss.detach() * weight / config.gradient_accumulation_steps
        elbo += output.elbo * weight / config.gradient_accumulation_steps
    return loss, elbo, norm


class NotFinite(ValueError):  # noqa: N818 (a user's mistake like every ValueError, with the step it happened at)
    """A step's loss or gradient norm is not a finite number."""

    def __init__(self, step: int, what: str, value: float):
        super().__init__(f"the {what.replace('_', ' ')} is {value} at step {step}")
        self.step = step


def check_finite(measured: Sequence[Sequence[float]], first: int, skipped: int, *, is_scaled: bool) -> int:
    """Look at what was ``measured`` in the steps from number ``first`` on, after ``skipped`` ones in a row whose
    gradient overflowed; return how many of these there are now.

    With fp16 (``is_scaled``) such a step is skipped and the loss scaled down for the next one: that is allowed, but not
    :data:`MOST_SKIPPED` times in a row.

    Raises:
        NotFinite: with the first step that has no finite loss or gradient norm.
    """
    for number, values in enumerate(measured, start=first):
        broken = {what: value for what, value in zip(MEASURED, values) if not math.isfinite(value)}
        is_skipped = list(broken) == ["gradient_norm"] and is_scaled
        skipped = skipped + 1 if is_skipped else 0
        if broken and (not is_skipped or skipped > MOST_SKIPPED):
            raise NotFinite(number, *next(iter(broken.items())))
    return skipped


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
