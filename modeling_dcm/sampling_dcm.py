"""The sampler: reveal genes in a random order fixed in advance, drawing each from the denoiser's distribution.

Plain functions over a ``denoise`` callable; knows nothing of networks, conditions or files. Positions first and tokens
second: the number of genes revealed in a step is the schedule's, and no count, however rare, loses a race against MASK.
Letters: B cells, L genes in the sequence, q genes revealed in a step, S steps, K largest count.
"""

from collections.abc import Callable

import torch

from .count_distribution_dcm import TwoStageCategorical
from .schedule_dcm import Curve, reveal_schedule

# denoise(x_t (B, L), positions (B, q), known (B, j)) -> the distribution at the positions, or logits (B, q, K+1).
# `known` are the positions that may hold a count by now: all of them are among it, and what is not observed yet there
# is still MASK.
Denoiser = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor | TwoStageCategorical]


def random_order(x: torch.Tensor, mask_token_id: int, pad_token_id: int, generator: torch.Generator) -> torch.Tensor:
    """Positions (B, L) of each cell: given genes first, then the masked ones in random order, then PAD."""
    keys = torch.rand(x.shape, generator=generator, device=x.device)
    keys = keys.masked_fill((x != mask_token_id) & (x != pad_token_id), -1.0).masked_fill(x == pad_token_id, 2.0)
    return keys.argsort(dim=1, stable=True)


@torch.no_grad()
def sample_counts(
    denoise: Denoiser,
    x: torch.Tensor,
    *,
    steps: int | str,
    schedule: str = "cubic",
    curve: Curve | None = None,
    temperature: float = 1.0,
    mask_token_id: int,
    pad_token_id: int,
    generator: torch.Generator,
    on_step: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Replace every MASK of ``x`` by a count; counts that are given, and PAD, stay as they are.

    Args:
        denoise: the denoiser, see :data:`Denoiser`.
        x: ids (B, L), MASK where a count is wanted.
        steps: calls of the denoiser at most, or ``"auto"``. Each cell follows the schedule for its number of masks.
        schedule: see :func:`reveal_schedule`; likewise ``curve``.
        temperature: divides the logits; 1.0 draws from the model.
        generator: source of every draw, on the device of ``x``.
        on_step: called with x_t after each step.

    Returns:
        ids (B, L) without MASK.
    """
    B, L = x.shape
    pi = random_order(x, mask_token_id, pad_token_id, generator)
    is_masked = x == mask_token_id
    given = (~is_masked & (x != pad_token_id)).sum(dim=1).cpu()  # (B,)
    k = _reveal_bounds(is_masked.sum(dim=1).cpu(), given, steps, schedule, curve)  # (B, S+1)
    widths = k.diff(dim=1).amax(dim=0).tolist()  # q of each step
    k = given[:, None] + k  # k[:, s] first positions of pi are known before step s
    most_known = k.amax(dim=0).tolist()
    k = k.to(x.device)
    pi = torch.cat([pi, pi.new_full((B, 1), L)], dim=1)  # (B, L+1), the last is nobody's
    x_t = torch.cat([x, x.new_full((B, 1), pad_token_id)], dim=1)
    for s, q in enumerate(widths):
        # which genes go from MASK at t to a count at s: (m_t - m_s)/m_t of the masked, the next q in the order pi
        index = k[:, s, None] + torch.arange(q, device=x.device)
        is_revealed = index < k[:, s + 1, None]  # a cell with fewer to reveal is done before the others
        positions = pi.gather(1, index.clamp(max=L)).masked_fill(~is_revealed, L)  # (B, q)
        # p(x_0^i | x_t, c) at these genes i, and one draw of x_0^i from each
        p = denoise(x_t[:, :L], positions.clamp(max=L - 1), pi[:, : most_known[s]])
        p = TwoStageCategorical(p) if isinstance(p, torch.Tensor) else p
        x_0 = p.draw(generator, temperature)
        # x_s is x_t with x_s^i = x_0^i
        x_t.scatter_(1, positions, x_0)
        if on_step is not None:
            on_step(x_t[:, :L])
    return x_t[:, :L]


def _reveal_bounds(
    num_masked: torch.Tensor, num_given: torch.Tensor, steps: int | str, schedule: str, curve: Curve | None
) -> torch.Tensor:
    """Genes revealed after each step (B, S+1); cells with fewer masked genes than steps are done early."""
    sizes, cell_size = torch.stack([num_masked, num_given], dim=1).unique(dim=0, return_inverse=True)
    schedules = [reveal_schedule(n, steps, schedule, curve, known) if n else [0] for n, known in sizes.tolist()]
    length = max(len(revealed) for revealed in schedules)
    padded = [revealed + [revealed[-1]] * (length - len(revealed)) for revealed in schedules]
    return torch.tensor(padded)[cell_size]
