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

from eval.drawing.file_counts import listed, opened_counts, panel_columns
from tokenization import DCMTokenizer
from training.data.h5ad import read_h5ad

logger = logging.getLogger(__name__)


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
        with opened_counts(path, layer) as file:
            columns = panel_columns(path.name, file.genes, tokenizer.genes)
            _report_genes(path.name, columns, cells.n_vars, tokenizer.genes)
            counts = file.over(columns, "reading cells")
        counts = counts.astype(np.int32 if counts.max() <= np.iinfo(np.int32).max else np.int64)
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


def _report_genes(name: str, columns: np.ndarray, num_found: int, genes: Sequence[str]) -> None:
    """Say which genes the file lacks, and how many of its own the model does not know."""
    missing = [gene for gene, column in zip(genes, columns) if column < 0]
    if missing:
        logger.warning("%s lacks %d of the model's %d genes (%s)", name, len(missing), len(genes), listed(missing))
    unknown = num_found - len(genes) + len(missing)
    if unknown:
        logger.warning("%s: %d genes are unknown to the model and left out", name, unknown)


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
