"""Open a file of counts of any usual kind as a :class:`CountFile`.

An h5ad file (``X``, a layer, ``raw``), 10x ``.h5``, a 10x folder of ``.mtx``, or Parquet with a row for each cell, as
Tahoe-100M is published.
"""

import gzip
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import scipy.sparse
from anndata.io import read_elem, sparse_dataset

from tokenization.labels_dcm import shortened
from training.data.command_line import ProgressReport
from training.data.h5ad import (
    CellBuckets,
    CountFile,
    DenseRows,
    StoredRows,
    TokenRows,
    damage_named,
    open_h5ad,
    read_known,
    read_table,
    refuse_zarr,
    sorted_by_cell,
)
from training.data.shards import COUNTS

RAW = "raw"
GENE_EXPRESSION = "Gene Expression"
FEATURES = ("name", "id", "feature_type")
MTX_LINES = 2**20
GENE_TABLE, BARCODE = "gene_metadata.parquet", "BARCODE_SUB_LIB_ID"  # of Tahoe-100M
MTX_FILES = {"matrix": ("matrix.mtx",), "features": ("features.tsv", "genes.tsv"), "barcodes": ("barcodes.tsv",)}


def open_counts(path: Path, scratch: Path, layer: str | None = None) -> CountFile:
    """Find the counts of one file or folder, and read all that is beside them.

    Args:
        path: an h5ad file, a 10x ``.h5`` file, or a folder with ``matrix.mtx``, ``features.tsv`` (or ``genes.tsv``)
            and ``barcodes.tsv``, each of them also as ``.gz``, or Parquet with the lists ``genes`` and ``expressions``
            and a table of genes beside it.
        scratch: folder for counts that must be sorted by cell first; need not exist, removed by the caller.
        layer: of an h5ad file, a layer, or ``"raw"`` for ``raw.X`` (unless a layer has that name); default ``X``.
    """
    refuse_zarr(path)
    is_10x = _is_10x(path)
    if layer is not None and (path.is_dir() or is_10x or path.suffix == ".parquet"):
        raise ValueError(f"--layer {layer!r} was given, but {str(path)!r} has no layers: leave it out")
    if path.name.removesuffix(".gz").endswith(".mtx") and not path.is_dir():
        raise ValueError(f"{str(path)!r} has no names of genes and cells; give its folder, with features and barcodes")
    if path.is_dir():
        file = _open_mtx(path, scratch)
    elif is_10x:
        file = _open_10x(path)
    elif path.suffix == ".parquet":
        file = _open_rows(path)
    else:
        file = _open_h5ad(path, scratch, layer)
    num_cells, num_genes = len(file.obs), len(file.var)
    if file.matrix.shape != (num_cells, num_genes):
        raise ValueError(
            f"{str(path)!r} has counts of shape {file.matrix.shape} for {num_cells} cells, {num_genes} genes"
        )
    if not num_cells or not num_genes:
        raise ValueError(f"{str(path)!r} has {num_cells} cells and {num_genes} genes; expected some of both")
    file.obs.index, file.var.index = file.obs.index.astype(str), file.var.index.astype(str)
    return file


@contextmanager
def opened_counts(path: Path, layer: str | None = None) -> Iterator[CountFile]:
    """Open one file as :func:`open_counts`; what must be sorted lies in the system's folder for temporary files."""
    with tempfile.TemporaryDirectory() as scratch:
        yield open_counts(path, Path(scratch) / "sorted", layer)


def read_counts(path: Path, layer: str | None = None) -> anndata.AnnData:
    """Read a file into memory, every value checked: int32 counts as CSR in ``X``, ``obs``, ``var`` and ``uns``."""
    with opened_counts(path, layer) as file:
        blocks = [counts.astype(np.int32) for _, counts in file.blocks(f"reading {path.name}", check=True)]
        uns = {}
        if h5py.is_hdf5(path):
            with damage_named(path), h5py.File(path, "r") as source:
                uns = read_known(source["uns"]) if "uns" in source else {}
        return anndata.AnnData(scipy.sparse.vstack(blocks, format="csr"), obs=file.obs, var=file.var, uns=uns)


def write_counts(path: Path, adata: anndata.AnnData, layer: str | None = None) -> None:
    """Write the counts, names and labels of cells in memory to an h5ad file, and what ``uns`` says for this package."""
    if layer is not None and layer not in adata.layers:
        raise ValueError(f"there is no layer {layer!r}; layers there: {', '.join(adata.layers) or 'none'}")
    counts = adata.X if layer is None else adata.layers[layer]
    uns = {name: adata.uns[name] for name in adata.uns if name.startswith("dcm_")}
    obs = adata.obs.set_axis(adata.obs_names.astype(str))
    anndata.AnnData(counts, obs=obs, var=adata.var[[]], uns=uns).write_h5ad(path)


# --- h5ad -------------------------------------------------------------------------------------------------------------


def _open_h5ad(path: Path, scratch: Path, layer: str | None) -> CountFile:
    with open_h5ad(path) as file:
        layers = sorted(file.get("layers", ()))
        raw_group = f"{RAW}/" if f"{RAW}/X" in file else f"{RAW}."  # anndata 0.6 wrote raw.X and raw.var
        known = layers + [RAW] * (RAW not in layers and f"{raw_group}X" in file)
        if layer is not None and layer not in known:
            raise ValueError(f"{str(path)!r} has no layer {layer!r}; layers there: {', '.join(known) or 'none'}")
        if layer is None and "X" not in file:
            raise ValueError(f"{str(path)!r} has no X; pass --layer with one of: {', '.join(known)}")
        raw = layer == RAW and RAW not in layers
        name = f"{raw_group}X" if raw else "X" if layer is None else f"layers/{layer}"
        with damage_named(path):
            obs, var = read_table(file, "obs"), read_table(file, f"{raw_group}var" if raw else "var")
            panels = read_elem(file["uns/dcm_panels"]) if not raw and "uns/dcm_panels" in file else None
            element = file[name]
            if isinstance(element, h5py.Dataset):
                matrix = DenseRows(path, name, element.shape)
            elif (stored := sparse_dataset(element)).format == "csr":
                matrix = StoredRows(path, name, stored.shape)
            else:
                matrix = sorted_by_cell(path, element, stored.shape, scratch)
    source = "X" if layer is None else "raw.X" if raw else f"layer {layer!r}"
    others = [name for name in known if name != layer]
    return CountFile(path, f"{source} of {path.name}", matrix, obs, var, others, panels=panels)


# --- 10x --------------------------------------------------------------------------------------------------------------


def _is_10x(path: Path) -> bool:
    """Whether this is an HDF5 file with 10x's ``matrix`` and not AnnData's ``obs``."""
    if not path.is_file() or not h5py.is_hdf5(path):
        return False
    with damage_named(path), h5py.File(path, "r") as file:
        return isinstance(file.get("matrix"), h5py.Group) and "obs" not in file


def _open_10x(path: Path) -> CountFile:
    """The ``.h5`` of Cell Ranger 3 and later: features x barcodes by column, which is cells x genes by row."""
    with damage_named(path), h5py.File(path, "r") as file:
        group = file["matrix"]
        lacking = [name for name in FEATURES if name not in group.get("features", ())]
        if lacking:
            raise ValueError(
                f"{str(path)!r} looks like 10x output, but matrix/features has no {', '.join(lacking)}; expected "
                f"{', '.join(FEATURES)}: write it again with them, or as h5ad"
            )
        features = {name: group["features"][name].asstr()[:] for name in FEATURES}
        barcodes = group["barcodes"].asstr()[:]
        matrix = StoredRows(path, "matrix", group["shape"][:][::-1])
    return _file_of_10x(path, barcodes, features, matrix)


def _file_of_10x(path: Path, barcodes, features: dict, matrix: StoredRows | CellBuckets) -> CountFile:
    columns = {"gene_ids": features["id"], "feature_types": features["feature_type"]}
    var = pd.DataFrame(columns, index=pd.Index(features["name"]))
    are_genes = np.asarray(var["feature_types"] == GENE_EXPRESSION)
    if not are_genes.any():
        raise ValueError(
            f"{str(path)!r} has no features of the type {GENE_EXPRESSION!r}; types there: "
            f"{shortened(var['feature_types'].unique())}"
        )
    obs = pd.DataFrame(index=pd.Index(barcodes))
    return CountFile(path, f"matrix of {path.name}", matrix, obs, var, are_genes=are_genes)


def _open_mtx(path: Path, scratch: Path) -> CountFile:
    """A folder of ``matrix.mtx`` (features x barcodes), ``features.tsv`` (Cell Ranger 2: ``genes.tsv``), barcodes."""
    files = {kind: _mtx_file(path, names) for kind, names in MTX_FILES.items()}
    options = {"sep": "\t", "header": None, "dtype": str, "keep_default_na": False, "quoting": 3}
    with damage_named(files["features"]):
        features = pd.read_csv(files["features"], **options)
    if features.shape[1] < 2:
        raise ValueError(f"{str(files['features'])!r} has one column; expected gene id, gene name and feature type")
    with damage_named(files["barcodes"]):
        barcodes = pd.read_csv(files["barcodes"], **options)[0]
    kinds = features[2] if features.shape[1] > 2 else pd.Series(GENE_EXPRESSION, index=features.index)
    columns = {"id": features[0].tolist(), "name": features[1].tolist(), "feature_type": kinds.tolist()}
    return _file_of_10x(path, barcodes.tolist(), columns, _read_mtx(files["matrix"], scratch))


def _mtx_file(folder: Path, names: tuple[str, ...]) -> Path:
    candidates = [folder / (name + ending) for name in names for ending in ("", ".gz")]
    found = [path for path in candidates if path.is_file()]
    if not found:
        is_full = any(folder.glob("*.h5ad"))
        raise FileNotFoundError(
            f"no {' or '.join(names)} (or .gz) in the folder {str(folder)!r}; expected a 10x folder with matrix.mtx, "
            f"features.tsv and barcodes.tsv{'; its h5ad files are given by name: *.h5ad' if is_full else ''}"
        )
    return found[0]


def _read_mtx(path: Path, scratch: Path) -> CellBuckets:
    """Sort the entries of a Matrix Market file (genes x cells) by cell."""
    opened = gzip.open if path.suffix == ".gz" else open
    with damage_named(path), opened(path, "rt", encoding="utf-8-sig") as file:
        header = file.readline().lower().split()
        if header[:3] != ["%%matrixmarket", "matrix", "coordinate"] or header[3] not in ("integer", "real"):
            raise ValueError(f"{str(path)!r} is not a sparse Matrix Market file of numbers: it begins {header[:4]}")
        sizes = next((line.split() for line in file if not line.startswith("%")), [])
        if len(sizes) != 3 or not all(map(str.isdecimal, sizes)):
            raise ValueError(f"{str(path)!r} does not say its numbers of genes, cells and entries; copy it again")
        num_genes, num_cells, stored = map(int, sizes)
        if not stored:
            raise ValueError(f"{str(path)!r} has no counts: it announces 0 entries of {num_genes:,} x {num_cells:,}")
        dtype = np.int64 if header[3] == "integer" else np.float64
        buckets = CellBuckets(scratch, (num_cells, num_genes), np.dtype(dtype))
        read = 0
        types = {"gene": np.int64, "cell": np.int64, "value": dtype}
        chunks = pd.read_csv(file, sep=r"\s+", header=None, names=list(types), dtype=types, chunksize=MTX_LINES)
        with ProgressReport(stored, task=f"sorting {path.name}", unit="values") as report:
            for chunk in chunks:
                for axis, size in (("gene", num_genes), ("cell", num_cells)):
                    if chunk[axis].min() < 1 or chunk[axis].max() > size:
                        raise ValueError(f"{str(path)!r} has {axis} numbers outside 1 to {size:,}; copy it again")
                buckets.add(chunk["cell"].to_numpy() - 1, chunk["gene"].to_numpy() - 1, chunk["value"].to_numpy())
                read += len(chunk)
                report.update(len(chunk))
    if read != stored:
        raise ValueError(f"{str(path)!r} has {read:,} entries but announces {stored:,}: it is cut short; copy it again")
    return buckets


# --- rows of Parquet --------------------------------------------------------------------------------------------------


def _open_rows(path: Path) -> CountFile:
    """One file of Tahoe-100M (or of its schema): each row is a cell, with the tokens of its genes and their counts.

    ``gene_metadata.parquet`` (columns ``token_id``, ``ensembl_id``, ``gene_symbol``) stands beside the file or in
    ``../metadata/``, as in the published data set.
    """
    places = [folder / GENE_TABLE for folder in (path.parent, path.absolute().parent.parent / "metadata")]
    table = next((place for place in places if place.is_file()), None)
    if table is None:
        raise FileNotFoundError(
            f"no {GENE_TABLE} beside {str(path)!r} or in ../metadata/; expected the table of its genes (columns "
            "token_id, ensembl_id, gene_symbol)"
        )
    with damage_named(table):
        var = pq.read_table(table).to_pandas()
    with damage_named(path):
        names = pq.read_schema(path).names
        lacking = [name for name in COUNTS if name not in names]
        if lacking or not {"token_id", "ensembl_id"} <= set(var):
            what = f"column {lacking[0]!r}" if lacking else f"column token_id or ensembl_id in {str(table)!r}"
            raise ValueError(f"{str(path)!r} has no {what}; expected lists of genes and expressions, and their table")
        obs = pq.read_table(path, columns=[name for name in names if name not in COUNTS])
        obs = obs.to_pandas(strings_to_categorical=True)
    matrix = TokenRows(path, (len(obs), len(var)), var.pop("token_id").to_numpy())
    barcodes = obs.pop(BARCODE) if BARCODE in obs else pd.Series([f"{path.stem}-{row}" for row in range(len(obs))])
    obs.index, var.index = pd.Index(barcodes.astype(str)), pd.Index(var["ensembl_id"].astype(str))
    return CountFile(path, f"expressions of {path.name}", matrix, obs, var)
