"""The distribution over counts at each queried gene: how it is made from hidden states, scored and drawn.

A count distribution offers ``full()``, ``cross_entropy(labels)`` and ``draw(generator, temperature)``; its head takes
hidden states, the condition and the queried genes. Another distribution is another pair of such classes in this file.
Letters: B cells, Q queried genes, S small counts, K largest count, D width, C columns of the genes' bias.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn

from .conditioning_dcm import PartialCells
from .configuration_dcm import DCMConfig
from .layers_dcm import NUM_COUNT_FEATURES, count_features, layer_norm, modulate

TAIL_TERMS = 12
SMALL_TAIL = 1e-3
LARGEST_RATIO = 0.99
LARGE_AT_ONCE = 2**26  # logits of large counts
SCORES = 64  # columns of the bilinear rate
SHAPED_COUNTS = 16  # small counts that may start away from the negative binomial
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
        ratios = log_ratios(S, number - 1, self.mean[rows], self.size[rows])  # of each large count to the one before
        base = nn.functional.pad(ratios.cumsum(dim=-1), (1, 0))  # of S it is 0: a constant is lost in the normalisation
        if self.id_of_count is None:
            return logits + base
        largest = base.amax(dim=-1, keepdim=True)  # the mass of a bin is the sum over its counts
        mass = torch.zeros_like(logits).index_add(-1, self.id_of_count, (base - largest).exp())
        return logits + mass.clamp(min=torch.finfo(mass.dtype).tiny).log() + largest

    def cross_entropy(self, labels: torch.Tensor, num_large: int | None = None) -> torch.Tensor:
        """``-log p(labels)`` (B, Q), nats.

        ``num_large`` says how many large counts there are at most, so that nobody has to look and wait for the answer.
        """
        if self.weight is None:
            return _cross_entropy(self.small, labels)
        S = self.small.shape[-1] - 1
        nats = _cross_entropy(self.small, labels.clamp(max=S))
        is_large = labels >= S
        number = int(is_large.sum()) if num_large is None else min(num_large, labels.numel())
        places = is_large.flatten().float().topk(number, sorted=False).indices  # large counts first, then any others
        rows = (places // labels.shape[1], places % labels.shape[1])
        of_rows = _cross_entropy(self.large(rows), (labels[rows] - S).clamp(min=0)) * is_large[rows]
        return nats.index_put(rows, of_rows, accumulate=True)

    def draw(self, generator: torch.Generator, temperature: float = 1.0) -> torch.Tensor:
        """One count (B, Q) from each distribution, its logits divided by the temperature.

        On a CPU the second stage is drawn where the first says so alone. Other devices would wait for such a look: they
        draw it everywhere, some genes at a time.
        """
        if self.weight is None or temperature != 1.0:
            return draw_counts(self.full(), temperature, generator)
        counts = draw_counts(self.small, 1.0, generator)
        S = self.small.shape[-1] - 1
        if counts.device.type == "cpu":
            rows = (counts == S).nonzero(as_tuple=True)
            return counts.index_put(rows, S + draw_counts(self.large(rows), 1.0, generator))
        genes = max(1, LARGE_AT_ONCE // (len(counts) * len(self.weight)))
        for start in range(0, counts.shape[1], genes):
            part = (slice(None), slice(start, start + genes))
            large = S + draw_counts(self.large(part), 1.0, generator)
            counts[part] = torch.where(counts[part] == S, large, counts[part])
        return counts


def draw_counts(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    """One id for each row of ``logits`` (.., K+1), divided by the temperature, in float32: the first whose cumulated
    probability is above a uniform number. One random number for a row is several times cheaper than one for each id."""
    cumulated = (logits.float() / temperature).softmax(dim=-1).cumsum(dim=-1)
    total = cumulated[..., -1:]
    uniform = torch.rand(total.shape, generator=generator, device=logits.device)
    below = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))  # the product is rounded
    drawn = torch.searchsorted(cumulated, below, right=True)[..., 0]
    return drawn.clamp(max=logits.shape[-1] - 1)  # of logits that are no numbers, too


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    nats = nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    return nats.view(labels.shape)


def log_ratios(first: int, number: int, mean: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """``log NB(c + 1) / NB(c)`` (.., number) of a negative binomial, from the count ``first`` on.

    ``mean`` mu and ``size`` r are above 0, the variance is ``mu + mu^2 / r``.
    """
    c = torch.arange(first, first + number, device=mean.device)
    return ((c + size[..., None]) / (c + 1)).log() - torch.log1p(size / mean)[..., None]


def log_counts_and_tail(mean: torch.Tensor, size: torch.Tensor, num_small: int) -> torch.Tensor:
    """``log NB(c; mu, r)`` of the counts below S, each from the one before it, and ``log P(c >= S)``: (.., S+1).

    A large tail is what the small counts leave. A small one, where that difference would be rounding errors, is a sum
    over the next counts, and from :data:`TAIL_TERMS` after S on of what is as good as a geometric series.
    """
    ratios = log_ratios(0, num_small + TAIL_TERMS + 1, mean, size)
    last = ratios[..., -1:].clamp(max=math.log(LARGEST_RATIO))
    log_p = nn.functional.pad(ratios[..., :-1].cumsum(dim=-1), (1, 0)) - (size * torch.log1p(mean / size))[..., None]
    small, others = log_p[..., :num_small], log_p[..., num_small:]
    rest = others[..., -1:] + last - torch.log1p(-last.exp())
    in_series = torch.cat([others, rest], dim=-1).logsumexp(dim=-1)
    left = 1 - small.exp().sum(dim=-1)
    tail = torch.where(left > SMALL_TAIL, left.clamp(min=SMALL_TAIL).log(), in_series)
    return torch.cat([small, tail[..., None]], dim=-1)


@lru_cache
@torch.inference_mode(False)
def ids_of_counts(first: int, bins: tuple[int, ...], max_count: int, device: torch.device) -> torch.Tensor:
    """Which of the ids from ``first`` on each count from there to ``max_count`` has; ``bins`` are left edges."""
    edges = torch.tensor([*range(first, bins[0]), *bins], device=device)
    return torch.searchsorted(edges, torch.arange(first, max_count + 1, device=device), right=True) - 1


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
        self.num_small = config.num_small
        self.norm = layer_norm(config.hidden_size)
        self.modulation = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.counts = ZeroLinear(NUM_COUNT_FEATURES, config.hidden_size, bias=False)
        self.large = ZeroLinear(1, config.hidden_size, bias=False) if self.num_small < self.num_counts else None
        self.bias = CountBias(1, config.num_counts)
        self.gene_bias = CountBias(config.num_genes, columns) if columns else None

    def forward(self, x: torch.Tensor, condition: torch.Tensor, queried: PartialCells) -> TwoStageCategorical:
        """The distribution at the genes ``queried`` (B, Q) with hidden states ``x`` (B, Q, D)."""
        return self.of_counts(self.modulated(x, condition), queried)

    def modulated(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        return modulate(self.norm(x), shift, scale)

    def of_counts(self, x: torch.Tensor, queried: PartialCells) -> TwoStageCategorical:
        """Logits of the counts, linear in ``x`` (B, Q, D) beside those of each gene."""
        bias = self.bias.weight[0]
        weight = self.counts(count_features(self.num_counts, x.device).to(bias.dtype)).to(x.dtype)
        small, large = weight[: self.num_small], weight[self.num_small :]  # (S, D) and (K+1-S, D)
        if self.large is not None:
            small = torch.cat([small, self.large(bias.new_ones(1, 1)).to(x.dtype)])
        logits = nn.functional.linear(x, small).float() + self.of_genes(queried)
        if self.large is None:
            return TwoStageCategorical(logits, x)
        return TwoStageCategorical(logits, x, large, bias[self.num_small :])

    def of_genes(self, queried: PartialCells) -> torch.Tensor:
        """Logits (B, Q, C) of each gene alone, or (C,) where all have the same."""
        if self.large is None:
            bias = self.bias.weight[0]
            return bias if self.gene_bias is None else bias + self.gene_bias(queried.gene_ids)
        # zeros everywhere are the uniform distribution: "a large count" then has as many shares as there are
        shares = self.gene_bias.weight.new_zeros(self.num_small)
        shares = nn.functional.pad(shares, (0, 1), value=math.log(self.num_counts - self.num_small))
        return nn.functional.embedding(queried.gene_ids, self.gene_bias.weight + shares)

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
    """Numbers of each gene that start small beside a factor that starts at zero."""


class StateLoadings(nn.Module):
    """Loadings of the cell state, as they were estimated: training would fit them to the noise of the very cells that
    the states are made of, and drawn cells would have it twice."""

    def __init__(self, num_genes: int, width: int):
        super().__init__()
        self.register_buffer("weight", torch.zeros(num_genes, width))


class NegativeBinomialHead(CategoricalHead):
    """The categorical head as a correction of a negative binomial, which starts at statistics of the training cells.

    ``log p(c) = log NB(c; mu, r) + u(c)``, normalised in the same two stages. ``mu = expected exp(delta)``: what depth
    and cell type let expect, times what the network makes of the observed genes and the condition: a rate linear in
    the hidden state, one that is bilinear in gene and condition, and where the cell state is given ``<B, (z, 1)>``.
    How far the perturbations' effect on a gene, which is in ``expected``, is to be trusted is linear in the condition.
    The dispersions 1/r are those around either mean, times a factor. No mean is above what nearly all training cells
    have: the exponential of a state that is large by chance is.

    Rates, factor and what is learned of u start at zero. Factor and what of u comes from the hidden state count by the
    share of genes observed, and where the state is given so does what is learned of genes and conditions: while nothing
    is observed a cell with a state is what the statistics say, but for how far its perturbation's effect is trusted.
    Means and shapes are otherwise traded against each other, at nearly the same likelihood and with worse cells.
    """

    def __init__(self, config: DCMConfig):
        super().__init__(config)
        D, G = config.hidden_size, config.num_genes
        self.count_bins, self.max_count = config.count_bins, config.max_count
        self.rate = ZeroLinear(D, 2)  # of the logarithms of mean and r
        self.loading = Loadings(G, SCORES)
        self.score = ZeroLinear(D, SCORES)
        self.trust = ZeroLinear(D, 1) if config.num_perturbations else None
        self.state_loading = StateLoadings(G, config.state_width + 1) if config.state_dim else None
        # log r without and with the state
        self.register_buffer("log_size", torch.zeros(2, G))
        self.register_buffer("largest_mean", torch.full((G,), float(config.max_count)))
        # of means told the state, by cell type; the last one is not given
        self.register_buffer("type_shift", torch.zeros(config.num_cell_types + 1, G) if config.state_dim else None)
        # where u of each gene starts, the last column of all further counts
        columns = 0 if self.gene_bias is None else min(self.gene_bias.embedding_dim, SHAPED_COUNTS + 1)
        self.register_buffer("correction", torch.zeros(G, columns))

    def forward(self, x: torch.Tensor, condition: torch.Tensor, queried: PartialCells) -> TwoStageCategorical:
        genes, observed = queried.gene_ids, 1 - queried.progress.t  # (B, Q) and (B,)
        learned = self.share_of_learned(queried)
        x = self.modulated(x, condition)
        u = self.of_counts(x * observed[:, None, None].to(x.dtype), queried)
        change, log_factor = self.rate(x).float().clamp(-LARGEST_CHANGE, LARGEST_CHANGE).unbind(dim=-1)
        change, log_factor = change * learned, log_factor * observed[:, None]
        if self.trust is not None:
            change = change + queried.effect * self.trust(condition).float()
        of_gene = nn.functional.linear(self.score(condition), self.loading.weight).float() * learned  # (B, G)
        log_size = self.log_size[0][genes]
        if self.state_loading is not None:
            given = ~queried.state.isnan().any(dim=1, keepdim=True)  # (B, 1)
            z = nn.functional.pad(torch.nan_to_num(queried.state), (0, 1), value=1.0) * given
            # autocast leaves float64 alone: rounding here would be an error of the mean
            of_state = nn.functional.linear(z.double(), self.state_loading.weight.double())
            of_gene = of_gene + of_state.float() + self.type_shift[queried.cell_type_ids] * given
            log_size = torch.where(given, self.log_size[1][genes], log_size)
        change = change + of_gene.gather(1, genes.expand(len(x), -1))
        mean = queried.expected.float().clamp(min=LOWEST_MEAN) * change.clamp(-LARGEST_CHANGE, LARGEST_CHANGE).exp()
        mean = torch.minimum(mean, self.largest_mean[genes])
        size = (log_size + log_factor).exp()
        small = log_counts_and_tail(mean, size, self.num_small)
        if self.large is None:
            return u._replace(small=u.small + small[..., :-1])
        id_of_count = None
        if self.count_bins is not None:
            id_of_count = ids_of_counts(self.num_small, tuple(self.count_bins), self.max_count, x.device)
        return u._replace(small=u.small + small, mean=mean, size=size, id_of_count=id_of_count)

    def share_of_learned(self, queried: PartialCells) -> torch.Tensor:
        """How much (B, 1) of what is learned of conditions and genes counts: the share observed where a state is given,
        else all."""
        observed = 1 - queried.progress.t[:, None]
        if self.state_loading is None:
            return torch.ones_like(observed)
        return torch.where(queried.state.isnan().any(dim=1, keepdim=True), 1.0, observed)

    def of_genes(self, queried: PartialCells) -> torch.Tensor:
        learned = super().of_genes(queried) if self.large is None else self.gene_bias(queried.gene_ids)
        learned = learned * self.share_of_learned(queried)[..., None]
        if self.gene_bias is None:
            return learned
        further = learned.shape[-1] - self.correction.shape[1]
        table = torch.cat([self.correction, self.correction[:, -1:].expand(-1, further)], dim=1)
        return learned + nn.functional.embedding(queried.gene_ids, table)

    @torch.no_grad()
    def set_marginals(self, histogram: torch.Tensor) -> None:
        """Start without corrections: u is zero, whatever the marginals; see :meth:`set_estimates`."""
        self.bias.weight.zero_()

    @torch.no_grad()
    def set_estimates(
        self,
        largest_mean: torch.Tensor,
        dispersion: torch.Tensor,
        state_loading: torch.Tensor | None,
        state_dispersion: torch.Tensor | None,
        correction: torch.Tensor | None = None,
        type_shift: torch.Tensor | None = None,
    ) -> None:
        """Start at statistics: bounds of means (G,), 1/r (G,) around what is expected, B (G, E+1), 1/r (G,) around the
        regression, u (G, S+1) of the first counts, the last column of all others, and what is added to the logarithms
        of the regression in each cell type (T+1, G)."""
        self.largest_mean.copy_(largest_mean)
        self.log_size[:] = -dispersion.log()
        if state_loading is not None:
            self.log_size[1] = -state_dispersion.log()
            self.state_loading.weight.copy_(state_loading)
        if type_shift is not None:
            self.type_shift.copy_(type_shift)
        if correction is not None and self.gene_bias is not None:
            S = correction.shape[1] - 1
            self.correction[:, :S] = correction[:, :S]
            self.correction[:, S:] = correction[:, S:]
