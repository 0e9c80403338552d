"""Turn a typed, documented ``main`` into a command line, and say how far a long task is.

Every stage (``dcm-convert``, ``dcm-train``, ...) is a plain function; tyro makes its options from the signature and its
help from the docstring. A mistake of the user is one line on stderr and exit code 2, never a traceback; set
``DCM_TRACEBACK=1`` to see the traceback all the same.
"""

import ctypes
import importlib.metadata
import inspect
import logging
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30


def run(main: Callable[..., object]) -> None:
    """Run ``main`` with the options of the command line; exit 2 on a ``ValueError`` or ``OSError`` that it raises."""
    import tyro

    with user_errors():
        tyro.cli(main)


@contextmanager
def user_errors() -> Iterator[None]:
    """Log to stderr, and end the program with one line and exit code 2 on a ``ValueError`` or ``OSError``, or 130 on
    Ctrl-C."""
    keep_freed_memory()
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[AboveBars(sys.stderr)])
    for noisy in ("httpx", "httpx2", "datasets", "accelerate", "fsspec", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("DCM_TRACEBACK") == "1":
            raise
        message = " ".join(str(error).split())
        with bars_cleared():
            sys.stderr.write(f"error: {message}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        with bars_cleared():
            sys.stderr.write("interrupted\n")
        sys.exit(130)


class AboveBars(logging.StreamHandler):
    """Writes lines to the terminal above the progress bars that are open there."""

    def emit(self, record: logging.LogRecord) -> None:
        with bars_cleared():
            super().emit(record)


def bars_cleared() -> AbstractContextManager:
    """Context in which no bar of tqdm, which need not be imported, stands on the terminal's last lines."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    return nullcontext() if tqdm is None else tqdm.external_write_mode(file=sys.stderr)


def version_of(package: str) -> str | None:
    """Return the installed version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions_of(packages: Iterable[str]) -> dict[str, str | None]:
    """Return the versions of Python and of packages, for whoever reads the numbers that they made."""
    return {"python": platform.python_version()} | {package: version_of(package) for package in packages}


def command_of(program: str, main: Callable[..., object], arguments: dict[str, object]) -> str:
    """Return the command line that gives ``main`` these arguments: the first is positional, defaults are left out."""
    words, parameters = [], inspect.signature(main).parameters
    for position, (name, parameter) in enumerate(parameters.items()):
        value, option = arguments[name], "--" + name.replace("_", "-")
        if value == parameter.default:
            continue
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        else:
            values = value if isinstance(value, tuple) else [value]
            words += [option] * (position > 0) + [str(part) for part in values]
    return f"{program} {shlex.join(words)}"


def keep_freed_memory() -> None:
    """Let glibc, where there is one, reuse large freed blocks: a network asks for the same sizes again and again.

    Handed back to the system, every page would be cleared again before its next use.
    """
    mmap_threshold, trim_threshold = -3, -1  # of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(mmap_threshold, 2**25)  # the largest value that glibc accepts
    mallopt(trim_threshold, 2**31 - 1)


class ProgressReport:
    """Counts the units of a task that are done: a bar on a terminal, one line per half minute elsewhere.

    Used as a context; what ends within a second is not reported.

    Args:
        total: units in all.
        task: what is done, in the words of the user.
        unit: what is counted, such as ``"cells"``.
    """

    def __init__(self, total: float, *, task: str, unit: str):
        from tqdm import tqdm

        self.total, self.task, self.unit = total, task, unit
        self.done = 0
        self.start = self.last_line = time.monotonic()
        self.is_terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, desc=task, unit=f" {unit}", unit_scale=True, delay=1, disable=not self.is_terminal)

    def __enter__(self) -> "ProgressReport":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()

    @property
    def rate(self) -> float:
        """Units per second so far."""
        return self.done / max(time.monotonic() - self.start, 1e-9)

    def update(self, units: float) -> None:
        """Note that ``units`` more are done."""
        self.done += units
        self.bar.update(units)
        now = time.monotonic()
        if self.is_terminal or now - self.last_line < SECONDS_BETWEEN_LINES:
            return
        self.last_line, rate = now, self.done / (now - self.start)
        left = (self.total - self.done) / max(rate, 1e-9)
        line = "%s: %d of %d %s, %.3g per second, %.0f s left"
        logger.info(line, self.task, self.done, self.total, self.unit, rate, left)
