"""Write one split as a folder of Parquet shards in a random order, without holding its counts in memory.

Cells arrive in the order of the input file. Each goes to a temporary bucket by its position in a random order, and
every bucket is then sorted and becomes one Parquet file. Columns: ``genes`` and ``expressions`` (positions and counts
of a cell's expressed genes, ascending) and one ``ClassLabel`` per condition. Knows nothing of how cells were chosen.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse
from tqdm import tqdm

ROW_GROUP_CELLS = 4096
BUCKET_CELLS = 4 * ROW_GROUP_CELLS
PANEL = "panel"  # column that says which genes were measured in a cell, where that differs


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
    """Group files that measured the same genes; None where every file measured all.

    Args:
        measured: (F, G) whether a file has a gene.
        files: F names.
        genes: G names.
    """
    if measured.all():
        return None
    patterns, first, of_file = np.unique(measured, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    of_file = np.argsort(order)[of_file.ravel()]
    names = [f"panel{i}" for i in range(len(patterns))]
    patterns = dict(zip(names, patterns[order]))
    missing = {
        name: {
            "files": [file for file, panel in zip(files, of_file) if panel == i],
            "missing_genes": [genes[j] for j in np.flatnonzero(~patterns[name])],
        }
        for i, name in enumerate(names)
    }
    return Panels(missing=missing, measured=patterns, of_file=of_file)


def shard_features(num_genes: int, largest_count: int, labels: Mapping[str, Sequence[str]]) -> datasets.Features:
    """Columns of a shard: the narrowest integers that hold every gene and count, and a ClassLabel per condition.

    Raises:
        ValueError: a count does not fit into 32 bits.
    """
    if largest_count >= 2**31:
        raise ValueError(f"the largest count is {largest_count:,}; expected counts below 2^31")
    genes = "uint16" if num_genes <= 2**16 else "int32"
    expressions = "uint16" if largest_count < 2**16 else "uint32"
    columns = {
        "genes": datasets.List(datasets.Value(genes)),
        "expressions": datasets.List(datasets.Value(expressions)),
    }
    return datasets.Features(columns | {name: datasets.ClassLabel(names=list(names)) for name, names in labels.items()})


class ShardWriter:
    """Shards of one split of n cells.

    Args:
        folder: where the Parquet files go, ``00000.parquet`` and so on; made here.
        features: columns, from :func:`shard_features`.
        columns: condition name to n labels, in the order in which the cells will arrive.
        order_seed: seeds the random order; the same seed and cells give the same bytes.
    """

    def __init__(
        self,
        folder: Path,
        *,
        features: datasets.Features,
        columns: Mapping[str, pd.Categorical],
        num_cells: int,
        order_seed: Sequence[int],
    ):
        self.folder = folder
        self.features = features
        self.columns = {name: column.codes.astype(np.int64) for name, column in columns.items()}
        self.place = np.random.default_rng(order_seed).permutation(num_cells)  # (n,) place of each arriving cell
        self.buckets = folder / ".buckets"
        self.buckets.mkdir(parents=True)
        self.types = {name: np.dtype(features[name].feature.dtype) for name in ("genes", "expressions")}
        self.types["lengths"] = np.dtype(np.int64)
        self.arrived = 0

    def add(self, counts: scipy.sparse.csr_matrix) -> None:
        """Take the next m cells, (m, G) with sorted genes and no stored zeros."""
        bucket_of_cell = self.place[self.arrived : self.arrived + counts.shape[0]] // BUCKET_CELLS
        self.arrived += counts.shape[0]
        for bucket in np.unique(bucket_of_cell):
            part = counts[np.flatnonzero(bucket_of_cell == bucket)]
            values = {"genes": part.indices, "expressions": part.data, "lengths": np.diff(part.indptr)}
            for name, dtype in self.types.items():
                with open(self.buckets / f"{bucket:05d}.{name}", "ab") as file:
                    values[name].astype(dtype).tofile(file)

    def finish(self) -> None:
        """Turn the buckets into Parquet files and remove them.

        Raises:
            ValueError: not every cell arrived.
        """
        if self.arrived != len(self.place):
            raise ValueError(f"{self.arrived:,} cells arrived; expected {len(self.place):,}")
        num_buckets = -(-len(self.place) // BUCKET_CELLS)
        for bucket in tqdm(range(num_buckets), desc=f"writing {self.folder.name}", delay=1, disable=None):
            self._write_bucket(bucket)
        shutil.rmtree(self.buckets)

    def _write_bucket(self, bucket: int) -> None:
        cells = np.flatnonzero(self.place // BUCKET_CELLS == bucket)  # as they arrived
        genes, expressions, lengths = (
            np.fromfile(self.buckets / f"{bucket:05d}.{name}", dtype=self.types[name])
            for name in ("genes", "expressions", "lengths")
        )
        order = np.argsort(self.place[cells])
        starts = np.cumsum(lengths) - lengths
        ends = np.cumsum(lengths[order])
        gather = np.repeat(starts[order] - ends + lengths[order], lengths[order]) + np.arange(len(genes))
        offsets = pa.array(np.concatenate([[0], ends]).astype(np.int32))
        schema = self.features.arrow_schema
        arrays = {
            "genes": pa.ListArray.from_arrays(offsets, genes[gather]),
            "expressions": pa.ListArray.from_arrays(offsets, expressions[gather]),
            **{name: pa.array(codes[cells[order]]) for name, codes in self.columns.items()},
        }
        pq.write_table(
            pa.Table.from_arrays([arrays[name] for name in schema.names], schema=schema),
            self.folder / f"{bucket:05d}.parquet",
            row_group_size=ROW_GROUP_CELLS,
            compression="zstd",
            use_dictionary=["expressions.list.element", *self.columns],
            column_encoding={"genes.list.element": "DELTA_BINARY_PACKED"},
        )


def dataset_card(split: Mapping[str, object]) -> str:
    """Markdown of ``README.md``: what ``datasets.load_dataset`` needs to find the shards, and what they are.

    Args:
        split: what ``split.json`` says.
    """
    numbers = {name: len(cells) for name, cells in split["cells"].items() if cells}
    config = "\n".join(f"  - split: {name}\n    path: {name}/*.parquet" for name in numbers)
    rows = "\n".join(f"| {name} | {number:,} |" for name, number in numbers.items())
    conditions = ", ".join(f"`{name}`" for name in split["conditions"]) or "none"
    files = ", ".join(source["file"] for source in split["sources"])
    return f"""---
configs:
- config_name: default
  data_files:
{config}
tags:
- single-cell
- gene-expression
---

# Cells of {files}

Counts of {len(split["genes"]["panel"]):,} genes, written by `dcm-convert` of Discrete Cell Models.
Conditions: {conditions}.

| split | cells |
|---|---|
{rows}

Each row is a cell: `genes` are the positions of its expressed genes in `tokenizer/genes.txt`, `expressions` their
counts, and each condition a `ClassLabel`. Genes that are not listed have the count 0. The largest count in training is
{split["largest_training_count"]:,}. The split is `{split["split"]}` (seed {split["seed"]}): `split.json` names the
cells of each part, and the `.h5ad` files are the same cells as AnnData.
"""
