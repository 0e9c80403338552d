"""What shards look like: columns of the Parquet files, panels of files that measured different genes, and the card.

Columns: ``genes`` and ``expressions`` (positions and counts of a cell's expressed genes, ascending) and one
``ClassLabel`` per condition. Knows nothing of how cells were chosen and how they got into their order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from training.conversion.pieces import Cells

ROW_GROUP_CELLS = 4096
BUCKET_CELLS = 4 * ROW_GROUP_CELLS  # of a Parquet file
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


def write_shard(path: Path, cells: Cells, codes: Mapping[str, np.ndarray], schema: pa.Schema) -> None:
    """Write one Parquet file.

    Args:
        path: of the file.
        cells: in the order of the rows.
        codes: condition name to the label ids of these cells.
        schema: columns, from :func:`shard_features`.
    """
    offsets = pa.array(np.concatenate([[0], np.cumsum(cells.lengths)]).astype(np.int32))
    arrays = {
        "genes": pa.ListArray.from_arrays(offsets, cells.genes),
        "expressions": pa.ListArray.from_arrays(offsets, cells.expressions),
        **{name: pa.array(values) for name, values in codes.items()},
    }
    pq.write_table(
        pa.Table.from_arrays([arrays[name] for name in schema.names], schema=schema),
        path,
        row_group_size=ROW_GROUP_CELLS,
        compression="zstd",
        use_dictionary=["expressions.list.element", *codes],
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
