"""The table that training freezes: one safetensors file with a vector for each perturbation's name.

Its metadata list the names that have no vector and are to have a learned one; a name that is neither here nor there was
forgotten, and training refuses it. Letter: D, length of the vectors.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from scipy import sparse

from tokenization.labels_dcm import shortened
from training.data.files import sha256_of, written_aside

logger = logging.getLogger(__name__)

ABOUT = "dcm_embed"  # the file's one key of metadata: safetensors writes several in an arbitrary order
WITHOUT_VECTOR = "without_vector"
COMPONENTS = 64  # of each table that is joined with others


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
