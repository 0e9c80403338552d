"""The network's parts: token embeddings, attention, AdaLN-zero blocks, the two backbones and the head.

Knows nothing of noise, losses or labels' meaning: a condition arrives as one vector for each cell. Letters: B cells,
L genes in the sequence, Q queried genes, S keys, D width, H heads, M latents, K largest count, V ids, R count features.
"""

import math

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_dcm import DCMConfig
from .law_dcm import FactoredLogits

NUM_SMALL_COUNTS = 8
NUM_BUMPS = 24
NUM_COUNT_FEATURES = NUM_SMALL_COUNTS + NUM_BUMPS
LOWEST_LEVEL = 3e-3  # expected counts below are not told apart


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


def sinusoidal(x: torch.Tensor, dim: int, max_period: float = 10_000.0) -> torch.Tensor:
    """Sines and cosines (B, dim) of a scalar of each cell (B,)."""
    frequencies = torch.exp(-math.log(max_period) * torch.arange(dim // 2, device=x.device) / (dim // 2))
    angles = x.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class AdaLNZero(nn.Linear):
    """From the condition to shifts, scales and gates; zero at initialisation, so that blocks start as the identity."""


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero: the head, which then emits the training marginals."""


class CountBias(nn.Embedding):
    """Biases of the head over counts; zero until the training marginals are set."""


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


class Attention(nn.Module):
    """Multi-head attention of queries (B, Q, D) over keys (B, S, D), through transformers' attention interface."""

    is_causal = False

    def __init__(self, config: DCMConfig):
        super().__init__()
        self.config = config
        self.heads = config.num_attention_heads
        self.head_dim = config.hidden_size // self.heads
        self.q = nn.Linear(config.hidden_size, config.hidden_size)
        self.k = nn.Linear(config.hidden_size, config.hidden_size)
        self.v = nn.Linear(config.hidden_size, config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor, keys: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
        """``key_mask`` (B, S), True at the keys to attend to; None: all of them."""
        return self.attend(x, *self.keys_and_values(keys), key_mask)

    def keys_and_values(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What queries attend to (B, H, S, D/H), twice."""
        return self._heads(self.k(keys)), self._heads(self.v(keys))

    def attend(
        self, x: torch.Tensor, key: torch.Tensor, value: torch.Tensor, key_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention of queries ``x`` (B, Q, D) over keys and values (B, H, S, D/H)."""
        query = self._heads(self.q(x))
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

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)


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
        self.attention = Attention(config)
        self.mlp = MLP(config)
        self.modulation = AdaLNZero(config.hidden_size, 6 * config.hidden_size)
        self.open_gate = 1.0 if cross else 0.0

    def forward(
        self,
        x: torch.Tensor,
        condition: torch.Tensor,
        keys: torch.Tensor | None = None,
        key_mask: torch.Tensor | None = None,
        cached: tuple[torch.Tensor, torch.Tensor] | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Tokens (B, L, D), or those at ``positions`` (B, Q) alone, which still attend to all.

        ``cached`` are keys and values of :meth:`keys_and_values`, in place of ``keys``.
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition).chunk(6, dim=-1)
        h = modulate(self.norm_attention(x), shift_a, scale_a)
        if cached is None:
            cached = self.attention.keys_and_values(h) if keys is None else self.keys_and_values(keys)
        if positions is not None:
            x, h = at_positions(x, positions), at_positions(h, positions)
        x = x + (self.open_gate + gate_a[:, None]) * self.attention.attend(h, *cached, key_mask)
        return x + (self.open_gate + gate_m[:, None]) * self.mlp(modulate(self.norm_mlp(x), shift_m, scale_m))

    def keys_and_values(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, H, S, D/H) of a cross-attention block: the same at every noise level."""
        return self.attention.keys_and_values(self.norm_keys(keys))


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

    def genes(
        self, gene_ids: torch.Tensor, is_target: torch.Tensor | None, expected: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Identity of the genes (.., L, D), with their ``expected`` counts (.., L) where these are given, flagged where
        they are the perturbation's target."""
        identity = self.gene(gene_ids)
        if self.level is not None and expected is not None:
            identity = identity + self.level(level_features(expected, self.max_count).to(identity.dtype))
        if is_target is None:
            return identity
        return identity + is_target[..., None].to(identity.dtype) * self.target.weight

    def forward(
        self,
        input_ids: torch.Tensor,
        gene_ids: torch.Tensor,
        is_target: torch.Tensor | None,
        expected: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, L, D), and the sum over the observed genes of what was counted (B, D)."""
        counts = self.count(count_features(self.num_counts, input_ids.device).to(self.count.weight.dtype))
        table = torch.cat([counts, self.mask_and_pad.weight.to(counts.dtype)])  # (V, 2D)
        count, level = (nn.functional.embedding(input_ids, half.contiguous()) for half in table.chunk(2, dim=-1))
        reading = count + level * self.gene_reading(gene_ids)
        is_observed = (input_ids < self.num_counts).to(reading.dtype)
        return self.genes(gene_ids, is_target, expected) + reading, (is_observed[:, None] @ reading)[:, 0]


class DiTBackbone(nn.Module):
    """Full bidirectional attention over all measured genes (the paper's), or over the observed ones alone.

    Without ``config.masked_keys`` nobody attends to a masked gene, so those that are not queried can be left out.
    """

    def __init__(self, config: DCMConfig):
        super().__init__()
        self.embedding = CellEmbedding(config)
        # always among the keys where masked genes are not: nothing observed is defined
        self.nothing = None if config.masked_keys else nn.Embedding(1, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))

    def forward(self, tokens, condition, extra_tokens, key_mask, positions=None) -> torch.Tensor:
        """Hidden states (B, L, D) of the genes ``tokens``, or (B, Q, D) of those at ``positions`` (B, Q); ``key_mask``
        (B, L) or None. The last block runs at the positions alone: what other genes would become nobody reads."""
        parts = [tokens]
        if extra_tokens is not None:
            parts.insert(0, extra_tokens)
        if self.nothing is not None:
            parts.insert(0, self.nothing.weight.expand(len(tokens), -1, -1).to(tokens.dtype))
        x = torch.cat(parts, dim=1) if len(parts) > 1 else tokens
        extra = x.shape[1] - tokens.shape[1]
        if key_mask is not None:
            key_mask = nn.functional.pad(key_mask, (extra, 0), value=True)
        for block in self.blocks[:-1]:
            x = block(x, condition, None, key_mask)
        if positions is not None:
            return self.blocks[-1](x, condition, None, key_mask, None, positions + extra)
        return self.blocks[-1](x, condition, None, key_mask)[:, extra:]


class LatentBackbone(nn.Module):
    """Learned latents read the observed genes, think, and are read by the queried genes: cost linear in genes."""

    def __init__(self, config: DCMConfig):
        super().__init__()
        self.embedding = CellEmbedding(config)
        self.latents = nn.Embedding(config.num_latents, config.hidden_size)
        self.nothing = nn.Embedding(1, config.hidden_size)  # always among the keys: nothing observed is defined
        self.read = Block(config, cross=True)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.write = Block(config, cross=True)

    def forward(self, tokens, condition, extra_tokens, is_observed) -> torch.Tensor:
        """Latents (B, E+M, D) after reading the observed ones among ``tokens`` (B, L, D)."""
        keys = torch.cat([self.nothing.weight.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], dim=1)
        key_mask = None if is_observed is None else nn.functional.pad(is_observed, (1, 0), value=True)
        return self.think(condition, extra_tokens, keys=keys, key_mask=key_mask)

    def think(self, condition, extra_tokens, **read) -> torch.Tensor:
        """Latents (B, E+M, D) after reading; ``read`` says from where, see :class:`Block`."""
        x = self.latents.weight.expand(len(condition), -1, -1)
        if extra_tokens is not None:
            x = torch.cat([extra_tokens, x], dim=1)
        x = self.read(x, condition, **read)
        for block in self.blocks:
            x = block(x, condition)
        return x


class CountHead(nn.Module):
    """The law over counts 0..K of the queried genes, in two stages; there is no output for MASK or PAD.

    First which of the small counts it is, or that it is a large one; then which large one. Large counts are rare, so
    the second stage, which has nearly all of the outputs, is hardly ever needed: not for the loss, nor for drawing.
    ``gene_bias`` has C columns for each gene: one for each of the C-1 small counts, the last for all large ones.
    With C = 0, or C > K, there is one stage.

    Only the weights of the counts start at zero. A modulation that started at zero too would be a saddle: once the bias
    holds the marginals, neither would have a gradient that knows the conditions.
    """

    def __init__(self, config: DCMConfig):
        super().__init__()
        self.num_counts = config.num_counts
        columns = min(config.gene_output_bias, config.num_counts)
        self.num_small = columns - 1 if 0 < columns < config.num_counts else config.num_counts
        self.norm = layer_norm(config.hidden_size)
        self.modulation = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.counts = ZeroLinear(NUM_COUNT_FEATURES, config.hidden_size, bias=False)
        self.large = ZeroLinear(1, config.hidden_size, bias=False) if self.num_small < self.num_counts else None
        self.bias = CountBias(1, config.num_counts)
        self.gene_bias = CountBias(config.num_genes, columns) if columns else None

    def forward(self, x: torch.Tensor, condition: torch.Tensor, gene_ids: torch.Tensor) -> FactoredLogits:
        """The law at genes ``gene_ids`` (B, Q) with hidden states ``x`` (B, Q, D)."""
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        x = modulate(self.norm(x), shift, scale)
        weight = self.counts(count_features(self.num_counts, x.device).to(self.counts.weight.dtype)).to(x.dtype)
        bias = self.bias.weight[0]
        small, large = weight[: self.num_small], weight[self.num_small :]  # (S, D) and (K+1-S, D)
        if self.large is not None:
            small = torch.cat([small, self.large.weight.T.to(x.dtype)])
        logits = nn.functional.linear(x, small).float()
        if self.large is None:
            logits = logits + bias if self.gene_bias is None else logits + bias + self.gene_bias(gene_ids)
            return FactoredLogits(logits, x, None, None)
        # zeros everywhere are the uniform law over counts: "a large count" then has as many shares as there are
        shares = nn.functional.pad(bias.new_zeros(self.num_small), (0, 1), value=math.log(len(large)))
        logits = logits + nn.functional.embedding(gene_ids, self.gene_bias.weight + shares)
        return FactoredLogits(logits, x, large, bias[self.num_small :])

    @torch.no_grad()
    def set_marginals(self, histogram: torch.Tensor) -> None:
        """Start at the log marginals of the training cells: ``histogram`` (G, K+1), cells for each gene and count.

        One pseudo-cell with the counts' law over all genes keeps unseen counts possible.
        """
        histogram = histogram.double().cpu()
        shared = histogram.sum(dim=0) + 1.0
        shared = shared / shared.sum()
        log_p = ((histogram + shared) / (histogram.sum(dim=1, keepdim=True) + 1.0)).log()
        self.bias.weight.zero_()
        if self.gene_bias is None:
            self.bias.weight.copy_(shared.log()[None])
        elif self.large is None:
            self.gene_bias.weight.copy_(log_p)
        else:
            S = self.num_small
            self.bias.weight[0, S:] = (shared[S:] / shared[S:].sum()).log().to(self.bias.weight)
            any_large = log_p[:, S:].logsumexp(dim=1, keepdim=True) - math.log(self.num_counts - S)
            self.gene_bias.weight.copy_(torch.cat([log_p[:, :S], any_large], dim=1))
