"""Write files and folders so that a crash leaves the last good state, and remove what a killed run left.

What is written stands beside its place as ``.NAME.DIGITS.part`` until it is whole. The process that writes to such a
folder holds a lock on it, which the system takes back when the process ends in whatever way; folders that nobody holds
are leftovers.
"""

import contextlib
import fcntl
import glob
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenization.labels_dcm import read_names

logger = logging.getLogger(__name__)

DIGITS = "[0-9a-f]" * 8


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


def read_list(path: Path, option: str) -> list[str]:
    """Names of a text file, one per line, in order; ``option`` is what it was given by."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r} ({option}); expected a text file with one name per line")
    names = read_names(path)
    if not names:
        raise ValueError(f"{str(path)!r} ({option}) is empty; expected one name per line")
    return names


def check_writable(out: Path) -> None:
    """Raise OSError unless a file ``out`` can be written, before the work that fills it."""
    if out.is_dir():
        raise IsADirectoryError(f"--out {str(out)!r} is a folder; expected the h5ad file to write")
    nearest = next(folder for folder in out.absolute().parents if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"--out {str(out)!r} cannot be written: {str(nearest)!r} is no folder to write into")


def check_folder(out: Path) -> None:
    """Raise ValueError unless ``out`` is a folder or may become one."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {str(out)!r} is a file; expected a folder")


def followed(path: str | Path) -> Path:
    """What a symbolic link points to, which is what gets written; any other path as it is."""
    path = Path(path)
    return path.resolve() if path.is_symlink() else path


def check_readable(path: str | Path) -> None:
    """Raise PermissionError for a file or folder that is there and that this user must not read."""
    if os.path.exists(path) and not os.access(path, os.R_OK):
        raise PermissionError(f"no permission to read {str(path)!r}; ask its owner")


def share(path: str | Path) -> None:
    """Give a file, or the files of a folder, the mode of any new file: safetensors makes them 0600."""
    umask = os.umask(0)
    os.umask(umask)
    path = Path(path)
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file() and not file.is_symlink():
            file.chmod(0o666 & ~umask)


@contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write a file or a folder to; rename it to ``path`` when the block succeeds.

    An existing ``path`` is replaced only at the end; when the block raises, what was written is removed and ``path``
    is as it was before. A folder cannot be replaced in one move: if a process was killed between the two, the old one
    is put back here.
    """
    path = followed(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(path.parent, path.name)
    try:
        yield aside
        share(aside)
        if aside.is_dir():
            put_back(path)
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
            if aside.is_file():
                with aside.open("rb") as file:
                    os.fsync(file.fileno())  # the bytes before the name
            os.replace(aside, path)
    except BaseException:
        put_back(path)  # not at each file that is written: it lists the folder
        raise
    finally:
        if aside.is_dir():
            shutil.rmtree(aside)
        else:
            aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file aside, and rename it."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file that a person can read, likewise."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def put_back(path: Path) -> None:
    """Finish or undo what processes that were killed while they replaced a folder left beside it."""
    left = path.parent.glob(f".{glob.escape(path.name)}.{DIGITS}.old")
    for old in sorted(left, key=lambda folder: folder.stat().st_mtime):
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            logger.warning("putting %s back, which an interrupted run was about to replace", path)
            os.replace(old, path)


def _aside(folder: Path, name: str) -> Path:
    return folder / f".{name}.{uuid.uuid4().hex[:8]}.part"


# --- folders that a process holds while it writes ---------------------------------------------------------------------


@contextmanager
def folder_written_aside(out: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``out`` when the block succeeds, and is removed when it raises."""
    with written_aside(out) as folder, _held(folder):
        yield folder


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder for temporary files on the file system of ``out``; it is removed at the end."""
    out = followed(out)
    folder = _aside(_existing_parent(out), out.name)
    try:
        with _held(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_replaceable(out: Path, *, mark: str, written: Collection[str]) -> None:
    """Raise ValueError unless the folder ``out`` is absent, empty, or holds nothing but what an earlier run wrote.

    ``mark`` is the name of a file that every run writes, ``written`` are the names of all that a run writes.
    """
    if not out.exists():
        return
    check_folder(out)
    names = {path.name for path in out.iterdir()}
    if names and mark not in names:
        raise ValueError(f"--out {str(out)!r} exists and holds no conversion; remove it or name another folder")
    others = sorted(names - set(written))
    if others:
        raise ValueError(
            f"--out {str(out)!r} holds a conversion and other things ({', '.join(others[:5])}) that replacing it would "
            "delete; move them or name another folder"
        )
    if names:
        logger.info("replacing the conversion in %s", out)


def remove_leftovers(out: Path) -> None:
    """Remove working folders of ``out`` whose processes were killed; those of living processes stay.

    A run that was killed between the two renames that replace ``out`` left it under another name: it is put back.
    """
    out = followed(out)
    put_back(out)
    for parent in {out.parent, _existing_parent(out)}:
        for folder in sorted(parent.glob(f".{glob.escape(out.name)}.{DIGITS}.part")):
            with contextlib.suppress(BlockingIOError), _locked(folder, fcntl.LOCK_EX):
                logger.info("removing %s, which an interrupted conversion left", folder)
                shutil.rmtree(folder)


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.is_dir())


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    folder.mkdir()
    with _locked(folder, fcntl.LOCK_SH):
        yield


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
