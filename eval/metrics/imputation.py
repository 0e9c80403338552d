"""How well masked counts were filled: correlations with the truth, and whether intervals cover it.

Entries arrive chunk by chunk and are kept as a table of how often each pair (true count, sum of draws) occurs, so
memory does not grow with the number of cells. Letters: B cells of a chunk, G genes, M masked entries of a chunk, D
draws.
"""

from collections import Counter

import numpy as np

INTERVAL = 0.9


class MaskedEntries:
    """Masked counts, what was drawn for them, and what each gene's mean would have said.

    ``seed`` is of the random part of ranks among equal counts.
    """

    def __init__(self, num_genes: int, seed: int):
        self.generator = np.random.default_rng(seed)
        self.pairs: Counter[tuple[int, int]] = Counter()  # (true count, sum of draws): how often
        self.draws = self.covered = 0
        # per gene, of entries that were masked: how many, sum and sum of squares; and of the others: sum and how many
        self.masked, self.total, self.squares, self.given_total, self.given = np.zeros((5, num_genes))

    def add(self, counts: np.ndarray, hidden: np.ndarray, drawn: np.ndarray) -> None:
        """Take in a chunk: ``counts`` (B, G), which of them were ``hidden`` (B, G), ``drawn`` (D, M) for these."""
        truth, self.draws = counts[hidden], len(drawn)
        pairs, times = np.unique(np.stack([truth, drawn.sum(axis=0)]), axis=1, return_counts=True)
        for true, total, number in zip(*pairs.tolist(), times.tolist()):
            self.pairs[true, total] += number
        below, equal = (drawn < truth).sum(axis=0), (drawn == truth).sum(axis=0)
        rank = (below + self.generator.random(len(truth)) * (equal + 1)) / (self.draws + 1)
        self.covered += int((np.abs(rank - 0.5) < INTERVAL / 2).sum())
        counts = counts.astype(np.float64)
        self.masked += hidden.sum(axis=0)
        self.total += (counts * hidden).sum(axis=0)
        self.squares += (counts**2 * hidden).sum(axis=0)
        self.given += (~hidden).sum(axis=0)
        self.given_total += (counts * ~hidden).sum(axis=0)

    def scores(self) -> dict[str, float]:
        """How well the masked entries were filled.

        Returns:
            ``entries``; ``pearson`` and ``spearman`` between posterior means and true counts; ``pearson_gene_means``,
            the same for each gene's mean over entries that were not masked; ``coverage_90``, how often the truth lies
            in the central 90 % of its rank among the draws (ties broken at random), 0.9 if draws and truth have the
            same distribution. A correlation of constants is NaN.
        """
        truth, total = np.array(list(self.pairs)).T.astype(np.float64)
        times = np.array(list(self.pairs.values()), dtype=np.float64)
        return {
            "entries": int(times.sum()),
            "pearson": weighted_correlation(truth, total, times),
            "spearman": weighted_correlation(weighted_ranks(truth, times), weighted_ranks(total, times), times),
            "pearson_gene_means": self._gene_means_correlation(),
            "coverage_90": self.covered / times.sum(),
        }

    def _gene_means_correlation(self) -> float:
        mean = self.given_total / np.maximum(self.given, 1)
        n = self.masked.sum()
        center, truth_center = (self.masked * mean).sum() / n, self.total.sum() / n
        covariance = (mean * self.total).sum() / n - center * truth_center
        variances = (self.masked * mean**2).sum() / n - center**2, self.squares.sum() / n - truth_center**2
        scale = np.sqrt(np.prod(np.maximum(variances, 0)))
        return float(covariance / scale) if scale > 0 else float("nan")

    def summary(self) -> str:
        """The scores in one line."""
        return (
            "{entries:,} masked counts: posterior mean against truth, Pearson {pearson:.3f} (each gene's mean "
            "{pearson_gene_means:.3f}), Spearman {spearman:.3f}; 90 % intervals cover {coverage_90:.1%}"
        ).format(**self.scores())


def weighted_correlation(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    """Pearson correlation of pairs (n,), each of which occurs ``weights`` (n,) times; NaN if one is constant."""
    x, y = x - np.average(x, weights=weights), y - np.average(y, weights=weights)
    scale = np.sqrt((weights * x**2).sum() * (weights * y**2).sum())
    return float((weights * x * y).sum() / scale) if scale > 0 else float("nan")


def weighted_ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean ranks (n,) of values, each of which occurs ``weights`` (n,) times; equal values share theirs."""
    _, group = np.unique(values, return_inverse=True)
    size = np.bincount(group, weights=weights)
    return (size.cumsum() - (size - 1) / 2)[group]
