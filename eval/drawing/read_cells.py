"""Cells of a file as a checkpoint sees them: counts over its genes, which of these were measured, conditions.

The file is read in blocks and the panel's counts are kept sparse; a dense matrix is made for one chunk of cells at a
time. Letters: N cells, B cells of a chunk, F genes of the file, G genes of the panel.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

from tokenization.conditions_dcm import CELL_TYPE, PERTURBATION, ConditionLabels, as_tensor
from tokenization.count_errors_dcm import library_size
from tokenization.gene_names_dcm import find_genes
from tokenization.labels_dcm import shortened
from training.data.formats import opened_counts
from training.data.h5ad import CountFile, damage_named, open_h5ad, read_table

if TYPE_CHECKING:
    import torch

    from modeling_dcm import DCMForDenoising
    from tokenization import DCMTokenizer

logger = logging.getLogger(__name__)

CELLS_AT_ONCE = 1024


@dataclass(frozen=True)
class MeasuredCells:
    """N cells over the genes of a checkpoint."""

    obs: pd.DataFrame
    counts: sparse.csr_matrix  # (N, G) as they stand in the file, not clipped; nothing is stored at genes that it lacks
    panel: np.ndarray  # (N,) of each cell
    panels: np.ndarray  # (P, G) which genes were measured in the cells of each panel
    conditions: list[str]  # names of those that ``obs`` gave
    condition_ids: dict[str, torch.Tensor]  # one row for each cell; -1 is *not given*
    tokenizer: DCMTokenizer  # of the checkpoint

    def __len__(self) -> int:
        return self.counts.shape[0]

    def measured(self, rows: slice) -> np.ndarray:
        """Which genes (B, G) were measured in some cells."""
        return self.panels[self.panel[rows]]

    @property
    def always_measured(self) -> np.ndarray:
        """Which genes (G,) were measured in every cell."""
        return self.panels.all(axis=0)

    def count_ids(self, counts: np.ndarray) -> np.ndarray:
        """Ids of counts of any shape; those above the largest have its id, which was said when the file was read."""
        return self.tokenizer.count_ids(np.minimum(counts, self.tokenizer.max_count))

    def input_ids(self, rows: slice) -> torch.Tensor:
        """Ids (B, G) of some cells, PAD where not measured."""
        ids = self.count_ids(self.counts[rows].toarray())
        ids[~self.measured(rows)] = self.tokenizer.pad_token_id
        return as_tensor(ids)

    def conditions_of(self, rows: slice) -> dict[str, torch.Tensor]:
        """Condition ids of some cells."""
        return {name: ids[rows] for name, ids in self.condition_ids.items()}

    def library_size(self, rows: slice = slice(None)) -> torch.Tensor:
        """Totals (B,) over the panel, not clipped; meaningful where every gene was measured."""
        return as_tensor(library_size(self.counts[rows]).astype(np.float32))


def read_measured_cells(
    path: Path, tokenizer: DCMTokenizer, layer: str | None = None, *, with_conditions: bool = True
) -> MeasuredCells:
    """Read a file's cells, genes and labels by name; what can be left out to fit the checkpoint is logged.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no file of counts, no cells, no such layer, values that are not counts, none of the panel's genes or
            one of them twice, an unknown label (near matches are listed).
    """
    with opened_counts(path, layer) as file:
        columns = panel_columns(file, tokenizer.genes)
        lacking = [gene for gene, column in zip(tokenizer.genes, columns) if column < 0]
        if lacking:
            what = "%s lacks %d of the model's %d genes (%s)"
            logger.warning(what, path.name, len(lacking), len(columns), shortened(lacking))
        unknown = len(file.var) - len(columns) + len(lacking)
        if unknown:
            logger.warning("%s: %d genes are unknown to the model and left out", path.name, unknown)
        panel, panels = file.measured(columns)
        if len(panels) > 1:
            what = "%s: %d of the model's %d genes were measured in every cell; the others are none where they were not"
            logger.warning(what, path.name, panels.all(axis=0).sum(), len(columns))
        names, ids = _observed_conditions(path.name, file.obs, tokenizer) if with_conditions else ([], {})
        counts = sparse.vstack([*file.panel_blocks(columns, f"reading {path.name}")], format="csr")
    over = counts.data > tokenizer.max_count
    if over.any():
        what = "%s: %d counts are above the model's largest, %d (up to %d): it sees %d there"
        most = tokenizer.max_count
        logger.warning(what, path.name, over.sum(), most, counts.data.max(), most)
    return MeasuredCells(file.obs, counts.astype(np.int32), panel, panels, names, ids, tokenizer)


def states_of(
    path: Path, model: DCMForDenoising, tokenizer: DCMTokenizer, layer: str | None = None
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """States (N, E), None of a model that has none, and library sizes (N,) of the cells of a file.

    Raises:
        ValueError: no such layer, values that are not counts, genes of the panel that were not measured.
    """
    import torch

    from modeling_dcm.generation_dcm import row_chunks

    cells = read_measured_cells(path, tokenizer, layer, with_conditions=False)
    lacking = np.asarray(tokenizer.genes)[~cells.always_measured]
    if len(lacking):
        lacks = f"lacks {len(lacking):,} of the panel's {len(tokenizer.genes):,} genes ({shortened(lacking)})"
        raise ValueError(f"{str(path)!r} {lacks}, at least in some cells: a state needs all; leave out --keep-state")
    sizes = cells.library_size()
    if not model.config.state_dim:
        return None, sizes
    chunks = [rows for _, rows in row_chunks(len(cells), CELLS_AT_ONCE)]
    device = model.device
    states = [model.state(cells.input_ids(rows).to(device), sizes[rows].to(device)).cpu() for rows in chunks]
    return torch.cat(states), sizes


def conditions_like(
    path: Path,
    labels: ConditionLabels,
    *,
    cell_type: str | None = None,
    perturbation: str | None = None,
    covariates: dict[str, str] | None = None,
) -> dict[str, torch.Tensor | int]:
    """Conditions of one cell to be drawn for each cell of an h5ad file, as :meth:`DCMTokenizer.conditions`; counts are
    not looked at. A label that is given is that of all cells, whatever ``obs`` says.

    Raises:
        ValueError: a missing column, cells without label, or unknown labels.
    """
    obs = read_obs(path)
    given = {CELL_TYPE: cell_type, PERTURBATION: perturbation, **(covariates or {})}
    given = {name: label for name, label in given.items() if label is not None}
    needed = [name for name in labels.known_conditions() if name not in given]
    columns = labelled(obs, needed, file=str(path), way_out="or give all cells one label by its option")
    return {"num_cells": len(obs), **labels.condition_ids(columns.assign(**given))}


def read_obs(path: Path) -> pd.DataFrame:
    """Names and labels of the cells of an h5ad file."""
    with open_h5ad(path) as file, damage_named(path):
        return read_table(file, "obs")


def labelled(obs: pd.DataFrame, columns: Sequence[str], *, file: str, way_out: str) -> pd.DataFrame:
    """Columns of ``obs`` that must be there and have a label for every cell; ``way_out`` ends the message if not."""
    absent = [column for column in columns if column not in obs]
    if absent:
        known = shortened(obs.columns, 20) or "none"
        raise ValueError(f"{file!r} has no obs column {', '.join(map(repr, absent))}; it has {known}; {way_out}")
    for column in columns:
        unlabelled = int(obs[column].isna().sum())
        if unlabelled:
            raise ValueError(f"{file!r}: {unlabelled:,} cells have no label in obs[{column!r}]; label or remove them")
    return obs[list(columns)]


def chunk_seed(seed: int, *key: int) -> int:
    """A seed for one piece of a run, from the run's seed and the piece's numbers."""
    return int(np.random.SeedSequence([seed, *key]).generate_state(1)[0])


def panel_columns(file: CountFile, genes: Sequence[str]) -> np.ndarray:
    """Column (G,) of each gene of the panel among the genes of a file, -1 where it is missing.

    Genes are matched by name, Ensembl ids whatever their version.

    Raises:
        ValueError: a gene of the panel stands there more than once, or none does.
    """
    name, found = file.path.name, file.var.index
    repeated = found[found.isin(genes) & found.duplicated()].unique()
    if len(repeated):
        raise ValueError(f"{name!r} has {len(repeated):,} genes twice ({shortened(repeated)}); sum or drop duplicates")
    columns, doubtful = find_genes(genes, list(found))
    if doubtful:
        raise ValueError(
            f"{name!r}: {len(doubtful):,} Ensembl ids stand in several versions "
            f"({shortened(next(iter(doubtful.values())))}); sum them or keep one of each"
        )
    if (columns < 0).all():
        raise ValueError(
            f"none of the {len(found):,} genes of {name!r} ({shortened(found)}) is known to the model, whose genes are "
            f"{shortened(genes)}; expected the same kind of names in var_names"
        )
    return columns


def _observed_conditions(
    name: str, obs: pd.DataFrame, tokenizer: DCMTokenizer
) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Names and ids of the conditions that stand in ``obs``; those that do not are *not given*, which is logged."""
    known = tokenizer.known_conditions()
    for condition in known:
        if condition not in obs:
            logger.warning("%s has no obs column %r: the model is not told the %s", name, condition, condition)
        elif obs[condition].isna().any():
            unlabelled = int(obs[condition].isna().sum())
            logger.warning("%s: %d cells have no label in obs[%r]: not given", name, unlabelled, condition)
    given = {condition: obs[condition] for condition in known if condition in obs}
    try:
        return list(given), tokenizer.condition_ids(given)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from error
