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

TAIL_TERMS = 12
SMALL_TAIL = 1e-3
SCORES = 64  # columns of the bilinear rate
LOWEST_MEAN = 1e-6
LARGEST_CHANGE = 8.0  # of the logarithms of mean and dispersion


class TwoStageCategorical(NamedTuple):
    """``p(c) = softmax(small)_c`` below S, ``p(c) = softmax(small)_S softmax(large)_(c-S)`` from S on.

    The logits of the large counts are linear in the hidden state and computed for the rows that need them.
    """

    small: torch.Tensor  # (.., S+1), the last is *a large count*; (.., K+1) when there is one stage
    hidden: torch.Tensor | None = None  # (.., D)
    weight: torch.Tensor | None = None  # (K+1-S, D); None: one stage
    bias: torch.Tensor | None = None  # (K+1-S,)
    mean: torch.Tensor | None = None  # (..) of the negative binomial that the large logits correct; None: of nothing
    size: torch.Tensor | None = None  # (..) its r
    id_of_count: torch.Tensor | None = None  # (K'+1-S,) which of the large ids each count from S on has, with bins

    def full(self) -> torch.Tensor:
        """Logits (.., K+1): normalised logarithms of probabilities when there are two stages."""
        if self.weight is None:
            return self.small
        small = self.small.log_softmax(dim=-1)
        large = self.large(...).log_softmax(dim=-1)
        return torch.cat([small[..., :-1], small[..., -1:] + large], dim=-1)

    def large(self, rows) -> torch.Tensor:
        """Logits (.., K+1-S) of the large counts, of the distributions at ``rows``."""
        hidden = self.hidden[rows]
        logits = nn.functional.linear(hidden, self.weight, self.bias.to(hidden.dtype)).float()
        if self.mean is None:
            return logits
        S = self.small.shape[-1] - 1
        number = logits.shape[-1] if self.id_of_count is None else len(self.id_of_count)
        counts = torch.arange(S, S + number, device=logits.device)
        base = log_negative_binomial(counts, self.mean[rows][..., None], self.size[rows][..., None])
        if self.id_of_count is None:
            return logits + base
        largest = base.amax(dim=-1, keepdim=True)  # the mass of a bin is the sum over its counts
        mass = torch.zeros_like(logits).index_add(-1, self.id_of_count, (base - largest).exp())
        return logits + mass.clamp(min=torch.finfo(mass.dtype).tiny).log() + largest

    def cross_entropy(self, labels: torch.Tensor) -> torch.Tensor:
        """``-log p(labels)`` (..), nats."""
        if self.weight is None:
            return _cross_entropy(self.small, labels)
        S = self.small.shape[-1] - 1
        nats = _cross_entropy(self.small, labels.clamp(max=S))
        rows = (labels >= S).nonzero(as_tuple=True)
        return nats.index_put(rows, _cross_entropy(self.large(rows), labels[rows] - S), accumulate=True)

    def draw(self, generator: torch.Generator, temperature: float = 1.0) -> torch.Tensor:
        """One count (..) from each distribution, its logits divided by the temperature."""
        if self.weight is None or temperature != 1.0:
            return draw_counts(self.full(), temperature, generator)
        counts = draw_counts(self.small, 1.0, generator)
        S = self.small.shape[-1] - 1
        rows = (counts == S).nonzero(as_tuple=True)
        return counts.index_put(rows, S + draw_counts(self.large(rows), 1.0, generator))


def draw_counts(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    """One id for each row of ``logits`` (.., K+1), Gumbel-max in float32: the largest ``logits / T - log Exp(1)``."""
    noise = torch.empty(logits.shape, device=logits.device).exponential_(generator=generator)
    return (logits.float() / temperature - noise.log()).argmax(dim=-1)


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    nats = nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    return nats.view(labels.shape)


def log_negative_binomial(counts: torch.Tensor, mean: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """``log NB(c; mu, r)``, broadcast; ``mean`` mu and ``size`` r are above 0, the variance is ``mu + mu^2 / r``."""
    at_random = torch.lgamma(counts + size) - torch.lgamma(size) - torch.lgamma(counts + 1.0)
    return at_random - size * torch.log1p(mean / size) - counts * torch.log1p(size / mean)


def log_small_counts(mean: torch.Tensor, size: torch.Tensor, num_small: int) -> torch.Tensor:
    """``log NB(c; mu, r)`` (.., S) of the counts below S, each from the one before it."""
    c = torch.arange(1, num_small, device=mean.device)
    of_zero = -size * torch.log1p(mean / size)
    ratios = ((size[..., None] + c - 1) / c).log() - torch.log1p(size / mean)[..., None]
    return torch.cat([of_zero[..., None], of_zero[..., None] + ratios.cumsum(dim=-1)], dim=-1)


def log_large_count(small: torch.Tensor, mean: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """``log P(c >= S)`` (..), given ``small`` (.., S) of :func:`log_small_counts`.

    A large tail is what the small counts leave. A small one, where that difference would be rounding errors, is the
    probability of S times a series of ratios, of which the terms beyond :data:`TAIL_TERMS` are as good as geometric.
    """
    S = small.shape[-1]
    left = 1 - small.exp().sum(dim=-1)
    odds = mean / (mean + size)

    def ratio(count: int) -> torch.Tensor:  # of NB(count + 1) to NB(count)
        return odds * (count + size) / (count + 1)

    term = series = torch.ones_like(mean)
    for j in range(TAIL_TERMS):
        term = term * ratio(S + j)
        series = series + term
    rest = ratio(S + TAIL_TERMS).clamp(max=0.99)
    series = series + term * rest / (1 - rest)
    in_series = small[..., -1] + ratio(S - 1).log() + series.log()
    return torch.where(left > SMALL_TAIL, left.clamp(min=SMALL_TAIL).log(), in_series)


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
            return TwoStageCategorical(logits, x)
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


class Loadings(nn.Embedding):
    """Numbers of each gene that start small (or at a regression) beside a factor that starts at zero."""


class NegativeBinomialHead(CategoricalHead):
    """The categorical head as a correction of a negative binomial, which starts at statistics of the training cells.

    ``log p(c) = log NB(c; mu, r) + u(c)``, normalised in the same two stages. ``mu = expected exp(delta)``: what depth
    and cell type let expect, times what the network makes of the observed genes and the condition: a rate linear in
    the hidden state, one that is bilinear in gene and condition, and where the cell state is given ``<B, (z, 1)>``.
    The dispersions 1/r are those around either mean, times a factor. Rates, factor and u are zero at the start. No mean
    is above what nearly all training cells have: the exponential of a state that is large by chance is.
    """

    def __init__(self, config: DCMConfig):
        super().__init__(config)
        D, G = config.hidden_size, config.num_genes
        self.count_bins, self.max_count = config.count_bins, config.max_count
        self.rate = ZeroLinear(D, 2)  # of the logarithms of mean and r
        self.loading = Loadings(G, SCORES)
        self.score = ZeroLinear(D, SCORES)
        self.state_loading = Loadings(G, config.state_width + 1) if config.state_dim else None
        # log r without and with the state
        self.register_buffer("log_size", torch.zeros(2, G))
        self.register_buffer("largest_mean", torch.full((G,), float(config.max_count)))

    def forward(self, x: torch.Tensor, condition: torch.Tensor, queried: PartialCells) -> TwoStageCategorical:
        u = super().forward(x, condition, queried)
        genes = queried.gene_ids
        change, log_factor = self.rate(u.hidden).float().clamp(-LARGEST_CHANGE, LARGEST_CHANGE).unbind(dim=-1)
        change = change + (self.loading(genes) @ self.score(condition)[..., None])[..., 0].float()
        log_size = self.log_size[0][genes]
        if self.state_loading is not None:
            given = ~queried.state.isnan().any(dim=1)  # (B,)
            z = nn.functional.pad(torch.nan_to_num(queried.state), (0, 1), value=1.0).to(self.state_loading.weight)
            of_state = (self.state_loading(genes) @ z[..., None])[..., 0].float()
            change = torch.where(given[:, None], change + of_state, change)
            log_size = torch.where(given[:, None], self.log_size[1][genes], log_size)
        mean = queried.expected.float().clamp(min=LOWEST_MEAN) * change.clamp(-LARGEST_CHANGE, LARGEST_CHANGE).exp()
        mean = torch.minimum(mean, self.largest_mean[genes])
        size = (log_size + log_factor).exp()
        small = log_small_counts(mean, size, self.num_small)
        if self.large is None:
            return u._replace(small=u.small + small)
        small = torch.cat([small, log_large_count(small, mean, size)[..., None]], dim=-1)
        id_of_count = None
        if self.count_bins is not None:
            edges = torch.tensor([*range(self.num_small, self.count_bins[0]), *self.count_bins], device=x.device)
            counts = torch.arange(self.num_small, self.max_count + 1, device=x.device)
            id_of_count = torch.searchsorted(edges, counts, right=True) - 1
        return u._replace(small=u.small + small, mean=mean, size=size, id_of_count=id_of_count)

    @torch.no_grad()
    def set_marginals(self, histogram: torch.Tensor) -> None:
        """Start without corrections: u is zero, whatever the marginals; see :meth:`set_estimates`."""
        self.bias.weight.zero_()
        if self.large is not None:  # zeros of the categorical head give *a large count* as many shares as there are
            self.gene_bias.weight.zero_()
            self.gene_bias.weight[:, -1] = -math.log(self.num_counts - self.num_small)

    @torch.no_grad()
    def set_estimates(
        self,
        largest_mean: torch.Tensor,
        dispersion: torch.Tensor,
        state_loading: torch.Tensor | None,
        state_dispersion: torch.Tensor | None,
    ) -> None:
        """Start at statistics: bounds of means (G,), 1/r (G,) around what is expected, B (G, E+1), and 1/r (G,) around
        the regression."""
        self.largest_mean.copy_(largest_mean)
        self.log_size[:] = -dispersion.log()
        if state_loading is not None:
            self.log_size[1] = -state_dispersion.log()
            self.state_loading.weight.copy_(state_loading)
