"""Estimate what the network starts at: dispersions, loadings of the cell state, shapes of counts, the state's prior.

In come counts of training cells, what was expected of them, and their states; out go numbers for each gene, condition
or cell type, in seconds. Letters: n cells, G genes, d components of the state, E = d + 1, M mixture components,
S counts with a correction of their own.
"""

from collections.abc import Callable

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import LinearOperator, svds
from scipy.special import gammaln
from sklearn.mixture import GaussianMixture

from modeling_dcm.count_distribution_dcm import SHAPED_COUNTS

DISPERSIONS = (1e-3, 30.0)  # least and largest 1 / r, the squared coefficient of variation beyond Poisson's
GOLDEN = (5**0.5 - 1) / 2
SEARCH_STEPS = 10  # to 5 % of a dispersion
NEWTON_STEPS = 8
LARGEST_STEP = 1.0  # of a loading in one Newton step
LARGEST_EFFECT = 8.0  # of the state on the logarithm of a mean
RIDGE = 30.0  # cells' worth of evidence that a loading is 0
GENES_AT_ONCE = 2048
CELLS_OF_A_COMPONENT = 40
PARTS_BY_TOTAL = 5
LEAST_VARIANCE = 1e-4
NO_WEIGHT = -1e4  # a logarithm of zero
LARGEST_MEAN = 0.995  # quantile of a gene's counts above zero
SPLITS = 2
HELD_OUT = 0.2  # share of the cells
RANKS = 5  # components whose spread is averaged
SPREAD = (0.2, 1.0)  # least and largest variance of held-out cells along a component
CALIBRATION_CELLS = 4096
CALIBRATION_STEPS = 5
CALIBRATION_STEP = 0.6
CELLS_AT_ONCE = 512
TYPE_COUNTS = 2.0  # counts' worth of evidence that a cell type's mean is what the state says
WEAK = 0.1  # a direction of the state that drawn cells hardly follow, of the one that they follow most
SHAPE_STEPS = 4
NOT_CORRECTED = 5.0  # cells' worth of evidence that counts are as the negative binomial says


def principal_components(
    counts: csr_matrix, total: np.ndarray, median_total: float, num_components: int
) -> tuple[np.ndarray, np.ndarray]:
    """Find the mean (G,) and whitened principal components (d, G) of ``log1p(counts / total * median_total)``.

    By Lanczos iterations on the sparse matrix; its centring is never written out.
    """
    n, G = counts.shape
    logs = _log_normalized(counts, total, median_total)
    center = np.asarray(logs.mean(axis=0))[0]
    centred = LinearOperator(
        (n, G),
        matvec=lambda v: logs @ v.ravel() - center @ v.ravel(),
        rmatvec=lambda v: logs.T @ v.ravel() - center * v.sum(),
        dtype=np.float64,
    )
    d = min(num_components, min(n, G) - 1)
    _, values, vectors = svds(centred, k=d, v0=np.ones(min(n, G)), random_state=0)
    components = np.zeros((num_components, G))
    components[:d] = vectors[::-1] / (values[::-1] / np.sqrt(n - 1))[:, None]
    return center, components


def _log_normalized(counts: csr_matrix, total: np.ndarray, median_total: float) -> csr_matrix:
    return counts.astype(np.float64).multiply((median_total / np.maximum(total, 1))[:, None]).tocsr().log1p()


def moment_dispersion(counts: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Estimate 1/r (G,) of a negative binomial by moments: ``sum((x - mu)^2 - mu) / sum(mu^2)``, shrunk to all genes'.

    Args:
        counts: (n, G).
        expected: means mu (n, G), above 0.
    """
    excess = ((counts - expected) ** 2 - expected).sum(axis=0, dtype=np.float64)
    square = (expected**2).sum(axis=0, dtype=np.float64)
    pooled = max(excess.sum() / square.sum(), DISPERSIONS[0])
    return np.clip((excess + pooled) / (square + 1.0), *DISPERSIONS)


def likely_dispersion(counts: csr_matrix, expected: np.ndarray) -> np.ndarray:
    """Estimate 1/r (G,) by maximum likelihood, a golden-section search: unlike moments, a few loud cells do not decide.

    Args:
        counts: (n, G) sparse.
        expected: means (n, G), above 0.
    """
    rows, genes = counts.nonzero()
    x, mu = counts.data.astype(np.float64), expected[rows, genes].astype(np.float64)

    def nats(log_dispersion: np.ndarray) -> np.ndarray:
        dispersion = np.exp(log_dispersion)
        r = 1 / dispersion
        of_zeros = r * np.log1p(expected * dispersion.astype(np.float32)).sum(axis=0, dtype=np.float64)
        counted = x * np.log1p(r[genes] / mu) - gammaln(x + r[genes]) + gammaln(r[genes])
        return of_zeros + np.bincount(genes, counted, minlength=counts.shape[1])

    low, high = (np.full(counts.shape[1], np.log(bound)) for bound in DISPERSIONS)
    inner = [high - GOLDEN * (high - low), low + GOLDEN * (high - low)]
    values = [nats(point) for point in inner]
    for _ in range(SEARCH_STEPS):
        is_left = values[0] < values[1]
        low, high = np.where(is_left, low, inner[0]), np.where(is_left, inner[1], high)
        new = np.where(is_left, high - GOLDEN * (high - low), low + GOLDEN * (high - low))
        value = nats(new)
        inner = [np.where(is_left, new, inner[1]), np.where(is_left, inner[0], new)]
        values = [np.where(is_left, value, values[1]), np.where(is_left, values[0], value)]
    return np.exp((low + high) / 2)


def largest_means(counts: csr_matrix) -> np.ndarray:
    """The largest mean (G,) that a gene may have: a high quantile of its counts above zero, at least 1.

    The exponential of a state that is large by chance is beyond any count that was ever seen.
    """
    by_gene = counts.tocsc()
    values = np.split(by_gene.data, by_gene.indptr[1:-1])
    return np.array([np.quantile(x, LARGEST_MEAN) if len(x) else 1.0 for x in values]).clip(1.0)


def state_loadings(
    counts: csr_matrix, expected: np.ndarray, state: np.ndarray, largest_mean: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Regress the counts of every gene on the state: ``x ~ NB(expected exp(<B, (z, 1)>), r)``, with a ridge on B.

    Newton's method with Fisher's information, all genes side by side; dispersions by moments on the way and by
    likelihood at the end.

    Args:
        counts: (n, G) sparse.
        expected: means (n, G) without the state, above 0.
        state: z (n, d).
        largest_mean: of :func:`largest_means`.

    Returns:
        B (G, d + 1), the intercept last, and 1/r (G,) around the regression.
    """
    parts = [slice(start, start + GENES_AT_ONCE) for start in range(0, counts.shape[1], GENES_AT_ONCE)]
    fits = [_loadings(counts[:, genes], expected[:, genes], state, largest_mean[genes]) for genes in parts]
    return np.concatenate([loadings for loadings, _ in fits]), np.concatenate([spread for _, spread in fits])


def _loadings(
    counts: csr_matrix, expected: np.ndarray, state: np.ndarray, largest_mean: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    n, d = state.shape
    x = counts.toarray().astype(np.float32)
    design = np.concatenate([state, np.ones((n, 1))], axis=1).astype(np.float32)  # (n, E)
    products = (design[:, :, None] * design[:, None, :]).reshape(n, -1)  # (n, E E)
    penalty = np.append(np.full(d, RIDGE), 1.0)
    loadings = np.zeros((counts.shape[1], d + 1))
    dispersion = moment_dispersion(x, expected).astype(np.float32)
    for step in range(NEWTON_STEPS):
        mean = expected * state_effect(loadings, state)
        if step == NEWTON_STEPS // 2:
            dispersion = moment_dispersion(x, mean).astype(np.float32)
        weight = 1 / (1 + dispersion * mean)
        gradient = ((x - mean) * weight).T @ design - penalty * loadings
        information = ((mean * weight).T @ products).reshape(-1, d + 1, d + 1).astype(np.float64) + np.diag(penalty)
        change = np.linalg.solve(information, gradient[..., None])[..., 0]
        largest = np.abs(change).max(axis=1, keepdims=True).clip(min=1e-9)
        loadings += change * np.minimum(1, LARGEST_STEP / largest)
    return loadings, likely_dispersion(counts, regressed(expected, loadings, state, largest_mean))


def regressed(expected: np.ndarray, loadings: np.ndarray, state: np.ndarray, largest_mean: np.ndarray) -> np.ndarray:
    """Means (n, G) told the state: what was expected times its effect, bounded."""
    return np.minimum(expected * state_effect(loadings, state), largest_mean.astype(np.float32))


def state_effect(loadings: np.ndarray, state: np.ndarray) -> np.ndarray:
    """Factor (n, G) of the state on expected counts, ``exp(<B, (z, 1)>)``, bounded."""
    logarithm = state.astype(np.float32) @ loadings[:, :-1].T.astype(np.float32) + loadings[:, -1].astype(np.float32)
    return np.exp(logarithm.clip(-LARGEST_EFFECT, LARGEST_EFFECT))


def held_out_spread(
    counts: csr_matrix, total: np.ndarray, median_total: float, cell_type: np.ndarray, num_components: int, seed: int
) -> np.ndarray:
    """Estimate how spread new cells are along principal components (d,): their variance within cell types over that of
    the cells that the components were found in.

    A part of the cells is held out. Components of high rank lie along what was noise in a few of the others. What is
    missing to 1 falls as the number of cells that the components are found in grows, so it is less for all of them.
    """
    logs = _log_normalized(counts, total, median_total)
    ratios = []
    for split in range(SPLITS):
        order = np.random.default_rng([seed, 79, split]).permutation(len(total))
        held, kept = np.split(order, [max(1, round(len(order) * HELD_OUT))])
        _, components = principal_components(counts[kept], total[kept], median_total, num_components)
        z = logs @ components.T
        variances = [np.square(z[rows] - _type_means(z, cell_type, kept)[rows]).mean(axis=0) for rows in (held, kept)]
        ratios.append(variances[0] / np.maximum(variances[1], 1e-9))
    found = 1 - (1 - np.mean(ratios, axis=0)) * (1 - HELD_OUT)
    padded = np.pad(found, RANKS // 2, mode="edge")
    return np.convolve(padded, np.full(RANKS, 1 / RANKS), mode="valid").clip(*SPREAD)


def _type_means(z: np.ndarray, cell_type: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Mean states (n, d) of each cell's type, over the cells ``rows``; over all of these where none is of it."""
    types, index = np.unique(cell_type, return_inverse=True)
    means = np.repeat(z[rows].mean(axis=0)[None], len(types), axis=0)
    for number in np.unique(index[rows]):
        means[number] = z[rows[index[rows] == number]].mean(axis=0)
    return means[index]


def calibrated_loadings(
    counts: csr_matrix,
    expected: np.ndarray,
    state: np.ndarray,
    largest_mean: np.ndarray,
    cell_type: np.ndarray,
    spread: np.ndarray,
    encode: Callable[[np.ndarray], np.ndarray],
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Regress counts on the state, and change the loadings until cells drawn from them are as spread as new cells are.

    A cell's state is made of its own counts, noise included; cells that are drawn from it get noise once more, and
    would vary too much along some components, too little along others where the ridge is strong. So cells are drawn and
    their states taken, ``z' = z A + noise`` within cell types; A should be the matrix that makes the covariance of z'
    that of new cells, and the loadings are moved towards it. A gene keeps its mean count.

    Args:
        counts, expected, state, largest_mean: as in :func:`state_loadings`; a last column of the state that is not of
            ``encode`` keeps its loadings.
        cell_type: ids (n,), the same for all where there is none.
        spread: variance (d,) of new cells, of :func:`held_out_spread`.
        encode: from counts (n, G) to their first d components of the state.
        seed: of the cells that are drawn.
    """
    rng = np.random.default_rng([seed, 80])
    loadings, dispersion = state_loadings(counts, expected, state, largest_mean)
    rows = np.sort(rng.permutation(len(state))[:CALIBRATION_CELLS])
    x, expected, state = counts[rows], expected[rows], state[rows]
    d, z = len(spread), state[:, : len(spread)]
    center = _type_means(z, cell_type[rows], np.arange(len(rows)))
    r = z - center
    within = r.T @ r / len(r)
    share = np.linalg.pinv(np.cov(z.T).reshape(d, d), rcond=1e-6, hermitian=True) @ within
    wanted = within * np.sqrt(np.outer(spread, spread))
    for _ in range(CALIBRATION_STEPS):
        dispersion = _with_means(x, expected, loadings, state, largest_mean)
        drawn = np.concatenate(
            [
                encode(_drawn(regressed(expected[part], loadings, state[part], largest_mean), dispersion, rng))
                for part in (slice(start, start + CELLS_AT_ONCE) for start in range(0, len(rows), CELLS_AT_ONCE))
            ]
        )
        drawn = drawn - center
        drawn -= drawn.mean(axis=0)
        followed = np.linalg.pinv(within, rcond=1e-6, hermitian=True) @ (r.T @ drawn / len(r))
        noise = drawn - r @ followed
        target = _transport(within, wanted - noise.T @ noise / len(r))
        change = share @ (target @ np.linalg.pinv(followed, rcond=WEAK) - np.eye(d))
        loadings[:, :d] += CALIBRATION_STEP * loadings[:, :d] @ change.T
    return loadings, _with_means(x, expected, loadings, state, largest_mean)


def _with_means(
    counts: csr_matrix, expected: np.ndarray, loadings: np.ndarray, state: np.ndarray, largest_mean: np.ndarray
) -> np.ndarray:
    """Move the intercepts of ``loadings`` so that genes have their mean counts; returns 1/r (G,) around these means."""
    mean = regressed(expected, loadings, state, largest_mean).sum(axis=0, dtype=np.float64)
    loadings[:, -1] += np.log((np.asarray(counts.sum(axis=0))[0] + 0.5) / (mean + 0.5))
    return likely_dispersion(counts, regressed(expected, loadings, state, largest_mean))


def type_shifts(
    counts: csr_matrix, mean: np.ndarray, dispersion: np.ndarray, cell_type: np.ndarray, num_types: int
) -> np.ndarray:
    """What to add to the logarithms of means told the state so that each cell type has its mean counts, (T + 1, G); the
    last row, of cells without a type, is 0.

    Counts are weighted by ``1 / (1 + mu / r)``, so that few loud cells do not decide, and :data:`TYPE_COUNTS` of them
    stand for no shift.

    Args:
        counts: (n, G) sparse.
        mean: (n, G), above 0.
        dispersion: 1/r (G,).
        cell_type: ids (n,), -1 where not given.
        num_types: T.
    """
    sums, due = np.zeros((2, num_types + 1, counts.shape[1]))
    for type_ in np.unique(cell_type[cell_type >= 0]):
        rows = np.flatnonzero(cell_type == type_)
        for part in (rows[start : start + CELLS_AT_ONCE] for start in range(0, len(rows), CELLS_AT_ONCE)):
            weight = 1 / (1 + mean[part] * dispersion)
            sums[type_] += (weight * counts[part].toarray()).sum(axis=0)
            due[type_] += (weight * mean[part]).sum(axis=0)
    return np.log((sums + TYPE_COUNTS) / (due + TYPE_COUNTS)).astype(np.float32)


def _drawn(mean: np.ndarray, dispersion: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.poisson(rng.gamma(1 / dispersion, mean * dispersion))


def _transport(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The matrix (d, d) that takes Gaussian rows of covariance ``source`` to ``target`` by the shortest way; what is
    negative in the target counts as 0."""

    def root(matrix: np.ndarray, power: float) -> np.ndarray:
        values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
        kept = values > 1e-6 * max(values.max(), 1e-12)
        return (vectors * np.where(kept, np.where(kept, values, 1.0) ** power, 0.0)) @ vectors.T

    half, inverse = root(source, 0.5), root(source, -0.5)
    return inverse @ root(half @ root(target, 1.0) @ half, 0.5) @ inverse


def count_corrections(counts: csr_matrix, mean: np.ndarray, dispersion: np.ndarray, num_small: int) -> np.ndarray:
    """Estimate by likelihood what to add to the logarithms of a negative binomial: for each of the first S counts of a
    gene, and for all others together, u (G, S + 1).

    Every count is then as frequent in a gene as it is in the cells: few cells with many counts of a gene make its
    dispersion large, and a negative binomial that has it is too wide for all others.

    Args:
        counts: (n, G) sparse.
        mean: (n, G), above 0.
        dispersion: 1/r (G,).
        num_small: S, unless that is more than :data:`SHAPED_COUNTS`.
    """
    S = min(num_small, SHAPED_COUNTS)
    found = []
    for start in range(0, counts.shape[1], genes := GENES_AT_ONCE // 32):
        part = slice(start, start + genes)
        x = np.minimum(counts[:, part].toarray(), S)
        cells = np.stack([(x == count).sum(axis=0) for count in range(S + 1)], axis=1)  # (g, S+1)
        p = _probabilities(mean[:, part], dispersion[part], S)  # (n, g, S+1)
        typical = p.mean(axis=0)
        u = np.zeros(typical.shape, dtype=np.float32)
        for _ in range(SHAPE_STEPS):
            likely = 0
            for each, weight in ((p, 1.0), (typical[None], NOT_CORRECTED)):
                q = each * np.exp(u)
                likely = likely + weight * (q / q.sum(axis=-1, keepdims=True)).sum(axis=0)
            u += np.log((cells + NOT_CORRECTED * typical) / likely)
        found.append(u)
    return np.concatenate(found)


def _probabilities(mean: np.ndarray, dispersion: np.ndarray, num_counts: int) -> np.ndarray:
    """Of each of the first counts, and of all others together (n, G, S + 1), by a negative binomial."""
    r, mean = (1 / dispersion).astype(np.float32), mean.astype(np.float32)
    p = np.empty((*mean.shape, num_counts + 1), dtype=np.float32)
    p[..., 0] = np.exp(-r * np.log1p(mean / r))
    for count in range(1, num_counts):
        p[..., count] = p[..., count - 1] * ((count - 1 + r) / count) * (mean / (mean + r))
    p[..., -1] = 1 - p[..., :-1].sum(axis=-1)
    return p.clip(1e-7)


def state_mixture(residuals: np.ndarray, num_components: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit a mixture of Gaussians with one covariance to states around their groups' means.

    Clusters of cells, each cut into parts of about equal size by the last column, the logarithm of the total, which is
    skewed: the variance of a whole cluster would give cells with more counts than there are. With fewer than
    :data:`CELLS_OF_A_COMPONENT` cells for each component there are fewer: the others have no weight.

    Returns:
        Log weights (M,), means (M, E) and Cholesky factor (E, E), lower triangle.
    """
    n, E = residuals.shape
    M = max(1, min(num_components, n // CELLS_OF_A_COMPONENT))
    log_weight, location = np.full(num_components, NO_WEIGHT), np.zeros((num_components, E))
    if n < 2:
        log_weight[0] = 0.0
        return log_weight, location, np.eye(E)
    parts = min(M, PARTS_BY_TOTAL)
    fit = GaussianMixture(M // parts, covariance_type="tied", reg_covar=1e-2, max_iter=500, random_state=seed)
    cluster, left = fit.fit_predict(residuals), residuals.copy()
    rows = [np.flatnonzero(cluster == number) for number in range(M // parts)]
    pieces = [piece for each in rows for piece in np.array_split(each[np.argsort(residuals[each, -1])], parts)]
    for number, piece in enumerate(piece for piece in pieces if len(piece)):
        log_weight[number], location[number] = np.log(len(piece) / n), residuals[piece].mean(axis=0)
        left[piece] -= location[number]
    return log_weight, location, np.linalg.cholesky(left.T @ left / n + LEAST_VARIANCE * np.eye(E))
