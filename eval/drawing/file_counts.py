"""Counts of an h5ad file over the genes of a panel: read in blocks, with every value of the file checked.

What completing, scoring and sampling like a file have in common. Knows nothing of labels, networks and what the counts
are for. Letters: N cells, M genes of the file, G genes of the panel.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem, sparse_dataset
from scipy import sparse
from tqdm.auto import tqdm

from tokenization.counts_dcm import CountCheck
from tokenization.gene_names_dcm import find_genes
from training.data.h5ad import damage_named, open_h5ad

BLOCK_LINES = 4096  # cells, or genes of a matrix stored by gene
BLOCK_VALUES = 2**24  # of a dense block; a sparse one holds fewer
NAMES_SHOWN = 5


@dataclass(frozen=True)
class FileCounts:
    """The counts of an open file.

    Attributes:
        path: the file.
        source: what the counts are called in messages.
        genes: names of the M genes.
        matrix: (N, M) on disk.
        layers: where else counts could be.
        layer_option: how the user names one of them; ``{}`` stands for it.
    """

    path: Path
    source: str
    genes: pd.Index
    matrix: object
    layers: list[str]
    layer_option: str

    def over(self, columns: np.ndarray, task: str) -> sparse.csr_matrix:
        """Counts (N, G) int64 of the genes that stand in ``columns`` (G,); nothing is stored where that is -1.

        Args:
            columns: positions in the file, from :func:`panel_columns`.
            task: what the progress bar says.

        Raises:
            ValueError: some value of the file, also of other genes, is not a count; or the file is damaged.
        """
        taken = np.unique(columns[columns >= 0])
        parts = list(self._blocks(taken, task))
        in_file = (sparse.hstack if self._by_gene else sparse.vstack)(parts, format="csr")
        there = np.flatnonzero(columns >= 0)
        ones = np.ones(len(there), dtype=np.int64)
        order = sparse.csr_matrix(
            (ones, (np.searchsorted(taken, columns[there]), there)), shape=(len(taken), len(columns))
        )
        counts = sparse.csr_matrix(in_file @ order)
        counts.eliminate_zeros()
        return counts

    @property
    def _by_gene(self) -> bool:
        return getattr(self.matrix, "format", None) == "csc"

    def _blocks(self, taken: np.ndarray, task: str) -> Iterator[sparse.csr_matrix]:
        """Blocks of the columns ``taken``, ascending, along the axis by which the file is stored."""
        length, width = self.matrix.shape[:: -1 if self._by_gene else 1]
        step = max(1, min(BLOCK_LINES, BLOCK_VALUES // max(1, width)))
        check = CountCheck()
        unit = " genes" if self._by_gene else " cells"
        with tqdm(total=length, desc=task, unit=unit, unit_scale=True, delay=1, disable=None) as bar:
            for start in range(0, length, step):
                lines = slice(start, min(start + step, length))
                with damage_named(self.path):
                    block = self.matrix[:, lines] if self._by_gene else self.matrix[lines]
                check.add(block.data if sparse.issparse(block) else block)
                if check.is_clean:
                    here = taken
                    if self._by_gene:
                        here = taken[np.searchsorted(taken, start) : np.searchsorted(taken, lines.stop)] - start
                    yield sparse.csr_matrix(block[:, here]).astype(np.int64)
                bar.update(lines.stop - start)
        check.raise_if_bad(self.source, layers=self.layers, layer_option=self.layer_option)


@contextmanager
def opened_counts(path: Path, layer: str | None = None, *, layer_option: str = "--layer {}") -> Iterator[FileCounts]:
    """Open the counts of an h5ad file.

    Args:
        path: the file.
        layer: where the counts are; None is ``X``.
        layer_option: how the user names a layer; ``{}`` stands for its name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not an h5ad file, or no such matrix.
    """
    with open_h5ad(path) as file:
        layers = sorted(file.get("layers", ()))
        if layer is not None and layer not in layers:
            raise ValueError(f"{str(path)!r} has no layer {layer!r}; layers there: {', '.join(layers) or 'none'}")
        if layer is None and "X" not in file:
            raise ValueError(
                f"{str(path)!r} has no X; pass {layer_option.format(layers[0])} (layers there: {', '.join(layers)})"
            )
        with damage_named(path):
            genes = read_elem(file["var"]).index.astype(str)
            element = file["X"] if layer is None else file["layers"][layer]
            matrix = element if isinstance(element, h5py.Dataset) else sparse_dataset(element)
        source = f"{'X' if layer is None else f'layer {layer!r}'} of {path.name!r}"
        others = [name for name in layers if name != layer]
        yield FileCounts(path, source, genes, matrix, others, layer_option)


def panel_columns(name: str, found: pd.Index, genes: Sequence[str]) -> np.ndarray:
    """Column (G,) of each gene of the panel among the genes of the file called ``name``, -1 where it is missing.

    Genes are matched by name, Ensembl ids whatever their version.

    Raises:
        ValueError: a gene of the panel stands there more than once, or none does.
    """
    repeated = found[found.isin(genes) & found.duplicated()].unique()
    if len(repeated):
        raise ValueError(f"{name!r} has {len(repeated):,} genes twice ({listed(repeated)}); sum or drop duplicates")
    columns, doubtful = find_genes(genes, list(found))
    if doubtful:
        raise ValueError(
            f"{name!r}: {len(doubtful):,} Ensembl ids stand in several versions "
            f"({listed(next(iter(doubtful.values())))}); sum them or keep one of each"
        )
    if (columns < 0).all():
        raise ValueError(
            f"none of the {len(found):,} genes of {name!r} ({listed(found)}) is known to the model, whose genes are "
            f"{listed(genes)}; expected the same kind of names in var_names"
        )
    return columns


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f", and {len(names) - NAMES_SHOWN:,} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(map(str, names[:NAMES_SHOWN])) + more
