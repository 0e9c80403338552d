"""Cells as evaluation sees them: a matrix of integer counts and one label per cell and condition column.

Reads them from AnnData with genes matched by name, and refuses what is not counts. Knows nothing of metrics, protocols
or generators.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from tokenization.counts_dcm import CountCheck

logger = logging.getLogger(__name__)

PERTURBATION = "perturbation"
DEFAULT_CONDITIONS = ("cell_type", PERTURBATION)
SEPARATOR = " | "
NAMES_SHOWN = 5


@dataclass(frozen=True, eq=False)
class LabelledCounts:
    """Counts (n, G) of the same genes in the same order for everything that is compared, and the cells' labels.

    Attributes:
        counts: (n, G) CSR, integer.
        labels: n rows, one string column per condition (cell type, perturbation, covariates); no column is
            unconditional.
        control: the label of unperturbed cells in the column ``perturbation``; None if there are none.
    """

    counts: sparse.csr_matrix
    labels: pd.DataFrame
    control: str | None = None

    def __post_init__(self) -> None:
        if self.counts.shape[0] != len(self.labels):
            raise ValueError(
                f"{self.counts.shape[0]} cells but labels for {len(self.labels)}: expected one row per cell"
            )

    def __len__(self) -> int:
        return self.counts.shape[0]

    @cached_property
    def rows_by_condition(self) -> dict[str, np.ndarray]:
        """Condition's name (its labels joined by " | "; "all" if there are no columns) -> the rows of its cells."""
        names = pd.Series("all", index=range(len(self)))
        for position, column in enumerate(self.labels):
            values = self.labels[column].reset_index(drop=True)
            names = values if position == 0 else names + SEPARATOR + values
        groups = names.groupby(names, sort=True).indices
        return {str(name): np.asarray(rows) for name, rows in groups.items()}

    def take(self, rows: np.ndarray) -> "LabelledCounts":
        """The cells of some rows, in that order."""
        return LabelledCounts(self.counts[rows], self.labels.iloc[rows].reset_index(drop=True), self.control)

    def control_rows(self, condition: str | None) -> np.ndarray | None:
        """Rows of the control cells that share every other label with a condition.

        None for the control's own condition, for a name that is no condition (such as that of all cells together), and
        where there are no such cells.
        """
        rows = self.rows_by_condition.get(condition)
        if rows is None or self.control is None or PERTURBATION not in self.labels:
            return None
        wanted = self.labels.iloc[rows[0]]
        if wanted[PERTURBATION] == self.control:
            return None
        matches = (self.labels[PERTURBATION] == self.control).to_numpy()
        for column in self.labels.columns.drop(PERTURBATION):
            matches = matches & (self.labels[column] == wanted[column]).to_numpy()
        return np.flatnonzero(matches) if matches.any() else None


def from_anndata(
    adata: anndata.AnnData,
    *,
    name: str,
    conditions: Sequence[str],
    genes: Sequence[str] | None = None,
    layer: str | None = None,
    control: str | None = None,
) -> LabelledCounts:
    """Take the counts and the condition columns of ``obs``; genes are matched by name and put in order.

    Args:
        adata: cells with raw counts (any numeric type).
        name: what to call the file in messages.
        conditions: columns of ``obs``.
        genes: the wanted genes in order; None keeps the file's own. Other genes are dropped, which is logged.
        layer: where the counts are; None is ``X``.
        control: the label of unperturbed cells.

    Raises:
        ValueError: values that are not counts, duplicate or missing genes, a missing column or label, no cells.
    """
    if adata.n_obs == 0:
        raise ValueError(f"{name!r} has no cells; expected one or more")
    check_unique_genes(adata.var_names, name)
    absent = [column for column in conditions if column not in adata.obs]
    if absent:
        raise ValueError(
            f"{name!r} has no column {', '.join(map(repr, absent))} in obs; it has {_listed(adata.obs.columns, 20)}; "
            "choose columns that every file has with --condition-keys A,B (or --condition-keys none)"
        )
    labels = adata.obs[list(conditions)].reset_index(drop=True)
    for column in conditions:
        unlabelled = int(labels[column].isna().sum())
        if unlabelled:
            raise ValueError(f"{name!r}: {unlabelled:,} cells have no label in obs[{column!r}]; label or remove them")
    counts = _integer_counts(adata, name, layer)
    if genes is not None:
        counts = counts[:, _gene_positions(adata.var_names, genes, name)]
    return LabelledCounts(counts.tocsr(), labels.astype(str), control)


def check_unique_genes(names: pd.Index, file: str) -> None:
    """Refuse genes that cannot be matched by name.

    Raises:
        ValueError: a name that stands more than once.
    """
    if not names.is_unique:
        repeated = names[names.duplicated()].unique()
        raise ValueError(f"{file!r} has {len(repeated):,} duplicate gene names ({_listed(repeated)}); make them unique")


def condition_columns(requested: str | None, real: anndata.AnnData, generated: Sequence[anndata.AnnData]) -> list[str]:
    """Columns that make up a condition: ``requested`` (A,B or none), else what the real file says, else the usual ones.

    A file written by ``dcm-convert`` or ``dcm-sample`` lists them in ``uns["dcm_conditions"]``; for any other,
    ``cell_type`` and ``perturbation`` are taken where every file has them.
    """
    if requested is not None:
        names = [name.strip() for name in requested.split(",") if name.strip()]
        return [] if names in ([], ["none"]) else names
    if "dcm_conditions" in real.uns:
        return [str(name) for name in np.asarray(real.uns["dcm_conditions"]).ravel()]
    return [name for name in DEFAULT_CONDITIONS if all(name in file.obs for file in (real, *generated))]


def _integer_counts(adata: anndata.AnnData, name: str, layer: str | None) -> sparse.csr_matrix:
    """``X`` or a layer as CSR, every value a finite, non-negative integer."""
    if layer is not None and layer not in adata.layers:
        raise ValueError(f"{name!r} has no layer {layer!r}; it has {_listed(adata.layers)}")
    counts = sparse.csr_matrix(adata.X if layer is None else adata.layers[layer])
    check = CountCheck()
    check.add(counts.data)
    source = f"X of {name!r}" if layer is None else f"layer {layer!r} of {name!r}"
    check.raise_if_bad(source, layers=list(adata.layers), layer_option="--layer {}")
    return counts.astype(np.int32 if check.maximum <= np.iinfo(np.int32).max else np.int64)


def _gene_positions(found: pd.Index, genes: Sequence[str], name: str) -> np.ndarray:
    """Columns of ``genes`` among the genes of a file."""
    positions = found.get_indexer(pd.Index(genes))
    missing = [gene for gene, position in zip(genes, positions) if position < 0]
    if missing:
        raise ValueError(
            f"{name!r} lacks {len(missing):,} of the {len(genes):,} genes of the real cells ({_listed(missing)}); "
            f"expected all of them, by the same names (its own: {_listed(found, 3)})"
        )
    if len(found) > len(genes):
        logger.info("%s: %d genes that are not compared are left out", name, len(found) - len(genes))
    return positions


def _listed(names: Sequence[str], shown: int = NAMES_SHOWN) -> str:
    """The first few names, and how many more there are."""
    names = [str(name) for name in names]
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return (", ".join(names[:shown]) or "none") + more
