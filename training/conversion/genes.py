"""Bring the cells of one file or many to one list of genes, look at every count once, and choose the genes to keep.

Gene names are made comparable (a column of ``var`` instead of its index, Ensembl ids without version), cell names
unique, and every gene that a file lacks is either dropped (intersection) or remembered as not measured there (union).
Of these genes all are kept, those of a list, or the most variable of the training cells, and no other cells reach this
choice.

Shapes: m cells of a block, N cells in all, G joint genes, F files.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from pandas.api.types import infer_dtype
from scipy.sparse import csr_matrix
from tqdm import tqdm

from tokenization.gene_names_dcm import ENSEMBL_ID, without_version
from tokenization.labels_dcm import shortened
from training.data.files import read_list
from training.data.formats import open_counts
from training.data.h5ad import CountFile, with_genes
from training.data.variable_genes import GeneTotals, seurat_v3_variances, top_genes

logger = logging.getLogger(__name__)

SOURCE_FILE = "source_file"
FEWEST_GENES = 25  # expressed in a cell; with fewer, two cells may well have the same counts by chance


@dataclass(frozen=True)
class FileCells:
    """The cells of one file among all cells, and its genes among the joint ones."""

    file: CountFile
    rows: slice  # their positions among all N cells
    columns: np.ndarray  # the joint gene of each of the file's columns, -1 where it is none
    measured: np.ndarray  # (G,) whether the file has a gene


@dataclass(frozen=True)
class InputCells:
    """N cells in all, and their G joint genes."""

    files: list[FileCells]
    obs: pd.DataFrame  # of all N cells, indexed by unique names
    var: pd.DataFrame  # of the G joint genes, indexed by name

    @property
    def measured(self) -> np.ndarray:
        """(F, G) whether a file has a gene."""
        return np.stack([file.measured for file in self.files])

    def blocks(self, task: str, *, check: bool = False) -> Iterator[tuple[slice, csr_matrix, np.ndarray]]:
        """Yield positions among all cells, their counts (m, G), and which genes their file has (G,).

        ``task`` and ``check`` are those of :meth:`CountFile.blocks`.
        """
        for cells in self.files:
            for rows, counts in cells.file.blocks(f"{task} of {cells.file.path.name}", check=check):
                here = slice(rows.start + cells.rows.start, rows.stop + cells.rows.start)
                yield here, with_genes(counts, cells.columns, len(cells.measured)), cells.measured


def read_cells(
    sources: Sequence[Path],
    scratch: Path,
    *,
    layer: str | None = None,
    gene_key: str | None = None,
    genes: Sequence[str] | None = None,
    join: Literal["intersection", "union"] = "intersection",
) -> InputCells:
    """Read all of the files but their counts, and join their genes; the options are those of ``dcm-convert``.

    Temporary files go to ``scratch``, which the caller removes.
    """
    resolved = [path.resolve() for path in sources]
    for path in sources:
        if resolved.count(path.resolve()) > 1:
            raise ValueError(f"{str(path)!r} is given twice; give each file once")
    bar = tqdm(sources, desc="opening files", unit=" files", delay=1, disable=None)
    files = [open_counts(path, scratch / f"sorted{i}", layer) for i, path in enumerate(bar)]
    names = [_gene_names(file, gene_key) for file in files]
    _check_kinds(files, names)
    joint = pd.Index(_join_genes(files, names, genes, join))
    ends = np.cumsum([len(file.obs) for file in files])
    cells = []
    for file, name, end in zip(files, names, ends.tolist()):
        columns = np.where(name != "", joint.get_indexer(name), -1)
        measured = np.zeros(len(joint), dtype=bool)
        measured[columns[columns >= 0]] = True
        cells.append(FileCells(file, slice(end - len(file.obs), end), columns, measured))
    return InputCells(files=cells, obs=_join_obs(files), var=_join_var(files, names, joint))


def _gene_names(file: CountFile, gene_key: str | None) -> np.ndarray:
    """Comparable names of a file's columns, (columns,) str; "" for those that are no genes."""
    var = file.var
    if gene_key is not None and gene_key not in var:
        known = ", ".join(map(str, var.columns)) or "none"
        raise ValueError(f"{str(file.path)!r} has no var column {gene_key!r} (--gene-key); columns there: {known}")
    column = var.index.to_series() if gene_key is None else var[gene_key]
    missing = int(column.isna().sum()) + int((column.astype(str).str.strip() == "").sum())
    if missing:
        where = "var_names" if gene_key is None else f"var column {gene_key!r}"
        raise ValueError(f"{str(file.path)!r}: {missing:,} genes have no name in {where}; name or drop them")
    names = column.astype(str).map(without_version)
    versioned = int((names != column.astype(str)).sum())
    if versioned:
        logger.info("%s: %s Ensembl ids are written without their version", file.path.name, f"{versioned:,}")
    names = names.to_numpy(dtype=object)
    measured = file.measured(np.arange(len(names)))[1]
    if (measured != measured[0]).any():
        raise ValueError(
            f"{str(file.path)!r} has cells of several panels (uns['dcm_panels']): convert the files that it was made "
            "of, or write the cells of each obs['panel'] to a file and give them all"
        )
    names = np.where(measured[0], names, "")
    if file.are_genes is not None and not file.are_genes.all():
        logger.info("%s: %d features that are no genes are left out", file.path.name, (~file.are_genes).sum())
        names = np.where(file.are_genes, names, "")
    given = pd.Index(names[names != ""])
    repeated = sorted(set(given[given.duplicated()]))
    if repeated:
        raise ValueError(
            f"{str(file.path)!r}: {len(repeated):,} gene names stand more than once ({shortened(repeated)}); add them "
            "up or rename them, or name a column of var with other names (--gene-key)"
        )
    return names


def _check_kinds(files: list[CountFile], names: list[np.ndarray]) -> None:
    """Raise if some files name their genes by Ensembl id and others do not."""
    are_ensembl = [sum(map(bool, map(ENSEMBL_ID.fullmatch, name))) > (name != "").sum() / 2 for name in names]
    if len(set(are_ensembl)) > 1:
        one, other = are_ensembl.index(True), are_ensembl.index(False)
        raise ValueError(
            f"genes are Ensembl ids in {files[one].path.name} ({_example(names[one])}) but other names in "
            f"{files[other].path.name} ({_example(names[other])}); --gene-key names a column of var that both have"
        )


def _example(names: Sequence[str]) -> str:
    return ", ".join([name for name in names if name][:2])


def _join_genes(files: list[CountFile], names: list[np.ndarray], wanted: Sequence[str] | None, join: str) -> list[str]:
    """The joint genes in order."""
    sets = [set(name) - {""} for name in names]
    if wanted is None:
        joint = list(dict.fromkeys(gene for name in names for gene in name if gene))
        if join == "intersection":
            joint = [gene for gene in joint if all(gene in have for have in sets)]
            for file, have in zip(files, sets):
                if len(joint) < len(have):
                    dropped = f"{len(have) - len(joint):,} of its genes are not in every file and are dropped"
                    logger.info("%s: %s (--join union keeps them)", file.path.name, dropped)
        if not joint:
            shown = "; ".join(f"{file.path.name}: {_example(name)}" for file, name in zip(files, names))
            raise ValueError(f"no gene is in all {len(files)} files ({shown}); expected the same kind of names")
        return joint
    wanted = [without_version(gene) for gene in wanted]
    anywhere = set().union(*sets)
    if not anywhere & set(wanted):
        raise ValueError(
            f"none of the {len(wanted):,} genes of --genes ({_example(wanted)}) is in the data ({_example(names[0])}); "
            f"--gene-key names another column of var: {', '.join(map(str, files[0].var.columns)) or 'none here'}"
        )
    for file, have in zip(files, sets):
        missing = [gene for gene in wanted if gene not in have]
        if missing and join == "intersection":
            raise ValueError(
                f"{str(file.path)!r} lacks {len(missing):,} of the {len(wanted):,} genes of --genes "
                f"({shortened(missing)}); remove them from the list, or --join union marks them as not measured"
            )
    return wanted


def _join_obs(files: list[CountFile]) -> pd.DataFrame:
    """Annotations of all cells: of several files the columns that all have, and ``source_file``."""
    for file in files:
        repeated = sorted(set(file.obs.index[file.obs.index.duplicated()]))
        if repeated:
            raise ValueError(
                f"{str(file.path)!r}: {len(repeated):,} cell names stand more than once ({shortened(repeated)}); "
                "adata.obs_names_make_unique(), or drop cells that are there twice"
            )
    if len(files) == 1:
        return files[0].obs
    stems = _distinct_names([file.path for file in files])
    shared = [column for column in files[0].obs if all(column in file.obs for file in files)]
    dropped = sorted({str(column) for file in files for column in file.obs} - set(map(str, shared)))
    if dropped:
        logger.info("obs columns that not every file has are left out: %s", ", ".join(dropped))
    if SOURCE_FILE in shared:
        shared.remove(SOURCE_FILE)
    obs = _storable(pd.concat([file.obs[shared] for file in files]))
    origin = np.repeat(np.arange(len(files)), [len(file.obs) for file in files])
    if obs.index.has_duplicates:
        logger.info("cell names occur in several files: each becomes <file>:<name>")
        obs.index = [f"{stems[i]}:{name}" for i, name in zip(origin, obs.index)]
    obs[SOURCE_FILE] = pd.Categorical.from_codes(origin, categories=stems)
    return obs


def _distinct_names(paths: list[Path]) -> list[str]:
    """File names without ending; of folders' parents as much as it takes to make them differ."""
    whole = [path.resolve().with_suffix("").parts for path in paths]
    for depth in range(1, max(map(len, whole))):
        names = ["/".join(parts[-depth:]) for parts in whole]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _join_var(files: list[CountFile], names: list[np.ndarray], joint: pd.Index) -> pd.DataFrame:
    """Annotations of the joint genes: columns that all files have, each gene's from the first file with it."""
    shared = [column for column in files[0].var if all(column in file.var for file in files)]
    var = pd.concat([file.var[shared].set_axis(pd.Index(name)) for file, name in zip(files, names)])
    return _storable(var[~var.index.duplicated()].reindex(joint))


def _storable(table: pd.DataFrame) -> pd.DataFrame:
    """``table`` with columns of mixed types, which h5ad cannot hold, as text."""
    objects = [column for column in table if table[column].dtype == object]
    mixed = [column for column in objects if infer_dtype(table[column], skipna=True) not in ("string", "empty")]
    return table.assign(**{column: table[column].astype(str).where(table[column].notna()) for column in mixed})


# --- which genes are kept ---------------------------------------------------------------------------------------------


def read_gene_list(path: Path) -> list[str]:
    """Genes of ``--genes``, as :func:`training.data.files.read_list`; one that is named twice is a ValueError, too."""
    genes = pd.Index(read_list(path, "--genes"))
    repeated = sorted(set(genes[genes.duplicated()]))
    if repeated:
        raise ValueError(
            f"{str(path)!r} names {len(repeated):,} genes twice ({', '.join(repeated[:5])}); once is enough"
        )
    return genes.tolist()


@dataclass(frozen=True)
class Panel:
    """The genes that are kept, and what their counts are like."""

    genes: np.ndarray  # their positions among the joint genes, ascending
    largest: int  # count of any cell, which sizes the columns of the shards and nothing else
    largest_in_training: int
    zero_genes: int  # how many have no count in training


def choose_panel(cells: InputCells, train: np.ndarray, n_top_genes: int | None) -> Panel:
    """Validate every value, and choose the genes: all, or the ``n_top_genes`` most variable of the cells ``train``."""
    num_genes = len(cells.var)
    if n_top_genes is not None and not 1 <= n_top_genes <= num_genes:
        raise ValueError(f"--n-top-genes is {n_top_genes:,}; expected 1 to {num_genes:,}, the genes of the data")
    in_train = np.zeros(len(cells.obs), dtype=bool)
    in_train[train] = True
    training, tally = GeneTotals(num_genes), CellTally()
    largest = np.zeros(num_genes, dtype=np.int64)
    for rows, counts, measured in cells.blocks("checking counts", check=True):
        training.add(counts[in_train[rows]], measured)
        tally.add(counts)
        largest = np.maximum(largest, counts.max(axis=0).toarray().ravel())
    tally.warn(cells.obs.index)
    genes = np.arange(num_genes)
    if n_top_genes is not None:
        blocks = (counts[in_train[rows]] for rows, counts, _ in cells.blocks("choosing genes by the cells"))
        genes = top_genes(seurat_v3_variances(training, blocks), n_top_genes)
    in_training = training.largest[genes]
    if not in_training.any():
        where = " and ".join(of_file.file.source for of_file in cells.files)
        raise ValueError(f"{where} has no count above 0 in the {len(train):,} training cells")
    return Panel(
        genes=genes,
        largest=int(largest[genes].max()),
        largest_in_training=int(in_training.max()),
        zero_genes=int((in_training == 0).sum()),
    )


# --- cells without a count, and cells that are there twice -----------------------------------------------------------


class CellTally:
    """Tally of the cells added so far; twelve bytes are kept for each."""

    def __init__(self):
        self._tallies: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, counts: csr_matrix) -> None:
        """Add a block of cells (m, genes) with sorted genes and no stored zeros."""
        self._tallies.append((fingerprints(counts), np.diff(counts.indptr).astype(np.int32)))

    def warn(self, names: pd.Index) -> None:
        """Warn of cells without counts, and of cells that are there twice under two names."""
        prints, expressed = map(np.concatenate, zip(*self._tallies))
        empty = np.flatnonzero(expressed == 0)
        if len(empty):
            shown = ", ".join(names[empty[:3]])
            logger.warning("%s cells have no count at all (%s); they are kept: drop them", f"{len(empty):,}", shown)
        rich = np.flatnonzero(expressed >= FEWEST_GENES)
        _, first, group = np.unique(prints[rich], return_index=True, return_inverse=True)
        again = np.flatnonzero(first[group] != np.arange(len(rich)))
        if len(again):
            logger.warning(
                "%s cells have exactly the counts of another cell (%s those of %s); they are kept: drop copies, or "
                "test cells may be training cells",
                f"{len(again):,}",
                names[rich[again[0]]],
                names[rich[first[group[again[0]]]]],
            )


def fingerprints(counts: csr_matrix) -> np.ndarray:
    """The sum (m,) modulo 2^64 of the hashes of each cell's (gene, count) pairs: equal for equal counts, different for
    others but for one pair of cells in 10^19."""
    pairs = counts.indices.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + counts.data.astype(np.uint64)
    mixed = pd.util.hash_array(pairs)
    sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(mixed, dtype=np.uint64)])
    return sums[counts.indptr[1:]] - sums[counts.indptr[:-1]]
