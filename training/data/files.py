"""Read h5ad files with errors that say what to do, and write files so that a crash leaves the last good state.

Knows nothing of models, vocabularies or shards.
"""

import glob
import hashlib
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anndata
import h5py

logger = logging.getLogger(__name__)


@contextmanager
def damage_explained(path: str | Path) -> Iterator[None]:
    """Turn what HDF5 and AnnData raise while reading ``path`` inside the block into one ValueError about the file."""
    try:
        yield
    except (OSError, KeyError, RuntimeError, anndata._io.utils.AnnDataReadError) as error:
        raise ValueError(
            f"{str(path)!r} cannot be read ({type(error).__name__}: {error}); it looks cut short or damaged: "
            "copy it again"
        ) from error


def open_h5ad(path: str | Path) -> h5py.File:
    """Open an h5ad file as HDF5, to read parts of it without loading the rest; the caller closes it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, not HDF5, cut short, or HDF5 without AnnData's layout.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}; expected an h5ad file")
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{str(path)!r} is empty (0 bytes); write or copy it again")
    if not h5py.is_hdf5(path):
        raise ValueError(f"{str(path)!r} is not an h5ad file (no HDF5 signature in its {size:,} bytes)")
    with damage_explained(path):
        file = h5py.File(path, "r")
    missing = [name for name in ("obs", "var") if name not in file]
    if "X" not in file and not len(file.get("layers", ())):
        missing.append("X and no layers")
    if missing:
        file.close()
        raise ValueError(f"{str(path)!r} is HDF5 but not an h5ad file: it has no {', no '.join(missing)}")
    return file


def read_h5ad(path: str | Path, *, backed: bool = False) -> anndata.AnnData:
    """Open an h5ad file.

    Args:
        path: the file.
        backed: leave the counts on disk (``AnnData(backed="r")``).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, not HDF5, cut short, or HDF5 without AnnData's layout.
    """
    open_h5ad(path).close()
    with damage_explained(path):
        return anndata.read_h5ad(path, backed="r" if backed else None)


def sha256_of(path: str | Path) -> str:
    """Compute the SHA-256 of a file, or of the names and contents of all files below a folder, in hexadecimal."""
    path = Path(path)
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


@contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write a file or a folder to; rename it to ``path`` when the block succeeds.

    An existing ``path`` is replaced only at the end; when the block raises, what was written is removed and ``path``
    is as it was before. A folder cannot be replaced in one move: if a process was killed between the two, the old one
    is put back here.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    put_back(path)
    aside = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.part"
    try:
        yield aside
        if aside.is_dir() and path.is_dir():
            old = aside.with_suffix(".old")
            os.replace(path, old)
            try:
                os.replace(aside, path)
            except OSError:
                if not path.exists():
                    os.replace(old, path)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            _flush(aside)
            os.replace(aside, path)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside)
        else:
            aside.unlink(missing_ok=True)


def put_back(path: Path) -> None:
    """Finish or undo what processes that were killed while they replaced a folder left beside it."""
    left = path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.old")
    for old in sorted(left, key=lambda folder: folder.stat().st_mtime):
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            logger.warning("putting %s back, which an interrupted run was about to replace", path)
            os.replace(old, path)


def _flush(path: Path) -> None:
    """Ask the system to put the bytes of a file on disk before its name is changed."""
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())
