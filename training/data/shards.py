"""What a folder of shards looks like, wherever it lies: columns of the Parquet files, panels, files elsewhere.

A row is a cell: ``genes`` and ``expressions`` (positions and counts of its expressed genes, ascending), its
``library_size`` (the total of these counts), one ``ClassLabel`` for each condition, and its ``panel`` where files
measured different genes. Of shards elsewhere (`hf://datasets/NAME`, or whatever URL fsspec knows) what is small is
copied into a local folder that stands for the whole; the shards are read where they are.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from training.data.files import written_aside

if TYPE_CHECKING:
    import datasets
    import pandas as pd
    import pyarrow.parquet as pq

REMOTE, NOT_COPIED = "remote.json", (".parquet", ".h5ad")
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


def measured_of(folder: Path, genes: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Which ``genes`` were measured in each of the panels ``names`` (P, G), by the ``panels.json`` of a folder."""
    path = folder / "panels.json"
    if not path.is_file():
        raise FileNotFoundError(f"no panels.json in {str(folder)!r}, though cells have panels; convert again")
    panels = json.loads(path.read_text(encoding="utf-8"))
    return np.stack([~np.isin(genes, panels[name]["missing_genes"]) for name in names])


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
    """Columns of a shard: the narrowest integers that hold every gene and count, and a ClassLabel per condition."""
    import datasets  # takes seconds, and only writing needs it

    if largest_count >= 2**31:
        raise ValueError(f"the largest count is {largest_count:,}; expected counts below 2^31")
    columns = {
        "genes": datasets.List(datasets.Value("uint16" if num_genes <= 2**16 else "int32")),
        "expressions": datasets.List(datasets.Value("uint16" if largest_count < 2**16 else "uint32")),
        LIBRARY_SIZE: datasets.Value("int64"),
    }
    return datasets.Features(columns | {name: datasets.ClassLabel(names=list(names)) for name, names in labels.items()})


# --- shards that lie elsewhere ----------------------------------------------------------------------------------------


@lru_cache
def local_folder(data: Path) -> Path:
    """The folder of shards ``data``, or where that is a URL the local folder that stands for it.

    The shards' names, sizes and checksums are in its name: data that change have another one.
    """
    found = re.fullmatch(r"([a-z][a-z0-9]+):/+(.*)", str(data))  # a Path has one slash of two
    if found is None:
        return data
    import datasets
    import fsspec

    url = "://".join(found.groups())
    system, root = fsspec.core.url_to_fs(url)
    files = {name[len(root) :].lstrip("/"): about for name, about in system.find(root, detail=True).items()}
    of_splits = [name for name in files if name.endswith(".parquet") and name.partition("/")[0] in SPLITS]
    shards = {name: [files[name]["size"], files[name].get("blob_id")] for name in of_splits}
    if not shards:
        raise FileNotFoundError(f"no shards at {url!r}; expected a folder that dcm-convert wrote")
    others = {name: about["size"] for name, about in files.items() if not name.endswith(NOT_COPIED)}
    said = json.dumps({"url": url, "shards": dict(sorted(shards.items())), "others": others}, sort_keys=True)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "dcm_shards" / hashlib.sha256(said.encode()).hexdigest()[:16]
    if not folder.exists():
        with written_aside(folder) as aside:
            for name in others:
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                with system.open(f"{root}/{name}") as source, (aside / name).open("wb") as copy:
                    shutil.copyfileobj(source, copy)
            (aside / REMOTE).write_text(said, encoding="utf-8")
    return folder


def shard_files(folder: Path, split: str) -> list[str]:
    """Paths or URLs of the shards of a split, in order."""
    remote = folder / REMOTE
    if not remote.is_file():
        return sorted(map(str, (folder / split).glob("*.parquet")))
    said = json.loads(remote.read_text(encoding="utf-8"))
    return [f"{said['url']}/{name}" for name in said["shards"] if name.startswith(f"{split}/")]


def open_shard(file: str) -> "pq.ParquetFile":
    """Open a shard: mapped into memory, or from elsewhere with a request for each piece that is read."""
    import fsspec
    import pyarrow.parquet as pq

    if "://" in file:
        return pq.ParquetFile(fsspec.open(file).open(), pre_buffer=True)
    return pq.ParquetFile(file, memory_map=True)
