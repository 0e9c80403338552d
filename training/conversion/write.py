"""Write every split as a folder of Parquet shards in a random order, and as one h5ad in the order of the files.

Two passes: the input files are sorted into temporary files, by split and by the shard that a random order sends a cell
to; from these come each h5ad, each shard and the statistics. Letters: N cells in all, n of a split, m of a block, G
genes of the panel.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import anndata
import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import DatasetCardData
from scipy.sparse import csr_matrix, vstack

from tokenization import DCMTokenizer
from tokenization.conditions_dcm import PERTURBATION
from tokenization.count_errors_dcm import library_size
from training.conversion.conditions import ConditionColumns
from training.conversion.genes import InputCells, Panel
from training.data import shards
from training.data.command_line import ProgressReport
from training.data.h5ad import BLOCK_CELLS, with_genes, write_h5ad_in_blocks
from training.data.shards import COUNTS, LIBRARY_SIZE, MERGED, PANEL, SPLITS, Panels, find_panels, shard_features
from training.data.statistics import STATISTICS, compute_statistics, vocabulary_of, write_statistics

logger = logging.getLogger(__name__)

LENGTHS = np.dtype(np.int64)


@dataclass(frozen=True)
class Tables:
    """What is written of N cells besides their counts."""

    obs: pd.DataFrame  # conditions first
    var: pd.DataFrame  # of the genes of the panel
    uns: dict[str, object]  # what every h5ad says of the conditions
    codes: dict[str, np.ndarray]  # condition name -> (N,) ids
    features: datasets.Features  # columns of the shards
    panels: Panels | None  # which genes were measured in which files, where these differ

    @property
    def types(self) -> dict[str, np.dtype]:
        """Of the positions and counts in the shards."""
        return {name: np.dtype(self.features[name].feature.dtype) for name in COUNTS}

    def measured(self, cells: np.ndarray) -> dict[str, np.ndarray]:
        """The panel of each of some cells (n,), and which genes were measured in each panel (P, G)."""
        if self.panels is None:
            return {"panel": np.zeros(len(cells), dtype=np.int64), "measured": np.ones((1, len(self.var)), dtype=bool)}
        return {"panel": self.codes[PANEL][cells], "measured": np.stack(list(self.panels.measured.values()))}


@dataclass(frozen=True)
class StoredCells:
    """A temporary sparse matrix (n, G) to which cells are appended: three raw arrays in files beside ``path``."""

    path: Path  # without ending
    num_genes: int
    types: Mapping[str, np.dtype]  # of the arrays ``genes`` and ``expressions``

    def append(self, counts: csr_matrix) -> None:
        """Add cells (m, G) behind those so far."""
        arrays = {"genes": counts.indices, "expressions": counts.data, "lengths": np.diff(counts.indptr)}
        for name, values in arrays.items():
            with self.path.with_suffix(f".{name}").open("ab") as file:
                values.astype(self.types.get(name, LENGTHS)).tofile(file)

    def blocks(self) -> Iterator[csr_matrix]:
        """The cells in order, some thousands (m, G) at a time."""
        lengths = np.fromfile(self.path.with_suffix(".lengths"), LENGTHS)
        files = [self.path.with_suffix(f".{name}") for name in COUNTS]
        with files[0].open("rb") as genes, files[1].open("rb") as expressions:
            for start in range(0, len(lengths), BLOCK_CELLS):
                pointers = np.concatenate([[0], np.cumsum(lengths[start : start + BLOCK_CELLS])])
                indices = np.fromfile(genes, self.types["genes"], pointers[-1])
                values = np.fromfile(expressions, self.types["expressions"], pointers[-1])
                yield csr_matrix((values, indices, pointers), shape=(len(pointers) - 1, self.num_genes))


def build_tables(cells: InputCells, conditions: ConditionColumns, panel: Panel, files: Sequence[str]) -> Tables:
    """Collect everything but the counts; ``files`` are the names of the input files."""
    panels = find_panels(cells.measured[:, panel.genes], files, cells.var.index[panel.genes].tolist())
    uns: dict[str, object] = {"dcm_conditions": np.array(list(conditions.columns), dtype=object)}
    uns["dcm_dataset"] = "+".join(Path(file).stem for file in files)
    if PERTURBATION in conditions.columns:
        uns["dcm_separator"] = conditions.separator or ""
    if conditions.control is not None:
        uns["dcm_control"] = conditions.control
    others = {}
    if panels is not None:
        sizes = [file.rows.stop - file.rows.start for file in cells.files]
        others[PANEL] = pd.Categorical.from_codes(np.repeat(panels.of_file, sizes), categories=list(panels.missing))
        uns["dcm_panels"] = panels.measured
    columns = {**conditions.columns, **others}
    labels = {name: column.categories for name, column in columns.items()}
    return Tables(
        obs=conditions.canonical_obs(cells.obs, others),
        var=cells.var.iloc[panel.genes],
        uns=uns,
        codes={name: column.codes.astype(np.int64) for name, column in columns.items()},
        features=shard_features(len(panel.genes), panel.largest, labels),
        panels=panels,
    )


def write_splits(
    folder: Path,
    cells: InputCells,
    splits: Mapping[str, np.ndarray],
    panel: Panel,
    tables: Tables,
    tokenizer: DCMTokenizer,
    *,
    seed: int,
) -> list[Path]:
    """Write ``SPLIT/*.parquet`` and ``SPLIT.h5ad`` for every split that has cells, and the statistics of ``train``.

    Temporary files go to ``folder``, too, which is made here and removed by the caller. ``splits`` are ascending
    positions among the cells of all files; ``seed`` orders the shards. Returns the folders and files written.
    """
    empty = [name for name, here in splits.items() if not len(here)]
    if empty:
        logger.info("no cells for %s: not written", ", ".join(empty))
    splits = {name: here for name, here in splits.items() if len(here)}
    rngs = {name: np.random.default_rng([seed, SPLITS.index(name)]) for name in splits}
    places = {name: rngs[name].permutation(len(here)) for name, here in splits.items()}  # in the random order
    shard_of = {name: place // shards.SHARD_CELLS for name, place in places.items()}
    (folder / "sorted").mkdir(parents=True)
    whole, parts = sort_cells(cells, panel.genes, splits, shard_of, folder / "sorted", tables.types)
    with ProgressReport(sum(map(len, splits.values())), task="writing cells", unit="cells") as report:
        for name, here in splits.items():
            obs = tables.obs.iloc[here]
            blocks = ({"X": counts} for counts in whole[name].blocks())
            annotations = anndata.AnnData(obs=obs, var=tables.var, uns=tables.uns)
            write_h5ad_in_blocks(folder / f"{name}.h5ad", annotations, blocks, {"X": np.int32})
            if name == "train":
                ids = tokenizer.condition_ids({condition: obs[condition] for condition in tokenizer.known_conditions()})
                statistics = compute_statistics(
                    whole[name].blocks(),
                    {key: of_cells.numpy() for key, of_cells in ids.items()},
                    max_count=panel.largest_in_training,
                    num_cell_types=len(tokenizer.cell_types),
                    **tables.measured(here),
                )
                write_statistics(folder / STATISTICS, statistics, vocabulary_of(tokenizer))
            (folder / name).mkdir()
            at_place = np.argsort(places[name])
            for shard, stored in enumerate(parts[name]):
                rows = at_place[shard * shards.SHARD_CELLS :][: shards.SHARD_CELLS]
                codes = {column: values[here[rows]] for column, values in tables.codes.items()}
                order = np.argsort(np.argsort(rows))
                path = folder / name / f"{shard:05d}.parquet"
                write_shard(path, stored, order, codes, tables.features.arrow_schema)
                report.update(len(rows))
    return [*(folder / name for split in splits for name in (split, f"{split}.h5ad")), folder / STATISTICS]


def sort_cells(
    cells: InputCells,
    panel: np.ndarray,
    splits: Mapping[str, np.ndarray],
    shard_of: Mapping[str, np.ndarray],
    folder: Path,
    types: Mapping[str, np.dtype],
) -> tuple[dict[str, StoredCells], dict[str, list[StoredCells]]]:
    """Sort all cells into temporary files in ``folder``, in the order of the input files: those of each split (n,
    ascending), and those that go to each of its shards (``shard_of`` (n,)); of the genes of ``panel``."""
    whole = {name: StoredCells(folder / name, len(panel), types) for name in splits}
    parts = {
        name: [StoredCells(folder / f"{name}-{shard:05d}", len(panel), types) for shard in range(of_cell.max() + 1)]
        for name, of_cell in shard_of.items()
    }
    position = np.full(len(cells.var), -1)
    position[panel] = np.arange(len(panel))
    for rows, counts, _ in cells.blocks("sorting cells"):
        counts = with_genes(counts, position, len(panel))
        for name, members in splits.items():
            here = slice(*np.searchsorted(members, [rows.start, rows.stop]))
            chosen = counts[members[here] - rows.start]
            whole[name].append(chosen)
            for shard in np.unique(shard_of[name][here]):
                parts[name][shard].append(chosen[np.flatnonzero(shard_of[name][here] == shard)])
    return whole, parts


def write_shard(
    path: Path, stored: StoredCells, order: np.ndarray, codes: Mapping[str, np.ndarray], schema: pa.Schema
) -> None:
    """Write one Parquet file: row i is the stored cell ``order[i]``, with the labels ``codes[..][i]``."""
    counts = vstack([*stored.blocks()], format="csr")[order]
    offsets = pa.array(counts.indptr.astype(np.int32))
    values = {"genes": counts.indices, "expressions": counts.data}
    lists = {
        name: pa.ListArray.from_arrays(offsets, array.astype(schema.field(name).type.value_type.to_pandas_dtype()))
        for name, array in values.items()
    }
    columns = {**lists, LIBRARY_SIZE: pa.array(library_size(counts)), **codes}
    pq.write_table(
        pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema),
        path,
        row_group_size=shards.ROW_GROUP_CELLS,
        compression="zstd",
        use_dictionary=["expressions.list.element", *codes],
        column_encoding={"genes.list.element": "DELTA_BINARY_PACKED"},
    )


def dataset_card(description: Mapping[str, object]) -> str:
    """Markdown of ``README.md``: what ``datasets`` needs to find the shards, and what they are, by ``split.json``."""
    parts = description.get("parts", {})
    if parts:  # labels are numbered anew in each, so that they are no one table
        numbers = {name: sum(part["cells"][name] for part in parts.values()) for name in SPLITS}
        where = f"`{MERGED}` says what the numbers of labels mean in each of the {len(parts)} parts, which are linked."
    else:
        numbers = {name: len(cells) for name, cells in description["cells"].items()}
        where = "`split.json` names the cells of each, and the `.h5ad` files are the same cells as AnnData."
    numbers = {name: number for name, number in numbers.items() if number}
    configs = [
        {
            "config_name": part or "default",
            "data_files": [{"split": name, "path": f"{name}/{part and part + '-'}*.parquet"} for name in numbers],
        }
        for part in parts or [""]
    ]
    metadata = DatasetCardData(configs=configs, tags=["single-cell", "gene-expression"]).to_yaml()
    rows = "\n".join(f"| {name} | {number:,} |" for name, number in numbers.items())
    return f"""---
{metadata}
---

# Cells of {", ".join(source["file"] for source in description["sources"])}

Counts of {len(description["genes"]["panel"]):,} genes, written by `dcm-convert` of Discrete Cell Models.
Conditions: {", ".join(f"`{name}`" for name in description["conditions"]) or "none"}.

| split | cells |
|---|---|
{rows}

Each row is a cell: `genes` are the positions of its expressed genes in `tokenizer/genes.txt`, `expressions` their
counts, `library_size` the total of these, and each condition a `ClassLabel`. Genes that are not listed have the count
0. The largest count in training is {description["max_count"]:,}. The split is `{description["split"]}`:
{where}
`statistics.safetensors` is what a fresh network starts from: statistics of the training cells.
"""
