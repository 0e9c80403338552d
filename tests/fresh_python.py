"""A virtual environment that has torch, transformers, numpy and what these need, and nothing else.

Stands in for the machine of somebody who has never heard of this package. What is installed here is linked into it, so
that nothing is downloaded; another version of transformers comes from the package index, and links fill in the rest.

    python -m tests.fresh_python elsewhere/    # into an environment that ``python -m venv`` made
"""

import os
import subprocess
import sys
import venv
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

INSTALLED = ("torch", "transformers", "numpy")
ABSENT = ("anndata", "scipy", "datasets", "accelerate", "pandas", "modeling_dcm", "tokenization", "training")


def make_environment(folder: Path, *pip_arguments: str) -> Path:
    """Make a virtual environment, install what pip is asked for, and link ``INSTALLED`` into it; its Python.

    Links come last on the path: what pip installed goes before them.

    Raises:
        RuntimeError: pip cannot install what was asked for; the message is its last line.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    if pip_arguments:
        pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
        done = subprocess.run([*pip, *pip_arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().rpartition("\n")[2])
    return link_installed(folder)


def link_installed(folder: Path) -> Path:
    """Make ``INSTALLED`` and their dependencies importable in the virtual environment ``folder``; its Python."""
    linked = folder / "linked"
    linked.mkdir()
    for found in _closure():
        tops = {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            target = Path(found.locate_file(top))
            if target.exists() and not (linked / top).exists():
                (linked / top).symlink_to(target)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (folder / "lib" / version / "site-packages" / "linked.pth").write_text(f"{linked.resolve()}\n")
    return folder / "bin" / "python"


def fresh_python(
    python: Path, code: str, *arguments: object, home: Path, **environment: str
) -> subprocess.CompletedProcess:
    """Run ``code`` offline in a process of a virtual environment that knows nothing of ours.

    Args:
        python: what :func:`make_environment` returned.
        code: Python; ``sys.argv[1:]`` are ``arguments``.
        home: an own folder for the caches of transformers and the Hub; also the working directory.
        environment: variables to set, such as ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE="0"``.
    """
    home.mkdir(parents=True, exist_ok=True)
    own = {
        "HF_HOME": str(home / "hf"),
        "HF_MODULES_CACHE": str(home / "modules"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
        "HOME": str(home),
        "PATH": os.environ["PATH"],
    }
    command = [str(python), "-I", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=own | environment, cwd=home, check=False)


def _closure() -> tuple[Distribution, ...]:
    """Distributions of ``INSTALLED`` and, recursively, of what they require without extras."""
    found: dict[str, Distribution] = {}
    wanted = list(INSTALLED)
    while wanted:
        name = wanted.pop().lower().replace("_", "-")
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:  # a requirement of another platform's build
            continue
        requirements = map(Requirement, found[name].requires or ())
        wanted += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return tuple(found.values())


if __name__ == "__main__":
    link_installed(Path(sys.argv[1]))
