"""What perturbations do to cells, estimated on training cells: shifts of the cell state and log fold changes of genes.

Everything is against control cells of the same cell type and covariates, and shrunk by how many cells and counts stand
behind it (empirical Bayes). For each gene and set of perturbations two sums are all that is needed, of weighted counts
S and of what control cells of the same depth would have E: with weights ``1 / (1 + mu / r)`` E is also the variance of
S, and with a Gamma prior of variance tau^2 around 1 the fold change is ``(S + 1 / tau^2) / (E + 1 / tau^2)``. A
perturbation's own gene is a case of its own: there the prior is around what perturbations do to their targets, and what
others are predicted to do is told by those that do not target the gene.
Letters: n cells, G genes, T cell types, C contexts (cell type and covariates), R rows, E = d + 1 of the state and log1p
of the total, K kinds of gene effects (whole; beside the state).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from modeling_dcm.state_dcm import ANY, left_out_weights, predicted_effects, ridge_weights

CELLS_AT_ONCE = 1024
FOLDS = 2  # halves of the training cells: a cell is shown effects that the other half has
PRIORS = (1e-3, 4.0)  # least and largest variance of fold changes
PRIOR_ROUNDS = 5
LARGEST_EFFECT = 5.0  # of log fold changes
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 1e6)  # the last one is the mean
FEWEST_OF_A_TYPE = 3  # perturbations that tell what others do in a cell type
MOST_PAIRS = 20_000  # of cell types and perturbations that are predicted; where there are more, none is
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
    targets: np.ndarray  # gene of the panel that each perturbation targets, by id; -1 for none


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
    singles = np.flatnonzero((keys[:, 0] == ANY) & (keys[:, 2:] < 0).all(axis=1))
    own = cells.targets[keys[singles, 1]]
    targeted = singles[own >= 0], own[own >= 0]
    whole = _fold_changes(sums.sum(axis=0), expected.sum(axis=0), levels, targeted)
    folds = np.stack([_fold_changes(*both, levels, targeted) for both in zip(sums, expected)])
    state = _state_shifts(cells, row_of, keys, levels)
    members = [_members(keys, row, cells.types[row_of[:, 1] == row]) for row in range(len(keys))]
    damping = np.array([*(_damping(effect, members) for effect in whole), _damping(state, members)])
    known = np.flatnonzero([bool(vectors) and id_ in vectors for id_ in keys[singles, 1].tolist()])
    weights, penalty, error = _mean_of_others(len(singles)), PENALTIES[-1], None
    if len(known) > 2:
        of_known = _stack(vectors, keys[singles[known], 1])
        penalty, of_others, error = choose_penalty(of_known, whole[0, singles[known]], own[known])
    if penalty < PENALTIES[-1]:  # else the mean of all perturbations, with a vector or without
        weights[known] = 0
        weights[np.ix_(known, known)] = of_others
    unseen = [_as_if_unseen(half, keys, members, singles, weights, own) for half in folds]
    predicted, by_vector = np.stack([values for values, _ in unseen]), unseen[0][1]
    has_target = np.flatnonzero(cells.targets >= 0).tolist()
    new = np.array(sorted({*(vectors or ()), *has_target} - set(keys[singles, 1].tolist())), dtype=np.int64)
    mixed = np.full((len(new) + 1, len(singles)), 1 / max(len(singles), 1))  # a last one of the mean, for all others
    with_vector = np.flatnonzero([bool(vectors) and id_ in vectors for id_ in new.tolist()])
    if len(with_vector) and penalty < PENALTIES[-1]:
        mixed[with_vector] = 0
        told = ridge_weights(_stack(vectors, new[with_vector]), of_known, penalty).numpy()
        mixed[np.ix_(with_vector, known)] = told
    seen = np.unique(np.column_stack([cells.types, cells.ids[:, 0]])[np.isin(row_of[:, 1], singles)], axis=0)
    pairs = _TypePairs(keys, np.append(keys[singles, 1], new), seen)
    new_own = np.append(cells.targets[new], -1)

    def extended(values: np.ndarray, of_new: np.ndarray) -> np.ndarray:
        known_and_new = np.concatenate([values[..., singles, :], of_new[..., :-1, :]], axis=-2)
        return np.concatenate([values, pairs.told(values, known_and_new)[1], of_new], axis=-2).astype(np.float32)

    values = {"genes": whole, "folds": folds, "predicted": predicted}
    of_new = {name: _predicted(value[..., singles, :], own, weights, mixed, new_own) for name, value in values.items()}
    values, of_new = values | {"state": state}, of_new | {"state": mixed @ state[singles]}
    values = {name: extended(value, of_new[name]) for name, value in values.items()}
    added = np.full((len(mixed), keys.shape[1]), -1)
    added[:-1, 0], added[:-1, 1], added[-1] = ANY, new, ANY
    by_vector = np.append(by_vector, np.zeros(len(pairs.keys) + len(mixed), dtype=bool))
    return Effects(
        keys=np.concatenate([keys, pairs.keys, added]),
        base=base_of_type,
        base_folds=base_folds,
        damping=damping,
        by_vector=by_vector,
        penalty=penalty,
        num_known=len(known),
        error=error,
        **values,
    )


def choose_penalty(
    vectors: torch.Tensor, effects: np.ndarray, targets: np.ndarray | None = None
) -> tuple[float, np.ndarray, float]:
    """Choose the ridge's penalty by leaving out one perturbation at a time.

    Args:
        vectors: (n, D) of perturbations that were seen.
        effects: (n, G) what they do.
        targets: (n,) gene that each of them targets, -1 for none: what it does there is not asked for.

    Returns:
        The penalty (the largest: the vectors tell nothing), the weights (n, n) of the others in each prediction, and
        the sum of squared errors as a share of that of the mean of the others.
    """
    n = len(effects)
    if targets is not None:
        others = _mean_of_others(n)
        effects = _predicted(effects, targets, others, np.eye(n), np.full(n, -1))
    errors = {}
    for penalty in PENALTIES:
        left_out = left_out_weights(vectors, penalty).numpy()
        errors[penalty] = np.square(left_out @ effects - effects).sum(), left_out
    best = min(errors, key=lambda penalty: errors[penalty][0])
    return best, errors[best][1], errors[best][0] / max(errors[PENALTIES[-1]][0], 1e-12)


def _predicted(*of_known_and_new: np.ndarray) -> np.ndarray:
    """:func:`modeling_dcm.state_dcm.predicted_effects` of arrays."""
    return predicted_effects(*map(torch.from_numpy, of_known_and_new)).numpy()


def _mean_of_others(n: int) -> np.ndarray:
    """Weights (n, n) of the others in the mean of them."""
    return (1 - np.eye(n)) / max(n - 1, 1)


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


def _fold_changes(
    sums: np.ndarray, expected: np.ndarray, levels: np.ndarray, targeted: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Log fold changes (K, R, G): of rows with any cell type around none, or at the genes that they target (rows and
    genes) around the mean of these; of the others around the row with any cell type."""
    is_general = levels == np.arange(len(levels))
    effects = np.zeros_like(sums)
    for kind, (x, mu) in enumerate(zip(sums, expected)):
        weight = 1 / (1 + 1 / np.maximum(mu[targeted], 1e-9))  # as many counts tell it, and as it varies by about 1
        logs = np.log((x[targeted] + 0.5) / (mu[targeted] + 0.5))
        effects[kind][targeted] = (weight * logs).sum() / (weight.sum() + 1)
    effects[:, is_general] = _shrunk(sums[:, is_general], expected[:, is_general], effects[:, is_general])
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
    effects: np.ndarray,
    keys: np.ndarray,
    members: Sequence[list[int]],
    singles: np.ndarray,
    weights: np.ndarray,
    own: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """What would be said of each group without its cells (K, R, G): sums of single perturbations, what other cell types
    say, or what other perturbations say, by ``weights``; and where it is this last one (R,)."""
    predicted, by_vector = effects.copy(), np.zeros(len(keys), dtype=bool)
    damping = np.array([[_damping(effect, members)] for effect in effects])
    if len(singles) > 1:
        predicted[:, singles] = _predicted(effects[:, singles], own, weights, weights, own)
        by_vector[singles] = True
    for row, key in enumerate(keys):
        same_set = (keys[:, 1:] == key[1:]).all(axis=1)
        others = np.flatnonzero(same_set & (keys[:, 0] != ANY) & (keys[:, 0] != key[0]))
        if members[row]:
            predicted[:, row] = damping * effects[:, members[row]].sum(axis=1)
        elif key[0] != ANY:
            predicted[:, row] = effects[:, others].mean(axis=1)
    told, _ = _TypePairs(keys, keys[singles, 1], keys[:0, :2]).told(effects, effects[:, singles])
    is_told = (keys[:, 0] != ANY) & (keys[:, 2:] < 0).all(axis=1)
    predicted[:, is_told] = told[:, is_told]
    return predicted, by_vector


class _TypePairs:
    """Single perturbations in cell types that have no cells of them: what the type's others do, and how this one
    differs from them elsewhere, as far as such differences agreed for those that the type has.

    ``keys`` (N, 1 + W) are the pairs of types and ``ids`` that are not ``seen`` (M, 2), of types that have some.
    """

    def __init__(self, keys: np.ndarray, ids: np.ndarray, seen: np.ndarray):
        is_single = (keys[:, 0] != ANY) & (keys[:, 2:] < 0).all(axis=1)
        order = np.argsort(ids)
        self.place = order[np.searchsorted(ids[order], keys[:, 1]).clip(max=len(ids) - 1)]  # in ids, of each row
        of_type = {t: np.flatnonzero(is_single & (keys[:, 0] == t)) for t in np.unique(keys[is_single, 0])}
        self.rows = {t: rows for t, rows in of_type.items() if len(rows) >= FEWEST_OF_A_TYPE}
        self.missing = {t: np.flatnonzero(~np.isin(ids, seen[seen[:, 0] == t, 1])) for t in self.rows}
        if sum(map(len, self.missing.values())) > MOST_PAIRS:
            self.missing = {t: missing[:0] for t, missing in self.missing.items()}
        self.keys = np.full((sum(map(len, self.missing.values())), keys.shape[1]), -1)
        if len(self.keys):
            self.keys[:, 0] = np.concatenate([np.full(len(missing), t) for t, missing in self.missing.items()])
            self.keys[:, 1] = ids[np.concatenate(list(self.missing.values()))]

    def told(self, values: np.ndarray, general: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What is said of groups' ``values`` (.., R, G) without their cells, where it is told so, and of the pairs
        without cells (.., N, G); ``general`` (.., n, G) is said of each of the ids in any type."""
        total, number = np.zeros_like(general), np.zeros(general.shape[-2])
        for rows in self.rows.values():
            total[..., self.place[rows], :] += values[..., rows, :]
            number[self.place[rows]] += 1
        left_out, pairs = values.copy(), [general[..., :0, :]]
        for type_, rows in self.rows.items():
            mine, of_place, n = values[..., rows, :], self.place[rows], len(rows)
            elsewhere = (number[of_place] > 1)[:, None]
            theirs = (total[..., of_place, :] - mine) / np.maximum(number[of_place] - 1, 1)[:, None]
            theirs = np.where(elsewhere, theirs, general[..., of_place, :])
            mean, mean_of_theirs = mine.mean(axis=-2, keepdims=True), theirs.mean(axis=-2, keepdims=True)
            differs, differs_elsewhere = ((x - m) * n / (n - 1) for x, m in ((mine, mean), (theirs, mean_of_theirs)))
            square = np.square(differs_elsewhere).sum(axis=(-2, -1), keepdims=True)
            agreed = (differs * differs_elsewhere).sum(axis=(-2, -1), keepdims=True) / np.maximum(square, 1e-12)
            agreed = agreed.clip(0, 1)
            left_out[..., rows, :] = mine - differs + agreed * differs_elsewhere
            pairs.append(mean + agreed * (general[..., self.missing[type_], :] - mean_of_theirs))
        return left_out, np.concatenate(pairs, axis=-2)


def _stack(vectors: dict[int, torch.Tensor], ids: Sequence[int]) -> torch.Tensor:
    return torch.stack([vectors[int(id_)] for id_ in ids])
