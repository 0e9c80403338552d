"""The loop over time as the released code runs it, under the right reveal rule and under its own: two yardsticks.

At each of 100 equal steps logits of every count are computed at every gene, revealed or not, and one joint draw decides
for each masked gene between the counts and staying masked. Slow on purpose. Letters: B cells, G genes, K largest count.
"""

from collections.abc import Callable
from itertools import pairwise

import torch

from modeling_dcm import DCMForDenoising
from modeling_dcm.diffusion_dcm import keyed_generator, sigma
from modeling_dcm.generation_dcm import dropout_off, row_chunks, select_rows

STEPS = 100
CELLS_AT_ONCE = 16  # logits of every gene and count of more cells would not fit in memory

# (t, s, eps) -> probability that a gene masked at time t is revealed at s. The right one is `reveal_probability`, the
# Euler step of Eq. 3 too: rates sigma(t) s_v from MASK to counts v, with the concrete scores of Eq. 5, sum to
# sigma(t) alpha / (1 - alpha) = 1 / t, and (t - s) / t is the same number.
RevealRule = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


def forward_rule(t: torch.Tensor, s: torch.Tensor, eps: float) -> torch.Tensor:
    """``min(1, sigma(t) (t - s))``: the released code's step, where Eq. 3 has lost the ratio ``alpha / (1 - alpha)``.

    A gene is revealed at the rate at which the *forward* process masks it: ``sigma(1) = (1 - eps) / eps``, about 999,
    where sampling begins. With fewer than 999 steps the first one reveals every gene, independently of all others.
    """
    return (sigma(t, eps) * (t - s)).clamp(max=1.0)


@torch.no_grad()
def naive_loop(
    model: DCMForDenoising,
    conditions: dict[str, torch.Tensor],
    num_cells: int,
    *,
    rule: RevealRule,
    generator: torch.Generator,
    steps: int = STEPS,
) -> torch.Tensor:
    """Draw count ids (B, G) by the plain loop over time: ``steps`` equal ones from t = 1 to 0.

    ``conditions`` (B, ..) are arguments of the forward. The loop ends early once nothing is masked: what is revealed
    never changes.
    """
    config = model.config
    mask = config.mask_token_id
    times = torch.linspace(1.0, 0.0, steps + 1, device=model.device)
    x_t = torch.full((num_cells, config.num_genes), mask, device=model.device)
    for t, s in pairwise(times):
        if not bool((x_t == mask).any()):
            break
        p = model(x_t, **conditions).logits.float().softmax(dim=-1)  # (B, G, K+1)
        reveal = rule(t, s, config.noise_eps)
        stay = (1 - reveal).expand(*p.shape[:2], 1)
        joint = torch.cat([reveal * p, stay], dim=-1)  # (B, G, K+2); the last id is MASK
        drawn = torch.multinomial(joint.flatten(0, 1), 1, generator=generator).view_as(x_t)
        x_t = torch.where(x_t == mask, drawn, x_t)
    # only the forward rule with steps of less than 1/999 leaves masks; the released code takes the likeliest count
    return torch.where(x_t == mask, p.argmax(dim=-1), x_t)


def naive_cells(
    model: DCMForDenoising,
    conditions: dict[str, torch.Tensor],
    num_cells: int,
    *,
    rule: RevealRule,
    seed: int = 0,
    steps: int = STEPS,
) -> torch.Tensor:
    """Cells (N, G) by :func:`naive_loop`, a few at a time, for the ``conditions`` (N, ..) of ``generate``."""
    cells = []
    with dropout_off(model):
        for chunk, rows in row_chunks(num_cells, CELLS_AT_ONCE):
            size = rows.stop - rows.start
            generator = keyed_generator(seed, chunk, device=model.device)
            given = select_rows(conditions, rows, model.device)
            if model.config.library_size_conditioning:
                labels = [given.get(name) for name in ("cell_type_ids", "perturbation_ids", "covariate_ids")]
                given["library_size"] = model.library_sizes.draw(size, *labels, generator)
            cells.append(naive_loop(model, given, size, rule=rule, generator=generator, steps=steps).cpu())
    return torch.cat(cells)
