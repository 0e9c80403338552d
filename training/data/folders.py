"""Folders that a conversion works in: none looks finished before it is, and what a killed run left is removed later.

A working folder stands beside the result as ``.NAME.DIGITS.part``. Every process that writes to it shares a lock on
it, which the system takes back when the process ends in whatever way; folders that nobody holds are leftovers. Knows
nothing of what is in them.
"""

import contextlib
import fcntl
import glob
import logging
import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from training.data.files import put_back, written_aside

logger = logging.getLogger(__name__)


@contextmanager
def folder_written_aside(out: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``out`` when the block succeeds, and is removed when it raises."""
    with written_aside(out) as folder, _held(folder):
        yield folder


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder for temporary files on the file system of ``out``; it is removed at the end."""
    folder = _existing_parent(out) / f".{out.name}.{uuid.uuid4().hex[:8]}.part"
    try:
        with _held(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_replaceable(out: Path, *, mark: str, written: Collection[str]) -> None:
    """Raise unless ``out`` may be (re)placed: absent, empty, or nothing but what an earlier run wrote.

    Args:
        out: the folder.
        mark: name of a file that every run writes.
        written: names of all that a run writes.

    Raises:
        ValueError: replacing the folder would delete something else.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"--out {str(out)!r} is a file; expected a folder")
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
    put_back(out)
    for parent in {out.parent, _existing_parent(out)}:
        for folder in sorted(parent.glob(f".{glob.escape(out.name)}.{'[0-9a-f]' * 8}.part")):
            with contextlib.suppress(BlockingIOError), _locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
                logger.info("removing %s, which an interrupted conversion left", folder)
                shutil.rmtree(folder)


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def hold(folder: Path) -> int:
    """Share the lock of a folder until this process ends or closes the descriptor that is returned.

    Raises:
        BlockingIOError: somebody is removing the folder.
    """
    return _lock(folder, fcntl.LOCK_SH | fcntl.LOCK_NB)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    folder.mkdir()
    with _locked(folder, fcntl.LOCK_SH | fcntl.LOCK_NB):
        yield


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    descriptor = _lock(folder, how)
    try:
        yield
    finally:
        os.close(descriptor)


def _lock(folder: Path, how: int) -> int:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, how)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
