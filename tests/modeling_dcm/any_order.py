"""Enumerate what cells of three genes with counts 0 to 2 (MASK is 3) are when drawn one gene at a time."""

import itertools

import numpy as np
import torch
from scipy import stats


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def any_order(table: dict[tuple[int, ...], np.ndarray]) -> np.ndarray:
    """Probabilities (3, 3, 3) of cells drawn in uniformly random order, by a denoiser's probabilities (3, 3) of each
    gene's counts in every state."""
    p = np.zeros((3, 3, 3))
    for order, x_0 in itertools.product(itertools.permutations(range(3)), itertools.product(range(3), repeat=3)):
        x_t, chance = [3] * 3, 1 / 6
        for gene in order:
            chance *= table[tuple(x_t)][gene, x_0[gene]]
            x_t[gene] = x_0[gene]
        p[x_0] += chance
    return p


def any_order_p_value(cells: torch.Tensor, p: np.ndarray) -> float:
    """Of the chi-square test that ``cells`` (N, 3) have the probabilities ``p``; rare cells are taken together."""
    observed = (cells @ torch.tensor([9, 3, 1])).bincount(minlength=27).numpy()
    expected = len(cells) * p.ravel()
    bins = np.where(expected < 5, 27, np.arange(27))
    observed, expected = (np.bincount(bins, values, minlength=28) for values in (observed, expected))
    return stats.chisquare(observed[expected > 0], expected[expected > 0]).pvalue
