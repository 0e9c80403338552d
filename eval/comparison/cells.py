"""Read everything that an evaluation compares: real test and training cells, and generated files or checkpoints.

A checkpoint is drawn from first, with the conditions of the real test cells and several seeds. Knows nothing of
metrics.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import anndata
import pandas as pd

from eval.comparison.labelled_counts import (
    PERTURBATION,
    LabelledCounts,
    check_unique_genes,
    condition_columns,
    from_anndata,
)
from eval.comparison.protocols import missing_cells
from training.data.files import read_h5ad

logger = logging.getLogger(__name__)

GENES_NAMED = 5


@dataclass(frozen=True)
class Cells:
    """Everything that is compared: genes and condition columns are the same in all of it.

    ``genes_left_out`` are genes of the real cells that some other file lacks; none unless that was allowed.
    """

    real: LabelledCounts
    train: LabelledCounts
    generated: dict[str, list[LabelledCounts]]
    genes: list[str]
    checkpoint: str | None
    genes_left_out: tuple[str, ...] = ()

    def genes_note(self) -> str | None:
        """What a reader of the numbers must know where not all genes of the real cells are compared."""
        if not self.genes_left_out:
            return None
        named, more = self.genes_left_out[:GENES_NAMED], len(self.genes_left_out) - GENES_NAMED
        return (
            f"{len(self.genes):,} of the {len(self.genes) + len(self.genes_left_out):,} genes of the real cells; left "
            f"out, as another file lacks them: {', '.join(named)}" + (f" and {more:,} more" if more > 0 else "")
        )


def read_cells(
    generated: Sequence[Path],
    real: Path,
    train: Path,
    *,
    names: Sequence[str | None],
    reserved_names: Sequence[str],
    condition_keys: str | None = None,
    layer: str | None = None,
    control: str | None = None,
    genes: Literal["all", "shared"] = "all",
) -> Cells:
    """Read all files, with the genes of the real one and one set of condition columns.

    Args:
        generated: h5ad files; those with one name are the seeds of one generator.
        real: the real test cells.
        train: the real training cells.
        names: a name for each generated file; None is what the file says in ``uns["generator"]``.
        reserved_names: names that a generator cannot have.
        condition_keys: columns of obs with commas between, or none; None is what the real file says.
        layer: layer of the generated files that holds the counts.
        control: label of control cells; None is what the real file says.
        genes: every file must have all genes of the real cells, or those that all files share are compared.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: a file that is not counts of the same genes with the same condition columns.
    """
    real_file = read_h5ad(real)
    files = [read_h5ad(path) for path in generated]
    train_file = read_h5ad(train)
    conditions = condition_columns(condition_keys, real_file, files)
    others = {str(path): file.var_names for path, file in zip((*generated, train), (*files, train_file))}
    compared, left_out = _compared_genes(real_file.var_names, others, genes, real=str(real))
    control = str(real_file.uns["dcm_control"]) if control is None and "dcm_control" in real_file.uns else control
    real_cells = from_anndata(real_file, name=str(real), conditions=conditions, genes=compared, control=control)
    if control is not None and PERTURBATION in conditions and control not in set(real_cells.labels[PERTURBATION]):
        known = ", ".join(sorted(set(real_cells.labels[PERTURBATION]))[:5])
        logger.warning("no test cell is labelled %r (control); perturbations there: %s, ...", control, known)
    by_model: dict[str, list[LabelledCounts]] = {}
    for path, file, name in zip(generated, files, names):
        cells = from_anndata(file, name=str(path), conditions=conditions, genes=compared, layer=layer, control=control)
        if not set(cells.rows_by_condition) & set(real_cells.rows_by_condition):
            raise ValueError(
                f"{str(path)!r} has none of the conditions of {str(real)!r} (columns {', '.join(conditions)}); it has "
                f"{next(iter(cells.rows_by_condition))!r}, the other {next(iter(real_cells.rows_by_condition))!r}, ..."
            )
        by_model.setdefault(name or _generator(file, path, reserved_names), []).append(cells)
    train_cells = from_anndata(train_file, name=str(train), conditions=conditions, genes=compared, control=control)
    found = [file.uns.get("dcm_sampling", {}).get("checkpoint") for file in files]
    checkpoints = list(dict.fromkeys(str(checkpoint) for checkpoint in found if checkpoint is not None))
    return Cells(real_cells, train_cells, by_model, compared, ", ".join(checkpoints) or None, left_out)


def drawn_files(
    generated: Sequence[Path], names: Sequence[str | None], *, real: Path, out: Path, seeds: int
) -> tuple[list[Path], list[str | None]]:
    """Replace every checkpoint by the files drawn from it, one for each seed, in ``out/samples``.

    Returns:
        The h5ad files and a name for each: the one given, for a checkpoint else the last part of its path.
    """
    paths: list[Path] = []
    all_names: list[str | None] = []
    for given, name in zip(generated, names):
        if not is_checkpoint(given):
            paths.append(given)
            all_names.append(name)
            continue
        from eval.sample import main as sample  # only here: drawing needs the network's packages

        for seed in range(seeds):
            path = out / "samples" / f"{given.resolve().name}_{seed}.h5ad"
            logger.info("drawing the test cells' conditions from %s, seed %d", given, seed)
            paths.append(sample(str(given), out=path, like=real, seed=seed))
            all_names.append(name or given.resolve().name)
    return paths, all_names


def is_checkpoint(path: Path) -> bool:
    """Whether an argument is a checkpoint's folder, or may be its id on the Hub, and not a file of cells."""
    return path.is_dir() or (path.suffix not in (".h5ad", ".h5") and not path.exists() and len(path.parts) == 2)


def warn_of_gaps(cells: Cells) -> None:
    """Say which test cells have no generated partner, and which generated cells are never compared."""
    for model, files in cells.generated.items():
        for position, file in enumerate(files, start=1):
            number, short, unmatched = missing_cells(file, cells.real)
            if number:
                logger.warning(
                    "%s, file %d: %d of %d test cells have no generated partner, in %d conditions (%s, ...); it is "
                    "compared on fewer cells than the floor",
                    model,
                    position,
                    number,
                    len(cells.real),
                    len(short),
                    short[0],
                )
            if unmatched:
                logger.warning(
                    "%s, file %d: %d conditions are not among the test cells and are left out (%s, ...)",
                    model,
                    position,
                    len(unmatched),
                    unmatched[0],
                )


def _compared_genes(
    of_real: pd.Index, others: dict[str, pd.Index], genes: Literal["all", "shared"], *, real: str
) -> tuple[list[str], tuple[str, ...]]:
    """The genes to compare, in the order of the real cells, and those left out because another file lacks them."""
    for name, found in others.items():
        check_unique_genes(found, name)
    absent = {name: of_real[~of_real.isin(found)] for name, found in others.items()}
    short = next((name for name, lacking in absent.items() if len(lacking)), None)
    if short is None:
        return list(map(str, of_real)), ()
    lacking = set().union(*absent.values())
    named = ", ".join(map(str, absent[short][:GENES_NAMED])) + (", ..." if len(absent[short]) > GENES_NAMED else "")
    what = f"{short!r} lacks {len(absent[short]):,} of the {len(of_real):,} genes of the real cells ({named})"
    if len(lacking) == len(of_real):
        raise ValueError(
            f"{what}; no gene of {real!r} is in every file: name genes alike in all of them (those of {short!r} are "
            f"{', '.join(map(str, others[short][:3]))}, ...)"
        )
    if genes == "all":
        raise ValueError(
            f"{what}; add them, or compare on the {len(of_real) - len(lacking):,} others with --genes shared"
        )
    logger.warning("%s: compared on the %d genes that all files share", what, len(of_real) - len(lacking))
    kept = [str(gene) for gene in of_real if gene not in lacking]
    return kept, tuple(str(gene) for gene in of_real if gene in lacking)


def _generator(file: anndata.AnnData, path: Path, reserved_names: Sequence[str]) -> str:
    """The generator's name as the file tells it."""
    if "generator" not in file.uns:
        raise ValueError(f"{str(path)!r} does not say what generated it (uns['generator']); pass --name NAME")
    if str(file.uns["generator"]) in reserved_names:
        raise ValueError(
            f"{str(path)!r}: uns['generator'] is {file.uns['generator']!r}, a row of every table; pass --name"
        )
    return str(file.uns["generator"])
