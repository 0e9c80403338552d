"""The cells of a comparison, read from files: real test cells, real training cells, and those of every generator.

Genes are matched by name, and what is not counts is refused.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

from eval.drawing.read_cells import labelled
from tokenization.labels_dcm import shortened
from training.data.formats import read_counts
from training.data.shards import read_panels

if TYPE_CHECKING:
    import anndata

logger = logging.getLogger(__name__)

PERTURBATION = "perturbation"
DEFAULT_CONDITIONS = ("cell_type", PERTURBATION)
SEPARATOR = " | "


@dataclass(frozen=True, eq=False)
class CellCounts:
    """Counts (n, G) of the same genes in the same order for everything that is compared, and the cells' conditions."""

    counts: sparse.csr_matrix  # (n, G), integer
    labels: pd.DataFrame  # n rows, one string column per condition (cell type, perturbation, covariates), or none
    control: str | None = None  # label of unperturbed cells in the column ``perturbation``
    separator: str = "+"  # joins the names of a combination, as in KLF1+TGFBR2; empty: names are never combined

    def __post_init__(self) -> None:
        if len(self) != len(self.labels):
            raise ValueError(f"{len(self)} cells but labels for {len(self.labels)}: expected one row per cell")

    def __len__(self) -> int:
        return self.counts.shape[0]

    @cached_property
    def rows_by_condition(self) -> dict[str, np.ndarray]:
        """Condition's name (its labels joined by " | "; "all" if there are no columns) -> the rows of its cells."""
        names = joined_labels(self.labels)
        return {str(name): np.asarray(rows) for name, rows in names.groupby(names, sort=True).indices.items()}

    def take(self, rows: np.ndarray) -> "CellCounts":
        """The cells of some rows, in that order."""
        return replace(self, counts=self.counts[rows], labels=self.labels.iloc[rows].reset_index(drop=True))

    def thinned(self, most: int, rng: np.random.Generator) -> "CellCounts":
        """At most so many random cells, in their order."""
        return self.take(np.sort(rng.choice(len(self), min(len(self), most), replace=False)))

    def control_rows(self, condition: str | None) -> np.ndarray | None:
        """Rows of the control cells that share every other label with a condition.

        None for the control's own condition, for a name that is no condition (such as that of all cells together), and
        where there are no such cells.
        """
        rows = self.rows_by_condition.get(condition)
        if rows is None or self.control is None or PERTURBATION not in self.labels:
            return None
        wanted = self.labels.iloc[rows[0]].to_dict() | {PERTURBATION: self.control}
        beside = self.rows_by_condition.get(SEPARATOR.join(wanted.values()))
        return None if beside is rows else beside


@dataclass(frozen=True)
class Comparison:
    """What is compared: genes, in their order, and condition columns are the same in all of it.

    ``genes_left_out`` are genes of the real cells that were not measured in all cells of every file.
    """

    real: CellCounts
    train: CellCounts | None  # for the floor and baselines
    generated: dict[str, list[CellCounts]]
    genes: list[str]
    checkpoint: str | None
    genes_left_out: tuple[str, ...] = ()
    dataset: str | None = None  # its name, as the real file tells it
    loss_still_falling: float | None = None  # the most of the generators' checkpoints, as their files tell it

    def notes(self) -> dict[str, str]:
        """What a reader of the numbers must know: of a training that was too short, and of genes that are left out."""
        found = {}
        if self.loss_still_falling is not None:
            falling = f"validation loss still falling by {self.loss_still_falling:.3g} per 1,000 steps"
            found["training"] = f"{falling} when training ended"
        if self.genes_left_out:
            number = len(self.genes) + len(self.genes_left_out)
            left_out = f"left out, as some cells were not measured there: {shortened(self.genes_left_out)}"
            found["genes"] = f"{len(self.genes):,} of the {number:,} genes of the real cells; {left_out}"
        return found


def together(parts: Sequence[CellCounts]) -> CellCounts:
    """All cells of several, which have the same columns of conditions."""
    counts = sparse.vstack([part.counts for part in parts], format="csr")
    labels = pd.concat([part.labels for part in parts], ignore_index=True)
    return replace(parts[0], counts=counts, labels=labels)


def joined_labels(labels: pd.DataFrame) -> pd.Series:
    """Name of each cell's condition: its labels joined by " | ", "all" if there are no columns."""
    names = pd.Series("all", index=range(len(labels)))
    for position, column in enumerate(labels):
        values = labels[column].reset_index(drop=True)
        names = values if position == 0 else names + SEPARATOR + values
    return names


def read_comparison(
    generated: Mapping[Path, str | None],
    real: Path,
    train: Path,
    *,
    reserved_names: Sequence[str],
    condition_keys: str | None = None,
    layer: str | None = None,
    control: str | None = None,
) -> Comparison:
    """Read all files, with the genes of the real one and one set of condition columns.

    Generated files with one name are the seeds of one generator; a name that is None is what the file says in
    ``uns["generator"]``, and ``reserved_names`` are refused. The other arguments are options of ``dcm-evaluate``.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: a file that is not counts of the same genes with the same condition columns.
    """
    real_file = read_counts(real)
    files = {path: read_counts(path, layer) for path in generated}
    train_file = read_counts(train)
    kept = _genes_measured_in_all({real: real_file, **files, train: train_file}, real_file.var_names)
    if control is None and "dcm_control" in real_file.uns:
        control = str(real_file.uns["dcm_control"])
    conditions = _condition_columns(condition_keys, [real_file, *files.values()])
    separator = str(real_file.uns.get("dcm_separator", train_file.uns.get("dcm_separator", CellCounts.separator)))
    options = {"conditions": conditions, "genes": kept, "control": control, "separator": separator}
    real_cells = from_anndata(real_file, name=str(real), **options)
    if control is not None and PERTURBATION in conditions and control not in set(real_cells.labels[PERTURBATION]):
        known = ", ".join(sorted(set(real_cells.labels[PERTURBATION]))[:5])
        logger.warning("no test cell is labelled %r (control); perturbations there: %s, ...", control, known)
    by_model: dict[str, list[CellCounts]] = {}
    for path, file in files.items():
        cells = from_anndata(file, name=str(path), **options)
        if len(cells) < 2:
            raise ValueError(f"{str(path)!r} has 1 cell; expected two or more")
        if not set(cells.rows_by_condition) & set(real_cells.rows_by_condition):
            raise ValueError(
                f"{str(path)!r} has none of the conditions of {str(real)!r} (columns {', '.join(conditions)}); it has "
                f"{next(iter(cells.rows_by_condition))!r}, the other {next(iter(real_cells.rows_by_condition))!r}, ..."
            )
        model = generated[path] or file.uns.get("generator")
        if model is None:
            raise ValueError(f"{str(path)!r} does not say what generated it (uns['generator']); pass --name NAME")
        if model in reserved_names:
            raise ValueError(f"{str(path)!r}: {model!r} is a row of every table; pass --name with another name")
        by_model.setdefault(str(model), []).append(cells)
    sampling = [file.uns.get("dcm_sampling", {}) for file in files.values()]
    found = [of_file.get("checkpoint") for of_file in sampling]
    falling = [float(of_file["loss_still_falling"]) for of_file in sampling if "loss_still_falling" in of_file]
    comparison = Comparison(
        real=real_cells,
        train=from_anndata(train_file, name=str(train), **options),
        generated=by_model,
        genes=kept,
        checkpoint=", ".join(dict.fromkeys(str(name) for name in found if name is not None)) or None,
        genes_left_out=tuple(real_file.var_names[~real_file.var_names.isin(kept)]),
        dataset=real_file.uns.get("dcm_dataset"),
        loss_still_falling=max(falling, default=None),
    )
    _warn_of_gaps(comparison)
    return comparison


def from_anndata(
    adata: "anndata.AnnData",
    *,
    name: str,
    conditions: Sequence[str],
    genes: Sequence[str],
    control: str | None = None,
    separator: str = CellCounts.separator,
    way_out: str = "choose columns that every file has with --condition-keys A,B (or --condition-keys none)",
) -> CellCounts:
    """Take the counts that :func:`read_counts` read and the condition columns of ``obs``; genes are matched by name.

    Genes that are not among ``genes`` are dropped, which is logged. ``name`` is what messages call the file, and
    ``way_out`` what they advise where it lacks a column.

    Raises:
        ValueError: duplicate or missing genes, a missing column or label.
    """
    labels = labelled(adata.obs, conditions, file=name, way_out=way_out).reset_index(drop=True)
    repeated = adata.var_names[adata.var_names.duplicated()].unique()
    if len(repeated):
        raise ValueError(
            f"{name!r} has {len(repeated):,} duplicate gene names ({shortened(repeated)}); make them unique"
        )
    positions = adata.var_names.get_indexer(pd.Index(genes))
    missing = [gene for gene, position in zip(genes, positions) if position < 0]
    if missing:
        raise ValueError(
            f"{name!r} lacks {len(missing):,} of the {len(genes):,} genes to compare ({shortened(missing)}); expected "
            f"all of them, by the same names (its own: {shortened(adata.var_names, 3)})"
        )
    if adata.n_vars > len(genes):
        logger.info("%s: %d genes that are not compared are left out", name, adata.n_vars - len(genes))
    return CellCounts(adata.X[:, positions].tocsr(), labels.astype(str), control, separator)


def _condition_columns(asked: str | None, files: Sequence["anndata.AnnData"]) -> list[str]:
    """Columns that make up a condition: ``asked`` (A,B or none), else what the first file says, else the usual.

    A file written by ``dcm-convert`` or ``dcm-sample`` lists them in ``uns["dcm_conditions"]``; for any other,
    ``cell_type`` and ``perturbation`` are taken where every file has them.
    """
    if asked is not None:
        names = [name.strip() for name in asked.split(",") if name.strip()]
        return [] if names == ["none"] else names
    if "dcm_conditions" in files[0].uns:
        return [str(name) for name in np.asarray(files[0].uns["dcm_conditions"]).ravel()]
    return [name for name in DEFAULT_CONDITIONS if all(name in file.obs for file in files)]


def _genes_measured_in_all(files: Mapping[Path, "anndata.AnnData"], of_real: pd.Index) -> list[str]:
    """The genes of the real cells but for those that were not measured in some cells of some file."""
    kept = of_real
    for path, file in files.items():
        _, measured = read_panels(file.obs, file.uns.get("dcm_panels"), file.n_vars, file=str(path))
        kept = kept[~kept.isin(file.var_names[~measured.all(axis=0)])]
    if not len(kept):
        raise ValueError(
            "no gene was measured in all cells of all files (uns['dcm_panels']): compare the cells of one panel at a "
            "time, those with one value of obs['panel']"
        )
    if len(kept) < len(of_real):
        what = "compared on the %d of %d genes that were measured in all cells of all files"
        logger.warning(what, len(kept), len(of_real))
    return list(map(str, kept))


def _warn_of_gaps(comparison: Comparison) -> None:
    """Say which test cells have no generated partner, and which generated cells are never compared."""
    wanted = comparison.real.rows_by_condition
    for model, files in comparison.generated.items():
        for position, file in enumerate(files, start=1):
            found = file.rows_by_condition
            lacking = {name: rows.size - found.get(name, rows[:0]).size for name, rows in wanted.items()}
            short = {name: number for name, number in lacking.items() if number > 0}
            unmatched = [name for name in found if name not in wanted]
            if short:
                logger.warning(
                    "%s, file %d: %d of %d test cells have no generated partner, in %d conditions (%s, ...); it is "
                    "compared on fewer cells than the floor",
                    *(model, position, sum(short.values()), len(comparison.real), len(short), next(iter(short))),
                )
            if unmatched:
                logger.warning(
                    "%s, file %d: %d conditions are not among the test cells and are left out (%s, ...)",
                    *(model, position, len(unmatched), unmatched[0]),
                )
