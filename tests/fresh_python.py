"""A Python process that has torch, transformers, numpy and what these need, and nothing else that is installed here.

Stands in for the machine of somebody who has never heard of this package: a folder of links to the installed files of
those distributions is the only place to import from. Knows nothing of checkpoints.
"""

import os
import subprocess
import sys
from functools import lru_cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

INSTALLED = ("torch", "transformers", "numpy")
ABSENT = ("anndata", "scipy", "datasets", "accelerate", "pandas", "modeling_dcm", "tokenization", "training")


def link_site_packages(folder: Path) -> Path:
    """Fill ``folder`` with links to the files of ``INSTALLED`` and their dependencies; return it."""
    folder.mkdir(parents=True)
    for found in _closure():
        tops = {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            target = Path(found.locate_file(top))
            if target.exists() and not (folder / top).exists():
                (folder / top).symlink_to(target)
    return folder


def fresh_python(
    site_packages: Path, code: str, *arguments: object, home: Path, **environment: str
) -> subprocess.CompletedProcess:
    """Run ``code`` offline in a process that can import from ``site_packages`` and the standard library only.

    Args:
        site_packages: what :func:`link_site_packages` made.
        code: Python; ``sys.argv[1:]`` are ``arguments``.
        home: an own folder for the caches of transformers and the Hub; also the working directory.
        environment: variables to set, such as ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE="0"``.
    """
    home.mkdir(parents=True, exist_ok=True)
    own = {
        "PYTHONPATH": str(site_packages),
        "HF_HOME": str(home / "hf"),
        "HF_MODULES_CACHE": str(home / "modules"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
        "HOME": str(home),
        "PATH": os.environ["PATH"],
    }
    command = [sys.executable, "-S", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=own | environment, cwd=home, check=False)


@lru_cache
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
