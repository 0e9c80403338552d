"""What the sampler asks at each step: a network's law at the genes about to be revealed, with no more work than needed.

Knows nothing of schedules and draws. Letters: B cells, L genes in the sequence, q genes asked, j known genes, H heads.
"""

import torch

from .depth_dcm import progress_of
from .law_dcm import FactoredLogits
from .sampling_dcm import Denoiser


def denoiser(
    model,
    gene_ids: torch.Tensor,
    conditions: dict[str, torch.Tensor],
    guidance_scale: float | dict[str, float],
    *,
    from_nothing: bool,
) -> Denoiser:
    """The sampler's callable for one chunk of cells.

    Args:
        model: a :class:`DCMForDenoising`.
        gene_ids: genes of the sequence (L,).
        conditions: of these cells, ``library_size`` among them.
        guidance_scale: w, see :meth:`DCMForDenoising.generate`.
        from_nothing: no gene was observed at the start, so what is known is the same number of genes in every cell.

    Raises:
        ValueError: guidance for a condition that was not given.
    """

    def asked_under(given: dict[str, torch.Tensor]) -> Denoiser:
        if model.config.backbone == "latent" and from_nothing:
            return RevealedGenes(model, gene_ids, given)
        return WholeCells(model, gene_ids, given)

    weights = _guidance_weights(guidance_scale, conditions)
    conditional = asked_under(conditions)
    if not weights:
        return conditional
    without = [
        (weight, asked_under({name: value for name, value in conditions.items() if name not in names}))
        for weight, names in weights
    ]

    def guided(x_t, positions, known) -> torch.Tensor:
        log_p = conditional(x_t, positions, known).full().log_softmax(dim=-1)
        total = log_p
        for weight, unconditional in without:
            total = total + weight * (log_p - unconditional(x_t, positions, known).full().log_softmax(dim=-1))
        return total

    return guided


GUIDED = {
    "cell_type": ("cell_type_ids",),
    "perturbation": ("perturbation_ids", "perturbation_embeds", "target_gene_ids"),
    "covariates": ("covariate_ids",),
}


def _guidance_weights(scale: float | dict[str, float], conditions) -> list[tuple[float, tuple[str, ...]]]:
    """Weights that are not 0, each with the arguments that its null leaves out; the library size is never left out."""
    if not isinstance(scale, dict):
        everything = tuple(name for names in GUIDED.values() for name in names)
        return [(float(scale), everything)] if scale else []
    for name in scale:
        if name not in GUIDED:
            raise ValueError(f"guidance_scale for {name!r}, expected one of {', '.join(GUIDED)}")
        if not any(argument in conditions for argument in GUIDED[name]):
            raise ValueError(f"guidance_scale for {name!r}, but no {name} was given to these cells")
    return [(float(weight), GUIDED[name]) for name, weight in scale.items() if weight]


class WholeCells:
    """Asks the network about partly observed cells anew at each step."""

    def __init__(self, model, gene_ids: torch.Tensor, given: dict[str, torch.Tensor]):
        self.model, self.gene_ids, self.given = model, gene_ids, given

    def __call__(self, x_t: torch.Tensor, positions: torch.Tensor, known: torch.Tensor) -> FactoredLogits:
        model, given = self.model, self.given
        B, L = x_t.shape
        genes = self.gene_ids.expand(B, L)
        progress = model._progress(x_t, genes, given)
        targets = given.get("target_gene_ids")
        if model.config.backbone == "dit" and model.config.masked_keys:
            return model._law(x_t, genes, progress, given, targets, positions, no_pad=True)
        # nobody reads a masked gene: the sequence is known genes, then queried ones
        subset = torch.cat([known, positions], dim=1)
        ids = torch.cat([x_t.gather(1, known), torch.full_like(positions, model.config.mask_token_id)], dim=1)
        asked = torch.arange(known.shape[1], subset.shape[1], device=x_t.device).expand(B, -1)
        return model._law(ids, genes.gather(1, subset), progress, given, targets, asked)


class RevealedGenes:
    """For latents: each gene is embedded, and made a key and a value, once, when it has been revealed.

    That is exact, as keys of the latents depend neither on the noise level nor on other genes. Needs cells in which
    all ``known`` genes are observed, in the order in which they were revealed.
    """

    def __init__(self, model, gene_ids: torch.Tensor, given: dict[str, torch.Tensor]):
        self.model, self.gene_ids, self.given = model, gene_ids, given
        self.key = self.value = self.is_target = self.mean = None

    def __call__(self, x_t: torch.Tensor, positions: torch.Tensor, known: torch.Tensor) -> FactoredLogits:
        model, backbone = self.model, self.model.backbone
        genes = self.gene_ids.expand(x_t.shape)
        if self.key is None:
            self._start(genes)
        self._read(x_t, genes, known[:, self.num_read :])
        size = self.given.get("library_size") if model.config.library_size_conditioning else None
        progress = progress_of(
            t=torch.full_like(self.observed_total, 1 - self.num_read / x_t.shape[1]),
            observed_total=self.observed_total,
            expected_observed=self.expected_observed,
            expected_masked=self.expected - self.expected_observed,
            library_size=size,
        )
        condition, tokens = model._condition(progress, self.total, self.given)
        end = 1 + self.num_read
        latents = backbone.think(condition, tokens, cached=(self.key[:, :, :end], self.value[:, :, :end]))
        is_target = None if self.is_target is None else self.is_target.gather(1, positions)
        expected = self.mean.gather(1, positions) * progress.depth[:, None]
        return model._ask(latents, condition, genes.gather(1, positions), is_target, expected)

    def _start(self, genes: torch.Tensor) -> None:
        model, backbone = self.model, self.model.backbone
        B, L = genes.shape
        key, value = backbone.read.keys_and_values(backbone.nothing.weight[None])  # (1, H, 1, D/H)
        shape = (B, key.shape[1], L + 1, key.shape[3])
        self.key, self.value = key.new_empty(shape), value.new_empty(shape)
        self.key[:, :, :1], self.value[:, :, :1] = key, value
        self.num_read = 0
        self.is_target = model._is_target(genes, self.given, self.given.get("target_gene_ids"))
        self.mean = model.totals.mean(genes, self.given.get("cell_type_ids"))
        self.expected = self.mean.sum(dim=1)
        self.expected_observed = torch.zeros_like(self.expected)
        self.observed_total = torch.zeros_like(self.expected)
        self.total = key.new_zeros(B, model.config.hidden_size)

    def _read(self, x_t: torch.Tensor, genes: torch.Tensor, new: torch.Tensor) -> None:
        """Take in the genes at positions ``new`` (B, q)."""
        if new.shape[1] == 0:
            return
        model, backbone = self.model, self.model.backbone
        ids = x_t.gather(1, new)
        is_target = None if self.is_target is None else self.is_target.gather(1, new)
        tokens, total = backbone.embedding(ids, genes.gather(1, new), is_target)
        key, value = backbone.read.keys_and_values(tokens)
        start, end = 1 + self.num_read, 1 + self.num_read + new.shape[1]
        self.key[:, :, start:end], self.value[:, :, start:end] = key, value
        self.total = self.total + total
        self.observed_total = self.observed_total + model.totals.total(ids)
        self.expected_observed = self.expected_observed + self.mean.gather(1, new).sum(dim=1)
        self.num_read += new.shape[1]
