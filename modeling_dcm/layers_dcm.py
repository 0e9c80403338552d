"""The parts that every backbone is made of: token embeddings, attention and AdaLN-zero blocks.

A condition arrives as one vector for each cell. Letters: B cells, L genes in the sequence, Q queried genes, S keys,
D width, H heads, K largest count, V ids, R count features.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .conditioning_dcm import CellTotals, ConditionEncoder, PartialCells
from .configuration_dcm import DCMConfig

NUM_SMALL_COUNTS = 8
NUM_BUMPS = 24
NUM_COUNT_FEATURES = NUM_SMALL_COUNTS + NUM_BUMPS
LOWEST_LEVEL = 3e-3  # expected counts below are not told apart


@lru_cache
@torch.inference_mode(False)
def count_features(num_counts: int, device: torch.device) -> torch.Tensor:
    """Functions of a count (K+1, R): which of the small counts it is, and smooth bumps over log1p(count).

    Embedding and head are linear in them. A free vector for each of hundreds of counts, most of them rare, would be
    mostly noise; neighbouring large counts learn together instead, and the head's bias keeps the exact marginals.
    """
    counts = torch.arange(num_counts, device=device)
    x = torch.log1p(counts.float())
    centres = torch.linspace(0, max(math.log1p(num_counts - 1), 1.0), NUM_BUMPS, device=device)
    bumps = bump((x[:, None] - centres) / (centres[1] - centres[0]))
    small = counts[:, None] == torch.arange(NUM_SMALL_COUNTS, device=device)
    return torch.cat([small.float(), bumps], dim=-1)


def level_features(expected: torch.Tensor, max_count: int) -> torch.Tensor:
    """Smooth bumps (.., 24) over the logarithm of expected counts (..)."""
    lowest, highest = math.log(LOWEST_LEVEL), math.log(max(max_count, 2))
    centres = torch.linspace(lowest, highest, NUM_BUMPS, device=expected.device)
    z = (expected.float() + LOWEST_LEVEL).log()[..., None]
    return bump((z - centres) / (centres[1] - centres[0]))


def bump(z: torch.Tensor) -> torch.Tensor:
    """``exp(-z^2 / 2)``, and 0 where that is below 2e-22: denormal numbers make a CPU's products many times slower."""
    return torch.exp(-0.5 * z**2) * (z.abs() < 10)


class AdaLNZero(nn.Linear):
    """From the condition to shifts, scales and gates; zero at initialisation, so that blocks start as the identity."""


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``x (1 + scale) + shift`` with one shift and scale (B, D) for each cell."""
    return x * (1 + scale[:, None]) + shift[:, None]


def at_positions(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rows (B, Q, D) of ``x`` (B, L, D) at ``positions`` (B, Q)."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


def layer_norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)


def eager_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """Softmax attention written out, (B, H, Q, D/H) -> (B, Q, H, D/H); the reference for the fast kernels."""
    weights = (query @ key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights.masked_fill(~attention_mask, torch.finfo(weights.dtype).min)
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class Projections(nn.Linear):
    """Several square projections of the same tokens as one product, (.., D) to (.., nD); each initialised by itself."""


class Attention(nn.Module):
    """Multi-head attention through transformers' attention interface; ``cross`` where keys are not the queries."""

    is_causal = False

    def __init__(self, config: DCMConfig, cross: bool = False):
        super().__init__()
        self.config = config
        self.heads = config.num_attention_heads
        self.head_dim = config.hidden_size // self.heads
        D = config.hidden_size  # what comes from the same tokens is one product
        self.qkv = None if cross else Projections(D, 3 * D)
        self.q = Projections(D, D) if cross else None
        self.kv = Projections(D, 2 * D) if cross else None
        self.out = nn.Linear(D, D)

    def attend(self, query: torch.Tensor, kv: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
        """Attention of queries (B, Q, D) over keys and values (B, S, 2D).

        ``key_mask`` (B, S) is True at the keys to attend to; None: all of them.
        """
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, *kv.chunk(2, dim=-1)))
        implementation = self.config._attn_implementation or "eager"
        mask = key_mask
        if key_mask is not None and not ("flash" in implementation and query.shape[2] == key.shape[2]):
            # flash attention unpads by a (B, S) mask only where queries and keys are the same tokens
            implementation = "sdpa" if "flash" in implementation else implementation
            mask = key_mask[:, None, None, :]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        dropout = self.config.dropout if self.training else 0.0
        attended, _ = attend(self, query, key, value, mask, dropout=dropout, scaling=self.head_dim**-0.5)
        return self.out(attended.flatten(2))


class MLP(nn.Module):
    def __init__(self, config: DCMConfig):
        super().__init__()
        hidden = round(config.hidden_size * config.mlp_ratio)
        self.up = nn.Linear(config.hidden_size, hidden)
        self.down = nn.Linear(hidden, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.dropout(nn.functional.gelu(self.up(x), approximate="tanh")))


class Block(GradientCheckpointingLayer):
    """AdaLN-zero transformer block (DiT): self-attention when ``keys`` is None, else cross-attention to ``keys``.

    A self-attention block starts as the identity. A cross-attention block is the only way from genes to latents or
    back, so its gates start at one: closed gates in a row would pass no gradient. Its keys are normalised but not
    modulated, so that they do not change with the noise level.
    """

    def __init__(self, config: DCMConfig, cross: bool = False):
        super().__init__()
        self.norm_attention = layer_norm(config.hidden_size)
        self.norm_keys = layer_norm(config.hidden_size) if cross else None
        self.norm_mlp = layer_norm(config.hidden_size)
        self.attention = Attention(config, cross)
        self.mlp = MLP(config)
        self.modulation = AdaLNZero(config.hidden_size, 6 * config.hidden_size)
        self.open_gate = 1.0 if cross else 0.0

    def forward(
        self,
        x: torch.Tensor,
        condition: torch.Tensor,
        keys: torch.Tensor | None = None,
        key_mask: torch.Tensor | None = None,
        cached: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Tokens (B, L, D), or those at ``positions`` (B, Q) alone, which still attend to all.

        ``cached`` are keys and values of :meth:`keys_and_values`, in place of ``keys``.
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition).chunk(6, dim=-1)
        h = modulate(self.norm_attention(x), shift_a, scale_a)
        if self.norm_keys is None:
            query, kv = self.attention.qkv(h).split([x.shape[-1], 2 * x.shape[-1]], dim=-1)
        else:
            query, kv = self.attention.q(h), self.keys_and_values(keys) if cached is None else cached
        if positions is not None:
            x, query = at_positions(x, positions), at_positions(query, positions)
        x = x + (self.open_gate + gate_a[:, None]) * self.attention.attend(query, kv, key_mask)
        return x + (self.open_gate + gate_m[:, None]) * self.mlp(modulate(self.norm_mlp(x), shift_m, scale_m))

    def keys_and_values(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys and values (B, S, 2D) of a cross-attention block: the same at every noise level."""
        return self.attention.kv(self.norm_keys(keys))


class CellEmbedding(nn.Module):
    """One token for each gene: who it is, what was counted, and how this gene reads that count (a product of both).

    Genes have an identity and no position: permuting them permutes the tokens.
    """

    def __init__(self, config: DCMConfig):
        super().__init__()
        self.num_counts, self.max_count = config.num_counts, config.max_count
        self.gene = nn.Embedding(config.num_genes, config.hidden_size)
        self.gene_reading = nn.Embedding(config.num_genes, config.hidden_size)
        self.count = nn.Linear(NUM_COUNT_FEATURES, 2 * config.hidden_size, bias=False)
        self.mask_and_pad = nn.Embedding(2, 2 * config.hidden_size)
        self.target = nn.Embedding(1, config.hidden_size) if config.num_perturbations else None
        self.level = nn.Linear(NUM_BUMPS, config.hidden_size) if config.cell_summary else None

    def identity(self, cells: PartialCells, *, with_expected: bool) -> torch.Tensor:
        """Who the genes (B or 1, L, D) of ``cells`` are, flagged where the perturbation targets them, and on request
        what is expected of them."""
        identity = self.gene(cells.gene_ids)
        if self.level is not None and with_expected:
            level = self.level(level_features(cells.expected, self.max_count).to(identity.dtype))
            identity = identity.to(level.dtype) + level
        if cells.is_target is None:
            return identity
        return identity + cells.is_target[..., None].to(identity.dtype) * self.target.weight

    def forward(self, cells: PartialCells, *, with_expected: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, L, D), and the sum over the observed genes of what was counted (B, D)."""
        input_ids = cells.input_ids
        features = count_features(self.num_counts, input_ids.device)
        counts = self.count(features.to(self.mask_and_pad.weight.dtype))
        table = torch.cat([counts, self.mask_and_pad.weight.to(counts.dtype)])  # (V, 2D)
        count, level = (nn.functional.embedding(input_ids, half.contiguous()) for half in table.chunk(2, dim=-1))
        reading = count + level * self.gene_reading(cells.gene_ids).to(level.dtype)
        is_observed = (input_ids < self.num_counts).to(reading.dtype)
        tokens = self.identity(cells, with_expected=with_expected).to(reading.dtype) + reading
        return tokens, (is_observed[:, None] @ reading)[:, 0]


class Encoded(NamedTuple):
    """What a backbone made of partly revealed cells, before any gene is queried."""

    condition: torch.Tensor  # (B, D)
    states: torch.Tensor  # (B, S, D): latents, or the tokens of the genes
    key_mask: torch.Tensor | None = None  # (B, S) states to attend to; None: all of them
    num_extra: int = 0  # states that stand before those of the genes


class Backbone(nn.Module, ABC):
    """From what is known of cells to hidden states of queried genes; a new one is a file with a class that has these.

    Attributes:
        reads_masked_genes: whether the output depends on masked genes that are not queried; otherwise the sampler
            leaves them out of the sequence.
    """

    reads_masked_genes = True

    @abstractmethod
    def encode(self, cells: PartialCells, conditions: ConditionEncoder) -> Encoded:
        """Read the observed genes of ``cells``, whose sum ``conditions`` makes a condition of."""

    @abstractmethod
    def query(self, encoded: Encoded, queried: PartialCells, positions: torch.Tensor | None) -> torch.Tensor:
        """Hidden states (B, Q, D) of the genes ``queried``, at ``positions`` (B, Q) or everywhere."""

    @abstractmethod
    def pool(self, encoded: Encoded, cells: PartialCells) -> torch.Tensor:
        """One vector (B, D) for each cell."""

    def incremental(self, cells: PartialCells, conditions: ConditionEncoder, totals: CellTotals) -> Callable | None:
        """A callable that encodes cells from nothing to everything and reuses what it has read, or None: ``(x_t (B, L),
        known (B, j)) -> encoded, cells``, see :data:`Denoiser` for the arguments."""
        return None
