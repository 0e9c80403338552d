"""What perturbations do to cells, estimated on training cells: shifts of the cell state and log fold changes of genes.

Everything is against control cells of the same cell type and covariates, and shrunk by how many cells and counts stand
behind it (empirical Bayes). For each gene and set of perturbations two sums are all that is needed, of weighted counts
S and of what control cells of the same depth would have E: with weights ``1 / (1 + mu / r)`` E is also the variance of
S, and with a Gamma prior of variance tau^2 around 1 the fold change is ``(S + 1 / tau^2) / (E + 1 / tau^2)``.
Letters: n cells, G genes, T cell types, C contexts (cell type and covariates), R rows, E = d + 1 of the state and log1p
of the total, K kinds of gene effects (whole; beside the state).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from modeling_dcm.state_dcm import ANY, ridge_weights

CELLS_AT_ONCE = 1024
FOLDS = 2  # halves of the training cells: a cell is shown effects that the other half has
PRIORS = (1e-3, 4.0)  # least and largest variance of fold changes
PRIOR_ROUNDS = 5
LARGEST_EFFECT = 5.0  # of log fold changes
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 1e6)  # the last one is the mean
DAMPING_CELLS = 0.1  # evidence, as a share of that of the sums, that sums are right as they are


@dataclass(frozen=True)
class LabelledCells:
    """N training cells as this module reads them."""

    counts: Callable[[np.ndarray], np.ndarray]  # of some rows, (n, G) dense
    expected: Callable[[np.ndarray], np.ndarray]  # means (K, n, G) of all cells of the type at this depth (and state)
    size: np.ndarray  # r (K, G) of the negative binomial
    state: np.ndarray | None  # (z, log1p(total)) of all cells (N, E), NaN where not known; None without a state
    types: np.ndarray  # (N,) cell type, -1 not given; one number less than ``num_types``
    context: np.ndarray  # (N,) number of cell type and covariates
    ids: np.ndarray  # (N, W) perturbations in descending order, without the control; -1 is padding
    is_control: np.ndarray  # (N,) whether it is a control cell; the others without perturbation are left out
    fold: np.ndarray  # (N,) which half the cell is in
    num_types: int  # T


@dataclass(frozen=True)
class Effects:
    """Effects of R groups of conditions, as modeling_dcm/state_dcm.py's ``PerturbationEffects`` keeps them.

    ``folds`` (2, K, R, G) and ``base_folds`` (2, K, T+1, G) are of each half of the cells, and so is ``predicted``
    (2, K, R, G), what would be said of each group if it had no cells; ``by_vector`` (R,) is where that is a prediction
    for a single perturbation that was never seen. ``error`` is what vectors of the ``num_known`` perturbations with one
    leave of the mean's squared error, each told by the others.
    """

    keys: np.ndarray
    genes: np.ndarray
    base: np.ndarray
    state: np.ndarray
    damping: np.ndarray
    folds: np.ndarray
    base_folds: np.ndarray
    predicted: np.ndarray
    by_vector: np.ndarray
    penalty: float
    num_known: int
    error: float | None


def estimate_effects(cells: LabelledCells, vectors: dict[int, torch.Tensor] | None = None) -> Effects | None:
    """Estimate the effects of all sets of perturbations that the cells have, and predict those of other ``vectors``.

    Args:
        cells: training cells.
        vectors: vector (D,) of perturbations by id; the others are predicted to have the mean effect.

    Returns:
        None where there are no control cells, or nothing else.
    """
    keys, row_of = _groups(cells)
    if not len(keys) or not cells.is_control.any():
        return None
    base_of_type, base_folds, base = _bases(cells)
    sums, expected = _sums(cells, row_of, len(keys), base)  # each (FOLDS, K, R, G)
    levels = _levels(keys)
    whole = _fold_changes(sums.sum(axis=0), expected.sum(axis=0), levels)
    folds = np.stack([_fold_changes(*both, levels) for both in zip(sums, expected)])
    state = _state_shifts(cells, row_of, keys, levels)
    members = [_members(keys, row, cells.types[row_of[:, 1] == row]) for row in range(len(keys))]
    damping = np.array([*(_damping(effect, members) for effect in whole), _damping(state, members)])
    singles = np.flatnonzero((keys[:, 0] == ANY) & (keys[:, 2:] < 0).all(axis=1))
    known = [row for row in singles if vectors and int(keys[row, 1]) in vectors]
    penalty, weights, error = PENALTIES[-1], None, None
    if len(known) > 2:
        penalty, weights, error = choose_penalty(_stack(vectors, keys[known, 1]), whole[0, known])
    unseen = [_as_if_unseen(half, keys, members, singles, known, weights) for half in folds]
    predicted, by_vector = np.stack([values for values, _ in unseen]), unseen[0][1]
    new = sorted(set(vectors or ()) - set(keys[singles, 1].tolist()))
    mixed = np.full((len(new) + 1, len(singles)), 1 / max(len(singles), 1))  # a last one of the mean, for all others
    if new and len(known) > 2:
        mixed[:-1] = 0
        of_known = ridge_weights(_stack(vectors, new), _stack(vectors, keys[known, 1]), penalty).numpy()
        mixed[:-1, np.searchsorted(singles, known)] = of_known
    added = np.full((len(mixed), keys.shape[1]), -1)
    added[:-1, 0], added[:-1, 1], added[-1] = ANY, new, ANY
    keys = np.concatenate([keys, added])

    def extended(values: np.ndarray) -> np.ndarray:
        return np.concatenate([values, mixed @ values[..., singles, :]], axis=-2)

    by_vector = np.append(by_vector, np.zeros(len(mixed), dtype=bool))
    values = {"genes": whole, "folds": folds, "predicted": predicted, "state": state}
    values = {name: extended(value).astype(np.float32) for name, value in values.items()}
    return Effects(
        keys=keys,
        base=base_of_type,
        base_folds=base_folds,
        damping=damping,
        by_vector=by_vector,
        penalty=penalty,
        num_known=len(known),
        error=error,
        **values,
    )


def choose_penalty(vectors: torch.Tensor, effects: np.ndarray) -> tuple[float, np.ndarray, float]:
    """Choose the ridge's penalty by leaving out one perturbation at a time.

    Args:
        vectors: (n, D) of perturbations that were seen.
        effects: (n, G) what they do.

    Returns:
        The penalty (the largest: the vectors tell nothing), the weights (n, n) of the others in each prediction, and
        the sum of squared errors as a share of that of the mean of the others.
    """
    errors = {}
    for penalty in PENALTIES:
        weights = ridge_weights(vectors, vectors, penalty).numpy()
        own = np.diag(weights).copy()
        left_out = (weights - np.diag(own)) / (1 - own).clip(1e-9)[:, None]
        errors[penalty] = np.square(left_out @ effects - effects).sum(), left_out
    best = min(errors, key=lambda penalty: errors[penalty][0])
    return best, errors[best][1], errors[best][0] / max(errors[PENALTIES[-1]][0], 1e-12)


# --- groups -----------------------------------------------------------------------------------------------------------


def _groups(cells: LabelledCells) -> tuple[np.ndarray, np.ndarray]:
    """Keys (R, 1 + W): sets in a cell type, where a set is in several, and then sets in any; rows (N, 2) of each cell,
    -1 where there is none."""
    N = len(cells.ids)
    has_set = (cells.ids >= 0).any(axis=1)
    sets, set_of = np.unique(cells.ids[has_set], axis=0, return_inverse=True)
    pairs, pair_of = np.unique(np.column_stack([set_of.ravel(), cells.types[has_set]]), axis=0, return_inverse=True)
    several = np.bincount(pairs[pairs[:, 1] >= 0, 0], minlength=len(sets))[pairs[:, 0]] > 1
    several &= pairs[:, 1] >= 0
    place = np.where(several, np.cumsum(several) - 1, -1)
    specific = np.column_stack([pairs[several, 1], sets[pairs[several, 0]]])
    general = np.column_stack([np.full(len(sets), ANY), sets])
    rows = np.full((N, 2), -1)
    rows[has_set, 0] = place[pair_of.ravel()]
    rows[has_set, 1] = len(specific) + set_of.ravel()
    return np.concatenate([specific, general]).astype(np.int64), rows


def _levels(keys: np.ndarray) -> np.ndarray:
    """(R,) the row with any cell type above each row, itself where it is that."""
    general = {tuple(key[1:]): row for row, key in enumerate(keys) if key[0] == ANY}
    return np.array([general[tuple(key[1:])] for key in keys], dtype=np.int64)


def _members(keys: np.ndarray, row: int, types: np.ndarray) -> list[int]:
    """Rows of the single perturbations of a set of several, in its cell type where that has a row; empty if one is
    missing. ``types`` are those of the cells that a row of any type has: where they are one, it is that one."""
    key = keys[row]
    type_ = types[0] if len(types) and (types == types[0]).all() else key[0]
    ids = key[1:][key[1:] >= 0]
    found = []
    for id_ in ids if len(ids) > 1 else ():
        is_single = (keys[:, 1] == id_) & (keys[:, 2:] < 0).all(axis=1)
        rows = np.flatnonzero(is_single & np.isin(keys[:, 0], [type_, ANY]))
        if not len(rows):
            return []
        found.append(int(rows[0]))
    return found


# --- genes ------------------------------------------------------------------------------------------------------------


def _bases(cells: LabelledCells) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log fold changes of control cells against all cells of the type: of each type (K, T+1, G), its last row that of
    all cells; the same by half (FOLDS, K, T+1, G); and of each context (K, C, G)."""
    K, G = cells.size.shape
    T, C = cells.num_types, int(cells.context.max()) + 1
    sums, expected = np.zeros((2, FOLDS, K, C, G), dtype=np.float32)
    type_of = np.full(C, -1)
    type_of[cells.context] = cells.types
    for rows in _blocks(np.flatnonzero(cells.is_control)):
        x, mu = cells.counts(rows), cells.expected(rows)
        weight = 1 / (1 + mu / cells.size[:, None])
        for context, fold in np.unique(np.column_stack([cells.context, cells.fold])[rows], axis=0):
            here = (cells.context[rows] == context) & (cells.fold[rows] == fold)
            sums[fold, :, context] += (weight[:, here] * x[here]).sum(axis=1)
            expected[fold, :, context] += (weight * mu)[:, here].sum(axis=1)

    def of_types(sums: np.ndarray, expected: np.ndarray) -> np.ndarray:
        of_all = _shrunk(sums.sum(axis=1), expected.sum(axis=1))
        inside = [type_of == type_ for type_ in range(T)]
        of_each = [_shrunk(sums[:, i].sum(axis=1), expected[:, i].sum(axis=1), of_all) for i in inside]
        return np.stack([*of_each, of_all], axis=1)

    base, folds = of_types(sums.sum(axis=0), expected.sum(axis=0)), np.stack(list(map(of_types, sums, expected)))
    return base, folds, _shrunk(sums.sum(axis=0), expected.sum(axis=0), base[:, type_of])


def _sums(cells: LabelledCells, row_of: np.ndarray, R: int, base: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """S and E (FOLDS, K, R, G) of each group, E from control cells of each cell's context."""
    K, G = cells.size.shape
    sums, expected = np.zeros((2, FOLDS, K, R, G), dtype=np.float32)
    perturbed = np.flatnonzero(row_of[:, 1] >= 0)
    order = perturbed[np.argsort(row_of[perturbed, 1], kind="stable")]
    for rows in _blocks(order):
        x, mu = cells.counts(rows), cells.expected(rows) * np.exp(base[:, cells.context[rows]])
        weight = 1 / (1 + mu / cells.size[:, None])
        counted, due = weight * x, weight * mu
        for level in (0, 1):
            for row in np.unique(row_of[rows, level]):
                for fold in range(FOLDS) if row >= 0 else ():
                    here = (row_of[rows, level] == row) & (cells.fold[rows] == fold)
                    sums[fold, :, row] += counted[:, here].sum(axis=1)
                    expected[fold, :, row] += due[:, here].sum(axis=1)
    return sums, expected


def _blocks(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[start : start + CELLS_AT_ONCE] for start in range(0, len(rows), CELLS_AT_ONCE)]


def _fold_changes(sums: np.ndarray, expected: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Log fold changes (K, R, G): of rows with any cell type around none, of the others around that row."""
    is_general = levels == np.arange(len(levels))
    effects = np.zeros_like(sums)
    effects[:, is_general] = _shrunk(sums[:, is_general], expected[:, is_general])
    effects[:, ~is_general] = _shrunk(sums[:, ~is_general], expected[:, ~is_general], effects[:, levels[~is_general]])
    return effects


def _shrunk(sums: np.ndarray, expected: np.ndarray, around: np.ndarray | float = 0.0) -> np.ndarray:
    """Logarithms of fold changes (.., G) of S and E, ``around`` logarithms; each row has a prior of its own."""
    expected = np.maximum(expected * np.exp(around), 1e-9)
    ratio = np.clip(sums / expected, 0, 10) - 1
    tau2 = np.full((*ratio.shape[:-1], 1), 0.1)
    for _ in range(PRIOR_ROUNDS):
        weight = 1 / (tau2 + 1 / expected) ** 2
        tau2 = (weight * (ratio**2 - 1 / expected)).sum(axis=-1, keepdims=True) / weight.sum(axis=-1, keepdims=True)
        tau2 = tau2.clip(*PRIORS)
    change = np.log((sums + 1 / tau2) / (expected + 1 / tau2))
    return (around + change).clip(-LARGEST_EFFECT, LARGEST_EFFECT)


# --- states -----------------------------------------------------------------------------------------------------------


def _state_shifts(cells: LabelledCells, row_of: np.ndarray, keys: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Shifts (R, E) of the state, with normal priors whose variances are those of all perturbations' shifts."""
    if cells.state is None:
        return np.zeros((len(keys), 1))
    known = ~np.isnan(cells.state).any(axis=1)
    control = np.full((int(cells.context.max()) + 1, cells.state.shape[1]), np.nan)
    for context in range(len(control)):
        here = known & cells.is_control & (cells.context == context)
        control[context] = cells.state[here].mean(axis=0) if here.any() else np.nan
    absent = np.isnan(control[:, 0])
    control[absent] = cells.state[known & cells.is_control].mean(axis=0) if (known & cells.is_control).any() else 0.0
    moved = cells.state - control[cells.context]
    variance = moved[known & cells.is_control].var(axis=0) if (known & cells.is_control).any() else 1.0
    shifts = np.zeros((len(keys), moved.shape[1]))
    for is_level in (levels == np.arange(len(keys)), levels != np.arange(len(keys))):
        rows = np.flatnonzero(is_level)
        if not len(rows):
            continue
        column = 1 if levels[rows[0]] == rows[0] else 0
        n = np.array([(known & (row_of[:, column] == row)).sum() for row in rows])[:, None]
        mean = np.stack([moved[known & (row_of[:, column] == row)].sum(axis=0) for row in rows]) / np.maximum(n, 1)
        around = shifts[levels[rows]] if column == 0 else 0.0
        noise = variance / np.maximum(n, 1)
        tau2 = np.maximum(((mean - around) ** 2 - noise).mean(axis=0), 1e-6)
        shifts[rows] = around + np.where(n > 0, tau2 / (tau2 + noise), 0) * (mean - around)
    return shifts


# --- what was not seen ------------------------------------------------------------------------------------------------


def _damping(effects: np.ndarray, members: Sequence[list[int]]) -> float:
    """The factor of sums that fits the sets that were seen with all of their members, by least squares around 1."""
    pairs = [(effects[row], effects[of].sum(axis=0)) for row, of in enumerate(members) if of]
    if not pairs:
        return 1.0
    seen, sums = map(np.stack, zip(*pairs))
    square = np.square(sums).sum()
    return float(((seen * sums).sum() + DAMPING_CELLS * square) / max((1 + DAMPING_CELLS) * square, 1e-12))


def _as_if_unseen(
    effects: np.ndarray, keys: np.ndarray, members: Sequence[list[int]], singles: np.ndarray, known, weights
) -> tuple[np.ndarray, np.ndarray]:
    """What would be said of each group without its cells (K, R, G): sums of single perturbations, what other cell types
    say, or what vectors (or the mean) of other perturbations say; and where it is this last one (R,)."""
    predicted, by_vector = effects.copy(), np.zeros(len(keys), dtype=bool)
    damping = np.array([[_damping(effect, members)] for effect in effects])
    for row, key in enumerate(keys):
        same_set = (keys[:, 1:] == key[1:]).all(axis=1)
        others = np.flatnonzero(same_set & (keys[:, 0] != ANY) & (keys[:, 0] != key[0]))
        rest = singles[singles != row]
        if members[row]:
            predicted[:, row] = damping * effects[:, members[row]].sum(axis=1)
        elif key[0] != ANY:
            predicted[:, row] = effects[:, others].mean(axis=1)
        elif row in singles and len(rest):
            predicted[:, row], by_vector[row] = effects[:, rest].mean(axis=1), True
    if weights is not None:
        predicted[:, known] = weights @ effects[:, known]
    return predicted, by_vector


def _stack(vectors: dict[int, torch.Tensor], ids: Sequence[int]) -> torch.Tensor:
    return torch.stack([vectors[int(id_)] for id_ in ids])
