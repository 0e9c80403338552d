"""Folders that a conversion works in: none looks finished before it is, and what a killed run left is removed later.

A working folder stands beside the result as ``.NAME.XXXXXXXX.part``. Its process holds a lock on it, which the system
takes back when the process ends in whatever way; folders without one are leftovers. Knows nothing of what is in them.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenization.files import written_aside

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


def remove_leftovers(out: Path) -> None:
    """Remove working folders of ``out`` whose process was killed; those of living processes stay."""
    hexadecimal = "[0-9a-f]" * 8
    for parent in {out.parent, _existing_parent(out)}:
        for folder in sorted(parent.glob(f".{out.name}.{hexadecimal}.part")):
            with contextlib.suppress(BlockingIOError), _lock(folder):
                logger.info("removing %s, which an interrupted conversion left", folder)
                shutil.rmtree(folder)


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.is_dir())


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    folder.mkdir()
    with _lock(folder):
        yield


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; BlockingIOError if another process does."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
