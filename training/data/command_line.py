"""Turn a typed, documented ``main`` into a command line, and say how far a long task is.

Every stage (``dcm-convert``, ``dcm-train``, ...) is a plain function; tyro makes its options from the signature and its
help from the docstring, with a command of its module's docstring as the example. A list is one word with commas, names
with values are ``NAME=VALUE`` in it, and ``none`` is no value. A mistake of the user is one line on stderr and exit
code 2, never a traceback; set ``DCM_TRACEBACK=1`` to see the traceback all the same.
"""

import ctypes
import importlib.metadata
import inspect
import logging
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Union, get_args, get_origin

if TYPE_CHECKING:
    from tyro.constructors import ConstructorRegistry

PACKAGE = "discrete-cell-models"

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30


def run(*mains: Callable[..., object]) -> None:
    """Run ``main``, or the one of several that the first word names, with the options of the command line; exit 2 on a
    ``ValueError`` or ``OSError`` that it raises."""
    with user_errors():
        parse(*mains)


def parse(*mains: Callable[..., object], arguments: list[str] | None = None, **options) -> object:
    """Return what ``main``, a function or a dataclass, or that of several which the first word names, makes of the
    words of the command line, default those of this program; ``options`` are more for :func:`tyro.cli`."""
    import tyro

    if (sys.argv[1:] if arguments is None else arguments) == ["--version"]:
        sys.stdout.write(f"{PACKAGE} {version_of(PACKAGE)}\n")
        sys.exit()
    for main in mains:
        _make_helpful(main)
    module = sys.modules[mains[0].__module__].__doc__
    words = _examples(module)[0].split()
    program = " ".join(words[:3] if words[0] == "python" else words[:1])
    options |= {"prog": program, "registry": grammar(), "args": arguments}
    options["config"] = (tyro.conf.PositionalMetavarFromFieldName,)
    if len(mains) == 1:
        return tyro.cli(mains[0], **options)
    commands = {main.__name__: main for main in mains}
    return tyro.extras.subcommand_cli_from_dict(commands, description=module.partition("\n")[0], **options)


def _make_helpful(main: Callable[..., object]) -> None:
    """Let each option's help be one line, without the line breaks of the source, and say a default only where the text
    does not: it is not None. Put the first command of the module's docstring that names ``main``, or else its first
    one, behind the summary."""
    import docstring_parser
    import tyro

    summary, args, rest = inspect.cleandoc(main.__doc__).partition("\n\nArgs:")
    if "\n\nExample: " in summary:
        return  # done before
    defaults = {name: parameter.default for name, parameter in inspect.signature(main).parameters.items()}
    for option in docstring_parser.parse_from_object(main).params:
        told = {"help_behavior_hint": ""} if defaults[option.arg_name] is None else {}
        words = tyro.conf.arg(help=" ".join(option.description.split()), **told)
        main.__annotations__[option.arg_name] = Annotated[main.__annotations__[option.arg_name], words]
    examples = _examples(sys.modules[main.__module__].__doc__)
    example = next((line for line in examples if f" {main.__name__} " in line), examples[0])
    summary = re.sub(r"(?<!\n)\n(?!\n)", " ", summary)
    main.__doc__ = f"{summary}\n\nExample: {example}" + args + rest


def _examples(text: str) -> list[str]:
    """The commands of a module's docstring: its lines with an indent, those that end in a backslash with the next."""
    return [" ".join(line.split()) for line in re.findall(r"^ {4}(\S.*)", re.sub(r"\\\n *", "", text), re.MULTILINE)]


def grammar() -> "ConstructorRegistry":
    """Return tyro's rules for what may be left out, and for names with values."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        kinds = get_args(info.type)
        if get_origin(info.type) is dict or NoneType not in kinds:
            return None
        given = Union[tuple(kind for kind in kinds if kind is not NoneType)]  # noqa: UP007
        spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(given, info.markers))
        nothing = () if str in kinds else ("none", "None")  # a label may be called none
        return replace(
            spec,
            choices=spec.choices and (*spec.choices, *nothing),
            instance_from_str=lambda words: None if words[0] in nothing else spec.instance_from_str(words),
            is_instance=lambda value: value is None or spec.is_instance(value),
            str_from_instance=lambda value: ["none"] if value is None else spec.str_from_instance(value),
        )

    @registry.primitive_rule
    def named_values(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        if get_origin(info.type) is not dict:
            return None
        kind = get_args(info.type)[1]

        def read(words: list[str]) -> dict[str, object]:
            pairs = [part.partition("=") for part in re.split(",(?=[^,=]+=)", words[0])]
            if not all(name and equals for name, equals, _ in pairs):
                raise ValueError(f"expected NAME=VALUE, with commas between several, not {words[0]!r}")
            return {name: kind(value) for name, _, value in pairs}

        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="NAME=VALUE[,...]",
            instance_from_str=read,
            is_instance=lambda value: isinstance(value, dict),
            str_from_instance=lambda value: [",".join(f"{name}={each}" for name, each in value.items())],
        )

    return registry


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
        said, code = "error: " + " ".join(str(error).split()), 2
    except KeyboardInterrupt:
        said, code = "interrupted", 130
    else:
        return
    with bars_cleared():
        sys.stderr.write(said + "\n")
    sys.exit(code)


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
    """Counts the units of a ``task`` that are done, such as ``"cells"``: a bar on a terminal, one line per half minute
    elsewhere. Used as a context; what ends within a second is not reported."""

    def __init__(self, total: float, *, task: str, unit: str):
        from tqdm import tqdm

        self.total, self.task, self.unit = total, task, unit
        self.done = 0
        self.start = self.last_line = time.monotonic()
        self.is_terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, desc=task, unit=f" {unit}", unit_scale=True, delay=1, disable=not self.is_terminal)

    def __enter__(self) -> "ProgressReport":
        return self

    def __exit__(self, *error: object) -> None:
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
        self.last_line, left = now, (self.total - self.done) / max(self.rate, 1e-9)
        line = "%s: %d of %d %s, %.3g per second, %.0f s left"
        logger.info(line, self.task, self.done, self.total, self.unit, self.rate, left)
