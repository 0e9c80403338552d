"""The labels of every condition (cell type, perturbation, covariates), to ids and back.

The half of the tokenizer that is not about genes and counts.
Shapes: n cells, P perturbations of a combination (padded with -1 on the right), C covariates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .labels_dcm import factorize, join_perturbation, label_ids, shortened, split_perturbation, unknown_label_error

if TYPE_CHECKING:
    import torch

CELL_TYPE = "cell_type"
PERTURBATION = "perturbation"


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """The array as a tensor. torch takes a second to import: whoever only asks for names does without it."""
    import torch

    return torch.from_numpy(array)


def repeated(names: Sequence[str]) -> list[str]:
    """The names that stand more than once, sorted."""
    return sorted(name for name, times in Counter(names).items() if times > 1)


def check_names(kind: str, names: Sequence[str]) -> None:
    """Raise ValueError for a name that is repeated, empty, has white space around it or a line break of any kind."""
    if len(set(names)) != len(names):
        raise ValueError(f"{kind} has {len(repeated(names)):,} names more than once: {shortened(repeated(names))}")
    for name in names:
        if name != name.strip() or name.splitlines() != [name]:
            raise ValueError(f"{kind} has the name {name!r}; expected one line without white space around it")


class ConditionLabels:
    """Vocabularies of the conditions that a model knows; the position of a label is its id.

    A base of the tokenizer, which calls ``_set_labels`` before anything else.
    """

    def _set_labels(
        self,
        cell_types: Sequence[str] | None,
        perturbations: Sequence[str] | None,
        control: str | None,
        covariates: Mapping[str, Sequence[str]] | None,
        separator: str | None,
    ) -> None:
        """Set and check the vocabularies, as they are given to :class:`DCMTokenizer`."""
        self.cell_types = [str(label) for label in cell_types or ()]
        self.perturbations = [str(label) for label in perturbations or ()]
        self.control = control
        self.covariates = {str(name): [str(label) for label in labels] for name, labels in (covariates or {}).items()}
        self.separator = separator
        check_names("cell_types", self.cell_types)
        check_names("perturbations", self.perturbations)
        for name, labels in self.covariates.items():
            if name in (CELL_TYPE, PERTURBATION) or not labels:
                raise ValueError(f"covariate {name!r} has {len(labels)} labels; expected some, and a name of its own")
            check_names(f"covariate {name!r}", labels)
        if control is not None and control not in self.perturbations:
            raise unknown_label_error("control", [control], self.perturbations)
        combined = [name for name in self.perturbations if separator and separator in name]
        if combined:
            raise ValueError(
                f"perturbation {combined[0]!r} contains the separator {separator!r}; "
                "expected single names (DCMTokenizer.from_labels splits combinations) or another separator"
            )

    def cell_type_ids(self, labels: object) -> torch.Tensor:
        """Ids (n,) of n cell types, -1 where missing. Raises ValueError for an unknown label."""
        self._require(self.cell_types, CELL_TYPE)
        return as_tensor(label_ids(labels, self.cell_types, CELL_TYPE))

    def perturbation_ids(self, labels: object) -> torch.Tensor:
        """Ids (n, P) of n perturbations or combinations, ascending, then -1; all -1 where missing.

        The order of a combination does not matter, a name given twice counts once, and ``"X+control"`` is X.

        Raises:
            ValueError: a single name is unknown.
        """
        self._require(self.perturbations, PERTURBATION)
        unique, codes = factorize(labels)
        split = [split_perturbation(label, control=self.control, separator=self.separator) for label in unique]
        table = np.full((len(unique) + 1, max(map(len, split), default=1)), -1, dtype=np.int64)
        flat = label_ids([name for names in split for name in names], self.perturbations, PERTURBATION)
        start = 0
        for row, names in zip(table, split):
            row[: len(names)] = np.sort(flat[start : start + len(names)])
            start += len(names)
        return as_tensor(table[codes])

    def add_perturbations(self, names: Iterable[str]) -> np.ndarray:
        """Learn the names of perturbations that the model has new vectors for, and return their ids (n,) int64.

        Known names keep their ids. See ``add_perturbations`` of the model, which takes the vectors in the same order.

        Raises:
            ValueError: a name is known, repeated, empty, or contains the separator; then nothing has been learned.
        """
        names = list(names)
        self._require(self.perturbations, PERTURBATION)
        known = [name for name in names if name in self.perturbations]
        if known:
            raise ValueError(f"{len(known)} perturbations are known already: {shortened(known)}; leave them out")
        before, checked = len(self.perturbations), ConditionLabels()
        together = [*self.perturbations, *names]
        checked._set_labels(self.cell_types, together, self.control, self.covariates, self.separator)
        self.perturbations = checked.perturbations
        return np.arange(before, len(self.perturbations), dtype=np.int64)

    def covariate_ids(self, labels: Mapping[str, object]) -> torch.Tensor:
        """Ids (n, C) of n cells, columns in the order of ``covariates``; -1 where a label or a covariate is missing.

        Args:
            labels: covariate name to n labels; at least one.

        Raises:
            ValueError: unknown covariate or label, or lengths that differ.
        """
        for name in labels:
            self._require(self.covariates.get(name, []), f"covariate {name!r}")
        columns = {name: label_ids(values, self.covariates[name], name) for name, values in labels.items()}
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"covariates have different numbers of labels: {lengths}; expected one per cell in each")
        ids = np.full((next(iter(lengths.values())), len(self.covariates)), -1, dtype=np.int64)
        for position, name in enumerate(self.covariates):
            if name in columns:
                ids[:, position] = columns[name]
        return as_tensor(ids)

    def conditions(
        self,
        cell_type: str | Sequence[str] | None = None,
        perturbation: str | Sequence[str] | None = None,
        covariates: Mapping[str, str | Sequence[str]] | None = None,
        num_cells: int | None = None,
    ) -> dict[str, int | torch.Tensor]:
        """Conditions of cells to be generated: ``model.generate(**tok.conditions(...))``.

        Args:
            cell_type: one label for all cells, or one per cell; None is *not given* (-1), here and below.
            perturbation: likewise; combinations joined by ``separator``. The control is asked for by its own name.
            covariates: name to one label or one per cell.
            num_cells: how many cells; default as many as labels are given, or 1.

        Returns:
            ``num_cells``, and for each condition that this tokenizer knows ``cell_type_ids`` (n,),
            ``perturbation_ids`` (n, P), ``covariate_ids`` (n, C).

        Raises:
            ValueError: an unknown label (near matches are listed), a condition without labels (those that have some
                are listed), or numbers of labels that contradict each other.
        """
        given = {CELL_TYPE: cell_type, PERTURBATION: perturbation, **(covariates or {})}
        given = {name: value for name, value in given.items() if value is not None}
        is_one = {name: isinstance(value, str) or np.ndim(value) == 0 for name, value in given.items()}
        lengths = {name: len(value) for name, value in given.items() if not is_one[name]}
        n = num_cells if num_cells is not None else next(iter(lengths.values()), 1)
        if n < 1:
            raise ValueError(f"num_cells is {n}; expected at least 1")
        for name, length in lengths.items():
            if length != n:
                raise ValueError(f"{length} labels of {name} for {n} cells; expected one for all or one per cell")
        columns = {name: [None] * n for name in self.known_conditions()}
        columns |= {name: [value] * n if is_one[name] else value for name, value in given.items()}
        return {"num_cells": n, **self.condition_ids(columns)}

    def known_conditions(self) -> list[str]:
        """Names of the conditions that have labels: cell type, perturbation, covariates."""
        return [CELL_TYPE] * bool(self.cell_types) + [PERTURBATION] * bool(self.perturbations) + list(self.covariates)

    def condition_ids(self, columns: Mapping[str, object]) -> dict[str, torch.Tensor]:
        """Ids of n labels of each condition that is given by its name."""
        ids, covariates = (
            {},
            {name: labels for name, labels in columns.items() if name not in (CELL_TYPE, PERTURBATION)},
        )
        if CELL_TYPE in columns:
            ids["cell_type_ids"] = self.cell_type_ids(columns[CELL_TYPE])
        if PERTURBATION in columns:
            ids["perturbation_ids"] = self.perturbation_ids(columns[PERTURBATION])
        return ids | ({"covariate_ids": self.covariate_ids(covariates)} if covariates else {})

    def _require(self, vocabulary: Sequence[str], kind: str) -> None:
        if not vocabulary:
            known = [f"covariate {name!r}" if name in self.covariates else name for name in self.known_conditions()]
            raise ValueError(f"this tokenizer has no labels of {kind}; it knows: {', '.join(known) or 'no condition'}")

    def condition_labels(self, conditions: Mapping[str, object], n: int) -> tuple[dict[str, np.ndarray], dict]:
        """Label columns (n,) of the conditions that some cell was given, and the matching ``uns``."""
        keys = ("cell_type_ids", "perturbation_ids", "covariate_ids")
        ids = {key: np.asarray(conditions[key]) for key in keys if conditions.get(key) is not None}
        for key, values in ids.items():
            if len(values) != n:
                raise ValueError(f"{key} has {len(values):,} rows but there are {n:,} cells")
        labels = {}
        if "cell_type_ids" in ids:
            labels[CELL_TYPE] = _labels_of(ids["cell_type_ids"], self.cell_types)
        if "perturbation_ids" in ids:
            rows, codes = np.unique(ids["perturbation_ids"], axis=0, return_inverse=True)
            joined = [join_perturbation((self.perturbations[i] for i in row if i >= 0), self.separator) for row in rows]
            labels[PERTURBATION] = np.array([label or None for label in joined], dtype=object)[codes.reshape(-1)]
        if "covariate_ids" in ids:
            for position, (name, vocabulary) in enumerate(self.covariates.items()):
                labels[name] = _labels_of(ids["covariate_ids"][:, position], vocabulary)
        labels = {name: column for name, column in labels.items() if np.not_equal(column, None).any()}
        uns: dict[str, object] = {"dcm_conditions": np.array(list(labels), dtype=object)}
        if PERTURBATION in labels:
            uns["dcm_separator"] = self.separator or ""
            if self.control is not None:
                uns["dcm_control"] = self.control
        return labels, uns


def _labels_of(ids: np.ndarray, vocabulary: Sequence[str]) -> np.ndarray:
    """Labels (n,) of ids, None for -1."""
    return np.array([*vocabulary, None], dtype=object)[ids]
