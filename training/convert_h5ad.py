"""Convert an h5ad file of counts to shards: the folder that training, sampling and evaluation read.

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
from typing import Annotated

import numpy as np
import tyro
from scipy.sparse import csr_matrix

from tokenization import DCMTokenizer
from tokenization.command_line import run
from tokenization.counts_dcm import CountCheck
from tokenization.files import written_aside
from training.condition_columns import ConditionColumns, read_conditions
from training.gene_panel import GeneTotals, seurat_v3_variances, top_genes
from training.h5ad_blocks import CountFile, CountWriter, opened_counts
from training.shards import ShardWriter, dataset_card, shard_features
from training.splits import SPLITS, random_split

logger = logging.getLogger(__name__)

FORMAT = "dcm-shards-1"
WRITTEN = {"README.md", "split.json", "tokenizer", *SPLITS, *(f"{split}.h5ad" for split in SPLITS)}


def main(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN.h5ad")],
    *,
    out: Path,
    layer: str | None = None,
    cell_type_key: str | None = None,
    perturbation_key: str | None = None,
    control: str | None = None,
    covariate_keys: str = "",
    separator: str = "+",
    n_top_genes: int | None = None,
    max_count: int | None = None,
    test_fraction: float = 0.2,
    validation_fraction: float = 0.1,
    split_seed: int = 0,
) -> Path:
    """Convert an h5ad file of counts to shards.

    Args:
        source: the h5ad file; every gene and cell is kept unless told otherwise.
        out: folder to write; one that an earlier conversion wrote is replaced, any other is an error.
        layer: layer with the counts; default X.
        cell_type_key: obs column of cell types; without it the data have none.
        perturbation_key: obs column of perturbations; without it the data have none.
        control: label of unperturbed cells; default "control" or "non-targeting" if one of them occurs.
        covariate_keys: obs columns of other conditions (batch, donor, ...), separated by commas.
        separator: what joins single perturbations to a combination; "" where names are never combined.
        n_top_genes: keep this many variable genes, chosen by seurat_v3 on training cells; default all.
        max_count: largest count of the vocabulary; default the largest of the training cells.
        test_fraction: share of the cells held out for evaluation, in every condition.
        validation_fraction: share of the remaining cells held out for choices during training.
        split_seed: seed of the split and of the order of the shards.

    Returns:
        The folder written.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file, a value, a label or an option is wrong; nothing has been written then.
    """
    _check_out(out)
    with opened_counts(source, layer) as file:
        _check_names(file)
        conditions = read_conditions(
            file.obs,
            cell_type_key=cell_type_key,
            perturbation_key=perturbation_key,
            covariate_keys=[key.strip() for key in covariate_keys.split(",") if key.strip()],
            control=control,
            separator=separator or None,
        )
        parts = random_split(
            conditions.strata(len(file.obs)),
            test_fraction=test_fraction,
            validation_fraction=validation_fraction,
            seed=split_seed,
        )
        panel, counted = _choose_panel(file, parts["train"], n_top_genes)
        tokenizer = _build_tokenizer(file, conditions, panel, counted, max_count)
        split = {
            "format": FORMAT,
            "split": "random",
            "seed": split_seed,
            "test_fraction": test_fraction,
            "validation_fraction": validation_fraction,
            "source": {"file": source.name, "sha256": _sha256(source), "layer": layer},
            **_describe(conditions, tokenizer, counted),
            "genes": {"selection": "all" if n_top_genes is None else "seurat_v3", "panel": tokenizer.genes},
            "cells": {name: file.obs.index[cells].tolist() for name, cells in parts.items()},
        }
        with written_aside(out) as folder:
            _write_parts(folder, file, conditions, parts, panel, counted.largest, split_seed)
            tokenizer.save_pretrained(folder / "tokenizer")
            (folder / "split.json").write_text(json.dumps(split, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            (folder / "README.md").write_text(dataset_card(split), encoding="utf-8")
    _report(out, tokenizer, parts, counted)
    return out


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


def _check_names(file: CountFile) -> None:
    for kind, names, way_out in (
        ("gene", file.var.index, "sum or drop the duplicates, or adata.var_names_make_unique()"),
        ("cell", file.obs.index, "adata.obs_names_make_unique()"),
    ):
        repeated = sorted(set(names[names.duplicated()]))
        if repeated:
            raise ValueError(
                f"{str(file.path)!r}: {len(repeated):,} {kind} names stand more than once "
                f"({', '.join(repeated[:5])}); {way_out}"
            )


def _choose_panel(file: CountFile, train: np.ndarray, n_top_genes: int | None) -> tuple[np.ndarray, Counted]:
    """Validate every value, and choose the genes; returns their positions in the file, ascending, and what was found.

    Only training cells can reach the choice; of the others nothing but the largest count is used, to size the columns.
    """
    num_genes = len(file.var)
    if n_top_genes is not None and not 1 <= n_top_genes <= num_genes:
        raise ValueError(f"--n-top-genes is {n_top_genes:,}; expected 1 to {num_genes:,}, the genes of the file")
    in_train = np.zeros(len(file.obs), dtype=bool)
    in_train[train] = True
    largest = np.zeros(num_genes, dtype=np.int64)
    totals = GeneTotals(num_genes)
    for rows, counts in file.blocks("checking counts", CountCheck()):
        largest = np.maximum(largest, counts.max(axis=0).toarray().ravel())
        totals.add(counts[in_train[rows]])
    panel = np.arange(num_genes)
    if n_top_genes is not None:
        blocks = (counts[in_train[rows]] for rows, counts in file.blocks("choosing genes"))
        panel = top_genes(seurat_v3_variances(totals, blocks), n_top_genes)
    if not totals.largest[panel].any():
        raise ValueError(f"{file.source} has no count above 0 in the {len(train):,} training cells")
    counted = Counted(
        largest=int(largest[panel].max()),
        largest_in_training=int(totals.largest[panel].max()),
        zero_genes=int((totals.largest[panel] == 0).sum()),
    )
    return panel, counted


def _build_tokenizer(
    file: CountFile, conditions: ConditionColumns, panel: np.ndarray, counted: Counted, max_count: int | None
) -> DCMTokenizer:
    if max_count is not None and max_count < counted.largest_in_training:
        raise ValueError(
            f"--max-count is {max_count:,} but the training cells have counts up to {counted.largest_in_training:,}; "
            f"pass --max-count {counted.largest_in_training} or more, or leave it out"
        )
    labels = {name: list(column.categories) for name, column in conditions.columns.items()}
    return DCMTokenizer.from_labels(
        genes=file.var.index[panel],
        max_count=counted.largest_in_training if max_count is None else max_count,
        cell_types=labels.pop("cell_type", None),
        perturbations=labels.pop("perturbation", None),
        control=conditions.control,
        covariates=labels,
        separator=conditions.separator,
    )


def _write_parts(
    folder: Path,
    file: CountFile,
    conditions: ConditionColumns,
    parts: dict[str, np.ndarray],
    panel: np.ndarray,
    largest: int,
    seed: int,
) -> None:
    """Write the Parquet folder and the h5ad of every part that has cells, in one pass over the file."""
    features = shard_features(
        len(panel), largest, {name: column.categories for name, column in conditions.columns.items()}
    )
    obs = conditions.canonical_obs(file.obs)
    uns: dict[str, object] = {"dcm_conditions": np.array(list(conditions.columns), dtype=object)}
    if conditions.control is not None:
        uns["dcm_control"] = conditions.control
    writers = {}
    for name, cells in parts.items():
        if not len(cells):
            logger.info("no cells for %s: it is not written", name)
            continue
        shards = ShardWriter(
            folder / name,
            features=features,
            columns={key: column[cells] for key, column in conditions.columns.items()},
            num_cells=len(cells),
            order_seed=[seed, SPLITS.index(name)],
        )
        h5ad = CountWriter(folder / f"{name}.h5ad", obs=obs.iloc[cells], var=file.var.iloc[panel], uns=uns)
        writers[name] = (shards, h5ad)
    for part, counts in _parts_of_blocks(file, parts, panel):
        for writer in writers[part]:
            writer.add(counts)
    for shards, _ in writers.values():
        shards.finish()


def _parts_of_blocks(
    file: CountFile, parts: dict[str, np.ndarray], panel: np.ndarray
) -> Iterator[tuple[str, csr_matrix]]:
    """Yield the cells of each part in each block of the file, (m, panel)."""
    for rows, counts in file.blocks("writing cells"):
        if len(panel) < counts.shape[1]:
            counts = counts[:, panel]
            counts.sort_indices()
        for name, cells in parts.items():
            first, last = np.searchsorted(cells, [rows.start, rows.stop])
            if last > first:
                yield name, counts[cells[first:last] - rows.start]


def _sha256(path: Path) -> str:
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
    logger.info("written: %s", out)


def cli() -> None:
    """Command line of ``dcm-convert``."""
    run(main)


if __name__ == "__main__":
    cli()
