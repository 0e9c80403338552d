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
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from tokenization import DCMTokenizer
from training.conversion.conditions import ConditionColumns, read_conditions
from training.conversion.genes import Panel, choose_panel, read_gene_list
from training.conversion.inputs import InputCells, read_cells
from training.conversion.splits import Controls, SplitName, split_cells
from training.conversion.write import build_tables, dataset_card, write_splits
from training.data.command_line import run
from training.data.folders import check_replaceable, folder_written_aside, remove_leftovers, scratch_folder
from training.data.shards import SPLITS, find_panels
from training.data.statistics import STATISTICS
from training.data.workers import FileWorkers, Report, available_cores, file_workers

logger = logging.getLogger(__name__)

FORMAT = "dcm-shards-2"
WRITTEN = {
    "README.md",
    "split.json",
    "panels.json",
    STATISTICS,
    "tokenizer",
    *SPLITS,
    *(f"{split}.h5ad" for split in SPLITS),
}
SMALL_INPUT = 2**28  # bytes; starting processes takes longer than they save


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
    processes: int | None = None,
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
        processes: how many work at once, on a file each; the result does not depend on it. Each holds a block of cells
            in memory. Default as many as there are cores and files, but one for inputs that are small.

    Returns:
        The folder written.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file, a value, a label or an option is wrong; nothing has been written then.
    """
    sources = (source,) if isinstance(source, Path) else tuple(source)
    if genes is not None and n_top_genes is not None:
        raise ValueError("--genes and --n-top-genes were both given; pass one of them")
    remove_leftovers(out)
    check_replaceable(out, mark="split.json", written=WRITTEN)
    gene_list = None if genes is None else read_gene_list(genes)
    processes = _sensible_processes(sources) if processes is None else processes
    with scratch_folder(out) as scratch, file_workers(processes, scratch) as workers:
        cells = read_cells(
            sources,
            scratch,
            workers,
            layer=layer,
            gene_key=gene_key,
            genes=gene_list,
            join=join,
            duplicate_genes=duplicate_genes,
        )
        conditions = read_conditions(
            cells.obs,
            cell_type_key=cell_type_key,
            perturbation_key=perturbation_key,
            covariate_keys=[key.strip() for key in covariate_keys.split(",") if key.strip()],
            control=control,
            separator=separator or None,
        )
        fractions = {"test_fraction": test_fraction, "validation_fraction": validation_fraction}
        chosen = split_cells(
            split,
            cells.obs,
            conditions,
            held_out=held_out,
            cell_type=held_out_cell_type,
            controls=controls,
            split_file=split_file,
            split_key=split_key,
            **fractions,
            seed=split_seed,
        )
        panel = choose_panel(cells, chosen.cells["train"], n_top_genes, workers)
        tokenizer = _build_tokenizer(cells, conditions, panel, max_count)
        panels = find_panels(cells.measured[:, panel.genes], [path.name for path in sources], tokenizer.genes)
        tables = build_tables(cells, conditions, panel, panels)
        written = write_splits(
            scratch / "splits", cells, chosen.cells, panel, tables, tokenizer, seed=split_seed, workers=workers
        )
        selection = "list" if genes is not None else "all" if n_top_genes is None else "seurat_v3"
        description = {
            "format": FORMAT,
            "split": split,
            "seed": split_seed,
            **fractions,
            **chosen.description,
            "sources": _describe_sources(sources, workers),
            "layer": layer,
            **_describe(conditions, tokenizer, panel),
            "genes": {"selection": selection, "join": join, "panel": tokenizer.genes},
            "cells": {name: cells.obs.index[part].tolist() for name, part in chosen.cells.items()},
        }
        with folder_written_aside(out) as folder:
            for path in written:
                path.rename(folder / path.name)
            tokenizer.save_pretrained(folder / "tokenizer")
            if panels is not None:
                _write_json(folder / "panels.json", panels.missing)
            _write_json(folder / "split.json", description)
            (folder / "README.md").write_text(dataset_card(description), encoding="utf-8")
    remove_leftovers(out)  # those whose processes were still ending a moment ago
    _report(out, tokenizer, chosen.cells, panel)
    return out


def _sensible_processes(sources: Sequence[Path]) -> int:
    files = [file for path in sources for file in (path.iterdir() if path.is_dir() else [path]) if file.is_file()]
    if sum(file.stat().st_size for file in files) < SMALL_INPUT:
        return 1
    return min(available_cores(), len(sources))


def _build_tokenizer(
    cells: InputCells, conditions: ConditionColumns, panel: Panel, max_count: int | None
) -> DCMTokenizer:
    if max_count is not None and max_count < panel.largest_in_training:
        raise ValueError(
            f"--max-count is {max_count:,} but the training cells have counts up to {panel.largest_in_training:,}; "
            f"pass --max-count {panel.largest_in_training} or more, or leave it out"
        )
    labels = {name: list(column.categories) for name, column in conditions.columns.items()}
    return DCMTokenizer.from_labels(
        genes=cells.var.index[panel.genes],
        max_count=panel.largest_in_training if max_count is None else max_count,
        cell_types=labels.pop("cell_type", None),
        perturbations=labels.pop("perturbation", None),
        control=conditions.control,
        covariates=labels,
        separator=conditions.separator,
    )


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _describe_sources(sources: Sequence[Path], workers: FileWorkers) -> list[dict[str, str]]:
    jobs = [partial(_sha256_reported, path) for path in sources]
    sums = workers.run(jobs, desc="summing files", total=len(jobs), unit=" files")
    return [{"file": path.name, "sha256": sum_} for path, sum_ in zip(sources, sums)]


def _sha256_reported(path: Path, *, report: Report) -> str:
    digest = _sha256(path)
    report(1)
    return digest


def _sha256(path: Path) -> str:
    """Of a file's bytes; of a folder, of the sums of its files in the order of their names."""
    if path.is_dir():
        sums = "".join(f"{file.name} {_sha256(file)}\n" for file in sorted(path.iterdir()) if file.is_file())
        return hashlib.sha256(sums.encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _describe(conditions: ConditionColumns, tokenizer: DCMTokenizer, panel: Panel) -> dict[str, object]:
    """What ``split.json`` says of the vocabularies, and the versions that wrote it."""
    packages = ("anndata", "datasets", "numpy", "pyarrow", "scikit-misc", "scipy", "transformers")
    return {
        "conditions": list(conditions.columns),
        "columns": conditions.sources,
        "control": conditions.control,
        "separator": conditions.separator,
        "max_count": tokenizer.max_count,
        "largest_training_count": panel.largest_in_training,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def _report(out: Path, tokenizer: DCMTokenizer, parts: dict[str, np.ndarray], panel: Panel) -> None:
    logger.info("cells: %s", ", ".join(f"{len(cells):,} {name}" for name, cells in parts.items()))
    logger.info("genes: %s (%s all zero in training)", f"{len(tokenizer.genes):,}", f"{panel.zero_genes:,}")
    logger.info(
        "largest count in training: %s, of the vocabulary: %s (of all cells: %s)",
        *(f"{count:,}" for count in (panel.largest_in_training, tokenizer.max_count, panel.largest)),
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
