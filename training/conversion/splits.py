"""Divide cells into training, validation and test cells: the named splits that papers argue about.

Works on condition labels and cell names alone, so that no split can depend on counts.

``random`` divides every condition. The others hold whole conditions out for the test: ``held-out-perturbations`` (genes
never seen perturbed), ``held-out-combinations`` (pairs whose members were seen alone), ``few-shot`` (some perturbations
of one cell type, seen in the other types) and ``zero-shot`` (every perturbation of one cell type), the last two in the
sense of STATE (Adduri et al. 2025, its loader cell-load). Validation cells are always a stratified share of what
remains for training.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from tokenization.conditions_dcm import CELL_TYPE, PERTURBATION
from tokenization.labels_dcm import (
    factorize,
    join_perturbation,
    read_names,
    read_text,
    shortened,
    split_perturbation,
    unknown_label_error,
)
from training.conversion.conditions import ConditionColumns
from training.data.shards import SPLITS


@dataclass(frozen=True)
class Split:
    """Which cells are trained on, validated on and tested on.

    Attributes:
        cells: ``train``, ``validation`` and ``test``: disjoint ascending positions that together are all cells.
        description: what ``split.json`` says of it besides the cells.
    """

    cells: dict[str, np.ndarray]
    description: dict[str, object] = field(default_factory=dict)


def split_cells(
    name: str,
    obs: pd.DataFrame,
    conditions: ConditionColumns,
    *,
    held_out: str | None,
    cell_type: str | None,
    controls: str | None,
    split_file: Path | None,
    split_key: str | None,
    test_fraction: float,
    validation_fraction: float,
    seed: int,
) -> Split:
    """The split that the options of ``dcm-convert`` ask for; they are explained there.

    Raises:
        FileNotFoundError: a file of cells or of labels is missing.
        ValueError: an option that this split has no use for was given, or whatever the split itself raises.
    """
    useless = {} if name == "from-file" else {"--split-file": split_file, "--split-key": split_key}
    if name in ("random", "from-file"):
        useless |= {"--held-out": held_out, "--held-out-cell-type": cell_type, "--controls": controls}
    given = [option for option, value in useless.items() if value is not None]
    if given:
        raise ValueError(f"{given[0]} was given, but --split {name} has no use for it; pass another --split")
    strata = conditions.strata(len(obs))
    fractions = {"test_fraction": test_fraction, "validation_fraction": validation_fraction}
    if name == "random":
        return Split(cells=random_split(strata, **fractions, seed=seed))
    if name != "from-file":
        labels = None if held_out is None else _read_labels(held_out)
        return condition_split(
            name, conditions, len(obs), held_out=labels, cell_type=cell_type, controls=controls, **fractions, seed=seed
        )
    if (split_file is None) == (split_key is None):
        raise ValueError("--split from-file needs either --split-file or --split-key")
    options = {"validation_fraction": validation_fraction, "seed": seed}
    if split_file is not None:
        return split_from_names(split_file, obs.index, strata, **options)
    if split_key not in obs:
        raise ValueError(f"no column {split_key!r} in obs; columns there: {', '.join(map(str, obs.columns)) or 'none'}")
    return split_from_column(obs[split_key], strata, **options)


def _read_labels(held_out: str) -> list[str]:
    """Labels of ``--held-out``: separated by commas, or one per line of the file after ``@``."""
    if not held_out.startswith("@"):
        return [label.strip() for label in held_out.split(",") if label.strip()]
    path = Path(held_out[1:])
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r} (--held-out @FILE); expected one perturbation per line")
    return read_names(path)


def random_split(
    strata: np.ndarray, *, test_fraction: float, validation_fraction: float, seed: int
) -> dict[str, np.ndarray]:
    """Random split, stratified: every condition gives its share to each split.

    A condition of c cells gives ``c * fraction`` cells, rounded down or up so that the whole split has its exact share
    of all cells; but at least one cell of every condition stays in training.

    Args:
        strata: (n,) integers, the full condition of each cell.
        test_fraction: share of all cells that is tested on.
        validation_fraction: share of the *remaining* cells that is validated on.
        seed: another seed gives other cells.

    Returns:
        As :attr:`Split.cells`.

    Raises:
        ValueError: a fraction is outside [0, 1).
    """
    _check_fractions(test_fraction, validation_fraction)
    rng = np.random.default_rng(seed)
    test = np.zeros(len(strata), dtype=bool)
    test[_draw(strata, test_fraction, rng)] = True
    return _with_validation(strata, test, validation_fraction, rng)


def condition_split(
    name: str,
    conditions: ConditionColumns,
    num_cells: int,
    *,
    held_out: Sequence[str] | None = None,
    cell_type: str | None = None,
    controls: str | None = None,
    test_fraction: float = 0.2,
    validation_fraction: float = 0.1,
    seed: int = 0,
) -> Split:
    """Hold whole conditions out for the test.

    Controls are never held out as a condition. Those of the cells that are divided (of the one cell type for few-shot
    and zero-shot, else all) have the fate ``controls``; all others are trained on.

    Args:
        name: ``held-out-perturbations``, ``held-out-combinations``, ``few-shot`` or ``zero-shot``.
        conditions: of n cells.
        num_cells: n.
        held_out: labels to test on; default a share ``test_fraction`` of those that can be, drawn with ``seed``. For
            held-out-perturbations single names; every combination with one of them is tested on too.
        cell_type: the cell type of few-shot and zero-shot.
        controls: ``"proportional"`` tests on the share of the controls that the held-out cells have among the
            perturbed ones; ``"train"`` and ``"test"`` take all. Default ``"test"`` for zero-shot, else
            ``"proportional"``: what STATE does.
        test_fraction: share of the *labels* that is held out, at least one; unused with ``held_out``.
        validation_fraction: share of the remaining cells that is validated on, stratified.
        seed: another seed gives other labels and cells.

    Raises:
        ValueError: the data lack the conditions, nothing can be held out, or a label is wrong.
    """
    _check_fractions(test_fraction, validation_fraction)
    if name != "zero-shot" and PERTURBATION not in conditions.columns:
        raise ValueError(f"--split {name} needs perturbations; pass --perturbation-key")
    rng = np.random.default_rng(seed)
    scope = _scope(name, conditions, num_cells, cell_type)
    label = np.full(num_cells, "", dtype=object)
    if PERTURBATION in conditions.columns:
        label = np.asarray(conditions.columns[PERTURBATION], dtype=object)
    is_control = label == conditions.control
    held = _held_out_labels(name, conditions, label[scope & ~is_control], held_out, test_fraction, rng)
    test = scope & ~is_control & _tested(name, conditions, label, held)
    if not test.any() or test.all():
        raise ValueError(
            f"--split {name} would test on {int(test.sum()):,} of {num_cells:,} cells; hold out other labels"
        )
    fate = controls or ("test" if name == "zero-shot" else "proportional")
    divided = np.flatnonzero(scope & is_control)
    strata = conditions.strata(num_cells)
    if fate == "proportional":
        share = test.sum() / max(1, (scope & ~is_control).sum())
        divided = divided[_draw(strata[divided], share, rng)] if share < 1 else divided
    if fate != "train":
        test[divided] = True
    if test.all():
        raise ValueError(f"--split {name} leaves no training cell; hold out fewer labels, or pass --controls train")
    return Split(
        cells=_with_validation(strata, test, validation_fraction, rng),
        description={"held_out": held, "held_out_cell_type": cell_type, "controls": fate},
    )


def split_from_names(
    path: Path, cells: pd.Index, strata: np.ndarray, *, validation_fraction: float, seed: int
) -> Split:
    """The split of a JSON file ``{"train": [cell names], "test": [...], "validation": [...]}``.

    Without ``validation``, it is a stratified share of the training cells.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such JSON, or a cell is unknown, named twice or not named.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r} (--split-file); expected JSON with lists of cell names")
    try:
        lists = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error})") from error
    lists = lists.get("cells", lists) if isinstance(lists, dict) else lists
    if not isinstance(lists, dict) or not all(isinstance(names, list) for names in lists.values()):
        raise ValueError(f'{str(path)!r} is not {{"train": [cell names], "test": [...]}}')
    labels = np.full(len(cells), "", dtype=object)
    for name, names in lists.items():
        positions = cells.get_indexer(pd.Index([str(cell) for cell in names], dtype=object))
        unknown = [names[i] for i in np.flatnonzero(positions < 0)]
        if unknown:
            raise ValueError(
                f"{str(path)!r} names {len(unknown):,} {name} cells that the data lack ({shortened(unknown, 3)}); "
                f"cells there are called {', '.join(cells[:3])}"
            )
        repeated = len(positions) - len(set(positions.tolist())) + int((labels[positions] != "").sum())
        if repeated:
            raise ValueError(f"{str(path)!r} names {repeated:,} {name} cells more than once; each cell has one split")
        labels[positions] = name
    return _split_of_labels(labels, f"{str(path)!r}", strata, validation_fraction, seed)


def split_from_column(column: pd.Series, strata: np.ndarray, *, validation_fraction: float, seed: int) -> Split:
    """The split of an ``obs`` column with the labels ``train``, ``test`` and perhaps ``validation``.

    Raises:
        ValueError: it has another label, or none for some cell.
    """
    labels, codes = factorize(column)
    named = np.array([*labels, ""], dtype=object)[codes]
    return _split_of_labels(named, f"column {column.name!r}", strata, validation_fraction, seed)


def _split_of_labels(labels: np.ndarray, where: str, strata: np.ndarray, fraction: float, seed: int) -> Split:
    _check_fractions(0.0, fraction)
    wrong = sorted(set(labels) - {"", *SPLITS})
    if wrong:
        raise ValueError(f"{where} has the split {wrong[0]!r}; expected {', '.join(SPLITS)}")
    unnamed = int((labels == "").sum())
    if unnamed:
        raise ValueError(
            f"{where} has no split for {unnamed:,} of {len(labels):,} cells; name all cells, or drop them from the data"
        )
    cells = {name: np.flatnonzero(labels == name) for name in SPLITS}
    if not len(cells["train"]):
        raise ValueError(f"{where} names no training cell")
    if not len(cells["validation"]):
        cells = _with_validation(strata, labels == "test", fraction, np.random.default_rng(seed))
    return Split(cells=cells)


def _check_fractions(test_fraction: float, validation_fraction: float) -> None:
    for name, fraction in (("test", test_fraction), ("validation", validation_fraction)):
        if not 0 <= fraction < 1:
            raise ValueError(f"{name} fraction is {fraction}; expected at least 0 and below 1")


def _with_validation(
    strata: np.ndarray, test: np.ndarray, fraction: float, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """The three splits, given which cells are tested on."""
    rest = np.flatnonzero(~test)
    validation = rest[_draw(strata[rest], fraction, rng)]
    return {"train": np.setdiff1d(rest, validation), "validation": validation, "test": np.flatnonzero(test)}


def _draw(strata: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Ascending positions of a stratified draw that leaves at least one cell of each stratum behind.

    Systematic sampling: conditions are laid end to end, and condition j gives the whole numbers that its stretch of the
    line ``fraction * position`` crosses.
    """
    shuffled = rng.permutation(len(strata))
    shuffled = shuffled[np.argsort(strata[shuffled], kind="stable")]
    sizes = np.unique(strata, return_counts=True)[1]
    ends = np.cumsum(sizes)
    crossed = np.floor(fraction * ends + 0.5).astype(np.int64)
    wanted = np.minimum(np.diff(crossed, prepend=0), sizes - 1)
    rank_in_stratum = np.arange(len(strata)) - np.repeat(ends - sizes, sizes)
    return np.sort(shuffled[rank_in_stratum < np.repeat(wanted, sizes)])


# --- which conditions are held out ------------------------------------------------------------------------------------


def _scope(name: str, conditions: ConditionColumns, num_cells: int, cell_type: str | None) -> np.ndarray:
    """Cells that a split may divide, (n,) bool."""
    of_a_type = name in ("few-shot", "zero-shot")
    if of_a_type != (cell_type is not None):
        raise ValueError(
            f"--split {name} {'needs' if of_a_type else 'has no use for'} --held-out-cell-type"
            + (f" {cell_type!r}" if cell_type else "; pass the cell type that is tested on")
        )
    if not of_a_type:
        return np.ones(num_cells, dtype=bool)
    if CELL_TYPE not in conditions.columns:
        raise ValueError(f"--split {name} needs cell types; pass --cell-type-key")
    column = conditions.columns[CELL_TYPE]
    if cell_type not in column.categories:
        raise unknown_label_error("cell type", [cell_type], list(column.categories))
    return np.asarray(column == cell_type)


def _names(conditions: ConditionColumns, label: str) -> list[str]:
    return split_perturbation(label, control=conditions.control, separator=conditions.separator)


def _held_out_labels(
    name: str,
    conditions: ConditionColumns,
    labels: np.ndarray,
    wanted: Sequence[str] | None,
    fraction: float,
    rng: np.random.Generator,
) -> list[str]:
    """Labels (for held-out-perturbations: single names) to test on, sorted."""
    here = sorted(set(labels.tolist()))
    if name == "zero-shot":
        if wanted is not None:
            raise ValueError("--split zero-shot holds every perturbation of the cell type out; leave --held-out away")
        return here if PERTURBATION in conditions.columns else []
    eligible = here
    if name == "held-out-perturbations":
        eligible = sorted({single for label in here for single in _names(conditions, label)})
    elif name == "held-out-combinations":
        members = {label: _names(conditions, label) for label in here}
        eligible = [label for label in here if len(members[label]) > 1 and set(members[label]) <= set(here)]
    if wanted is None:
        if len(eligible) < 2:
            raise ValueError(
                f"--split {name} needs at least 2 labels that can be held out; found: {eligible or 'none'}"
            )
        size = min(max(1, round(fraction * len(eligible))), len(eligible) - 1)
        return sorted(rng.choice(np.array(eligible, dtype=object), size=size, replace=False).tolist())
    wanted = sorted({join_perturbation(_names(conditions, label), conditions.separator) for label in wanted})
    unknown = [label for label in wanted if label not in eligible]
    if unknown and name == "held-out-combinations" and unknown[0] in here:
        unseen = [single for single in _names(conditions, unknown[0]) if single not in here]
        why = f"{', '.join(unseen)} never stands alone" if unseen else "it is no combination"
        raise ValueError(f"{unknown[0]!r} cannot be a held-out combination: {why}")
    if unknown:
        raise unknown_label_error("perturbation to hold out", unknown, eligible)
    return wanted


def _tested(name: str, conditions: ConditionColumns, label: np.ndarray, held: list[str]) -> np.ndarray:
    """Cells with a held-out label, (n,) bool, whatever their cell type."""
    if name == "zero-shot":
        return np.ones(len(label), dtype=bool)
    if name == "held-out-perturbations":
        held = [one for one in sorted(set(label.tolist())) if set(_names(conditions, one)) & set(held)]
    return np.isin(label.astype(str), held)
