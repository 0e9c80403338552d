"""The paper's backbone: full bidirectional attention over all measured genes, or over the observed ones alone.

Letters: B cells, L genes in the sequence, Q queried genes, E tokens before them, D width.
"""

import torch
from torch import nn

from .conditioning_dcm import ConditionEncoder, PartialCells
from .configuration_dcm import DCMConfig
from .layers_dcm import Backbone, Block, CellEmbedding, Encoded


class DiTBackbone(Backbone):
    """Tokens of all genes through AdaLN-zero blocks; a gene's own token is its query.

    Without ``config.masked_keys`` nobody attends to a masked gene, so those that are not queried can be left out.
    """

    def __init__(self, config: DCMConfig):
        super().__init__()
        self.reads_masked_genes = config.masked_keys
        self.num_counts, self.pad_token_id = config.num_counts, config.pad_token_id
        self.embedding = CellEmbedding(config)
        # always among the keys where masked genes are not: nothing observed is defined
        self.nothing = None if config.masked_keys else nn.Embedding(1, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))

    def encode(self, cells: PartialCells, conditions: ConditionEncoder) -> Encoded:
        """Tokens (B, E+L, D) before the first block. A mask is made only where it is needed: it disqualifies flash
        kernels."""
        tokens, observed = self.embedding(cells, with_expected=True)
        condition, extra = conditions(cells, observed)
        if extra is None:
            extra = tokens.new_empty(len(tokens), 0, tokens.shape[-1])
        if self.nothing is not None:
            extra = torch.cat([self.nothing.weight.expand(len(tokens), -1, -1).to(tokens.dtype), extra], dim=1)
        if not self.reads_masked_genes:
            key_mask = cells.input_ids < self.num_counts
        else:
            measured = cells.input_ids != self.pad_token_id
            everywhere = bool(measured.all()) if cells.all_measured is None else cells.all_measured
            key_mask = None if everywhere else measured
        if key_mask is not None:
            key_mask = nn.functional.pad(key_mask, (extra.shape[1], 0), value=True)
        states = torch.cat([extra, tokens], dim=1) if extra.shape[1] else tokens
        return Encoded(condition, states, key_mask, extra.shape[1])

    def query(self, encoded: Encoded, queried: PartialCells, positions: torch.Tensor | None) -> torch.Tensor:
        """Hidden states (B, Q, D). The last block runs at the positions alone: what other genes would become nobody
        reads."""
        condition, x, key_mask, extra = encoded
        for block in self.blocks[:-1]:
            x = block(x, condition, None, key_mask)
        if positions is not None:
            return self.blocks[-1](x, condition, None, key_mask, None, positions + extra)
        return self.blocks[-1](x, condition, None, key_mask)[:, extra:]

    def pool(self, encoded: Encoded, cells: PartialCells) -> torch.Tensor:
        """Mean hidden state (B, D) of the measured genes."""
        measured = (cells.input_ids != self.pad_token_id)[..., None]
        return (self.query(encoded, cells, None) * measured).sum(dim=1) / measured.sum(dim=1).clamp(min=1)
