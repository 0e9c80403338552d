"""What the sampler asks of the network at each step, with and without guidance by the conditions.

Letters: B cells of a chunk, L genes in the sequence, q queried genes, j known ones.
"""

import math
from dataclasses import replace

import torch

from .count_distribution_dcm import TwoStageCategorical
from .sampling_dcm import Denoiser

GUIDED = {  # what guidance_scale may name, and the arguments that its null leaves out
    "cell_type": ("cell_type_ids",),
    "perturbation": ("perturbation_ids", "perturbation_embeds", "target_gene_ids"),
    "covariates": ("covariate_ids",),
}


def denoiser(
    model,
    x: torch.Tensor,
    gene_ids: torch.Tensor,
    conditions: dict[str, torch.Tensor],
    guidance_scale: float | dict[str, float],
    *,
    from_nothing: bool,
) -> Denoiser:
    """The sampler's callable for one chunk of cells, with no more work at a step than needed.

    Args:
        model: a :class:`DCMForDenoising`.
        x: ids (B, L) that the sampler starts from; every gene is measured.
        gene_ids: genes of the sequence (L,).
        conditions: of these cells, ``library_size`` among them.
        guidance_scale: w, see :meth:`DCMForDenoising.generate`.
        from_nothing: no gene was observed at the start, so what is known is the same number of genes in every cell.

    Raises:
        ValueError: guidance for a condition that was not given.
    """

    def under(given: dict[str, torch.Tensor]) -> Denoiser:
        cells = replace(model.partial_cells(x, gene_ids, **given), all_measured=True)
        encode = model.backbone.incremental(cells, model.conditions, model.totals) if from_nothing else None

        def denoise(x_t, positions, known) -> TwoStageCategorical:
            if encode is not None:
                return model.query(*encode(x_t, known), positions)
            now = replace(cells, input_ids=x_t, progress=model.totals.progress(x_t, cells.mean, cells.total))
            if model.backbone.reads_masked_genes:
                return model.predict(now, positions)
            # nobody reads a masked gene: the sequence is known genes, then queried ones
            now = now.at(torch.cat([known, positions], dim=1))
            queried = torch.arange(known.shape[1], now.input_ids.shape[1], device=x_t.device).expand(len(x_t), -1)
            masked = now.input_ids.scatter(1, queried, model.config.mask_token_id)
            return model.predict(replace(now, input_ids=masked), queried)

        return denoise

    weights = _guidance_weights(guidance_scale, conditions)
    conditional = under(conditions)
    if not weights:
        return conditional
    without = [
        (w, under({name: value for name, value in conditions.items() if name not in names})) for w, names in weights
    ]

    def guided(x_t, positions, known) -> torch.Tensor:
        log_p = conditional(x_t, positions, known).full().log_softmax(dim=-1)
        total = log_p
        for w, null in without:  # (1 + w) log p - w log p_null
            total = total + w * (log_p - null(x_t, positions, known).full().log_softmax(dim=-1))
        return total

    return guided


def _guidance_weights(scale: float | dict[str, float], conditions) -> list[tuple[float, tuple[str, ...]]]:
    """Weights that are not 0, each with the arguments that its null leaves out; the library size is never left out."""
    if not all(map(math.isfinite, scale.values() if isinstance(scale, dict) else [scale])):
        raise ValueError(f"guidance_scale={scale}, expected finite numbers")
    if not isinstance(scale, dict):
        everything = tuple(name for names in GUIDED.values() for name in names)
        return [(float(scale), everything)] if scale else []
    for name in scale:
        if name not in GUIDED:
            raise ValueError(f"guidance_scale for {name!r}, expected one of {', '.join(GUIDED)}")
        if not any(argument in conditions for argument in GUIDED[name]):
            raise ValueError(f"guidance_scale for {name!r}, but no {name} was given to these cells")
    return [(float(weight), GUIDED[name]) for name, weight in scale.items() if weight]
