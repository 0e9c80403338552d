"""Choose the genes: the most variable ones (seurat_v3) from blocks of training cells, or those of a list.

Knows nothing of count files and splits: the caller gives only the cells that may be seen.

Shapes: m cells of a block, n cells in all, G genes.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix
from skmisc.loess import loess

FEWEST_GENES = 20  # for the fit of variance on mean; with one to three genes scikit-misc's loess kills the process


def read_gene_list(path: Path) -> list[str]:
    """Genes of a text file, one per line, in order; empty lines are passed over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no text, names no gene, or one twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r} (--genes); expected a text file with one gene per line")
    try:
        genes = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not a text file ({error}); expected one gene per line") from error
    if not genes:
        raise ValueError(f"{str(path)!r} names no gene; expected one per line")
    repeated = sorted({gene for gene in genes if genes.count(gene) > 1}) if len(set(genes)) < len(genes) else []
    if repeated:
        raise ValueError(
            f"{str(path)!r} names {len(repeated):,} genes twice ({', '.join(repeated[:5])}); once is enough"
        )
    return genes


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


def seurat_v3_variances(totals: GeneTotals, blocks: Iterable[csr_matrix], *, span: float = 0.3) -> np.ndarray:
    """Variance of each gene's standardised and clipped counts, (G,) float64.

    log10 variance is fitted on log10 mean by loess; counts are standardised with the fitted deviation and clipped at
    sqrt(n) (Stuart et al. 2019, Comprehensive Integration of Single-Cell Data; scanpy's ``flavor="seurat_v3"``). n is
    each gene's own number of cells that measured it.

    Args:
        totals: of the same cells as ``blocks``.
        blocks: the cells once more, (m, G) each.
        span: share of the genes in each local fit.

    Raises:
        ValueError: fewer than two cells, or too few variable genes for the fit.
    """
    if totals.num_cells < 2:
        raise ValueError(f"seurat_v3 needs at least 2 training cells, got {totals.num_cells}")
    n = np.maximum(totals.measured, 2)  # a gene measured in fewer cells has variance 0
    mean = totals.sums / n
    variance = (totals.squares - totals.sums * mean) / (n - 1)
    varies = (variance > 0) & (totals.measured >= 2)
    problem = (
        f"seurat_v3 cannot fit variance on mean for {int(varies.sum()):,} variable genes of "
        f"{totals.num_cells:,} training cells"
    )
    if varies.sum() < FEWEST_GENES:
        raise ValueError(f"{problem}; expected at least {FEWEST_GENES}: keep every gene")
    fitted = np.zeros(len(mean))
    try:
        model = loess(np.log10(mean[varies]), np.log10(variance[varies]), span=span, degree=2)
        model.fit()
    except ValueError as error:
        raise ValueError(f"{problem} ({error}); give more cells or genes, or keep every gene") from error
    fitted[varies] = model.outputs.fitted_values
    deviation = np.sqrt(10**fitted)
    largest = deviation * np.sqrt(n) + mean
    sums, squares = np.zeros(len(mean)), np.zeros(len(mean))
    for block in blocks:
        clipped = np.minimum(block.data, largest[block.indices])
        sums += np.bincount(block.indices, weights=clipped, minlength=len(mean))
        squares += np.bincount(block.indices, weights=clipped**2, minlength=len(mean))
    variances = (n * mean**2 + squares - 2 * sums * mean) / ((n - 1) * deviation**2)
    return np.where(totals.measured >= 2, variances, 0.0)


def top_genes(variances: np.ndarray, num_genes: int) -> np.ndarray:
    """Positions of the ``num_genes`` largest variances, in ascending order of position; ties go to earlier genes."""
    return np.sort(np.argsort(-variances, kind="stable")[:num_genes])
