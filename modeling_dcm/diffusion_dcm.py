"""The absorbing-state diffusion: schedule functions, forward process and loss, each as the paper writes it.

`m = 1 - alpha` is the mask probability. Letters: B cells, L genes in the sequence, Q queried genes, K largest count.
"""

import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch

DEFAULT_EPS = 1e-3
IGNORED_LABEL = -100  # of a gene that counts for nothing in the loss


def sigma_bar(t: torch.Tensor, eps: float = DEFAULT_EPS) -> torch.Tensor:
    """Total noise up to time t, log-linear: ``-log(1 - (1-eps) t)``."""
    return -torch.log1p(-(1 - eps) * t)


def sigma(t: torch.Tensor, eps: float = DEFAULT_EPS) -> torch.Tensor:
    """Noise rate ``d sigma_bar / dt = (1-eps) / (1 - (1-eps) t)``.

    The paper (after Eq. 2) prints ``(1-eps) / (eps + (1-eps) t)``, which is this function with t -> 1-t; with it the
    process would be noisiest at the data. The paper's code uses the form here.
    """
    return (1 - eps) / (1 - (1 - eps) * t)


def alpha(t: torch.Tensor, eps: float = DEFAULT_EPS) -> torch.Tensor:
    """Survival probability ``exp(-sigma_bar(t)) = 1 - (1-eps) t`` (Eq. 5)."""
    return 1 - (1 - eps) * t


def mask_probability(t: torch.Tensor, eps: float = DEFAULT_EPS) -> torch.Tensor:
    """``m(t) = 1 - alpha(t)``: 0 at t=0 and 1-eps at t=1."""
    return (1 - eps) * t


def reveal_probability(t: torch.Tensor, s: torch.Tensor, eps: float = DEFAULT_EPS) -> torch.Tensor:
    """Probability that a gene masked at time t is revealed by the earlier time s: ``(m_t - m_s) / m_t``."""
    m_t = mask_probability(t, eps)
    return (m_t - mask_probability(s, eps)) / m_t


def keyed_generator(seed: int, *index: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of piece ``index`` of a run: the same whoever computes the piece, and in whatever order."""
    state = np.random.SeedSequence([seed, *index]).generate_state(1, np.uint64)[0]
    return torch.Generator(device=device).manual_seed(int(state >> np.uint64(1)))


def stratified_uniform(num_cells: int, generator: torch.Generator) -> torch.Tensor:
    """One u for each cell of the global batch, one in each of ``num_cells`` equal strata of [0, 1), in random order."""
    strata = torch.randperm(num_cells, generator=generator, device=generator.device)
    offsets = torch.rand(num_cells, generator=generator, device=generator.device, dtype=torch.float64)
    return ((strata + offsets) / num_cells).clamp(max=1 - 1e-12)


def num_masked(u: torch.Tensor, num_measured: torch.Tensor) -> torch.Tensor:
    """``k = 1 + floor(u n)`` masked genes of n measured ones: from 1 to n, everything masked included; 0 if n is 0."""
    return torch.minimum(1 + torch.floor(u.double() * num_measured).long(), num_measured)


def mask_counts(
    x_0: torch.Tensor, k: torch.Tensor, generator: torch.Generator, *, mask_token_id: int, pad_token_id: int
) -> torch.Tensor:
    """Mask ``k`` measured genes of each cell, chosen uniformly.

    Args:
        x_0: clean ids (B, L).
        k: number of genes to mask (B,), at most the number of measured (non-PAD) genes.
        generator: source of the choice, on the device of ``x_0``.

    Returns:
        x_t (B, L), MASK at the chosen genes.
    """
    keys = torch.rand(x_0.shape, generator=generator, device=x_0.device)
    return mask_smallest(x_0, k, keys, mask_token_id=mask_token_id, pad_token_id=pad_token_id)


def mask_smallest(
    x_0: torch.Tensor, k: torch.Tensor, keys: torch.Tensor, *, mask_token_id: int, pad_token_id: int
) -> torch.Tensor:
    """Mask the ``k`` measured genes of each cell with the smallest ``keys`` (B, L), random numbers in [0, 1)."""
    keys = keys.masked_fill(x_0 == pad_token_id, 2.0)  # behind every measured gene
    order = keys.argsort(dim=1)
    places = torch.arange(order.shape[1], device=order.device)
    rank = torch.empty_like(order).scatter_(1, order, places.expand_as(order))
    return x_0.masked_fill(rank < k[:, None].to(x_0.device), mask_token_id)


def choose_queries(x_t: torch.Tensor, keys: torch.Tensor, budget: int, *, mask_token_id: int) -> torch.Tensor:
    """Positions (B, Q) of at most ``budget`` masked genes of each cell, -1 where a cell has fewer.

    The masked genes with the smallest ``keys`` (B, L): given which genes are masked, a uniform choice among them, even
    when the same keys chose the mask.
    """
    keys = keys.masked_fill(x_t != mask_token_id, 2.0)
    keys, positions = keys.topk(min(budget, x_t.shape[1]), dim=1, largest=False)
    return positions.masked_fill(keys > 1.0, -1)


def drop_labels(ids: torch.Tensor, u: torch.Tensor, probability: float) -> torch.Tensor:
    """Replace a condition (B,) or (B, P) by *not given* (-1) in the cells whose ``u`` (B,) is below ``probability``."""
    dropped = (u < probability).to(ids.device)
    return ids.masked_fill(dropped if ids.ndim == 1 else dropped[:, None], -1)


def denoising_loss(
    cross_entropy: torch.Tensor, is_query: torch.Tensor, k: torch.Tensor, n: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted denoising cross-entropies (Eq. 6), summed over genes and divided by the batch's measured genes.

    ``S_b = k_b / Q_b`` times the sum over the Q_b queried masked genes, an unbiased estimate of the sum over all k_b.

    Args:
        cross_entropy: nats (B, Q).
        is_query: which of them count (B, Q), masked genes only.
        k: masked genes of each cell (B,).
        n: measured genes of each cell (B,).

    Returns:
        ``uniform = sum_b S_b / sum_b n_b`` and ``elbo = sum_b (n_b / k_b) S_b / sum_b n_b``; the second is an upper
        bound on -log p in nats per gene.
    """
    queried = is_query.sum(dim=1).clamp(min=1)
    per_cell = (cross_entropy * is_query).sum(dim=1) * (k / queried)  # S_b (B,)
    total = n.sum().clamp(min=1)
    return per_cell.sum() / total, (per_cell * n / k.clamp(min=1)).sum() / total


class DataCollatorForCountMasking:
    """Clean cells to masked batches for a training loop of your own, such as ``transformers.Trainer``.

    Of n measured genes ``k = 1 + floor(u n)`` are masked, u stratified over the batch: the loss of this package's own
    training, but for dropped conditions and queries. Each process, and each worker of a data loader, draws its own.

    Args:
        ids: what has ``mask_token_id`` and ``pad_token_id``: the tokenizer, or the model's configuration.
        seed: of all draws.
    """

    def __init__(self, ids: object, seed: int = 0):
        self.mask_token_id, self.pad_token_id, self.seed = ids.mask_token_id, ids.pad_token_id, seed
        self._generator: tuple[int, torch.Generator] | None = None

    def __call__(self, cells: Sequence[Mapping[str, object]]) -> dict[str, torch.Tensor]:
        """``cells`` as rows of ``tokenizer(adata)``: ``input_ids`` (L,), and conditions if they have any.

        Returns:
            Arguments of :meth:`DCMForDenoising.forward`: masked ``input_ids`` (B, L), ``labels`` (B, L), which are -100
            where nothing is masked, and the conditions.
        """
        batch = {}
        for name in cells[0]:
            values = [torch.as_tensor(cell[name]) for cell in cells]
            is_padded = name in ("perturbation_ids", "target_gene_ids")  # as many as a cell has
            pad = torch.nn.utils.rnn.pad_sequence
            batch[name] = pad(values, batch_first=True, padding_value=-1) if is_padded else torch.stack(values)
        x_0, generator = batch["input_ids"], self._of_this_worker()
        if "attention_mask" in batch:
            x_0 = x_0.masked_fill(batch.pop("attention_mask") == 0, self.pad_token_id)
        k = num_masked(stratified_uniform(len(x_0), generator), (x_0 != self.pad_token_id).sum(dim=1))
        ids = {"mask_token_id": self.mask_token_id, "pad_token_id": self.pad_token_id}
        x_t = mask_counts(x_0, k, generator, **ids)
        return {**batch, "input_ids": x_t, "labels": x_0.masked_fill(x_t != self.mask_token_id, IGNORED_LABEL)}

    def _of_this_worker(self) -> torch.Generator:
        worker = torch.utils.data.get_worker_info()
        # a loader's seed is another in each epoch: its workers are new ones then, and would draw the same again
        index = (int(os.environ.get("RANK", 0)) << 64) + (worker.seed if worker else 0)
        if self._generator is None or self._generator[0] != index:
            self._generator = index, keyed_generator(self.seed, index)
        return self._generator[1]
