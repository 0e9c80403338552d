"""Write every part of a split as a folder of Parquet shards in a random order, and as one h5ad in the files' order.

Two passes: the input files are sorted into pieces by several processes, and then each h5ad and each shard is made from
its pieces by whichever process is free. What is written does not depend on how many there are. Knows nothing of how
cells and genes were chosen.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from training.conversion.conditions import ConditionColumns
from training.conversion.genes import Panel
from training.conversion.inputs import InputCells
from training.conversion.pieces import Part, in_order, of_shard, read_blocks, read_pieces, runs_of_files, write_pieces
from training.conversion.splits import SPLITS
from training.data import shards
from training.data.h5ad import CountWriter
from training.data.shards import PANEL, Panels, shard_features, write_shard
from training.data.workers import FileWorkers, Job, Report

logger = logging.getLogger(__name__)

RUNS_PER_PROCESS = 4  # so that one that is done early finds more to do


@dataclass(frozen=True)
class Tables:
    """What is written of N cells besides their counts.

    Attributes:
        obs: their annotations, conditions first.
        var: annotations of the genes of the panel.
        uns: what every h5ad says of the conditions.
        codes: condition name to (N,) ids.
        schema: columns of the shards.
        types: of the columns ``genes`` and ``expressions``.
    """

    obs: pd.DataFrame
    var: pd.DataFrame
    uns: dict[str, object]
    codes: dict[str, np.ndarray]
    schema: pa.Schema
    types: dict[str, np.dtype]


def build_tables(cells: InputCells, conditions: ConditionColumns, panel: Panel, panels: Panels | None) -> Tables:
    """Everything but the counts; ``panels`` says which genes were measured in which files, where these differ."""
    uns: dict[str, object] = {"dcm_conditions": np.array(list(conditions.columns), dtype=object)}
    if conditions.control is not None:
        uns["dcm_control"] = conditions.control
    others = {}
    if panels is not None:
        sizes = [file.rows.stop - file.rows.start for file in cells.files]
        names = list(panels.missing)
        others[PANEL] = pd.Categorical.from_codes(np.repeat(panels.of_file, sizes), categories=names)
        uns["dcm_panels"] = panels.measured
    columns = {**conditions.columns, **others}
    labels = {name: column.categories for name, column in columns.items()}
    features = shard_features(len(panel.genes), panel.largest, labels)
    return Tables(
        obs=conditions.canonical_obs(cells.obs, others),
        var=cells.var.iloc[panel.genes],
        uns=uns,
        codes={name: column.codes.astype(np.int64) for name, column in columns.items()},
        schema=features.arrow_schema,
        types={name: np.dtype(features[name].feature.dtype) for name in ("genes", "expressions")},
    )


def write_parts(
    folder: Path,
    cells: InputCells,
    parts: Mapping[str, np.ndarray],
    panel: Panel,
    tables: Tables,
    *,
    seed: int,
    workers: FileWorkers,
) -> list[Path]:
    """Write ``PART/*.parquet`` and ``PART.h5ad`` for every part that has cells.

    Args:
        folder: where to, and where temporary files go; made here, removed by the caller.
        cells: of all files.
        parts: positions of the cells of each part, ascending.
        panel: the genes to keep.
        tables: everything but the counts.
        seed: of the random order of the shards.
        workers: the processes that read and write.

    Returns:
        The folders and files written.
    """
    for name in parts:
        if not len(parts[name]):
            logger.info("no cells for %s: it is not written", name)
    parts = {name: part for name, part in parts.items() if len(part)}
    pieces = folder / "pieces"
    pieces.mkdir(parents=True)
    orders = {
        name: np.random.default_rng([seed, SPLITS.index(name)]).permutation(len(part)) for name, part in parts.items()
    }
    blocks = _sort_cells(pieces, cells, parts, orders, panel, tables.types, workers)
    h5ads: list[Job] = []  # first, as each takes longest
    parquets: list[Job] = []
    for name, part in parts.items():
        here = {in_order(pieces / name, run): sizes[name] for run, sizes in enumerate(blocks)}
        texts = {"obs": tables.obs.iloc[part], "var": tables.var, "uns": tables.uns}
        h5ads.append(partial(write_h5ad, folder / f"{name}.h5ad", here, tables.types, texts))
        (folder / name).mkdir()
        at_place = np.argsort(orders[name])
        for shard, start in enumerate(range(0, len(part), shards.BUCKET_CELLS)):
            here = at_place[start : start + shards.BUCKET_CELLS]
            codes = {column: values[part[here]] for column, values in tables.codes.items()}
            found = [of_shard(pieces / name, shard, run) for run in range(len(blocks))]
            path, order = folder / name / f"{shard:05d}.parquet", np.argsort(np.argsort(here))
            parquets.append(partial(make_shard, path, found, order, codes, tables.schema, tables.types))
    total = 2 * sum(map(len, parts.values()))
    for _ in workers.run(h5ads + parquets, desc="writing cells", total=total, unit=" cells"):
        pass
    return [folder / name for part in parts for name in (part, f"{part}.h5ad")]


def _sort_cells(
    pieces: Path,
    cells: InputCells,
    parts: Mapping[str, np.ndarray],
    orders: Mapping[str, np.ndarray],
    panel: Panel,
    types: Mapping[str, np.dtype],
    workers: FileWorkers,
) -> list[dict[str, list[int]]]:
    """Sort all cells into pieces; returns for each run of files and each part how many cells each block gave it."""
    for name in parts:
        (pieces / name).mkdir()
    jobs = []
    for i, files in enumerate(runs_of_files(cells.files, RUNS_PER_PROCESS * workers.processes)):
        rows = slice(files[0].rows.start, files[-1].rows.stop)
        here = [Part(name, part, orders[name] // shards.BUCKET_CELLS).of(rows) for name, part in parts.items()]
        jobs.append(partial(write_pieces, pieces, i, files, panel.genes, here, types))
    return list(workers.run(jobs, desc="sorting cells", total=len(cells.obs), unit=" cells"))


def write_h5ad(
    path: Path,
    pieces: Mapping[Path, Sequence[int]],
    types: Mapping[str, np.dtype],
    tables: Mapping[str, object],
    *,
    report: Report,
) -> None:
    """Write one part's h5ad from its pieces, each read in blocks of the given numbers of cells."""
    writer = CountWriter(path, **tables)
    for piece, sizes in pieces.items():
        for cells in read_blocks(piece, sizes, types):
            writer.add(cells.genes, cells.expressions, cells.lengths)
            report(len(cells.lengths))
    writer.finish()


def make_shard(
    path: Path,
    pieces: Sequence[Path],
    order: np.ndarray,
    codes: Mapping[str, np.ndarray],
    schema: pa.Schema,
    types: Mapping[str, np.dtype],
    *,
    report: Report,
) -> None:
    """Write one shard from its pieces: row i is their cell ``order[i]``, with the labels ``codes[...][i]``."""
    write_shard(path, read_pieces(pieces, types).take(order), codes, schema)
    report(len(order))
