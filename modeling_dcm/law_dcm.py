"""A law over counts in two stages: logits of the small counts, and of the large ones where they are needed.

Plain tensor arithmetic; knows nothing of networks. Letters: S small counts, K largest count, D width.
"""

from typing import NamedTuple

import torch
from torch import nn


class FactoredLogits(NamedTuple):
    """``p(c) = softmax(small)_c`` below S, ``p(c) = softmax(small)_S softmax(large)_(c-S)`` from S on.

    The logits of the large counts are linear in the hidden state and computed for the rows that need them.
    """

    small: torch.Tensor  # (.., S+1), the last is *a large count*; (.., K+1) when there is one stage
    hidden: torch.Tensor  # (.., D)
    weight: torch.Tensor | None  # (K+1-S, D); None: one stage
    bias: torch.Tensor | None  # (K+1-S,)

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

    def draw(self, generator: torch.Generator) -> torch.Tensor:
        """One count (..) from each law, Gumbel-max in float32."""
        counts = draw_counts(self.small, 1.0, generator)
        if self.weight is None:
            return counts
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
