"""What a folder of shards looks like: columns of the Parquet files, and panels where files measured different genes.

A row is a cell: ``genes`` and ``expressions`` (positions and counts of its expressed genes, ascending), its
``library_size`` (the total of these counts), one ``ClassLabel`` for each condition, and its ``panel`` where files
measured different genes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import datasets

SPLITS = ("train", "validation", "test")
COUNTS = ("genes", "expressions")
LIBRARY_SIZE = "library_size"
PANEL = "panel"
NOT_LABELS = (*COUNTS, LIBRARY_SIZE)
ROW_GROUP_CELLS = 4096
SHARD_CELLS = 4 * ROW_GROUP_CELLS


@dataclass(frozen=True)
class Panels:
    """Which genes were measured in which files, where files differ.

    Attributes:
        missing: name of each panel to the genes that were *not* measured in its cells, and its files: what
            ``panels.json`` holds.
        measured: name of each panel to (G,) bool.
        of_file: (F,) the panel of each file.
    """

    missing: dict[str, dict[str, list[str]]]
    measured: dict[str, np.ndarray]
    of_file: np.ndarray


def find_panels(measured: np.ndarray, files: Sequence[str], genes: Sequence[str]) -> Panels | None:
    """Group F files that measured the same of G genes, given ``measured`` (F, G); None where every file has all."""
    if measured.all():
        return None
    patterns, first, of_file = np.unique(measured, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    of_file = np.argsort(order)[of_file.ravel()]
    patterns = {f"panel{i}": pattern for i, pattern in enumerate(patterns[order])}
    missing = {
        name: {
            "files": [file for file, panel in zip(files, of_file) if panel == i],
            "missing_genes": [genes[j] for j in np.flatnonzero(~pattern)],
        }
        for i, (name, pattern) in enumerate(patterns.items())
    }
    return Panels(missing=missing, measured=patterns, of_file=of_file)


def shard_features(num_genes: int, largest_count: int, labels: Mapping[str, Sequence[str]]) -> "datasets.Features":
    """Columns of a shard: the narrowest integers that hold every gene and count, and a ClassLabel per condition.

    Raises:
        ValueError: a count does not fit into 32 bits.
    """
    import datasets  # takes seconds, and only writing needs it

    if largest_count >= 2**31:
        raise ValueError(f"the largest count is {largest_count:,}; expected counts below 2^31")
    columns = {
        "genes": datasets.List(datasets.Value("uint16" if num_genes <= 2**16 else "int32")),
        "expressions": datasets.List(datasets.Value("uint16" if largest_count < 2**16 else "uint32")),
        LIBRARY_SIZE: datasets.Value("int64"),
    }
    return datasets.Features(columns | {name: datasets.ClassLabel(names=list(names)) for name, names in labels.items()})
