"""What a folder of shards looks like: columns of the Parquet files, and panels where files measured different genes.

A row is a cell: ``genes`` and ``expressions`` (positions and counts of its expressed genes, ascending), its
``library_size`` (the total of these counts), one ``ClassLabel`` for each condition, and its ``panel`` where files
measured different genes.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import datasets
    import pandas as pd

MERGED = "merged.json"
SPLITS = ("train", "validation", "test")
COUNTS = ("genes", "expressions")
LIBRARY_SIZE = "library_size"
PANEL = "panel"
NOT_LABELS = (*COUNTS, LIBRARY_SIZE)
ROW_GROUP_CELLS = 4096
SHARD_CELLS = 4 * ROW_GROUP_CELLS


@dataclass(frozen=True)
class Panels:
    """Which genes were measured in which files, where files differ; panels by name."""

    missing: dict[str, dict[str, list[str]]]  # what ``panels.json`` holds: files, and genes that were *not* measured
    measured: dict[str, np.ndarray]  # (G,) bool
    of_file: np.ndarray  # (F,) the panel of each file


@dataclass(frozen=True)
class MergedLabels:
    """Labels of shards that several conversions wrote, each of which numbered its own labels."""

    labels: dict[str, list[str]]  # of all parts, by condition; and ``panel`` where files measured different genes
    largest_count: int  # that any shard has room for
    parts: dict[str, dict[str, list[str]]]  # what the names of a part's files begin with -> its own ``labels``

    @classmethod
    def read(cls, folder: Path) -> "MergedLabels | None":
        """What ``merged.json`` says; None in a folder of one conversion."""
        path = folder / MERGED
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def recoded(self, name: str, codes: np.ndarray, files: Sequence[str], sizes: Sequence[int]) -> np.ndarray:
        """Positions (N,) in ``labels`` of the cells of all files, whose ``codes`` (N,) are their part's; a part without
        a column of panels has one."""
        found = np.empty_like(codes)
        for file, rows in zip(files, np.split(np.arange(len(codes)), np.cumsum(sizes)[:-1])):
            own = self.parts[Path(file).name.partition("-")[0]][name]
            position = np.array([*(self.labels[name].index(label) for label in own), -1])
            found[rows] = position[codes[rows].clip(min=0) if name == PANEL else codes[rows]]
        return found


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


def read_panels(
    obs: "pd.DataFrame", panels: Mapping[str, np.ndarray] | None, num_genes: int, *, file: str
) -> tuple[np.ndarray, np.ndarray]:
    """Read what an h5ad file says of the genes that were measured: its column ``panel`` and ``uns["dcm_panels"]``.

    Returns:
        The panel of each cell (n,), and which genes were measured in each panel that has cells (P, F); one panel of all
        genes where the file says nothing (``panels`` is None).

    Raises:
        ValueError: panels of other genes, or cells without one.
    """
    if panels is None:
        return np.zeros(len(obs), dtype=np.int64), np.ones((1, num_genes), dtype=bool)
    sizes = {len(measured) for measured in panels.values()}
    if sizes != {num_genes}:
        raise ValueError(
            f"{file!r}: uns['dcm_panels'] is of {sorted(sizes)} genes, the file has {num_genes:,}: "
            "choose genes in uns['dcm_panels'] as in var, so that it is known which were measured"
        )
    names, panel = np.unique(obs[PANEL].astype(str) if PANEL in obs else [], return_inverse=True)
    unknown = [name for name in names if name not in panels]
    if len(panel) != len(obs) or unknown:
        found = f"it holds {unknown[0]!r}" if unknown else "it is not there"
        raise ValueError(
            f"{file!r}: obs[{PANEL!r}] must name one of {', '.join(panels)} (uns['dcm_panels']) for every cell, but "
            f"{found}; write it as dcm-convert did, so that it is known which genes were measured"
        )
    return panel, np.stack([np.asarray(panels[name], dtype=bool) for name in names])


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
