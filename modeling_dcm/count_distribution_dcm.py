"""The distribution over counts at each queried gene: how it is made from hidden states, scored and drawn.

A count distribution offers ``full()``, ``cross_entropy(labels)`` and ``draw(generator, temperature)``; its head takes
hidden states, the condition and the queried genes. Another distribution is another pair of such classes in this file.
Letters: B cells, Q queried genes, S small counts, K largest count, D width, C columns of the genes' bias.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

from .conditioning_dcm import PartialCells
from .configuration_dcm import DCMConfig
from .layers_dcm import NUM_COUNT_FEATURES, count_features, layer_norm, modulate


class TwoStageCategorical(NamedTuple):
    """``p(c) = softmax(small)_c`` below S, ``p(c) = softmax(small)_S softmax(large)_(c-S)`` from S on.

    The logits of the large counts are linear in the hidden state and computed for the rows that need them.
    """

    small: torch.Tensor  # (.., S+1), the last is *a large count*; (.., K+1) when there is one stage
    hidden: torch.Tensor | None = None  # (.., D)
    weight: torch.Tensor | None = None  # (K+1-S, D); None: one stage
    bias: torch.Tensor | None = None  # (K+1-S,)

    def full(self) -> torch.Tensor:
        """Logits (.., K+1): normalised logarithms of probabilities when there are two stages."""
        if self.weight is None:
            return self.small
        small = self.small.log_softmax(dim=-1)
        large = self.large(self.hidden).log_softmax(dim=-1)
        return torch.cat([small[..., :-1], small[..., -1:] + large], dim=-1)

    def large(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (.., K+1-S) of the large counts."""
        return nn.functional.linear(hidden, self.weight, self.bias.to(hidden.dtype)).float()

    def cross_entropy(self, labels: torch.Tensor) -> torch.Tensor:
        """``-log p(labels)`` (..), nats."""
        if self.weight is None:
            return _cross_entropy(self.small, labels)
        S = self.small.shape[-1] - 1
        nats = _cross_entropy(self.small, labels.clamp(max=S))
        rows = (labels >= S).nonzero(as_tuple=True)
        return nats.index_put(rows, _cross_entropy(self.large(self.hidden[rows]), labels[rows] - S), accumulate=True)

    def draw(self, generator: torch.Generator, temperature: float = 1.0) -> torch.Tensor:
        """One count (..) from each distribution, its logits divided by the temperature."""
        if self.weight is None or temperature != 1.0:
            return draw_counts(self.full(), temperature, generator)
        counts = draw_counts(self.small, 1.0, generator)
        S = self.small.shape[-1] - 1
        rows = (counts == S).nonzero(as_tuple=True)
        return counts.index_put(rows, S + draw_counts(self.large(self.hidden[rows]), 1.0, generator))


def draw_counts(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    """One id for each row of ``logits`` (.., K+1), Gumbel-max in float32: the largest ``logits / T - log Exp(1)``."""
    noise = torch.empty(logits.shape, device=logits.device).exponential_(generator=generator)
    return (logits.float() / temperature - noise.log()).argmax(dim=-1)


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    nats = nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    return nats.view(labels.shape)


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero: the head, which then emits the training marginals.

    As every linear layer of this network it is called, and neither its weight nor its dtype is read: an adapter or a
    quantised layer may stand in its place.
    """


class CountBias(nn.Embedding):
    """Biases of the head over counts; zero until the training marginals are set."""


class CategoricalHead(nn.Module):
    """From hidden states to the distribution over counts 0..K, in two stages; there is no output for MASK or PAD.

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

    def forward(self, x: torch.Tensor, condition: torch.Tensor, queried: PartialCells) -> TwoStageCategorical:
        """The distribution at the genes ``queried`` (B, Q) with hidden states ``x`` (B, Q, D)."""
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        x = modulate(self.norm(x), shift, scale)
        weight = self.counts(count_features(self.num_counts, x.device).to(condition.dtype)).to(x.dtype)
        bias = self.bias.weight[0]
        small, large = weight[: self.num_small], weight[self.num_small :]  # (S, D) and (K+1-S, D)
        if self.large is not None:
            small = torch.cat([small, self.large(condition.new_ones(1, 1)).to(x.dtype)])
        logits = nn.functional.linear(x, small).float()
        if self.large is None:
            logits = logits + bias if self.gene_bias is None else logits + bias + self.gene_bias(queried.gene_ids)
            return TwoStageCategorical(logits)
        # zeros everywhere are the uniform distribution: "a large count" then has as many shares as there are
        shares = nn.functional.pad(bias.new_zeros(self.num_small), (0, 1), value=math.log(len(large)))
        logits = logits + nn.functional.embedding(queried.gene_ids, self.gene_bias.weight + shares)
        return TwoStageCategorical(logits, x, large, bias[self.num_small :])

    @torch.no_grad()
    def set_marginals(self, histogram: torch.Tensor) -> None:
        """Start at the log marginals of the training cells: ``histogram`` (G, K+1), cells for each gene and count.

        One pseudo-cell with the counts' distribution over all genes keeps unseen counts possible.
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
