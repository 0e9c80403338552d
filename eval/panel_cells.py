"""Cells of an h5ad file as a checkpoint sees them: counts over its genes, which of these were measured, conditions.

The file is read in blocks and the panel's counts are kept sparse; a dense matrix is made for one chunk of cells at a
time. Knows nothing of networks and of what is done with the cells. Letters: N cells, B cells of a chunk, G genes of the
panel.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch
from scipy import sparse
from tqdm.auto import tqdm

from tokenization import DCMTokenizer
from tokenization.counts_dcm import CountCheck
from tokenization.files import damage_explained, read_h5ad

logger = logging.getLogger(__name__)

BLOCK_CELLS = 4096
BLOCK_VALUES = 2**25  # of a dense matrix
NAMES_SHOWN = 5


@dataclass(frozen=True)
class PanelCells:
    """N cells over the genes of a checkpoint.

    Attributes:
        annotations: the file without its counts: ``obs``, ``obsm``, ``obsp`` and ``uns``.
        counts: (N, G) CSR as they stand in the file, not clipped; nothing is stored at genes that it lacks.
        measured: (G,) which genes the file has.
        conditions: names of the conditions that ``obs`` gave.
        condition_ids: their ids, one row for each cell; -1 is *not given*.
        tokenizer: of the checkpoint.
    """

    annotations: anndata.AnnData
    counts: sparse.csr_matrix
    measured: np.ndarray
    conditions: list[str]
    condition_ids: dict[str, torch.Tensor]
    tokenizer: DCMTokenizer

    def __len__(self) -> int:
        return self.counts.shape[0]

    def count_ids(self, counts: np.ndarray) -> np.ndarray:
        """Ids of counts of any shape; those above the largest have its id, which was said when the file was read."""
        return self.tokenizer.count_ids(np.minimum(counts, self.tokenizer.max_count))

    def input_ids(self, rows: slice) -> torch.Tensor:
        """Ids (B, G) of some cells, PAD where not measured."""
        ids = self.count_ids(self.counts[rows].toarray())
        ids[:, ~self.measured] = self.tokenizer.pad_token_id
        return torch.from_numpy(ids)

    def conditions_of(self, rows: slice) -> dict[str, torch.Tensor]:
        """Condition ids of some cells."""
        return {name: ids[rows] for name, ids in self.condition_ids.items()}

    def library_size(self, rows: slice) -> torch.Tensor:
        """Totals (B,) over the panel, not clipped; meaningful where every gene was measured."""
        return torch.from_numpy(np.asarray(self.counts[rows].sum(axis=1), dtype=np.float32).ravel())


def chunk_seed(seed: int, *key: int) -> int:
    """A seed for one piece of a run, from the run's seed and the piece's numbers."""
    return int(np.random.SeedSequence([seed, *key]).generate_state(1)[0])


def read_panel_cells(path: Path, tokenizer: DCMTokenizer, layer: str | None = None) -> PanelCells:
    """Read the cells of an h5ad file; what does not fit the checkpoint but can be left out is logged with its number.

    Args:
        path: the file.
        tokenizer: of the checkpoint: genes are matched by name, labels of conditions stand in ``obs`` under the names
            of the conditions.
        layer: where the counts are; None is ``X``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not an h5ad file, no cells, no such layer, values that are not counts, none of the panel's genes or
            one of them twice, an unknown label (near matches are listed).
    """
    with _opened(path) as cells:
        if cells.n_obs == 0:
            raise ValueError(f"{str(path)!r} has no cells; expected one or more")
        columns = _gene_columns(path.name, cells.var_names, tokenizer.genes)
        counts = _panel_counts(cells, path, layer, columns)
        names, ids = _conditions(path.name, cells.obs, tokenizer)
        annotations = anndata.AnnData(
            obs=cells.obs.copy(), obsm=dict(cells.obsm), obsp=dict(cells.obsp), uns=dict(cells.uns)
        )
    over = counts.data > tokenizer.max_count
    if over.any():
        logger.warning(
            "%s: %d counts are above the model's largest, %d (up to %d): it sees %d there",
            path.name,
            over.sum(),
            tokenizer.max_count,
            counts.data.max(),
            tokenizer.max_count,
        )
    return PanelCells(annotations, counts, columns >= 0, names, ids, tokenizer)


@contextmanager
def _opened(path: Path) -> Iterator[anndata.AnnData]:
    """The file with its ``X`` left on disk, closed at the end."""
    cells = read_h5ad(path, backed=True)
    try:
        yield cells
    finally:
        cells.file.close()


def _gene_columns(name: str, found: pd.Index, genes: Sequence[str]) -> np.ndarray:
    """Column (G,) of each gene of the panel among the genes of the file, -1 where it is missing."""
    found = found.astype(str)
    known = found.isin(genes)
    repeated = found[known & found.duplicated()].unique()
    if len(repeated):
        raise ValueError(f"{name!r} has {len(repeated):,} genes twice ({_listed(repeated)}); sum or drop duplicates")
    if not known.any():
        raise ValueError(
            f"none of the {len(found):,} genes of {name!r} ({_listed(found)}) is known to the model, whose genes are "
            f"{_listed(genes)}; expected the same kind of names in var_names"
        )
    column = {gene: index for index, gene in enumerate(found)}
    columns = np.array([column.get(gene, -1) for gene in genes])
    missing = [gene for gene in genes if gene not in column]
    if missing:
        logger.warning("%s lacks %d of the model's %d genes (%s)", name, len(missing), len(genes), _listed(missing))
    if not known.all():
        logger.warning("%s: %d genes are unknown to the model and left out", name, (~known).sum())
    return columns


def _panel_counts(cells: anndata.AnnData, path: Path, layer: str | None, columns: np.ndarray) -> sparse.csr_matrix:
    """Counts (N, G) of the panel; every value of the file's matrix is checked."""
    layers = list(cells.layers)
    if layer is not None and layer not in layers:
        raise ValueError(f"{str(path)!r} has no layer {layer!r}; layers there: {', '.join(layers) or 'none'}")
    matrix = cells.X if layer is None else cells.layers[layer]
    if matrix is None:
        raise ValueError(f"{str(path)!r} has no X; pass --layer with one of: {', '.join(layers)}")
    if getattr(matrix, "format", None) == "csc":  # cannot be read by rows
        matrix = (matrix.to_memory() if hasattr(matrix, "to_memory") else matrix).tocsr()
    check, blocks = CountCheck(), []
    is_sparse = hasattr(matrix, "format")
    step = BLOCK_CELLS if is_sparse else max(1, min(BLOCK_CELLS, BLOCK_VALUES // max(1, len(cells.var_names))))
    spread = _spread(columns, matrix.shape[1])
    for start in tqdm(range(0, len(cells), step), desc="reading", unit="block", delay=1, disable=None):
        with damage_explained(path):
            block = matrix[start : start + step]
        check.add(block.data if is_sparse else block)
        if check.is_clean:
            blocks.append(sparse.csr_matrix(sparse.csr_matrix(block).astype(np.int64) @ spread))
    source = f"X of {path.name!r}" if layer is None else f"layer {layer!r} of {path.name!r}"
    check.raise_if_bad(source, layers=layers, layer_option="--layer {}")
    counts = sparse.vstack(blocks, format="csr")
    counts.eliminate_zeros()
    return counts.astype(np.int32 if check.maximum <= np.iinfo(np.int32).max else np.int64)


def _spread(columns: np.ndarray, num_genes: int) -> sparse.csr_matrix:
    """Zeros and ones (genes of the file, G) that put the panel's genes in order and leave a missing one empty."""
    there = np.flatnonzero(columns >= 0)
    ones = np.ones(len(there), dtype=np.int64)
    return sparse.csr_matrix((ones, (columns[there], there)), shape=(num_genes, len(columns)))


def _conditions(name: str, obs: pd.DataFrame, tokenizer: DCMTokenizer) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Names and ids of the conditions that stand in ``obs``; those that do not are *not given*, which is logged."""
    wanted = [*(["cell_type"] if tokenizer.cell_types else []), *(["perturbation"] if tokenizer.perturbations else [])]
    wanted += list(tokenizer.covariates)
    for condition in wanted:
        if condition not in obs:
            logger.warning("%s has no obs column %r: the model is not told the %s", name, condition, condition)
        elif obs[condition].isna().any():
            unlabelled = int(obs[condition].isna().sum())
            logger.warning("%s: %d cells have no label in obs[%r]: not given", name, unlabelled, condition)
    given = {condition: obs[condition] for condition in wanted if condition in obs}
    names = list(given)
    covariates = {condition: given.pop(condition) for condition in tokenizer.covariates if condition in given}
    try:
        ids = tokenizer.conditions(num_cells=len(obs), **given, covariates=covariates or None)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from error
    ids.pop("num_cells")
    return names, ids


def _listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f", and {len(names) - NAMES_SHOWN:,} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(map(str, names[:NAMES_SHOWN])) + more
