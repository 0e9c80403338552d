"""Shards that lie elsewhere: `hf://datasets/NAME`, or whatever URL fsspec knows.

What is small is copied into a local folder that stands for the whole; the shards stay where they are, and are read
piece by piece where they are streamed.
"""

import hashlib
import json
import re
import shutil
from functools import lru_cache
from pathlib import Path

import fsspec
import pyarrow.parquet as pq

from training.data.files import written_aside
from training.data.shards import SPLITS

REMOTE = "remote.json"
NOT_COPIED = (".parquet", ".h5ad")


@lru_cache
def local_folder(data: Path) -> Path:
    """The folder of shards ``data``, or where that is a URL the local folder that stands for it.

    The shards' names, sizes and checksums are in its name: data that change have another one.

    Raises:
        FileNotFoundError: there is nothing at the URL.
    """
    found = re.fullmatch(r"([a-z][a-z0-9]+):/+(.*)", str(data))  # a Path has one slash of two
    if found is None:
        return data
    import datasets

    url = "://".join(found.groups())
    system, root = fsspec.core.url_to_fs(url)
    files = {name[len(root) :].lstrip("/"): about for name, about in system.find(root, detail=True).items()}
    shards = {name: [about["size"], about.get("blob_id")] for name, about in files.items() if _is_shard(name)}
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


def _is_shard(name: str) -> bool:
    return name.endswith(".parquet") and name.partition("/")[0] in SPLITS


def shard_files(folder: Path, split: str) -> list[str]:
    """Paths or URLs of the shards of a split, in order."""
    remote = folder / REMOTE
    if not remote.is_file():
        return sorted(map(str, (folder / split).glob("*.parquet")))
    said = json.loads(remote.read_text(encoding="utf-8"))
    return [f"{said['url']}/{name}" for name in said["shards"] if name.startswith(f"{split}/")]


def open_shard(file: str) -> pq.ParquetFile:
    """Open a shard: mapped into memory, or from elsewhere with a request for each piece that is read."""
    if "://" in file:
        return pq.ParquetFile(fsspec.open(file).open(), pre_buffer=True)
    return pq.ParquetFile(file, memory_map=True)
