"""The backbone of cost linear in genes: learned latents read the observed genes, think, and are read by queried genes.

Letters: B cells, L genes in the sequence, Q queried genes, E condition tokens, M latents, D width.
"""

from dataclasses import replace

import torch
from torch import nn

from .conditioning_dcm import CellTotals, ConditionEncoder, PartialCells, progress_of
from .configuration_dcm import DCMConfig
from .layers_dcm import Backbone, Block, CellEmbedding, Encoded


class LatentBackbone(Backbone):
    """Latents attend to the observed genes, then to each other; queried genes attend to the latents."""

    reads_masked_genes = False

    def __init__(self, config: DCMConfig):
        super().__init__()
        self.embedding = CellEmbedding(config)
        self.latents = nn.Embedding(config.num_latents, config.hidden_size)
        self.nothing = nn.Embedding(1, config.hidden_size)  # always among the keys: nothing observed is defined
        self.read = Block(config, cross=True)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.write = Block(config, cross=True)

    def encode(self, cells: PartialCells, conditions: ConditionEncoder) -> Encoded:
        """Latents (B, E+M, D) that have read the observed genes and no others."""
        tokens, observed = self.embedding(cells, with_expected=False)
        keys = torch.cat([self.nothing.weight.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], dim=1)
        is_observed = cells.input_ids < self.embedding.num_counts
        key_mask = nn.functional.pad(is_observed, (1, 0), value=True)
        return self.think(*conditions(cells, observed), keys=keys, key_mask=key_mask)

    def think(self, condition: torch.Tensor, extra: torch.Tensor | None, **read) -> Encoded:
        """Latents (B, E+M, D) after reading; ``read`` says from where, see :class:`Block`."""
        x = self.latents.weight.expand(len(condition), -1, -1).to(condition.dtype)
        if extra is not None:
            x = torch.cat([extra, x], dim=1)
        x = self.read(x, condition, **read)
        for block in self.blocks:
            x = block(x, condition)
        return Encoded(condition, x)

    def query(self, encoded: Encoded, queried: PartialCells, positions: torch.Tensor | None) -> torch.Tensor:
        """Hidden states (B, Q, D) of the queried genes, by latents that have read the observed ones."""
        queries = self.embedding.identity(queried, with_expected=True)
        return self.write(queries, encoded.condition, encoded.states)

    def pool(self, encoded: Encoded, cells: PartialCells) -> torch.Tensor:
        """Mean (B, D) of the latents."""
        return encoded.states.mean(dim=1)

    def incremental(self, cells: PartialCells, conditions: ConditionEncoder, totals: CellTotals) -> "RevealedGenes":
        return RevealedGenes(self, cells, conditions, totals)


class RevealedGenes:
    """Encoding of cells that start from nothing: a gene is embedded, and made a key and a value, once, when revealed.

    That is exact, as keys of the latents depend neither on the noise level nor on other genes. Needs cells in which
    all ``known`` genes are observed, in the order in which they were revealed.
    """

    def __init__(self, backbone: LatentBackbone, cells: PartialCells, conditions: ConditionEncoder, totals: CellTotals):
        self.backbone, self.cells, self.conditions, self.totals = backbone, cells, conditions, totals
        B, L = cells.input_ids.shape
        nothing = backbone.read.keys_and_values(backbone.nothing.weight[None])  # (1, 1, 2D)
        self.kv = nothing.new_empty(B, L + 1, nothing.shape[-1])
        self.kv[:, :1] = nothing
        self.num_read = 0
        self.expected = cells.mean.sum(dim=1)
        self.expected_observed = torch.zeros_like(self.expected)
        self.observed_total = torch.zeros_like(self.expected)
        # added up in float32: in bfloat16 a sum of hundreds of genes would not hear of one more
        self.observed = torch.zeros(B, backbone.nothing.embedding_dim, device=nothing.device)

    def __call__(self, x_t: torch.Tensor, known: torch.Tensor) -> tuple[Encoded, PartialCells]:
        """The cells ``x_t`` (B, L), of which the genes at ``known`` (B, j) are revealed, and their encoding."""
        self._read(x_t, known[:, self.num_read :])
        progress = progress_of(
            t=torch.full_like(self.observed_total, 1 - self.num_read / x_t.shape[1]),
            observed_total=self.observed_total,
            expected_observed=self.expected_observed,
            expected_masked=self.expected - self.expected_observed,
            library_size=self.cells.total,
        )
        cells = replace(self.cells, input_ids=x_t, progress=progress)
        observed = self.observed.to(self.kv.dtype)
        cached = self.kv[:, : 1 + self.num_read]
        return self.backbone.think(*self.conditions(cells, observed), cached=cached), cells

    def _read(self, x_t: torch.Tensor, new: torch.Tensor) -> None:
        """Take in the genes at positions ``new`` (B, q)."""
        if new.shape[1] == 0:
            return
        cells = replace(self.cells, input_ids=x_t).at(new)
        tokens, observed = self.backbone.embedding(cells, with_expected=False)
        start, end = 1 + self.num_read, 1 + self.num_read + new.shape[1]
        self.kv[:, start:end] = self.backbone.read.keys_and_values(tokens)
        self.observed = self.observed + observed
        self.observed_total = self.observed_total + self.totals.total(cells.input_ids)
        self.expected_observed = self.expected_observed + cells.mean.sum(dim=1)
        self.num_read = end - 1
