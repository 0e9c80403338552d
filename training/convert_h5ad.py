"""Convert files of counts (h5ad, 10x) to shards: the folder that training, sampling and evaluation read.

    dcm-convert cells.h5ad --out shards/ --cell-type-key cell_type --perturbation-key perturbation --control control

Everything that can be learnt from data is decided here, from training cells only (gene panel, largest count), and
stored: vocabularies in ``tokenizer/``, the cells of each part in ``split.json``. Deliberately knows nothing of models,
training and noise.
"""

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import tyro
from scipy.sparse import csr_matrix

from tokenization import DCMTokenizer
from tokenization.command_line import run
from training.cell_tally import CellTally
from training.condition_columns import ConditionColumns, read_conditions
from training.gene_panel import GeneTotals, read_gene_list, seurat_v3_variances, top_genes
from training.h5ad_blocks import CountWriter
from training.input_cells import InputCells, opened_cells, with_genes
from training.shards import PANEL, Panels, ShardWriter, dataset_card, find_panels, shard_features
from training.splits import (
    SPLITS,
    Controls,
    Split,
    SplitName,
    condition_split,
    random_split,
    split_from_column,
    split_from_names,
)
from training.work_folders import folder_written_aside, remove_leftovers, scratch_folder

logger = logging.getLogger(__name__)

FORMAT = "dcm-shards-1"
WRITTEN = {"README.md", "split.json", "panels.json", "tokenizer", *SPLITS, *(f"{split}.h5ad" for split in SPLITS)}


def main(
    source: Annotated[Path | tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IN.h5ad [IN.h5ad ...]")],
    *,
    out: Path,
    layer: str | None = None,
    cell_type_key: str | None = None,
    perturbation_key: str | None = None,
    control: str | None = None,
    covariate_keys: str = "",
    separator: str = "+",
    gene_key: str | None = None,
    genes: Path | None = None,
    n_top_genes: int | None = None,
    join: Literal["intersection", "union"] = "intersection",
    duplicate_genes: Literal["error", "sum"] = "error",
    max_count: int | None = None,
    split: SplitName = "random",
    held_out: str | None = None,
    held_out_cell_type: str | None = None,
    controls: Controls | None = None,
    split_file: Path | None = None,
    split_key: str | None = None,
    test_fraction: float = 0.2,
    validation_fraction: float = 0.1,
    split_seed: int = 0,
) -> Path:
    """Convert files of counts to shards.

    Args:
        source: h5ad files, 10x .h5 files, or 10x folders of matrix.mtx; every gene and cell is kept unless told
            otherwise. The cells of several files get the obs column source_file.
        out: folder to write; one that an earlier conversion wrote is replaced, any other is an error.
        layer: layer with the counts, or "raw" for raw.X; default X.
        cell_type_key: obs column of cell types; without it the data have none.
        perturbation_key: obs column of perturbations; without it the data have none.
        control: label of unperturbed cells; default "control" or "non-targeting" if one of them occurs.
        covariate_keys: obs columns of other conditions (batch, donor, ...), separated by commas.
        separator: what joins single perturbations to a combination; "" where names are never combined.
        gene_key: var column that names the genes; default var_names. Versions of Ensembl ids are removed.
        genes: text file of the genes to keep, one per line, in this order.
        n_top_genes: keep this many variable genes, chosen by seurat_v3 on training cells; default all.
        join: of several files, genes that all have, or that any has; genes that a file lacks are then marked as not
            measured in its cells. With --genes, "union" allows genes that the data lack.
        duplicate_genes: what to do with several columns of one gene.
        max_count: largest count of the vocabulary; default the largest of the training cells.
        split: random (a share of every condition), held-out-perturbations, held-out-combinations (both members seen
            alone), few-shot (some perturbations of --held-out-cell-type), zero-shot (all of them), or from-file.
        held_out: perturbations to test on, separated by commas, or @FILE with one per line; default a share
            --test-fraction of those that the split can hold out.
        held_out_cell_type: cell type that few-shot and zero-shot test on.
        controls: controls of the divided cells: "proportional" tests on as large a share of them as of the perturbed
            cells, "train" and "test" take all; default "test" for zero-shot, else "proportional".
        split_file: for from-file: JSON {"train": [cell names], "test": [...]}; an earlier split.json will do.
        split_key: for from-file: obs column with the labels train, test and perhaps validation.
        test_fraction: share of the cells held out for evaluation, in every condition; for splits that hold conditions
            out, the share of the labels.
        validation_fraction: share of the remaining cells held out for choices during training.
        split_seed: seed of the split and of the order of the shards.

    Returns:
        The folder written.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file, a value, a label or an option is wrong; nothing has been written then.
    """
    sources = (source,) if isinstance(source, Path) else tuple(source)
    if genes is not None and n_top_genes is not None:
        raise ValueError("--genes and --n-top-genes were both given; pass one of them")
    _check_out(out)
    remove_leftovers(out)
    gene_list = None if genes is None else read_gene_list(genes)
    files = {"layer": layer, "gene_key": gene_key, "genes": gene_list, "join": join, "duplicate_genes": duplicate_genes}
    with scratch_folder(out) as scratch, opened_cells(sources, scratch, **files) as cells:
        conditions = read_conditions(
            cells.obs,
            cell_type_key=cell_type_key,
            perturbation_key=perturbation_key,
            covariate_keys=[key.strip() for key in covariate_keys.split(",") if key.strip()],
            control=control,
            separator=separator or None,
        )
        chosen = _split(
            split,
            cells.obs,
            conditions,
            held_out=held_out,
            cell_type=held_out_cell_type,
            controls=controls,
            split_file=split_file,
            split_key=split_key,
            fractions={"test_fraction": test_fraction, "validation_fraction": validation_fraction},
            seed=split_seed,
        )
        panel, counted = _choose_panel(cells, chosen.parts["train"], n_top_genes)
        tokenizer = _build_tokenizer(cells, conditions, panel, counted, max_count)
        panels = find_panels(cells.measured[:, panel], [file.path.name for file in cells.files], tokenizer.genes)
        selection = "list" if genes is not None else "all" if n_top_genes is None else "seurat_v3"
        description = {
            "format": FORMAT,
            "split": split,
            "seed": split_seed,
            "test_fraction": test_fraction,
            "validation_fraction": validation_fraction,
            **chosen.description,
            "sources": [{"file": path.name, "sha256": _sha256(path)} for path in sources],
            "layer": layer,
            **_describe(conditions, tokenizer, counted),
            "genes": {"selection": selection, "join": join, "panel": tokenizer.genes},
            "cells": {name: cells.obs.index[part].tolist() for name, part in chosen.parts.items()},
        }
        with folder_written_aside(out) as folder:
            _write_parts(folder, cells, conditions, chosen.parts, panel, panels, counted.largest, split_seed)
            tokenizer.save_pretrained(folder / "tokenizer")
            if panels is not None:
                _write_json(folder / "panels.json", panels.missing)
            _write_json(folder / "split.json", description)
            (folder / "README.md").write_text(dataset_card(description), encoding="utf-8")
    _report(out, tokenizer, chosen.parts, counted)
    return out


def _split(
    name: SplitName,
    obs: pd.DataFrame,
    conditions: ConditionColumns,
    *,
    held_out: str | None,
    cell_type: str | None,
    controls: Controls | None,
    split_file: Path | None,
    split_key: str | None,
    fractions: dict[str, float],
    seed: int,
) -> Split:
    """The split that the options ask for; an option that this split has no use for is an error."""
    useless = {"--split-file": split_file, "--split-key": split_key}
    if name == "from-file":
        useless = {}
    if name in ("random", "from-file"):
        useless |= {"--held-out": held_out, "--held-out-cell-type": cell_type, "--controls": controls}
    given = [option for option, value in useless.items() if value is not None]
    if given:
        raise ValueError(f"{given[0]} was given, but --split {name} has no use for it; pass another --split")
    strata = conditions.strata(len(obs))
    if name == "random":
        return Split(parts=random_split(strata, **fractions, seed=seed))
    if name != "from-file":
        labels = None if held_out is None else _labels(held_out)
        return condition_split(
            name, conditions, len(obs), held_out=labels, cell_type=cell_type, controls=controls, **fractions, seed=seed
        )
    if (split_file is None) == (split_key is None):
        raise ValueError("--split from-file needs either --split-file or --split-key")
    options = {"validation_fraction": fractions["validation_fraction"], "seed": seed}
    if split_file is not None:
        return split_from_names(split_file, obs.index, strata, **options)
    if split_key not in obs:
        raise ValueError(f"no column {split_key!r} in obs; columns there: {', '.join(map(str, obs.columns)) or 'none'}")
    return split_from_column(obs[split_key], strata, **options)


def _labels(held_out: str) -> list[str]:
    """Labels of ``--held-out``: separated by commas, or one per line of the file after ``@``."""
    if not held_out.startswith("@"):
        return [label.strip() for label in held_out.split(",") if label.strip()]
    path = Path(held_out[1:])
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r} (--held-out @FILE); expected one perturbation per line")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


@dataclass(frozen=True)
class Counted:
    """What the first pass over the counts found in the genes of the panel."""

    largest: int  # over all cells
    largest_in_training: int
    zero_genes: int  # genes without a count in training


def _check_out(out: Path) -> None:
    """Raise unless ``out`` may be (re)placed: absent, empty, or nothing but an earlier conversion."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"--out {str(out)!r} is a file; expected a folder")
    names = {path.name for path in out.iterdir()}
    if names and "split.json" not in names:
        raise ValueError(f"--out {str(out)!r} exists and holds no conversion; remove it or name another folder")
    others = sorted(names - WRITTEN)
    if others:
        raise ValueError(
            f"--out {str(out)!r} holds a conversion and other things ({', '.join(others[:5])}) that replacing it would "
            "delete; move them or name another folder"
        )
    if names:
        logger.info("replacing the conversion in %s", out)


def _choose_panel(cells: InputCells, train: np.ndarray, n_top_genes: int | None) -> tuple[np.ndarray, Counted]:
    """Validate every value, and choose the genes; returns their positions, ascending, and what was found.

    Only training cells can reach the choice; of the others nothing but the largest count is used, to size the columns.
    """
    num_genes = len(cells.var)
    if n_top_genes is not None and not 1 <= n_top_genes <= num_genes:
        raise ValueError(f"--n-top-genes is {n_top_genes:,}; expected 1 to {num_genes:,}, the genes of the data")
    in_train = np.zeros(len(cells.obs), dtype=bool)
    in_train[train] = True
    largest = np.zeros(num_genes, dtype=np.int64)
    totals, tally = GeneTotals(num_genes), CellTally()
    for rows, counts, file in cells.blocks("checking counts", check=True):
        largest = np.maximum(largest, counts.max(axis=0).toarray().ravel())
        totals.add(counts[in_train[rows]], cells.measured[file])
        tally.add(counts)
    _warn_of_cells(cells.obs.index, tally)
    panel = np.arange(num_genes)
    if n_top_genes is not None:
        blocks = (block.counts[in_train[block.rows]] for block in cells.blocks("choosing genes"))
        panel = top_genes(seurat_v3_variances(totals, blocks), n_top_genes)
    if not totals.largest[panel].any():
        where = " and ".join(file.source for file in cells.files)
        raise ValueError(f"{where} has no count above 0 in the {len(train):,} training cells")
    counted = Counted(
        largest=int(largest[panel].max()),
        largest_in_training=int(totals.largest[panel].max()),
        zero_genes=int((totals.largest[panel] == 0).sum()),
    )
    return panel, counted


def _warn_of_cells(names: pd.Index, tally: CellTally) -> None:
    """Warn of cells without counts, and of cells that are there twice under two names."""
    empty, (again, first) = tally.empty, tally.repeated
    if len(empty):
        shown = ", ".join(names[empty[:3]])
        logger.warning("%s cells have no count at all (%s); they are kept: drop them", f"{len(empty):,}", shown)
    if len(again):
        logger.warning(
            "%s cells have exactly the counts of another cell (%s those of %s); they are kept: drop copies, or test "
            "cells may be training cells",
            f"{len(again):,}",
            names[again[0]],
            names[first[0]],
        )


def _build_tokenizer(
    cells: InputCells, conditions: ConditionColumns, panel: np.ndarray, counted: Counted, max_count: int | None
) -> DCMTokenizer:
    if max_count is not None and max_count < counted.largest_in_training:
        raise ValueError(
            f"--max-count is {max_count:,} but the training cells have counts up to {counted.largest_in_training:,}; "
            f"pass --max-count {counted.largest_in_training} or more, or leave it out"
        )
    labels = {name: list(column.categories) for name, column in conditions.columns.items()}
    return DCMTokenizer.from_labels(
        genes=cells.var.index[panel],
        max_count=counted.largest_in_training if max_count is None else max_count,
        cell_types=labels.pop("cell_type", None),
        perturbations=labels.pop("perturbation", None),
        control=conditions.control,
        covariates=labels,
        separator=conditions.separator,
    )


def _write_parts(
    folder: Path,
    cells: InputCells,
    conditions: ConditionColumns,
    parts: dict[str, np.ndarray],
    panel: np.ndarray,
    panels: Panels | None,
    largest: int,
    seed: int,
) -> None:
    """Write the Parquet folder and the h5ad of every part that has cells, in one pass over the files."""
    uns: dict[str, object] = {"dcm_conditions": np.array(list(conditions.columns), dtype=object)}
    if conditions.control is not None:
        uns["dcm_control"] = conditions.control
    columns = dict(conditions.columns)
    if panels is not None:
        sizes = [len(file.obs) for file in cells.files]
        columns[PANEL] = pd.Categorical.from_codes(np.repeat(panels.of_file, sizes), categories=list(panels.missing))
        uns["dcm_panels"] = panels.measured
    obs = conditions.canonical_obs(
        cells.obs, {name: columns[name] for name in columns if name not in conditions.columns}
    )
    features = shard_features(len(panel), largest, {name: column.categories for name, column in columns.items()})
    writers = {}
    for name, part in parts.items():
        if not len(part):
            logger.info("no cells for %s: it is not written", name)
            continue
        shards = ShardWriter(
            folder / name,
            features=features,
            columns={key: column[part] for key, column in columns.items()},
            num_cells=len(part),
            order_seed=[seed, SPLITS.index(name)],
        )
        h5ad = CountWriter(folder / f"{name}.h5ad", obs=obs.iloc[part], var=cells.var.iloc[panel], uns=uns)
        writers[name] = (shards, h5ad)
    for name, counts in _parts_of_blocks(cells, parts, panel):
        for writer in writers[name]:
            writer.add(counts)
    for writer in (writer for both in writers.values() for writer in both):
        writer.finish()


def _parts_of_blocks(
    cells: InputCells, parts: dict[str, np.ndarray], panel: np.ndarray
) -> Iterator[tuple[str, csr_matrix]]:
    """Yield the cells of each part in each block, (m, panel)."""
    position = np.full(len(cells.var), -1)
    position[panel] = np.arange(len(panel))
    for rows, counts, _ in cells.blocks("writing cells"):
        counts = with_genes(counts, position, len(panel))
        for name, part in parts.items():
            first, last = np.searchsorted(part, [rows.start, rows.stop])
            if last > first:
                yield name, counts[part[first:last] - rows.start]


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    """Of a file's bytes; of a folder, of the sums of its files in the order of their names."""
    if path.is_dir():
        sums = "".join(f"{file.name} {_sha256(file)}\n" for file in sorted(path.iterdir()) if file.is_file())
        return hashlib.sha256(sums.encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _describe(conditions: ConditionColumns, tokenizer: DCMTokenizer, counted: Counted) -> dict[str, object]:
    """What ``split.json`` says of the vocabularies, and the versions that wrote it."""
    packages = ("anndata", "datasets", "numpy", "pyarrow", "scikit-misc", "scipy", "transformers")
    return {
        "conditions": list(conditions.columns),
        "columns": conditions.sources,
        "control": conditions.control,
        "separator": conditions.separator,
        "max_count": tokenizer.max_count,
        "largest_training_count": counted.largest_in_training,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def _report(out: Path, tokenizer: DCMTokenizer, parts: dict[str, np.ndarray], counted: Counted) -> None:
    logger.info("cells: %s", ", ".join(f"{len(cells):,} {name}" for name, cells in parts.items()))
    logger.info("genes: %s (%s all zero in training)", f"{len(tokenizer.genes):,}", f"{counted.zero_genes:,}")
    logger.info(
        "largest count in training: %s, of the vocabulary: %s (of all cells: %s)",
        *(f"{count:,}" for count in (counted.largest_in_training, tokenizer.max_count, counted.largest)),
    )
    known = [f"{len(tokenizer.cell_types)} cell types"] * bool(tokenizer.cell_types)
    known += [f"{len(tokenizer.perturbations)} perturbations"] * bool(tokenizer.perturbations)
    known += [f"{len(labels)} labels of {name}" for name, labels in tokenizer.covariates.items()]
    logger.info("conditions: %s", ", ".join(known) or "none")
    targets = tokenizer.target_gene_ids
    if len(targets):
        logger.info("%d of %d perturbations are named like a gene of the panel", (targets >= 0).sum(), len(targets))
    logger.info("written: %s", out)


def cli() -> None:
    """Command line of ``dcm-convert``."""
    run(main)


if __name__ == "__main__":
    cli()
