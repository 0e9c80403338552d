"""Vectors of perturbations by name: the table that training freezes, files of vectors, and vectors from the cells.

A table is a safetensors file. Its metadata list the names that have no vector and are to have a learned one; a name
that is neither here nor there was forgotten, and training refuses it. Letters: D, length of the vectors; N control
cells, G genes, S cell types, C components.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import anndata
import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from scipy import sparse
from scipy.sparse.linalg import LinearOperator, svds

from tokenization.labels_dcm import shortened
from training.data.files import sha256_of, written_aside

if TYPE_CHECKING:
    from training.data.loader import Cells

logger = logging.getLogger(__name__)

ABOUT = "dcm_embed"  # the file's one key of metadata: safetensors writes several in an arbitrary order
WITHOUT_VECTOR = "without_vector"
COMPONENTS = 64  # of each table that is joined with others
TARGET_SUM = 1e4


@dataclass(frozen=True)
class PerturbationTable:
    """What a file says of perturbations."""

    vectors: dict[str, torch.Tensor]  # (D,) float32, by name
    without_vector: frozenset[str]  # names that are to have a learned vector instead
    sha256: str  # of the file

    @property
    def dim(self) -> int:
        """D."""
        return len(next(iter(self.vectors.values())))


def write_table(
    table: Mapping[str, torch.Tensor], out: Path, about: Mapping[str, object], without_vector: Iterable[str] = ()
) -> None:
    """Write vectors (D,) by name as float32, with ``about`` and the names without a vector as JSON in the metadata."""
    vectors = {name: vector.detach().float().clone() for name, vector in sorted(table.items())}
    dim = _dim(vectors, "the table")
    said = json.dumps({**about, WITHOUT_VECTOR: sorted(without_vector)}, sort_keys=True)
    with written_aside(out) as aside:
        save_file(vectors, aside, metadata={ABOUT: said})
    logger.info("%s: %d vectors of length %d", out, len(vectors), dim)


def read_table(path: Path, control: str | None) -> PerturbationTable:
    """Read a table, of ``dcm-embed`` or any safetensors file with vectors by name; the ``control``'s is left out, as it
    is always learned.
    """
    try:
        with safe_open(path, "pt") as file:
            vectors = {name: file.get_tensor(name).float().flatten() for name in file.keys()}  # noqa: SIM118
            about = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is not a safetensors file ({error})") from error
    vectors.pop(control, None)
    _dim(vectors, repr(str(path)))
    without = frozenset(about.get(WITHOUT_VECTOR, ())) - {control}
    return PerturbationTable(vectors, without, sha256_of(path))


def read_vectors(path: Path, key: str | None = None) -> dict[str, torch.Tensor]:
    """Read vectors by name, running no code of the file.

    Args:
        path: safetensors, ``.npz`` or ``.json`` (an array to each name), a ``.pt`` dictionary, ``.csv``, ``.tsv`` or
            ``.parquet`` (a row to each name, which stands in the first column or the index), or ``.h5ad`` (a row of X
            to each name of ``obs``).
        key: in ``.h5ad``, of obsm instead of X.
    """
    try:
        table = _read(path, key)
        vectors = {str(name): torch.as_tensor(vector).float().flatten() for name, vector in table.items()}
    except Exception as error:  # whatever the readers of these formats raise
        raise _unreadable(path, error) from error
    if not vectors:
        raise ValueError(f"{str(path)!r} holds no vector")
    return vectors


def _unreadable(path: Path, error: Exception) -> ValueError:
    kinds = "safetensors, .npz, .json, .pt, .csv, .tsv, .parquet or .h5ad"
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return ValueError(f"{str(path)!r} cannot be read ({first}); expected {kinds} with a vector of numbers to each name")


def _read(path: Path, key: str | None) -> Mapping[str, object]:
    if path.suffix in (".pt", ".pth"):
        return torch.load(path, map_location="cpu", weights_only=True)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name].astype(np.float32) for name in arrays.files}
    if path.suffix == ".json":
        return {name: np.asarray(vector, dtype=np.float32) for name, vector in json.loads(path.read_text()).items()}
    if path.suffix == ".h5ad":
        cells = anndata.read_h5ad(path)
        values = cells.X if key is None else cells.obsm[key]
        values = values.toarray() if sparse.issparse(values) else np.asarray(values)
        return dict(zip(cells.obs_names, values.astype(np.float32)))
    if path.suffix in (".csv", ".tsv", ".parquet"):
        frame = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, sep=None, engine="python")
        if path.suffix != ".parquet" or not pd.api.types.is_numeric_dtype(frame.dtypes.iloc[0]):
            frame = frame.set_index(frame.columns[0])
        if frame.index.has_duplicates:
            raise ValueError(f"{frame.index[frame.index.duplicated()][0]} stands more than once")
        return dict(zip(frame.index, frame.to_numpy(dtype=np.float32)))
    return load_file(path)


def joined(tables: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Join tables: each is whitened to at most :data:`COMPONENTS` components, of together one unit of mean squared
    length, and a last number says whether it has the name; where it has not, the others are 0."""
    names = list(dict.fromkeys(name for table in tables for name in table))
    parts = []
    for number, table in enumerate(tables, start=1):
        _dim(table, f"table {number}")
        known = torch.stack([table[name] for name in table]).double()
        u, s, _ = torch.linalg.svd(known - known.mean(dim=0), full_matrices=False)
        rank = min(int((s > 1e-6 * s[0]).sum()), COMPONENTS)
        whitened = dict(zip(table, u[:, :rank] * (len(known) / max(rank, 1)) ** 0.5))
        absent = known.new_zeros(rank)
        of_all = [torch.cat([whitened.get(name, absent), absent.new_tensor([name in table])]) for name in names]
        parts.append(torch.stack(of_all))
    return dict(zip(names, torch.cat(parts, dim=1).float()))


def _dim(vectors: Mapping[str, torch.Tensor], where: str) -> int:
    """The one length of the vectors, each finite and not all zero."""
    lengths = sorted({len(vector) for vector in vectors.values()})
    if len(lengths) != 1:
        raise ValueError(f"{where} holds vectors of lengths {lengths}, expected one length")
    broken = [name for name, vector in vectors.items() if not bool(vector.isfinite().all() and vector.any())]
    if broken:
        raise ValueError(f"{where}: vectors that are not finite, or all zero: {shortened(broken, 20)}")
    return lengths[0]


# --- coexpression -----------------------------------------------------------------------------------------------------


def coexpression_vectors(cells: "Cells", num_components: int) -> dict[str, np.ndarray]:
    """Compute a vector (C,) float32 for each gene that the training controls express.

    Principal components of log1p counts per 10,000 of the controls (of all cells, where no perturbation is known),
    centred within each cell type, so that types do not pass for coexpression. A loading is the component's weight
    times its standard deviation; the sign of a component makes its largest weight positive; all loadings are divided
    by their root mean square over the genes, one number for all of them. C is at most one less than controls and genes.

    Raises:
        ValueError: cells of another split, no controls, or too many components.
    """
    if cells.split != "train":
        raise ValueError(f"coexpression of the {cells.split} split; expected train: other cells are held out")
    controls = _controls(cells)
    counts = cells.csr(controls)
    N, G = counts.shape
    if not 1 <= num_components < min(N, G):
        raise ValueError(f"components is {num_components}; expected 1 to {min(N, G) - 1} ({N} controls, {G} genes)")
    type_ids = cells.conditions.get("cell_type_ids")
    types = np.zeros(N, dtype=np.int64) if type_ids is None else type_ids.numpy()[controls]
    loadings = _loadings(_log_normalised(counts), np.unique(types, return_inverse=True)[1], num_components)
    expressed = np.flatnonzero(np.diff(counts.tocsc().indptr))
    scale = np.sqrt(np.mean(loadings[expressed] ** 2))
    logger.info("coexpression of %d controls: %d of %d genes are expressed", N, len(expressed), G)
    return {cells.tokenizer.genes[gene]: (loadings[gene] / scale).astype(np.float32) for gene in expressed}


def _controls(cells: "Cells") -> np.ndarray:
    tokenizer = cells.tokenizer
    if not tokenizer.perturbations:
        return np.arange(len(cells))
    if tokenizer.control is None:
        raise ValueError("the shards name no control: coexpression is measured among controls; convert with --control")
    ids = cells.conditions["perturbation_ids"].numpy()
    rows = np.flatnonzero(ids[:, 0] == tokenizer.perturbations.index(tokenizer.control))
    if not len(rows):
        raise ValueError(f"no training cell has the control {tokenizer.control!r}: coexpression is measured among them")
    return rows


def _log_normalised(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    totals = np.asarray(counts.sum(axis=1)).ravel()
    data = np.log1p(counts.data * np.repeat(TARGET_SUM / np.maximum(totals, 1), np.diff(counts.indptr)))
    return sparse.csr_matrix((data, counts.indices, counts.indptr), shape=counts.shape)


def _loadings(x: sparse.csr_matrix, types: np.ndarray, C: int) -> np.ndarray:
    """Loadings (G, C) of the principal components of ``x`` (N, G) centred within ``types`` (N,), largest first.

    The centred matrix is never built: it is ``x`` less the mean of each cell's type, as an operator.
    """
    N, G = x.shape
    member = sparse.csr_matrix((np.ones(N), (np.arange(N), types)))  # (N, S)
    means = (member.T @ x).toarray() / np.asarray(member.sum(axis=0)).ravel()[:, None]  # (S, G)
    centred = LinearOperator(
        shape=(N, G),
        matvec=lambda v: x @ v.ravel() - member @ (means @ v.ravel()),
        rmatvec=lambda u: x.T @ u.ravel() - means.T @ (member.T @ u.ravel()),
        dtype=np.float64,
    )
    start = np.random.default_rng(0).standard_normal(min(N, G))
    _, deviations, weights = svds(centred, k=C, v0=start, solver="arpack")
    order = np.argsort(-deviations)
    weights, deviations = weights[order], deviations[order]
    signs = np.sign(weights[np.arange(C), np.abs(weights).argmax(axis=1)])
    return (weights * (signs * deviations / np.sqrt(max(1, N - 1)))[:, None]).T
