"""The table that training freezes: one safetensors file with a vector for each perturbation's name.

Its metadata list the names that have no vector and are to have a learned one; a name that is neither here nor there was
forgotten, and training refuses it. Letter: D, length of the vectors.
"""

import json
import logging
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from tokenization.labels_dcm import shortened
from training.data.files import sha256_of, written_aside

logger = logging.getLogger(__name__)

ABOUT = "dcm_embed"  # the file's one key of metadata: safetensors writes several in an arbitrary order
WITHOUT_VECTOR = "without_vector"


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
    """Write vectors (D,) by name as float32, with ``about`` and the names without a vector as JSON in the metadata.

    Raises:
        ValueError: vectors of different lengths, not finite, or all zero; nothing has been written then.
    """
    vectors = {name: vector.detach().float().clone() for name, vector in sorted(table.items())}
    dim = _dim(vectors, "the table")
    said = json.dumps({**about, WITHOUT_VECTOR: sorted(without_vector)}, sort_keys=True)
    with written_aside(out) as aside:
        save_file(vectors, aside, metadata={ABOUT: said})
    logger.info("%s: %d vectors of length %d", out, len(vectors), dim)


def read_table(path: Path, control: str | None) -> PerturbationTable:
    """Read a table, of ``dcm-embed`` or any safetensors file with vectors by name; the ``control``'s is left out, as it
    is always learned.

    Raises:
        ValueError: the file holds something else, or vectors of different lengths, not finite, or all zero.
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


def read_vectors(path: Path) -> dict[str, torch.Tensor]:
    """Read vectors by name from a safetensors file, or from a ``.pt`` dictionary (without running any code in it).

    Raises:
        ValueError: the file holds something else.
    """
    try:
        if path.suffix in (".pt", ".pth"):
            table = torch.load(path, map_location="cpu", weights_only=True)
        else:
            table = load_file(path)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"{str(path)!r} cannot be read ({first}); expected safetensors, or a .pt dictionary of tensors"
        ) from error
    if not isinstance(table, Mapping) or not all(
        isinstance(name, str) and isinstance(vector, torch.Tensor) for name, vector in table.items()
    ):
        raise ValueError(f"{str(path)!r} holds {type(table).__name__}; expected a dictionary of names and tensors")
    return {name: vector.flatten() for name, vector in table.items()}


def _dim(vectors: Mapping[str, torch.Tensor], where: str) -> int:
    """The one length of the vectors, each finite and not all zero."""
    lengths = sorted({len(vector) for vector in vectors.values()})
    if len(lengths) != 1:
        raise ValueError(f"{where} holds vectors of lengths {lengths}, expected one length")
    broken = [name for name, vector in vectors.items() if not bool(vector.isfinite().all() and vector.any())]
    if broken:
        raise ValueError(f"{where}: vectors that are not finite, or all zero: {shortened(broken, 20)}")
    return lengths[0]
