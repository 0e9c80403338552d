"""Choose the most variable genes by seurat_v3, from blocks of cells; conversion and evaluation do so alike.

Every sum is a sum of integers, exact in float64 below 2^53, so neither blocks nor their order change a bit of the
result. Reference: Stuart et al., Comprehensive Integration of Single-Cell Data, Cell 177 (2019), 1888-1902; scanpy's
``flavor="seurat_v3"``.

Shapes: m cells of a block, n cells in all, G genes.
"""

from collections.abc import Iterable

import numpy as np
from scipy.sparse import csr_matrix
from skmisc.loess import loess

LOESS_SPAN = 0.3
FEWEST_GENES = 20  # for the fit of variance on mean; with one to three genes scikit-misc's loess kills the process


class GeneTotals:
    """Per gene, over the cells added so far that measured it: their number, sums of counts and of squared counts, and
    the largest count."""

    def __init__(self, num_genes: int):
        self.num_cells = 0
        self.measured = np.zeros(num_genes)  # (G,) cells in which each gene was measured
        self.sums = np.zeros(num_genes)  # (G,) float64, exact below 2^53
        self.squares = np.zeros(num_genes)
        self.largest = np.zeros(num_genes, dtype=np.int64)

    def add(self, counts: csr_matrix, measured: np.ndarray | None = None) -> None:
        """Add a block of cells (m, G) with no stored zeros; ``measured`` (G,) bool says which genes, default all."""
        if not counts.shape[0]:
            return
        values = counts.data.astype(np.float64)
        self.num_cells += counts.shape[0]
        self.measured += counts.shape[0] * (1 if measured is None else measured)
        self.sums += np.bincount(counts.indices, weights=values, minlength=len(self.sums))
        self.squares += np.bincount(counts.indices, weights=values**2, minlength=len(self.sums))
        self.largest = np.maximum(self.largest, counts.max(axis=0).toarray().ravel())

    @property
    def n(self) -> np.ndarray:
        """(G,) cells that measured each gene, at least 2: a gene measured in fewer has variance 0."""
        return np.maximum(self.measured, 2)

    @property
    def variance(self) -> np.ndarray:
        """(G,) variance of the counts; 0 for genes that fewer than two cells measured."""
        variance = (self.squares - self.sums * (self.sums / self.n)) / (self.n - 1)
        return np.where(self.measured >= 2, variance, 0.0)


def seurat_v3_variances(totals: GeneTotals, blocks: Iterable[csr_matrix]) -> np.ndarray:
    """Variance of each gene's standardised and clipped counts, (G,) float64.

    log10 variance is fitted on log10 mean by loess; counts are standardised with the fitted deviation and clipped at
    sqrt(n), where n is each gene's own number of cells that measured it. ``totals`` and ``blocks`` (m, G) are of the
    same cells.
    """
    n = totals.n
    mean, deviation = totals.sums / n, _expected_deviation(totals)
    ceiling = deviation * np.sqrt(n) + mean  # larger counts are clipped to it
    sums, squares, clipped = np.zeros((3, len(mean)))  # of the counts below, (G,); how many are above
    for counts in blocks:
        above = counts.data > ceiling[counts.indices]
        below = np.where(above, 0, counts.data).astype(np.float64)
        for total, weights in ((sums, below), (squares, below**2), (clipped, above)):
            total += np.bincount(counts.indices, weights=weights, minlength=len(mean))
    sums += clipped * ceiling
    squares += clipped * ceiling**2
    variances = (n * mean**2 + squares - 2 * sums * mean) / ((n - 1) * deviation**2)
    return np.where(totals.measured >= 2, variances, 0.0)


def _expected_deviation(totals: GeneTotals) -> np.ndarray:
    """Standard deviation (G,) of genes of the same mean: log10 variance fitted on log10 mean by loess of degree 2."""
    if totals.num_cells < 2:
        raise ValueError(f"seurat_v3 needs at least 2 cells, got {totals.num_cells}")
    mean, variance = totals.sums / totals.n, totals.variance
    varies = variance > 0
    problem = (
        f"seurat_v3 cannot fit variance on mean for {int(varies.sum()):,} variable genes of {totals.num_cells:,} cells"
    )
    if varies.sum() < FEWEST_GENES:
        raise ValueError(f"{problem}; expected at least {FEWEST_GENES}: keep every gene")
    fitted = np.zeros(len(mean))
    try:
        model = loess(np.log10(mean[varies]), np.log10(variance[varies]), span=LOESS_SPAN, degree=2)
        model.fit()
    except ValueError as error:
        raise ValueError(f"{problem} ({error}); give more cells or genes, or keep every gene") from error
    fitted[varies] = model.outputs.fitted_values
    return np.sqrt(10**fitted)


def top_genes(variances: np.ndarray, num_genes: int) -> np.ndarray:
    """Positions of the ``num_genes`` largest variances, in ascending order of position; ties go to earlier genes."""
    return np.sort(np.argsort(-variances, kind="stable")[:num_genes])
