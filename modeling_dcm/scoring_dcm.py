"""Score cells with a trained model: bound their likelihood, embed them.

Letters: N all cells, B cells of a chunk, L genes in the sequence, D width.
"""

import torch

from .chunks_dcm import dropout_off, of_rows, row_chunks
from .conditioning_dcm import check_conditions
from .diffusion_dcm import keyed_generator, mask_counts, num_masked


class CellScoringMixin:
    """`log_likelihood` and `embed` of :class:`DCMForDenoising`."""

    @torch.no_grad()
    def log_likelihood(
        self, input_ids: torch.Tensor, *, num_samples: int = 16, seed: int = 0, batch_size: int = 64, **conditions
    ) -> torch.Tensor:
        """ELBO in nats per cell: a lower bound on ``log p(x | c)``, by Monte Carlo over the number of masked genes.

        Args:
            input_ids: clean ids (N, L), PAD where not measured.
            num_samples: masked versions of each cell; their mask counts are stratified.
            seed: keyed with the chunk, as in :meth:`generate`.
            conditions: the other arguments of :meth:`forward`.

        Returns:
            (N,) float64 on the CPU.
        """
        ids = {"mask_token_id": self.config.mask_token_id, "pad_token_id": self.config.pad_token_id}
        mask = conditions.pop("attention_mask", None)
        if mask is not None:
            input_ids = input_ids.masked_fill(mask == 0, self.config.pad_token_id)
        total = torch.zeros(len(input_ids), dtype=torch.float64)
        with dropout_off(self):
            for chunk, rows in row_chunks(len(input_ids), batch_size):
                generator = keyed_generator(seed, chunk, self.device)
                x_0 = input_ids[rows].to(self.device)
                given = of_rows(conditions, rows, self.device)
                n = (x_0 != self.config.pad_token_id).sum(dim=1)
                shift = torch.rand(len(x_0), generator=generator, device=self.device, dtype=torch.float64)
                for sample in range(num_samples):
                    k = num_masked((shift + sample / num_samples) % 1.0, n)
                    x_t = mask_counts(x_0, k, generator, **ids)
                    log_p = self(x_t, **given).logits.float().log_softmax(dim=-1)
                    is_masked = x_t == self.config.mask_token_id
                    nats = log_p.gather(-1, x_0.masked_fill(~is_masked, 0)[..., None])[..., 0]
                    nats = (nats * is_masked).sum(dim=1).double() * n / k.clamp(min=1)
                    total[rows] += (nats / num_samples).cpu()
        return total

    @torch.no_grad()
    def embed(self, input_ids: torch.Tensor, *, batch_size: int = 256, **conditions) -> torch.Tensor:
        """Pooled hidden state (N, D) of cells with counts ``input_ids`` (N, L): mean over genes, or over latents."""
        check_conditions(self.config, conditions)
        mask = conditions.pop("attention_mask", None)
        if mask is not None:
            input_ids = input_ids.masked_fill(mask == 0, self.config.pad_token_id)
        with dropout_off(self):
            chunks = (
                of_rows({"input_ids": input_ids, **conditions}, rows, self.device)
                for _, rows in row_chunks(len(input_ids), batch_size)
            )
            return torch.cat([self._pooled(**chunk).cpu() for chunk in chunks])

    def _pooled(self, input_ids: torch.Tensor, gene_ids: torch.Tensor | None = None, **conditions) -> torch.Tensor:
        gene_ids = self._check_genes(input_ids, gene_ids)
        targets = conditions.pop("target_gene_ids", None)
        embedded, condition, tokens, _ = self._embed(
            input_ids, gene_ids, self._progress(input_ids, gene_ids, conditions), conditions, targets
        )
        if self.config.backbone == "latent":
            return self._latents(input_ids, embedded, condition, tokens).mean(dim=1)
        measured = (input_ids != self.config.pad_token_id)[..., None]
        hidden = self._dit_hidden(input_ids, embedded, condition, tokens)
        return (hidden * measured).sum(dim=1) / measured.sum(dim=1).clamp(min=1)
