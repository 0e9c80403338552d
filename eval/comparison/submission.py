"""Say what is wrong with a file of predicted cells by the contract of the Virtual Cell Challenge of 2026, and write one
that is right.

The contract: raw counts, no cell above a million of them; the genes of the real file in its order; its labels, with
control cells; any number of cells. Needs no package of the challenge.
"""

from collections.abc import Sequence
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

from eval.comparison.cells import PERTURBATION, SEPARATOR, joined_labels
from eval.drawing.read_cells import panel_columns
from tokenization.count_checks_dcm import library_size
from tokenization.labels_dcm import shortened
from training.data.files import written_aside
from training.data.formats import opened_counts
from training.data.h5ad import damage_named, open_h5ad, read_known, read_table, write_h5ad_in_blocks

MOST_COUNTS = 1_000_000  # of a cell


def defects(path: Path, real: Path, *, control: str | None = None, layer: str | None = None) -> list[str]:
    """Everything by which a file breaks the contract beside the real file; none if it is right.

    ``control`` is by default what the real file says in ``uns["dcm_control"]``.

    Raises:
        OSError, ValueError: a file that cannot be read at all, or a real one without labels of perturbations.
    """
    obs, genes, columns, control = _asked(real, control)
    found, largest, large = [], 0, 0
    with opened_counts(path, layer) as file:
        try:
            for _, counts in file.blocks(f"reading {path.name}", check=True):
                sizes = library_size(counts)
                largest, large = max(largest, int(sizes.max(initial=0))), large + int((sizes > MOST_COUNTS).sum())
        except ValueError as error:
            found.append(str(error))
        theirs, names = file.obs, list(map(str, file.var.index))
    if large:
        found.append(f"{large:,} cells have more than {MOST_COUNTS:,} counts (the most {largest:,})")
    return found + _wrong_genes(names, genes) + _wrong_labels(theirs, obs, columns, control)


def refuse_defects(path: Path, real: Path, **options: str | None) -> None:
    """Raise ValueError with the numbered list of all that is wrong.

    Raises as :func:`defects`, too.
    """
    found = defects(path, real, **options)
    if found:
        listed = "; ".join(f"({number}) {defect}" for number, defect in enumerate(found, start=1))
        raise ValueError(f"{str(path)!r} breaks the contract of vcc2026 beside {str(real)!r}: {listed}")


def rewrite_as_submission(path: Path, real: Path) -> None:
    """Give drawn cells the real file's genes, in its order, and its labels as they stand there.

    Raises:
        ValueError: the cells lack a gene, or break the contract otherwise.
    """
    _, genes, _ = annotations_of(real)
    obs, _, uns = annotations_of(path)
    as_they_stand = {name.removeprefix("source_"): obs.pop(name) for name in [*obs] if name.startswith("source_")}
    as_they_stand.pop("cell", None)
    annotations = anndata.AnnData(obs=obs.assign(**as_they_stand), var=pd.DataFrame(index=genes), uns=uns)
    with opened_counts(path) as file, written_aside(path) as aside:
        refuse_missing_genes([*file.var.index], real)
        blocks = ({"X": counts} for counts in file.panel_blocks(panel_columns(file, genes), f"ordering {path.name}"))
        write_h5ad_in_blocks(aside, annotations, blocks, {"X": np.int32})
    refuse_defects(path, real)


def refuse_missing_genes(known: Sequence[str], real: Path) -> None:
    """Raise ValueError where a real file has genes that a checkpoint, whose genes are ``known``, cannot draw, or no
    control cells."""
    genes = _asked(real, None)[1]
    absent = [gene for gene in genes if gene not in set(known)]
    if absent:
        raise ValueError(
            f"{str(real)!r} has {len(absent):,} genes of {len(genes):,} that the model does not know "
            f"({shortened(absent)}), and a submission needs all: train on all of them (dcm-convert without "
            "--n-top-genes)"
        )


def annotations_of(path: Path) -> tuple[pd.DataFrame, list[str], dict[str, object]]:
    """``obs``, the genes and ``uns`` of an h5ad file, whose counts are not looked at."""
    with open_h5ad(path) as file, damage_named(path):
        uns = read_known(file["uns"]) if "uns" in file else {}
        return read_table(file, "obs"), list(map(str, read_table(file, "var").index)), uns


def _asked(real: Path, control: str | None) -> tuple[pd.DataFrame, list[str], list[str], str]:
    """Labels, genes, columns of conditions and the label of control cells of the real file."""
    obs, genes, uns = annotations_of(real)
    control = str(uns.get("dcm_control") if control is None else control)
    if PERTURBATION not in obs or control not in set(obs[PERTURBATION]):
        raise ValueError(
            f"{str(real)!r} has no cells labelled {control!r} (control) in obs[{PERTURBATION!r}]: name its label with "
            "--control, or in uns['dcm_control'] as dcm-convert does"
        )
    return obs, genes, [str(name) for name in np.atleast_1d(uns.get("dcm_conditions", [PERTURBATION]))], control


def _wrong_genes(names: list[str], genes: list[str]) -> list[str]:
    expected, found = set(genes), []
    for what, wrong in (
        ("are missing", [gene for gene in genes if gene not in set(names)]),
        ("are not in the real file", [name for name in names if name not in expected]),
        ("stand there twice", sorted(set(pd.Index(names)[pd.Index(names).duplicated()]))),
    ):
        if wrong:
            found.append(f"{len(wrong):,} genes {what} ({shortened(wrong)})")
    if not found and names != genes:
        first = next(place for place, pair in enumerate(zip(names, genes)) if pair[0] != pair[1])
        found.append(f"genes are in another order (gene {first + 1} is {names[first]}, expected {genes[first]})")
    return found


def _wrong_labels(obs: pd.DataFrame, real: pd.DataFrame, columns: list[str], control: str) -> list[str]:
    absent = [column for column in columns if column not in obs]
    if absent:
        return [f"obs has no column {', '.join(absent)} (it has {shortened(obs.columns) or 'none'})"]
    found = []
    for column in columns:
        if obs[column].isna().any():
            found.append(f"{int(obs[column].isna().sum()):,} cells have no label in obs[{column!r}]")
    ours, theirs = ({*joined_labels(table[columns].dropna().astype(str))} for table in (obs, real))
    place = columns.index(PERTURBATION)
    lacking = sorted(theirs - ours)
    controls = [name for name in lacking if name.split(SEPARATOR)[place] == control]
    others = [name for name in lacking if name not in controls]
    for what, names in (
        ("conditions without control cells", controls),
        ("conditions of the real file are missing", others),
        ("conditions are not in the real file", sorted(ours - theirs)),
    ):
        if names:
            found.append(f"{len(names):,} {what} ({shortened(names)})")
    return found
