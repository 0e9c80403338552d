"""Score cells with a trained model: bound their likelihood, embed them, measure the entropy curve.

Letters: N all cells, B cells of a chunk, L genes in the sequence, Q queried genes, D width, H strata of samples,
n measured genes of a cell, k masked ones.
"""

from collections.abc import Iterable

import numpy as np
import torch

from .conditioning_dcm import check_conditions
from .diffusion_dcm import keyed_generator, num_masked
from .generation_dcm import dropout_off, row_chunks, select_rows
from .schedule_dcm import curve_points

POINTS = 24
QUERIES = 64


class CellScoringMixin:
    """`log_likelihood` and `embed` of :class:`DCMForDenoising`."""

    @torch.no_grad()
    def log_likelihood(
        self,
        input_ids: torch.Tensor,
        *,
        num_samples: int = 16,
        seed: int = 0,
        batch_size: int = 64,
        return_error: bool = False,
        **conditions,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """ELBO in nats per cell: a lower bound on ``log p(x | c)``, by Monte Carlo over the masked genes.

        With l_i(M) the cross-entropy of gene i when the set M is masked, and k uniform in 1..n, the bound is
        ``-E[(n/k) sum_{i in M} l_i(M)]``. Most of its variance is which genes M holds, so each gene has a reference
        r_i, its cross-entropy given a random half of the other genes; ``sum_i r_i + (n/k) sum_{i in M} (l_i(M) - r_i)``
        has the same mean whatever r is. Two independent samples for each of H strata of k give the error too:
        ``sqrt(sum_h (a_h - b_h)^2 / 4) / H``, whose square is an unbiased variance given the reference.

        Args:
            input_ids: clean ids (N, L), PAD where not measured.
            num_samples: masked versions of each cell, 2H, besides the two that make the reference.
            seed: keyed with the chunk, as in :meth:`generate`.
            return_error: return the Monte Carlo standard error besides.
            conditions: the other arguments of :meth:`forward`.

        Returns:
            (N,) float64 on the CPU; with ``return_error`` two of them: bound and standard error. The error has at most
            H degrees of freedom: of few samples it is itself uncertain.

        Raises:
            ValueError: an odd number of samples, MASK among the ids, or conditions that do not fit the model.
        """
        if num_samples < 2 or num_samples % 2:
            raise ValueError(f"num_samples={num_samples}, expected an even number of at least 2: pairs tell the error")
        input_ids = self._measured_ids(input_ids, conditions)
        if bool((input_ids == self.config.mask_token_id).any()):
            raise ValueError(f"input_ids hold MASK ({self.config.mask_token_id}), expected counts, PAD if not measured")
        bound = torch.zeros(len(input_ids), dtype=torch.float64)
        error = torch.zeros(len(input_ids), dtype=torch.float64)
        with dropout_off(self):
            for chunk, rows in row_chunks(len(input_ids), batch_size):
                generator = keyed_generator(seed, chunk, device=self.device)
                x_0, given = input_ids[rows].to(self.device), select_rows(conditions, rows, self.device)
                nats = self._paired_nats(x_0, given, num_samples // 2, generator)  # (H, 2, B)
                bound[rows] = -nats.mean(dim=(0, 1)).cpu()
                error[rows] = (nats.diff(dim=1)[:, 0].square().sum(dim=0).sqrt() / (2 * len(nats))).cpu()
        return (bound, error) if return_error else bound

    def _paired_nats(self, x_0: torch.Tensor, given, strata: int, generator: torch.Generator) -> torch.Tensor:
        """Estimates (H, 2, B) of the negative bound; the pairs are independent given their reference."""
        n = (x_0 != self.config.pad_token_id).sum(dim=1)
        reference = self._reference(x_0, n, given, generator)  # (B, L)
        estimates = []
        for sample in range(2 * strata):
            u = torch.rand(len(x_0), generator=generator, device=x_0.device, dtype=torch.float64)
            k = num_masked((sample // 2 + u) / strata, n)
            genes = self._random_order(x_0, generator)[:, : max(1, int(k.max()))]
            is_masked = torch.arange(genes.shape[1], device=k.device) < k[:, None]
            excess = self._masked_nats(x_0, genes, is_masked, given) - reference.gather(1, genes) * is_masked
            estimates.append(reference.sum(dim=1) + excess.sum(dim=1) * n / k.clamp(min=1))
        return torch.stack(estimates).view(strata, 2, len(x_0))

    def _reference(self, x_0: torch.Tensor, n: torch.Tensor, given, generator: torch.Generator) -> torch.Tensor:
        """Cross-entropy (B, L) of each gene given the half of the measured genes that it is not in; 0 at PAD."""
        genes = self._random_order(x_0, generator)
        rank = torch.arange(genes.shape[1], device=n.device)
        is_first, is_measured = rank < n[:, None] // 2, rank < n[:, None]
        nats = self._masked_nats(x_0, genes, is_first, given)
        nats = nats + self._masked_nats(x_0, genes, is_measured & ~is_first, given)
        return torch.zeros_like(nats).scatter(1, genes, nats)

    def _masked_nats(
        self, x_0: torch.Tensor, genes: torch.Tensor, is_masked: torch.Tensor, given: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Cross-entropies (B, Q) at positions ``genes`` (B, Q) where ``is_masked`` (B, Q), which hides them; else 0."""
        labels = x_0.gather(1, genes)
        x_t = x_0.scatter(1, genes, labels.masked_fill(is_masked, self.config.mask_token_id))
        distribution = self.distribution(x_t, query_positions=genes, **given)
        return distribution.cross_entropy(labels.masked_fill(~is_masked, 0)).double() * is_masked

    def _random_order(self, x_0: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Positions (B, L) of each cell: measured genes in random order, then PAD."""
        keys = torch.rand(x_0.shape, generator=generator, device=x_0.device)
        return keys.masked_fill(x_0 == self.config.pad_token_id, 2.0).argsort(dim=1)

    @torch.no_grad()
    def embed(self, input_ids: torch.Tensor, *, batch_size: int = 256, **conditions) -> torch.Tensor:
        """Pooled state (N, D), float32, of cells with counts ``input_ids`` (N, L): mean over genes or latents."""
        input_ids = self._measured_ids(input_ids, conditions)
        with dropout_off(self):
            chunks = (
                select_rows({"input_ids": input_ids, **conditions}, rows, self.device)
                for _, rows in row_chunks(len(input_ids), batch_size)
            )
            return torch.cat([self._pooled(**chunk).float().cpu() for chunk in chunks])

    def _measured_ids(self, input_ids: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        """The ids with PAD outside ``attention_mask``, which is taken out of the ``conditions``; these are checked."""
        check_conditions(self.config, conditions)
        mask = conditions.pop("attention_mask", None)
        return input_ids if mask is None else input_ids.masked_fill(mask == 0, self.config.pad_token_id)

    def _pooled(self, input_ids: torch.Tensor, **conditions) -> torch.Tensor:
        cells = self.partial_cells(input_ids, **conditions)
        return self.backbone.pool(self.backbone.encode(cells, self.conditions), cells)


@torch.no_grad()
def measure_entropy(
    model, batches: Iterable[dict[str, torch.Tensor]], *, points: int = POINTS, seed: int = 0
) -> dict[str, list[float]]:
    """Mean cross-entropy of a masked gene given j random observed genes of its cell.

    Each cell has one random order of its genes. The first j of them are observed and the last :data:`QUERIES` (at most
    a quarter of the panel) are asked, so that all points of the curve share genes and orders, and differences between
    them are not noise. The curve ends where those begin.

    Args:
        model: a :class:`DCMForDenoising`.
        batches: ``input_ids`` (B, L), complete and clean, all genes measured, with the conditions of
            :meth:`DCMForDenoising.forward`.
        points: J.
        seed: of the random orders, keyed with the index of the batch.

    Returns:
        ``observed``: j; ``entropy``: h(j) in nats per gene; ``error``: its standard error over cells; ``cells``.

    Raises:
        ValueError: no cells, or cells with genes that were not measured.
    """
    nats: list[np.ndarray] = []
    observed: list[int] = []
    with dropout_off(model):
        for index, batch in enumerate(batches):
            batch = {name: value.to(model.device) for name, value in batch.items()}
            x_0 = batch.pop("input_ids")
            B, L = x_0.shape
            if bool((x_0 >= model.config.num_counts).any()):
                raise ValueError("the entropy curve needs cells in which every gene of the panel was measured")
            num_queries = min(QUERIES, -(-L // 4))
            observed = curve_points(L - num_queries, points)
            keys = torch.rand(B, L, generator=keyed_generator(seed, index, device=model.device), device=model.device)
            order = keys.argsort(dim=1)
            queries = order[:, L - num_queries :]
            labels = x_0.gather(1, queries)
            of_batch = []
            for j in observed:
                masked = torch.zeros_like(x_0, dtype=torch.bool).scatter_(1, order[:, j:], True)
                x_t = x_0.masked_fill(masked, model.config.mask_token_id)
                distribution = model.distribution(x_t, query_positions=queries, **batch)
                of_batch.append(distribution.cross_entropy(labels).double().mean(dim=1))
            nats.append(torch.stack(of_batch, dim=1).cpu().numpy())  # (B, J)
    if not nats:
        raise ValueError("no cells to measure the entropy curve on: convert with --validation-fraction above 0")
    all_nats = np.concatenate(nats)
    error = all_nats.std(axis=0, ddof=1) / np.sqrt(len(all_nats)) if len(all_nats) > 1 else np.zeros(len(observed))
    return {
        "observed": [float(j) for j in observed],
        "entropy": all_nats.mean(axis=0).tolist(),
        "error": error.tolist(),
        "cells": len(all_nats),
    }
