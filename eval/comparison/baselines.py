"""Draw from the baselines that every generator is shown beside, fitted on the training cells.

A baseline is ``fit(train) -> sample(conditions, rng)``: ``conditions`` is a data frame with one row per wanted cell and
the training cells' condition columns; what comes back are integer counts, one row per wanted cell. The two that predict
means (of a perturbation, of a combination) move real control cells to the predicted mean, so that they have a spread
and gene-gene structure to be compared.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from eval.comparison.cells import PERTURBATION, SEPARATOR, CellCounts
from modeling_dcm.state_dcm import ridge_weights
from tokenization.count_errors_dcm import library_size
from training.perturbations.effects import choose_penalty

logger = logging.getLogger(__name__)

Sampler = Callable[[pd.DataFrame, np.random.Generator], sparse.csr_matrix]
BASELINE_DRAWS = 3
NEIGHBOURS = 3
PSEUDO_COUNT = 0.1  # of mean counts, in logarithms of responses
GENES_AT_ONCE = 512
CELLS_AT_ONCE = 1024


def independent_marginals(train: CellCounts) -> Sampler:
    """Draw every gene by itself from the training cells of the condition: right marginals, no gene-gene structure.

    A condition without training cells backs off to the cells that share its leading columns (its cell type, say), and
    at last to all of them; the first that does is logged.
    """
    by_gene, source = train.counts.tocsc(), training_rows(train, who="marginals")

    def drawn(labels: tuple[str, ...], number: int, rng: np.random.Generator) -> sparse.csr_matrix:
        return _resampled(by_gene[source(labels)], number, rng)

    return _sampler(train, drawn)


def perturbation_mean(train: CellCounts) -> Sampler:
    """Predict the same for every perturbation: the mean over all of them, each weighing the same, in the cell type.

    What a model must beat to have learned anything about *which* perturbation it is. The control is its own mean.
    Reference: the baseline of cell-eval; Kernfeld et al., Genome Biology 26 (2025), 388.

    Raises:
        ValueError: no column of perturbations, or no control cells.
    """
    means = ConditionMeans(train)

    @functools.cache
    def average(context: tuple[str, ...]) -> np.ndarray:
        found = [mean for name in means.perturbations if (mean := means.of(context, name)) is not None]
        return np.mean(found, axis=0) if found else means.control(context)

    def predicted(context: tuple[str, ...], perturbation: str) -> np.ndarray:
        return means.control(context) if perturbation == train.control else average(context)

    return from_control_cells(train, means, _moved, predicted)


def controls_scaled(train: CellCounts) -> Sampler:
    """Scale each gene of control cells to the mean response of the perturbation in the cell type (or its average over
    the other cell types; the mean of all perturbations where it was never seen), rounded up or down at random.

    Right means around real cells: what the response of single cells adds to that of the mean. The control is itself.

    Raises:
        ValueError: no column of perturbations, or no control cells.
    """
    means = ConditionMeans(train)

    @functools.cache
    def factor(context: tuple[str, ...], perturbation: str) -> np.ndarray:
        if perturbation == train.control:
            return np.ones(train.counts.shape[1])
        names = [perturbation] if means.contexts_with(perturbation) else means.perturbations
        pairs = [(c, name) for name in names for c in means.contexts_with(name)]
        pairs = [pair for pair in pairs if pair[0] == context] or pairs
        with np.errstate(divide="ignore", invalid="ignore"):
            factors = np.mean([means.of(*pair) / means.control(pair[0]) for pair in pairs], axis=0)
        return np.where(np.isfinite(factors), factors, 1.0)

    return from_control_cells(train, means, _scaled, factor)


def ridge(train: CellCounts, vectors: Mapping[str, np.ndarray]) -> Sampler:
    """Scale control cells to the response that ridge regression on the perturbations' ``vectors`` predicts.

    The penalty is chosen by leaving training perturbations out. A perturbation of training cells has its own response,
    a combination the sum of its members' logarithms.

    Raises:
        ValueError: as :func:`controls_scaled`, or fewer than three training perturbations have a vector.
    """

    def predicted(known: np.ndarray, responses: np.ndarray, new: np.ndarray) -> np.ndarray:
        tensors = torch.from_numpy(new[None]), torch.from_numpy(known)
        penalty = choose_penalty(tensors[1], responses)[0]
        return (ridge_weights(*tensors, penalty).numpy() @ responses)[0]

    return _by_vectors(train, vectors, predicted)


def knn(train: CellCounts, vectors: Mapping[str, np.ndarray]) -> Sampler:
    """As :func:`ridge`, but the mean response of the :data:`NEIGHBOURS` perturbations of the most similar vectors (by
    their cosine).

    Raises:
        ValueError: as :func:`ridge`.
    """

    def predicted(known: np.ndarray, responses: np.ndarray, new: np.ndarray) -> np.ndarray:
        cosine = known @ new / np.linalg.norm(known, axis=1)
        return responses[np.argsort(-cosine, kind="stable")[:NEIGHBOURS]].mean(axis=0)

    return _by_vectors(train, vectors, predicted)


def additive(train: CellCounts) -> Sampler:
    """Predict a combination from its parts: their log fold changes add (pseudo-count 1 on the mean counts).

    A single perturbation is its own mean in the cell type; where it was not seen there, its average log fold change in
    the other cell types is applied to the control, and where it was seen nowhere, none (logged).
    Reference: Ahlmann-Eltze, Huber and Anders, Nature Methods 22 (2025), 1657-1661.

    Raises:
        ValueError: no column of perturbations, or no control cells.
    """
    means = ConditionMeans(train)
    unseen: list[str] = []

    @functools.cache
    def shift(context: tuple[str, ...], part: str) -> np.ndarray:
        contexts = means.contexts_with(part, near=context)
        if not contexts:
            if not unseen:
                what = "additive: no training cell of %s by itself; it, and any other such part, is taken to do nothing"
                logger.warning(what, part)
            unseen.append(part)
            return np.zeros(train.counts.shape[1])
        return np.mean([np.log1p(means.of(c, part)) - np.log1p(means.control(c)) for c in contexts], axis=0)

    def predicted(context: tuple[str, ...], perturbation: str) -> np.ndarray:
        parts = perturbation.split(train.separator) if train.separator else [perturbation]
        parts = [part for part in parts if part != train.control]
        moved = np.log1p(means.control(context)) + sum(shift(context, part) for part in parts)
        return np.maximum(np.expm1(moved), 0.0)

    return from_control_cells(train, means, _moved, predicted)


def scvi_prior(train: CellCounts) -> Sampler:
    """Decode ``z ~ N(0, I)`` by scVI, with the condition and the library size of a random training cell of it."""
    from eval.comparison import scvi

    return scvi.fit(train, from_prior=True)


def scvi_aggregated_posterior(train: CellCounts) -> Sampler:
    """Decode ``z ~ q(z | x)`` by scVI of a random training cell ``x`` of the condition, with its library size.

    Easier than the prior's task: each cell drawn starts from a real one.
    """
    from eval.comparison import scvi

    return scvi.fit(train, from_prior=False)


def scvi_shift(train: CellCounts) -> Sampler:
    """Decode control cells by scVI, their latents moved by the perturbation's mean shift (:func:`.scvi.fit_shift`)."""
    from eval.comparison import scvi

    return scvi.fit_shift(train)


FROM_CONTROL = tuple(fit.__name__ for fit in (perturbation_mean, controls_scaled, additive, scvi_shift))
FROM_VECTORS = {fit.__name__: fit for fit in (ridge, knn)}
FROM_SCVI = tuple(fit.__name__ for fit in (scvi_prior, scvi_aggregated_posterior, scvi_shift))
FITTED = (independent_marginals, perturbation_mean, controls_scaled, additive)
BASELINES: dict[str, Callable[[CellCounts], Sampler]] = {
    fit.__name__: fit for fit in (*FITTED, scvi_prior, scvi_aggregated_posterior, scvi_shift)
}


def named_baselines(names: str) -> list[str]:
    """Names of baselines, with commas between; the words default, all and none stand for lists.

    Raises:
        ValueError: an unknown name, or one whose package is not installed.
    """
    lists = {"default": [fit.__name__ for fit in FITTED], "all": list(BASELINES), "none": []}
    wanted = lists.get(names)
    if wanted is None:
        wanted = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
        if not wanted or not set(wanted) <= set(BASELINES):
            known = f"default, all, none, or some of {', '.join(BASELINES)}"
            raise ValueError(f"--baselines {names!r}: expected {known}, with commas between")
    if set(wanted) & set(FROM_SCVI):
        check_installed("scvi", "scvi-tools", "a baseline of scVI")
    return wanted


def check_installed(module: str, package: str, what: str) -> None:
    """Refuse to start ``what`` where its package is not there."""
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"{what} needs the package {package}: pip install 'discrete-cell-models[baselines]'")


def fitted_baselines(
    train: CellCounts,
    names: Sequence[str],
    *,
    required: bool,
    vectors: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Sampler]:
    """Fit baselines on the training cells; one that cannot be is an error if ``required``, else left out (logged).
    With ``vectors`` of perturbations those of :data:`FROM_VECTORS` are there too."""
    samplers = {}
    for name in names:
        reason = needs_control(train) if name in FROM_CONTROL else None
        if reason is not None and not required:
            logger.info("baseline %s is left out: %s", name, reason)
            continue
        samplers[name] = BASELINES[name](train)
    return samplers | {name: fit(train, vectors) for name, fit in FROM_VECTORS.items() if vectors}


def baseline_draws(sample: Sampler, real: CellCounts, *, seed: int = 0) -> Iterator[CellCounts]:
    """Yield samples of a baseline with the conditions of the test cells."""
    for draw in range(BASELINE_DRAWS):
        yield CellCounts(sample(real.labels, np.random.default_rng([seed, draw])), real.labels, real.control)


def needs_control(train: CellCounts) -> str | None:
    """Why the baselines that start from control cells cannot be computed; None if they can."""
    if PERTURBATION not in train.labels:
        return f"the condition columns ({', '.join(train.labels) or 'none'}) have no {PERTURBATION!r}"
    if train.control is None:
        return "no label of control cells is known (uns['dcm_control'] of the real file); pass --control LABEL"
    if not (train.labels[PERTURBATION] == train.control).any():
        return f"no training cell is labelled {train.control!r} (control) in {PERTURBATION!r}"
    return None


def check_control(train: CellCounts) -> None:
    """Raise ValueError where a baseline has no control cells to start from."""
    reason = needs_control(train)
    if reason is not None:
        raise ValueError(f"this baseline starts from control cells, and {reason}")


def cells_by_labels(labels: pd.DataFrame) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """Yield each distinct combination of labels of a data frame, in order, and its rows."""
    columns = list(labels)
    groups = labels.reset_index(drop=True).groupby(columns, sort=True).indices if columns else {(): range(len(labels))}
    for key, rows in groups.items():
        yield key if isinstance(key, tuple) else (key,), np.asarray(rows)


def training_rows(train: CellCounts, *, who: str) -> Callable[[tuple[str, ...]], np.ndarray]:
    """Return a function from a condition's labels to its training cells, or to those of as many of its leading columns
    as some training cell shares (logged of the first such condition)."""
    is_said = False

    def rows(labels: tuple[str, ...]) -> np.ndarray:
        nonlocal is_said
        matches = np.ones(len(train), dtype=bool)
        for position, column in enumerate(train.labels):
            narrower = matches & (train.labels[column] == labels[position]).to_numpy()
            if not narrower.any():
                if not is_said:
                    near = SEPARATOR.join(labels[:position]) or "the whole training file"
                    what = "%s: no training cell of %s; drawn from the %d cells of %s, others like it in the same way"
                    logger.warning(what, who, SEPARATOR.join(labels), matches.sum(), near)
                is_said = True
                break
            matches = narrower
        return np.flatnonzero(matches)

    return rows


class ConditionMeans:
    """Mean counts (G,) of the training cells by context (all labels but the perturbation's) and perturbation.

    Raises:
        ValueError: no column of perturbations, or no control cells.
    """

    def __init__(self, train: CellCounts):
        check_control(train)
        self._train, labels = train, train.labels[[PERTURBATION, *train.labels.columns.drop(PERTURBATION)]]
        self._known = {key: _mean(train.counts[rows]) for key, rows in cells_by_labels(labels)}
        self._rows = training_rows(replace(train, labels=labels), who="control cells")
        self.perturbations = sorted({name for name, *_ in self._known if name != train.control})

    def of(self, context: tuple[str, ...], perturbation: str) -> np.ndarray | None:
        """Mean counts, None where there are no such training cells."""
        return self._known.get((perturbation, *context))

    def control_rows(self, context: tuple[str, ...]) -> np.ndarray:
        """Control cells of the context; where it has none, those that share its leading columns, at last all."""
        return self._rows((self._train.control, *context))

    def control(self, context: tuple[str, ...]) -> np.ndarray:
        """Mean counts of the context's control cells."""
        known = self.of(context, self._train.control)
        return _mean(self._train.counts[self.control_rows(context)]) if known is None else known

    def contexts_with(self, perturbation: str, near: tuple[str, ...] | None = None) -> list[tuple[str, ...]]:
        """Contexts in which there are training cells of a perturbation: the one ``near`` alone if it is among them."""
        found = [tuple(context) for name, *context in self._known if name == perturbation]
        return [near] if near in found else found


def _mean(counts: sparse.csr_matrix) -> np.ndarray:
    return np.asarray(counts.mean(axis=0)).ravel()


def _by_vectors(train: CellCounts, vectors: Mapping[str, np.ndarray], predicted: Callable[..., np.ndarray]) -> Sampler:
    """Sampler that scales control cells to responses, those of perturbations without training cells ``predicted``
    from vectors (n, D) and log responses (n, G) of others, and its vector (D,)."""
    means = ConditionMeans(train)
    known = [name for name in means.perturbations if name in vectors]
    if len(known) < 3:
        raise ValueError(f"{len(known)} training perturbations have a vector; expected three or more to predict from")

    def response(name: str, context: tuple[str, ...]) -> np.ndarray:
        pairs = [(means.of(c, name), means.control(c)) for c in means.contexts_with(name, near=context)]
        return np.mean(
            [np.log(mean + PSEUDO_COUNT) - np.log(control + PSEUDO_COUNT) for mean, control in pairs], axis=0
        )

    @functools.cache
    def factor(context: tuple[str, ...], perturbation: str) -> np.ndarray:
        whole = bool(means.contexts_with(perturbation))
        parts = perturbation.split(train.separator) if train.separator and not whole else [perturbation]
        logs = np.zeros(train.counts.shape[1])
        for part in parts:
            if means.contexts_with(part):
                logs = logs + (response(part, context) if part != train.control else 0)
                continue
            names = known if part in vectors else means.perturbations  # without a vector: the mean response
            responses = np.stack([response(name, context) for name in names])
            known_vectors = np.stack([np.asarray(vectors[name], dtype=np.float64) for name in known])
            new = np.asarray(vectors[part], dtype=np.float64) if part in vectors else None
            logs = logs + (responses.mean(axis=0) if new is None else predicted(known_vectors, responses, new))
        return np.exp(logs)

    return from_control_cells(train, means, _scaled, factor)


def from_control_cells(
    train: CellCounts,
    means: ConditionMeans,
    change: Callable[..., sparse.csr_matrix],
    wanted: Callable[..., np.ndarray],
) -> Sampler:
    """Sampler that draws control cells of the context, each once as far as they go, and makes of them what is
    ``wanted`` (context, perturbation) by ``change`` (cells, mean of the controls, what is wanted, generator)."""
    position = list(train.labels).index(PERTURBATION)

    def drawn(labels: tuple[str, ...], number: int, rng: np.random.Generator) -> sparse.csr_matrix:
        context = (*labels[:position], *labels[position + 1 :])
        controls = means.control_rows(context)
        rounds = [rng.permutation(controls) for _ in range(-(-number // len(controls)))]
        cells = train.counts[np.concatenate(rounds)[:number]]
        return change(cells, means.control(context), wanted(context, labels[position]), rng)

    return _sampler(train, drawn)


def _scaled(cells: sparse.csr_matrix, _: np.ndarray, factor: np.ndarray, rng: np.random.Generator) -> sparse.csr_matrix:
    """Integer counts times ``factor`` (G,), rounded up or down at random."""
    cells = cells.astype(np.float64)
    cells.data *= factor[cells.indices]
    cells.data = np.floor(cells.data + rng.random(cells.nnz))
    cells.eliminate_zeros()
    return cells.astype(np.int64)


def _moved(
    cells: sparse.csr_matrix, mean: np.ndarray, target: np.ndarray, rng: np.random.Generator
) -> sparse.csr_matrix:
    """Integer counts whose expectation is ``target`` where that of ``cells`` is ``mean``.

    Genes that fall are thinned (binomial), genes that rise are given Poisson counts in proportion to the library size.
    """
    keep = np.minimum(np.divide(target, mean, out=np.ones_like(mean), where=mean > 0), 1.0)
    more = np.maximum(target - mean, 0.0)
    sizes = library_size(cells) / mean.sum() if mean.any() else np.ones(cells.shape[0])
    blocks = []
    for start in range(0, cells.shape[0], CELLS_AT_ONCE):
        rows = slice(start, start + CELLS_AT_ONCE)
        thinned = cells[rows].copy()
        thinned.data = rng.binomial(thinned.data, keep[thinned.indices]).astype(thinned.dtype)
        added = rng.poisson(sizes[rows, None] * more).astype(thinned.dtype)
        blocks.append((thinned + sparse.csr_matrix(added)).tocsr())
    moved = sparse.vstack(blocks, format="csr")
    moved.eliminate_zeros()
    return moved


def _sampler(
    train: CellCounts, drawn: Callable[[tuple[str, ...], int, np.random.Generator], sparse.csr_matrix]
) -> Sampler:
    """Sampler that draws the wanted number of cells of each condition, and puts them in the order asked for."""

    def sample(conditions: pd.DataFrame, rng: np.random.Generator) -> sparse.csr_matrix:
        order, blocks = [], []
        for labels, rows in cells_by_labels(conditions[list(train.labels)]):
            blocks.append(drawn(labels, len(rows), rng))
            order.append(rows)
        return sparse.vstack(blocks, format="csr")[np.argsort(np.concatenate(order), kind="stable")]

    return sample


def _resampled(source: sparse.csc_matrix, num_cells: int, rng: np.random.Generator) -> sparse.csr_matrix:
    """(num_cells, G) counts, each gene drawn with replacement and independently from its column of ``source``."""
    blocks = []
    for start in range(0, source.shape[1], GENES_AT_ONCE):
        dense = source[:, start : start + GENES_AT_ONCE].toarray()
        drawn = rng.integers(dense.shape[0], size=(num_cells, dense.shape[1]))
        blocks.append(sparse.csr_matrix(np.take_along_axis(dense, drawn, axis=0)))
    return sparse.hstack(blocks, format="csr")
