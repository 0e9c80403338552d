"""Read counts on disk in blocks of cells, and write h5ad files block by block, for all stages.

Counts are never all in memory: matrices stored by cell (CSR, dense) are read in place; those stored by gene (CSC) or in
any order (Matrix Market) go through temporary buckets on disk once (:class:`CellBuckets`). ``obs`` and ``var`` are in
memory.

Shapes: n cells, m cells of a block, F genes of the file, G genes of a panel.
"""

import contextlib
import logging
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import scipy.sparse
from anndata.io import read_elem, sparse_dataset, write_elem

from tokenization.count_errors_dcm import CountCheck
from tokenization.labels_dcm import shortened
from training.data.command_line import ProgressReport
from training.data.files import check_readable
from training.data.shards import COUNTS, read_panels

with contextlib.suppress(ImportError):
    import hdf5plugin  # noqa: F401 (HDF5 then knows zstd, lz4 and other filters)

logger = logging.getLogger(__name__)

BLOCK_CELLS = 4096
BLOCK_STORED = 2**22  # stored values of a sparse matrix
BLOCK_VALUES = 2**24  # values of a dense matrix
STORED_CHUNK = 2**16  # stored values that are compressed together
LARGEST_COUNT = 2**31 - 1
ZARR = (".zgroup", ".zattrs", "zarr.json")
UNKNOWN_ENCODING = anndata._io.specs.registry.IORegistryError
# what HDF5, AnnData, gzip and text that ends too early raise
DAMAGE = (OSError, KeyError, IndexError, EOFError, RuntimeError, zlib.error, anndata._io.utils.AnnDataReadError)


# --- h5ad files as a whole ------------------------------------------------------------------------------------------


def open_h5ad(path: str | Path) -> h5py.File:
    """Open an h5ad file as HDF5, to read parts of it without loading the rest; the caller closes it. A file that is
    empty, cut short, not HDF5, or without AnnData's layout is a ValueError."""
    path = Path(path)
    refuse_zarr(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}; expected an h5ad file")
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{str(path)!r} is empty (0 bytes); write or copy it again")
    check_readable(path)
    if not h5py.is_hdf5(path):
        with path.open("rb") as opened:
            if opened.read(2) == b"\x1f\x8b":
                raise ValueError(f"{str(path)!r} is compressed with gzip: unpack it first (gunzip)")
        raise ValueError(f"{str(path)!r} is not an h5ad file (no HDF5 signature in its {size:,} bytes)")
    with damage_named(path):
        file = h5py.File(path, "r")
    missing = [name for name in ("obs", "var") if name not in file]
    if "X" not in file and not len(file.get("layers", ())):
        missing.append("X and no layers")
    if missing:
        genomes = [name for name, group in file.items() if isinstance(group, h5py.Group) and "gene_names" in group]
        file.close()
        if genomes:
            raise ValueError(
                f"{str(path)!r} is 10x output of Cell Ranger 2 (genomes: {shortened(genomes)}): read it with "
                "scanpy.read_10x_h5(path, genome=...) and write it as h5ad"
            )
        raise ValueError(f"{str(path)!r} is HDF5 but not an h5ad file: it has no {', no '.join(missing)}")
    return file


@contextmanager
def damage_named(path: str | Path) -> Iterator[None]:
    """Turn what goes wrong while reading ``path`` inside the block into one ValueError that names the file."""
    try:
        yield
    except DAMAGE as error:
        raise ValueError(f"{str(path)!r} {_cause(path, error)}") from error
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{str(path)!r}: {error}") from error


def _cause(path: str | Path, error: Exception) -> str:
    """What keeps a file from being read, and the way out."""
    if any(words in str(error) for words in ("unable to lock file", "already open for write")):
        return "is open for writing elsewhere; close it there, or copy it first"
    with contextlib.suppress(OSError, RuntimeError), h5py.File(path, "r") as file:
        dataset = file.visititems(lambda _, item: item.name if _lacks_filter(item) else None)
        if dataset is not None:
            return f"is compressed with a filter that needs hdf5plugin ({dataset}): pip install hdf5plugin"
    return f"cannot be read ({type(error).__name__}: {error}); it looks cut short or damaged: copy it again"


def _lacks_filter(item: h5py.Group | h5py.Dataset) -> bool:
    created = item.id.get_create_plist() if isinstance(item, h5py.Dataset) else None
    return created is not None and not all(
        h5py.h5z.filter_avail(created.get_filter(i)[0]) for i in range(created.get_nfilters())
    )


def refuse_zarr(path: Path) -> None:
    """Raise ValueError if this is a zarr store."""
    if path.is_dir() and (path.suffix == ".zarr" or any((path / name).is_file() for name in ZARR)):
        raise ValueError(f"{str(path)!r} is a zarr store; write it as h5ad: anndata.read_zarr(path).write_h5ad(...)")


def read_table(file: h5py.File, name: str) -> pd.DataFrame:
    """Read ``obs``, ``var`` or ``raw/var``, as anndata does, but for columns of an encoding that it does not know."""
    element = file[name]
    if isinstance(element, h5py.Dataset):
        return _read_old_table(file, element)
    if "column-order" not in element.attrs:
        raise ValueError(
            f"{name} does not say how it is encoded: written by an old anndata; read it with that version and write "
            "it once with a newer one"
        )
    columns = [str(column) for column in element.attrs["column-order"]]
    repeated = sorted({column for column in columns if columns.count(column) > 1})
    if repeated:
        raise ValueError(f"{name} has the column {shortened(repeated)} more than once; rename or drop one and write it")
    try:
        return read_elem(element)
    except UNKNOWN_ENCODING:
        index = read_elem(element[element.attrs["_index"]])
        return pd.DataFrame(read_known(element, columns), index=index)


def read_known(group: h5py.Group, names: Iterable[str] | None = None) -> dict[str, object]:
    """Read what is in a group (or what is named); what has an encoding that anndata does not know is left out."""
    found = {}
    for name in group if names is None else names:
        try:
            found[name] = read_elem(group[name])
        except UNKNOWN_ENCODING:
            logger.warning("%s/%s has an encoding that this anndata does not know: not read", group.name, name)
    return found


def _read_old_table(file: h5py.File, element: h5py.Dataset) -> pd.DataFrame:
    """A table of anndata 0.6: one compound dataset, whose categories stand in ``uns`` by the column's name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", anndata.OldFormatWarning)
        table = anndata._io.h5ad.read_dataframe_legacy(element)
        uns = file.get("uns", {})
        for column in table:
            stored, codes = uns.get(f"{column}_categories"), table[column]
            if stored is not None and codes.dtype.kind in "iu":
                names = np.atleast_1d(anndata._io.h5ad.read_dataset(stored))
                if (codes < len(names)).all():
                    table[column] = pd.Categorical.from_codes(codes, names)
    return table


def write_h5ad_in_blocks(
    path: Path,
    annotations: anndata.AnnData,
    blocks: Iterable[Mapping[str, scipy.sparse.csr_matrix]],
    dtypes: Mapping[str, np.dtype],
) -> None:
    """Write an h5ad file whose matrices arrive in blocks of cells, one of which is in memory at a time.

    Args:
        path: the file, as of :func:`written_aside`.
        annotations: all but the matrices: ``obs`` in the order of the cells, ``var``, ``uns`` and others.
        blocks: for the next cells, the matrices (m, G) by their names in the file: ``X`` or ``layers/...``.
        dtypes: of the values, by these names.
    """
    annotations.write_h5ad(path, compression="gzip")
    options = {"chunks": (STORED_CHUNK,), "compression": "gzip", "compression_opts": 1, "shuffle": True}
    with h5py.File(path, "r+") as file:
        for name, dtype in dtypes.items():
            empty = scipy.sparse.csr_matrix((0, annotations.n_vars), dtype=dtype)
            empty.indptr = empty.indptr.astype(np.int64)  # also beyond 2^31 stored values
            write_elem(file, name, empty, dataset_kwargs=options)
        for matrices in blocks:
            for name, matrix in matrices.items():
                sparse_dataset(file[name]).append(matrix.astype(dtypes[name], copy=False))
        for name in dtypes:
            pointers = file[name]["indptr"][:]
            if pointers[-1] <= np.iinfo(np.int32).max:  # as anndata writes them: of the type of the indices
                del file[name]["indptr"]
                file[name]["indptr"] = pointers.astype(np.int32)


# --- counts in blocks of cells ----------------------------------------------------------------------------------------


def storable(values: np.ndarray) -> np.ndarray:
    """Values of a type that scipy's matrices hold: float32 for float16."""
    return values.astype(np.float32) if values.dtype == np.float16 else values


class DenseRows:
    """A dense matrix (n, F) in an HDF5 file; of this and of all that follow ``blocks`` yields rows (m, F) in order."""

    def __init__(self, path: Path, name: str, shape: tuple[int, int]):
        self.path, self.name, self.shape = path, name, shape

    def blocks(self) -> Iterator[np.ndarray]:
        size = max(1, min(BLOCK_CELLS, BLOCK_VALUES // max(1, self.shape[1])))
        with h5py.File(self.path, "r") as file:
            for start in range(0, self.shape[0], size):
                yield storable(file[self.name][start : start + size])


class StoredRows:
    """A CSR matrix (n, F) in the group ``name`` of an HDF5 file."""

    def __init__(self, path: Path, name: str, shape: tuple[int, int]):
        self.path, self.name = path, name
        self.shape = tuple(int(size) for size in shape)
        with h5py.File(path, "r") as file:
            self.indptr = checked_pointers(file[name], lines=shape[0])

    def blocks(self) -> Iterator[scipy.sparse.csr_matrix]:
        start, (num_cells, num_genes) = 0, self.shape
        with h5py.File(self.path, "r") as file:
            data, indices = (file[self.name][array] for array in ("data", "indices"))
            while start < num_cells:
                within = int(np.searchsorted(self.indptr, self.indptr[start] + BLOCK_STORED, side="right")) - 1
                stop = min(max(within, start + 1), start + BLOCK_CELLS, num_cells)
                pointers = self.indptr[start : stop + 1]
                stored = slice(int(pointers[0]), int(pointers[-1]))
                genes = checked_indices(indices[stored], num_genes)
                values = storable(data[stored]), genes, pointers - pointers[0]
                yield scipy.sparse.csr_matrix(values, shape=(stop - start, num_genes))
                start = stop


class TokenRows:
    """Rows of a Parquet file: lists of ``genes``, by token (F,), and their ``expressions`` (n, F)."""

    def __init__(self, path: Path, shape: tuple[int, int], tokens: np.ndarray):
        self.path, self.shape = path, shape
        self.gene_of_token = np.full(int(tokens.max()) + 1, -1)
        self.gene_of_token[tokens] = np.arange(len(tokens))

    def blocks(self) -> Iterator[scipy.sparse.csr_matrix]:
        """Yield stored values (m, F), without the marker that begins a row: a token that is no gene, with a negative
        expression."""
        for batch in pq.ParquetFile(self.path).iter_batches(BLOCK_CELLS, columns=list(COUNTS)):
            lists = [batch.column(name) for name in COUNTS]
            pointers, others = (np.concatenate([[0], np.cumsum(column.value_lengths())]) for column in lists)
            if not np.array_equal(pointers, others):
                raise ValueError("a row has another number of genes than of expressions; copy the file again")
            tokens, values = (column.flatten().to_numpy() for column in lists)
            is_known = (tokens >= 0) & (tokens < len(self.gene_of_token))
            genes = np.where(is_known, self.gene_of_token[np.where(is_known, tokens, 0)], -1)
            first = pointers[:-1][np.diff(pointers) > 0]
            kept = np.ones(len(values), dtype=bool)
            kept[first] = (values[first] >= 0) | (genes[first] >= 0)
            if (genes[kept] < 0).any():
                raise ValueError(f"the gene token {tokens[kept & (genes < 0)][0]} is not in the table of genes")
            pointers = np.concatenate([[0], np.cumsum(kept)])[pointers]
            rows = storable(values[kept]), genes[kept], pointers
            yield scipy.sparse.csr_matrix(rows, shape=(len(pointers) - 1, self.shape[1]))


class CellBuckets:
    """A matrix (n, F) whose values arrive in any order, sorted by cell through temporary files in ``folder``, which is
    made here and removed by the caller."""

    def __init__(self, folder: Path, shape: tuple[int, int], dtype: np.dtype):
        self.folder = folder
        self.folder.mkdir(parents=True)
        self.shape = tuple(int(size) for size in shape)
        self.record = np.dtype([("cell", np.int32), ("gene", np.int32), ("value", dtype)])

    def add(self, cells: np.ndarray, genes: np.ndarray, values: np.ndarray) -> None:
        """Take the values of some pairs of cell and gene, three arrays of one length."""
        records = np.empty(len(values), dtype=self.record)
        records["cell"], records["gene"], records["value"] = cells, genes, values
        buckets = cells // BLOCK_CELLS
        order = np.argsort(buckets, kind="stable")
        edges = np.flatnonzero(np.diff(buckets[order])) + 1
        for part in np.split(order, edges):
            if len(part):
                with self._path(int(buckets[part[0]])).open("ab") as file:
                    records[part].tofile(file)

    def blocks(self) -> Iterator[scipy.sparse.csr_matrix]:
        num_cells, num_genes = self.shape
        for bucket, start in enumerate(range(0, num_cells, BLOCK_CELLS)):
            path, size = self._path(bucket), min(BLOCK_CELLS, num_cells - start)
            records = np.fromfile(path, dtype=self.record) if path.exists() else np.empty(0, dtype=self.record)
            cells = records["cell"] - start
            records = records[np.argsort(cells, kind="stable")]
            pointers = np.concatenate([[0], np.cumsum(np.bincount(cells, minlength=size))])
            values = storable(records["value"]), records["gene"], pointers
            yield scipy.sparse.csr_matrix(values, shape=(size, num_genes))

    def _path(self, bucket: int) -> Path:
        return self.folder / f"{bucket:06d}"


def sorted_by_cell(path: Path, group: h5py.Group, shape: tuple[int, int], folder: Path) -> CellBuckets:
    """Transpose a CSC matrix (n, F) on disk, reading its arrays once."""
    pointers = checked_pointers(group, lines=shape[1])
    data, indices, stored = group["data"], group["indices"], int(pointers[-1])
    buckets = CellBuckets(folder, shape, data.dtype)
    with ProgressReport(stored, task=f"sorting {path.name}", unit="values") as report:
        for start in range(0, stored, BLOCK_STORED):
            stop = min(start + BLOCK_STORED, stored)
            cells = checked_indices(indices[start:stop], shape[0])
            genes = np.searchsorted(pointers, np.arange(start, stop), side="right") - 1
            buckets.add(cells, genes, data[start:stop])
            report.update(stop - start)
    return buckets


def checked_pointers(group: h5py.Group, *, lines: int) -> np.ndarray:
    """Index pointers of a compressed matrix, if they can be true."""
    pointers = group["indptr"][:].astype(np.int64)
    stored = min(len(group["data"]), len(group["indices"]))
    whole = len(pointers) == lines + 1 and pointers[0] == 0 and bool((np.diff(pointers) >= 0).all())
    if not whole or pointers[-1] > stored:
        raise ValueError(
            f"the index pointers of the sparse matrix are damaged (expected {lines + 1:,} ascending numbers from 0 to "
            f"at most {stored:,}); write or copy the file again"
        )
    return pointers


def checked_indices(indices: np.ndarray, size: int) -> np.ndarray:
    """Row or column indices of a sparse matrix, if all are in 0..size-1."""
    if len(indices) and not (indices.min() >= 0 and indices.max() < size):
        raise ValueError(
            f"the indices of the sparse matrix are damaged (from {indices.min():,} to {indices.max():,}, expected 0 to "
            f"{size - 1:,}); write or copy the file again"
        )
    return indices


def with_genes(counts: scipy.sparse.csr_matrix, columns: np.ndarray, num_genes: int) -> scipy.sparse.csr_matrix:
    """Counts with column j moved to ``columns[j]``, or dropped where that is -1."""
    if num_genes == len(columns) and np.array_equal(columns, np.arange(num_genes)):
        return counts
    genes = columns[counts.indices]
    kept = genes >= 0
    pointers = np.concatenate([[0], np.cumsum(kept)])[counts.indptr]
    moved = scipy.sparse.csr_matrix((counts.data[kept], genes[kept], pointers), shape=(counts.shape[0], num_genes))
    moved.sort_indices()
    return moved


@dataclass(frozen=True)
class CountFile:
    """A file of n cells and F genes, whose counts stay on disk."""

    path: Path  # the file or folder
    source: str  # what the counts are called in messages, such as "X of cells.h5ad"
    matrix: DenseRows | StoredRows | TokenRows | CellBuckets  # (n, F)
    obs: pd.DataFrame  # indexed by cell name
    var: pd.DataFrame  # indexed by gene name
    layers: list[str] = field(default_factory=list)  # what ``--layer`` could name instead
    are_genes: np.ndarray | None = None  # (F,) which columns are no antibodies or guides
    panels: Mapping[str, np.ndarray] | None = None  # what uns["dcm_panels"] says (:func:`~.shards.read_panels`)

    def measured(self, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Panel of each cell (n,), and which of the genes in ``columns`` (G,) each panel has (P, G): none where -1."""
        panel, measured = read_panels(self.obs, self.panels, len(self.var), file=str(self.path))
        return panel, measured[:, columns] & (columns >= 0)

    def blocks(self, task: str, *, check: bool = False) -> Iterator[tuple[slice, scipy.sparse.csr_matrix]]:
        """Yield slices of cells and their counts, CSR int64, with sorted genes and no stored zeros.

        ``task`` is what the progress bar says. With ``check`` every value is looked at as it is stored; after one that
        is no count blocks are still read, to say all that is wrong, but no longer yielded.
        """
        checked, start = CountCheck(), 0
        with ProgressReport(len(self.obs), task=task, unit="cells") as report:
            for block in self._stored_blocks(checked if check else None):
                if checked.is_clean and checked.maximum > LARGEST_COUNT:
                    raise ValueError(f"{self.source} has the value {checked.maximum:.4g}; expected counts below 2^31")
                rows = slice(start, start + block.shape[0])
                if checked.is_clean:
                    counts = scipy.sparse.csr_matrix(block).astype(np.int64)
                    counts.sum_duplicates()
                    counts.eliminate_zeros()
                    yield rows, counts
                report.update(block.shape[0])
                start = rows.stop
        checked.raise_if_bad(self.source, layers=self.layers, layer_option="--layer {}")

    def _stored_blocks(self, check: CountCheck | None) -> Iterator[np.ndarray | scipy.sparse.csr_matrix]:
        """The blocks as they are stored, each added to ``check``."""
        with damage_named(self.path):
            for block in self.matrix.blocks():
                if check is not None:
                    check.add(block.data if scipy.sparse.issparse(block) else block)
                yield block

    def panel_blocks(self, columns: np.ndarray, task: str) -> Iterator[scipy.sparse.csr_matrix]:
        """Yield the counts (m, G) int64 of the genes in ``columns`` (G,), nothing where that is -1; every value of the
        file is checked."""
        there, place = np.flatnonzero(columns >= 0), np.full(len(self.var), -1)
        place[columns[there]] = there
        for _, counts in self.blocks(task, check=True):
            yield with_genes(counts, place, len(columns))
