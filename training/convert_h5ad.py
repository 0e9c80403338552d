"""Convert files of counts (h5ad, 10x) to shards: the folder that training, sampling and evaluation read.

    dcm-convert cells.h5ad --out shards/ --cell-type-key cell_type --perturbation-key perturbation --control control
    dcm-convert --merge plate1/ plate2/ --out shards/

Everything that can be learnt from data is decided here, from training cells only (gene panel, largest count,
statistics), and stored: vocabularies in ``tokenizer/``, the cells of each split in ``split.json``. Needed packages are
imported where they are needed, so that ``--help`` and a wrong option answer at once.
"""

import inspect
import logging
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from training.data.command_line import run, version_of

if TYPE_CHECKING:
    from tokenization import DCMTokenizer
    from training.conversion.conditions import ConditionColumns
    from training.conversion.genes import InputCells, Panel
    from training.conversion.splits import Split, SplitOptions

logger = logging.getLogger(__name__)

FORMAT = "dcm-shards-2"
PACKAGES = ("anndata", "datasets", "numpy", "pyarrow", "scikit-misc", "scipy", "transformers")
WRITTEN = {"README.md", "split.json", "merged.json", "panels.json", "statistics.safetensors", "tokenizer"}
WRITTEN |= {"train", "validation", "test", "train.h5ad", "validation.h5ad", "test.h5ad"}
SplitName = Literal["random", "held-out-perturbations", "held-out-combinations", "few-shot", "zero-shot", "from-file"]


def main(
    source: Annotated[Path | tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IN.h5ad [IN.h5ad ...]")],
    *,
    out: Path,
    merge: bool = False,
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
    split: SplitName = "random",
    held_out: str | None = None,
    held_out_cell_type: str | None = None,
    split_file: Path | None = None,
    split_key: str | None = None,
    test_fraction: float = 0.2,
    validation_fraction: float = 0.1,
    split_seed: int = 0,
) -> Path:
    """Convert files of counts to shards.

    Args:
        source: h5ad files, 10x .h5 files, 10x folders of matrix.mtx, or Parquet files of Tahoe-100M with their
            gene_metadata.parquet; every gene and cell is kept unless told otherwise. The cells of several files get the
            obs column source_file.
        out: Folder to write; one that an earlier conversion wrote is replaced, any other is an error.
        merge: Make one data set of folders of shards that earlier calls wrote, of other files or on other machines:
            their files are linked, and no count is read. Genes and options must be the same: give each --genes.
        layer: Layer with the counts, or "raw" for raw.X; default X.
        cell_type_key: Column of obs of cell types; without it the data have none.
        perturbation_key: Column of obs of perturbations; without it the data have none.
        control: Label of unperturbed cells; default "control" or "non-targeting" if one of them occurs.
        covariate_keys: Columns of obs with other conditions (batch, donor, ...), separated by commas.
        separator: What joins single perturbations to a combination; "" where names are never combined.
        gene_key: Column of var that names the genes; default var_names. Versions of Ensembl ids are removed.
        genes: Text file of the genes to keep, one per line, in this order.
        n_top_genes: Keep this many variable genes, chosen by seurat_v3 on training cells; default all.
        join: Of several files, genes that all have, or that any has; genes that a file lacks are then marked as not
            measured in its cells. With --genes, "union" allows genes that the data lack.
        split: Random (a share of every condition), held-out-perturbations, held-out-combinations (both members seen
            alone), few-shot (some perturbations of --held-out-cell-type), zero-shot (all of them), or from-file. As
            large a share of the controls is tested on as of the perturbed cells.
        held_out: Perturbations to test on, separated by commas, or @FILE with one per line; default a share
            --test-fraction of those that the split can hold out.
        held_out_cell_type: Cell type that few-shot and zero-shot test on.
        split_file: For from-file: JSON {"train": [cell names], "test": [...]}; an earlier split.json will do.
        split_key: For from-file: obs column with the labels train, test and perhaps validation.
        test_fraction: Share of the cells held out for evaluation, in every condition; for splits that hold conditions
            out, the share of the labels.
        validation_fraction: Share of the remaining cells held out for choices during training.
        split_seed: Seed of the split and of the order of the shards.

    Returns:
        The folder written; where a file, a value, a label or an option is wrong nothing has been.
    """
    arguments = dict(locals())
    from training.conversion.splits import SplitOptions
    from training.data.files import check_replaceable, folder_written_aside, remove_leftovers, scratch_folder

    sources = (source,) if isinstance(source, Path) else tuple(source)
    _check(sources, arguments)
    chosen = {field.name: arguments[field.name] for field in fields(SplitOptions) if field.name != "seed"}
    options = SplitOptions(**chosen, seed=split_seed)
    remove_leftovers(out)
    check_replaceable(out, mark="split.json", written=WRITTEN)
    if merge:
        from training.conversion.merge import merge_shards

        with folder_written_aside(out) as folder:
            merge_shards(sources, folder)
        logger.info("written: %s", out)
        return out
    with scratch_folder(out) as scratch:
        cells, conditions, parts, panel = _chosen(sources, scratch, options, arguments)

        # takes seconds, so not before labels and counts are known to be right
        from training.conversion.write import build_tables, dataset_card, write_splits
        from training.data.files import write_json, write_text

        tokenizer = _build_tokenizer(cells.var.index[panel.genes], conditions, panel)
        tables = build_tables(cells, conditions, panel, [path.name for path in sources])
        written = write_splits(scratch / "splits", cells, parts.cells, panel, tables, tokenizer, seed=split_seed)
        description = {
            **_about(sources, arguments),
            **parts.description,
            "conditions": list(conditions.columns),
            "columns": conditions.sources,
            "control": conditions.control,
            "separator": conditions.separator,
            "max_count": tokenizer.max_count,
            "cells": {name: cells.obs.index[here].tolist() for name, here in parts.cells.items()},
        }
        description["genes"]["panel"] = tokenizer.genes
        with folder_written_aside(out) as folder:
            for path in written:
                path.rename(folder / path.name)
            tokenizer.save_pretrained(folder / "tokenizer")
            if tables.panels is not None:
                write_json(folder / "panels.json", tables.panels.missing)
            write_json(folder / "split.json", description)
            write_text(folder / "README.md", dataset_card(description))
    logger.info("cells: %s", ", ".join(f"{len(here):,} {name}" for name, here in parts.cells.items()))
    _report(tokenizer, panel)
    logger.info("written: %s", out)
    return out


def _check(sources: Sequence[Path], arguments: dict[str, object]) -> None:
    """Refuse files that are not there and options of :func:`main` that contradict each other."""
    for path in sources:
        if not path.exists():
            raise FileNotFoundError(f"no file {str(path)!r}; expected an h5ad file")
    defaults = {name: parameter.default for name, parameter in inspect.signature(main).parameters.items()}
    others = [name for name in arguments.keys() - {"source", "out", "merge"} if arguments[name] != defaults[name]]
    if arguments["merge"] and others:
        option = min(others).replace("_", "-")
        raise ValueError(f"--merge takes what the parts were converted with: leave out --{option}")
    if arguments["genes"] is not None and arguments["n_top_genes"] is not None:
        raise ValueError("--genes and --n-top-genes were both given; pass one of them")


def _chosen(
    sources: Sequence[Path], scratch: Path, options: "SplitOptions", arguments: dict[str, object]
) -> tuple["InputCells", "ConditionColumns", "Split", "Panel"]:
    """Look at every cell, and choose conditions, split and genes."""
    from training.conversion.conditions import read_conditions
    from training.conversion.genes import choose_panel, read_cells, read_gene_list
    from training.conversion.splits import split_cells

    def asked(*names: str) -> dict[str, object]:
        return {name: arguments[name] for name in names}

    genes = None if arguments["genes"] is None else read_gene_list(arguments["genes"])
    cells = read_cells(sources, scratch, genes=genes, **asked("layer", "gene_key", "join"))
    keys = [key.strip() for key in arguments["covariate_keys"].split(",") if key.strip()]
    columns = asked("cell_type_key", "perturbation_key", "control") | {"separator": arguments["separator"] or None}
    conditions = read_conditions(cells.obs, covariate_keys=keys, **columns)
    parts = split_cells(cells.obs, conditions, options)
    return cells, conditions, parts, choose_panel(cells, parts.cells["train"], arguments["n_top_genes"])


def _about(sources: Sequence[Path], arguments: dict[str, object]) -> dict[str, object]:
    """What ``split.json`` says of the conversion before it says what was found."""
    from tqdm import tqdm

    from training.data.files import sha256_of

    bar = tqdm(sources, desc="summing files", unit=" files", delay=1, disable=None)
    by_variance = "all" if arguments["n_top_genes"] is None else "seurat_v3"
    return {
        "format": FORMAT,
        "split": arguments["split"],
        "seed": arguments["split_seed"],
        "test_fraction": arguments["test_fraction"],
        "validation_fraction": arguments["validation_fraction"],
        "sources": [{"file": path.name, "sha256": sha256_of(path)} for path in bar],
        "layer": arguments["layer"],
        "versions": {name: version_of(name) for name in PACKAGES},
        "genes": {"selection": by_variance if arguments["genes"] is None else "list", "join": arguments["join"]},
    }


def _build_tokenizer(genes: Sequence[str], conditions: "ConditionColumns", panel: "Panel") -> "DCMTokenizer":
    from tokenization import DCMTokenizer

    labels = {name: list(column.categories) for name, column in conditions.columns.items()}
    if conditions.control is not None:
        labels["perturbation"].append(conditions.control)  # also where it never stands alone
    return DCMTokenizer.from_labels(
        genes=genes,
        max_count=panel.largest_in_training,
        cell_types=labels.pop("cell_type", None),
        perturbations=labels.pop("perturbation", None),
        control=conditions.control,
        covariates=labels,
        separator=conditions.separator,
    )


def _report(tokenizer: "DCMTokenizer", panel: "Panel") -> None:
    logger.info("genes: %s (%s all zero in training)", f"{len(tokenizer.genes):,}", f"{panel.zero_genes:,}")
    logger.info("largest count in training: %s (of all cells: %s)", f"{tokenizer.max_count:,}", f"{panel.largest:,}")
    known = [f"{len(tokenizer.cell_types)} cell types"] * bool(tokenizer.cell_types)
    known += [f"{len(tokenizer.perturbations)} perturbations"] * bool(tokenizer.perturbations)
    known += [f"{len(labels)} labels of {name}" for name, labels in tokenizer.covariates.items()]
    logger.info("conditions: %s", ", ".join(known) or "none")
    targets = tokenizer.target_gene_ids
    if len(targets):
        logger.info("%d of %d perturbations are named like a gene of the panel", (targets >= 0).sum(), len(targets))


cli = partial(run, main)

if __name__ == "__main__":
    cli()
