"""Find the conditions of each cell in the columns of ``obs`` and bring them into their canonical form.

Canonical columns are ``cell_type``, ``perturbation`` (single names sorted and joined; without the control unless it
stands alone) and the covariates under their own names.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from tokenization.conditions_dcm import CELL_TYPE, PERTURBATION
from tokenization.labels_dcm import factorize, join_perturbation, shortened, split_perturbation, unknown_label_error
from training.data.shards import NOT_LABELS, PANEL

logger = logging.getLogger(__name__)

USUAL_CONTROLS = ("control", "non-targeting")
MISSING_AS_TEXT = ("nan", "none", "na", "<na>", "null")  # what becomes of missing labels that are written as text
RESERVED = (CELL_TYPE, PERTURBATION, *NOT_LABELS, PANEL)


@dataclass(frozen=True)
class ConditionColumns:
    """Conditions of n cells."""

    columns: dict[str, pd.Categorical]  # canonical name -> n labels, categories in alphabetical order
    sources: dict[str, str]  # canonical name -> the column of ``obs`` that it came from
    control: str | None  # the perturbation label of unperturbed cells
    separator: str | None  # joins single perturbations to a combination

    def strata(self, num_cells: int) -> np.ndarray:
        """The full condition of each cell as an integer, (n,) int64; numbered in the order of the labels."""
        strata = np.zeros(num_cells, dtype=np.int64)
        for column in self.columns.values():
            strata = np.unique(strata * len(column.categories) + column.codes, return_inverse=True)[1]
        return strata

    def canonical_obs(self, obs: pd.DataFrame, others: Mapping[str, pd.Categorical] | None = None) -> pd.DataFrame:
        """``obs`` with the canonical columns (and ``others``) first.

        A column that stood in their place is kept as ``original_...``.
        """
        columns = self.columns | dict(others or {})
        canonical = pd.DataFrame(columns, index=obs.index)
        replaced = {}
        for name, labels in columns.items():
            if name in obs and (obs[name].astype(str).to_numpy() != np.asarray(labels, dtype=object)).any():
                replaced[name] = f"original_{name}"
                while replaced[name] in obs:
                    replaced[name] = f"original_{replaced[name]}"
                logger.info("obs column %r of the input is kept as %r", name, replaced[name])
        rest = obs.rename(columns=replaced)
        return canonical.join(rest.drop(columns=[name for name in columns if name in rest]))


def read_conditions(
    obs: pd.DataFrame,
    *,
    cell_type_key: str | None,
    perturbation_key: str | None,
    covariate_keys: Sequence[str],
    control: str | None,
    separator: str | None,
) -> ConditionColumns:
    """Take the conditions out of the columns of ``obs``; the options are those of ``dcm-convert``."""
    keys = {CELL_TYPE: cell_type_key, PERTURBATION: perturbation_key}
    for name in covariate_keys:
        if name in RESERVED or list(covariate_keys).count(name) > 1:
            raise ValueError(f"covariate column {name!r} is named twice or has a reserved name ({', '.join(RESERVED)})")
        keys[name] = name
    if control is not None and perturbation_key is None:
        raise ValueError(
            f"--control {control!r} was given without --perturbation-key; pass the column of perturbations"
        )
    sources = {name: key for name, key in keys.items() if key is not None}
    columns = {name: _read_column(obs, key) for name, key in sources.items()}
    if PERTURBATION in columns:
        control = _find_control(columns[PERTURBATION], control, separator)
        columns[PERTURBATION] = _canonical_perturbations(columns[PERTURBATION], control, separator)
    return ConditionColumns(columns=columns, sources=sources, control=control, separator=separator)


def existing_column(obs: pd.DataFrame, key: str) -> pd.Series:
    """The column of ``obs``; raises ValueError, with the columns that exist, if there is none."""
    if key not in obs:
        raise ValueError(f"no column {key!r} in obs; columns there: {', '.join(map(str, obs.columns)) or 'none'}")
    return obs[key]


def _read_column(obs: pd.DataFrame, key: str) -> pd.Categorical:
    labels, codes = factorize(existing_column(obs, key))
    is_empty = np.array([*(not label.strip() for label in labels), True])  # the last one is that of no label, -1
    missing = int(is_empty[codes].sum())
    if missing:
        of_all = f"{missing:,} of {len(obs):,} cells"
        raise ValueError(f"column {key!r} has no label for {of_all}; fill them or drop the cells")
    for i, label in enumerate(labels):
        if label.lower() in MISSING_AS_TEXT:
            number = f"{int((codes == i).sum()):,}"
            logger.warning("column %r has the label %r in %s cells: is that a missing label?", key, label, number)
    padded = [label for label in labels if label != label.strip()]
    if padded:
        raise ValueError(f"column {key!r} has the label {padded[0]!r} with white space around it; strip it")
    return _categorical(labels, codes)


def _categorical(labels: Sequence[str], codes: np.ndarray) -> pd.Categorical:
    """Labels (which may repeat) and codes into them as categories in alphabetical order."""
    categories, position = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    return pd.Categorical.from_codes(position[codes], categories=categories.tolist())


def _find_control(perturbations: pd.Categorical, control: str | None, separator: str | None) -> str | None:
    labels = list(perturbations.categories)
    if control in labels and separator and separator in control:
        raise ValueError(f"control {control!r} contains the separator {separator!r}; pass another --separator")
    singles = {name for label in labels for name in split_perturbation(label, control=None, separator=separator)}
    if control is None:
        usual = [label for label in USUAL_CONTROLS if label in singles]
        if len(usual) > 1:
            both = " and ".join(map(repr, usual))
            raise ValueError(f"perturbations have both {both}; pass --control with one of them")
        if not usual:
            logger.info("no perturbation is called %s: there is no control", " or ".join(map(repr, USUAL_CONTROLS)))
            return None
        logger.info("control: %r (found; --control names another)", usual[0])
        return usual[0]
    if control not in singles:
        raise unknown_label_error("control", [control], sorted(singles))
    return control


def _canonical_perturbations(
    perturbations: pd.Categorical, control: str | None, separator: str | None
) -> pd.Categorical:
    before = list(perturbations.categories)
    names = [split_perturbation(label, control=control, separator=separator) for label in before]
    after = [join_perturbation(parts, separator) for parts in names]
    changed = [(old, new) for old, new in zip(before, after) if old != new]
    if changed:
        logger.info("%d perturbation labels are written in canonical form, such as %r as %r", len(changed), *changed[0])
    combinations = {label: parts for label, parts in zip(before, names) if len(parts) > 1}
    if combinations:
        said = "%d of %d perturbation labels are read as combinations, joined by %r: %s"
        logger.info(said, len(combinations), len(before), separator, shortened(combinations, 3))
    alone = {parts[0] for parts in names if len(parts) == 1}
    never = {label: part for label, parts in combinations.items() for part in parts[::-1] if part not in alone}
    if never:
        logger.warning(
            "%d of these have a part that never stands alone (such as %r of %r): if %r is a part of the names, pass "
            '--separator "", or what else joins names',
            *(len(never), next(iter(never.values())), next(iter(never)), separator),
        )
    if control is not None and control not in alone:
        logger.warning("no cell has the control %r alone", control)
    return _categorical(after, perturbations.codes)
