"""Divide cells into training, validation and test cells: the named splits that papers argue about.

Works on condition labels and cell names alone, so that no split can depend on counts.

``random`` divides every condition. The others hold whole conditions out for the test: ``held-out-perturbations`` (genes
never seen perturbed), ``held-out-combinations`` (pairs whose members were seen alone), ``few-shot`` (some perturbations
of one cell type, seen in the other types) and ``zero-shot`` (every perturbation of one cell type), the last two in the
sense of STATE (Adduri et al. 2025, its loader cell-load). Validation cells are always a stratified share of what
remains for training.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from tokenization.conditions_dcm import CELL_TYPE, PERTURBATION
from tokenization.labels_dcm import (
    factorize,
    join_perturbation,
    read_text,
    shortened,
    split_perturbation,
    unknown_label_error,
)
from training.conversion.conditions import ConditionColumns, existing_column
from training.data.files import read_list
from training.data.shards import SPLITS

# the options that each split has a use for, besides fractions and seed
USES = {
    "random": (),
    "held-out-perturbations": ("held_out",),
    "held-out-combinations": ("held_out",),
    "few-shot": ("held_out", "held_out_cell_type"),
    "zero-shot": ("held_out_cell_type",),
    "from-file": ("split_file", "split_key"),
}


@dataclass(frozen=True)
class SplitOptions:
    """The options of ``dcm-convert`` that say how cells are divided; they are explained there."""

    split: str = "random"
    held_out: str | None = None
    held_out_cell_type: str | None = None
    split_file: Path | None = None
    split_key: str | None = None
    test_fraction: float = 0.2
    validation_fraction: float = 0.1
    seed: int = 0

    def __post_init__(self):
        for name, fraction in (("test", self.test_fraction), ("validation", self.validation_fraction)):
            if not 0 <= fraction < 1:
                raise ValueError(f"{name} fraction is {fraction}; expected at least 0 and below 1")
        useful = USES[self.split]
        for option in dict.fromkeys(option for options in USES.values() for option in options):
            if getattr(self, option) is not None and option not in useful:
                given = f"--{option.replace('_', '-')}"
                raise ValueError(f"{given} was given, but --split {self.split} has no use for it; pass another --split")
        if "held_out_cell_type" in useful and self.held_out_cell_type is None:
            raise ValueError(f"--split {self.split} needs --held-out-cell-type; pass the cell type that is tested on")
        if self.split == "from-file" and (self.split_file is None) == (self.split_key is None):
            raise ValueError("--split from-file needs either --split-file or --split-key")


@dataclass(frozen=True)
class Split:
    """Which cells are trained on, validated on and tested on."""

    cells: dict[str, np.ndarray]  # of ``train``, ``validation``, ``test``: disjoint ascending positions, together all
    description: dict[str, object]  # what ``split.json`` says of it besides the cells


def split_cells(obs: pd.DataFrame, conditions: ConditionColumns, options: SplitOptions) -> Split:
    """Divide n cells.

    ``random`` is stratified: a condition of c cells gives ``c * fraction`` cells, rounded down or up so that the whole
    split has its exact share of all cells; but at least one cell of every condition stays in training.

    The splits that hold conditions out never hold out the controls. Of those of the cells that are divided (of the one
    cell type for few-shot and zero-shot, else all) as large a share is tested on as of the perturbed cells, which is
    what STATE does; all others are trained on. ``held_out`` of held-out-perturbations are single names: every
    combination with one of them is tested on too.
    """
    strata = conditions.strata(len(obs))
    rng = np.random.default_rng(options.seed)
    description = {}
    if options.split == "from-file":
        cells = _cells_of_file(obs, options)
        if len(cells["validation"]):
            return Split(cells, description)
        test = np.isin(np.arange(len(obs)), cells["test"])
    elif options.split == "random":
        test = np.zeros(len(obs), dtype=bool)
        test[_draw(strata, options.test_fraction, rng)] = True
    else:
        test, description = _hold_out(conditions, strata, options, rng)
    rest = np.flatnonzero(~test)
    validation = rest[_draw(strata[rest], options.validation_fraction, rng)]
    cells = {"train": np.setdiff1d(rest, validation), "validation": validation, "test": np.flatnonzero(test)}
    return Split(cells, description)


def _hold_out(
    conditions: ConditionColumns, strata: np.ndarray, options: SplitOptions, rng: np.random.Generator
) -> tuple[np.ndarray, dict[str, object]]:
    """Which cells are tested on, (n,) bool, and what ``split.json`` says of it."""
    name, num_cells = options.split, len(strata)
    if name != "zero-shot" and PERTURBATION not in conditions.columns:
        raise ValueError(f"--split {name} needs perturbations; pass --perturbation-key")
    scope = _scope(conditions, num_cells, options)
    label = np.full(num_cells, "", dtype=object)
    if PERTURBATION in conditions.columns:
        label = np.asarray(conditions.columns[PERTURBATION], dtype=object)
    is_control = label == conditions.control
    held = _held_out_labels(conditions, label[scope & ~is_control], options, rng)
    tested = held
    if name == "held-out-perturbations":  # and all combinations with one of them
        tested = [one for one in sorted(set(label.tolist())) if set(_names(conditions, one)) & set(held)]
    test = scope & ~is_control & ((name == "zero-shot") | np.isin(label.astype(str), tested))
    if not test.any() or test.all():
        of_all = f"{int(test.sum()):,} of {num_cells:,} cells"
        raise ValueError(f"--split {name} would test on {of_all}; hold out other labels")
    divided = np.flatnonzero(scope & is_control)
    share = test.sum() / max(1, (scope & ~is_control).sum())
    test[divided[_draw(strata[divided], share, rng)] if share < 1 else divided] = True
    if test.all():
        raise ValueError(f"--split {name} leaves no training cell; hold out fewer labels")
    return test, {"held_out": held, "held_out_cell_type": options.held_out_cell_type}


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


# --- from a file ------------------------------------------------------------------------------------------------------


def _labels_of_file(path: Path, cells: pd.Index) -> np.ndarray:
    """The split of each cell by JSON ``{"train": [cell names], "test": [...], "validation": [...]}``; "" for none."""
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
    return labels


def _cells_of_file(obs: pd.DataFrame, options: SplitOptions) -> dict[str, np.ndarray]:
    """Cells by the names in a file, or by the labels in a column."""
    if options.split_file is not None:
        where, labels = repr(str(options.split_file)), _labels_of_file(options.split_file, obs.index)
    else:
        known, codes = factorize(existing_column(obs, options.split_key))
        where, labels = f"column {options.split_key!r}", np.array([*known, ""], dtype=object)[codes]
    wrong = sorted(set(labels) - {"", *SPLITS})
    if wrong:
        raise ValueError(f"{where} has the split {wrong[0]!r}; expected {', '.join(SPLITS)}")
    unnamed = int((labels == "").sum())
    if unnamed:
        of_all = f"{unnamed:,} of {len(labels):,} cells"
        raise ValueError(f"{where} has no split for {of_all}; name all cells, or drop them from the data")
    cells = {name: np.flatnonzero(labels == name) for name in SPLITS}
    if not len(cells["train"]):
        raise ValueError(f"{where} names no training cell")
    return cells


# --- which conditions are held out ------------------------------------------------------------------------------------


def _scope(conditions: ConditionColumns, num_cells: int, options: SplitOptions) -> np.ndarray:
    """Cells that a split may divide, (n,) bool."""
    cell_type = options.held_out_cell_type
    if cell_type is None:
        return np.ones(num_cells, dtype=bool)
    if CELL_TYPE not in conditions.columns:
        raise ValueError(f"--split {options.split} needs cell types; pass --cell-type-key")
    column = conditions.columns[CELL_TYPE]
    if cell_type not in column.categories:
        raise unknown_label_error("cell type", [cell_type], list(column.categories))
    return np.asarray(column == cell_type)


def _names(conditions: ConditionColumns, label: str) -> list[str]:
    return split_perturbation(label, control=conditions.control, separator=conditions.separator)


def _held_out_labels(
    conditions: ConditionColumns, labels: np.ndarray, options: SplitOptions, rng: np.random.Generator
) -> list[str]:
    """Labels (for held-out-perturbations: single names) to test on, sorted."""
    name, here = options.split, sorted(set(labels.tolist()))
    if name == "zero-shot":
        return here if PERTURBATION in conditions.columns else []
    eligible = here
    if name == "held-out-perturbations":
        eligible = sorted({single for label in here for single in _names(conditions, label)})
    elif name == "held-out-combinations":
        members = {label: _names(conditions, label) for label in here}
        eligible = [label for label in here if len(members[label]) > 1 and set(members[label]) <= set(here)]
    if options.held_out is None:
        if len(eligible) < 2:
            found = eligible or "none"
            raise ValueError(f"--split {name} needs at least 2 labels that can be held out; found: {found}")
        size = min(max(1, round(options.test_fraction * len(eligible))), len(eligible) - 1)
        return sorted(rng.choice(np.array(eligible, dtype=object), size=size, replace=False).tolist())
    given = [label.strip() for label in options.held_out.split(",") if label.strip()]
    if options.held_out.startswith("@"):
        given = read_list(Path(options.held_out[1:]), "--held-out @FILE")
    wanted = sorted({join_perturbation(_names(conditions, label), conditions.separator) for label in given})
    unknown = [label for label in wanted if label not in eligible]
    if unknown and name == "held-out-combinations" and unknown[0] in here:
        unseen = [single for single in _names(conditions, unknown[0]) if single not in here]
        why = f"{', '.join(unseen)} never stands alone" if unseen else "it is no combination"
        raise ValueError(f"{unknown[0]!r} cannot be a held-out combination: {why}")
    if unknown:
        raise unknown_label_error("perturbation to hold out", unknown, eligible)
    return wanted
