"""Estimate what the network starts at: dispersions and loadings of the cell state by regression, the state's prior.

In come counts of training cells, what was expected of them, and their states; out go numbers for each gene, condition
or cell type, in seconds. Letters: n cells, G genes, d components of the state, E = d + 1, M mixture components.
"""

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import LinearOperator, svds
from scipy.special import gammaln
from sklearn.mixture import GaussianMixture

from eval.metrics.distances import w2
from modeling_dcm.count_distribution_dcm import LOWEST_MEAN

DISPERSIONS = (1e-3, 30.0)  # least and largest 1 / r, the squared coefficient of variation beyond Poisson's
GOLDEN = (5**0.5 - 1) / 2
SEARCH_STEPS = 10  # to 5 % of a dispersion
NEWTON_STEPS = 8
LARGEST_STEP = 1.0  # of a loading in one Newton step
LARGEST_EFFECT = 8.0  # of the state on the logarithm of a mean
RIDGE = 300.0  # cells' worth of evidence that a loading is 0
GENES_AT_ONCE = 2048
CELLS_OF_A_COMPONENT = 40
NO_WEIGHT = -1e4  # a logarithm of zero
LARGEST_MEAN = 0.995  # quantile of a gene's counts above zero
STATE_DIMS = (16, 32)  # that are tried
HELD_OUT = 500  # cells that they are tried on, at most; and at most a fifth of all
STATE_DRAWS = 3


def principal_components(
    counts: csr_matrix, total: np.ndarray, median_total: float, num_components: int
) -> tuple[np.ndarray, np.ndarray]:
    """Find the mean (G,) and whitened principal components (d, G) of ``log1p(counts / total * median_total)``.

    By Lanczos iterations on the sparse matrix; its centring is never written out.
    """
    n, G = counts.shape
    logs = counts.astype(np.float64).multiply((median_total / np.maximum(total, 1))[:, None]).tocsr().log1p()
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


def state_dim_distances(
    counts: csr_matrix, total: np.ndarray, cell_type: np.ndarray, group: np.ndarray, seed: int
) -> dict[int, float]:
    """Draw cells by the regression alone, with several numbers of components of the cell state: W2 of each.

    A part of the cells is held out. Components and loadings are fitted to the others, cells are drawn from the states
    of some of these, of the same groups as the held-out ones, and compared on log1p counts of the genes with the most
    counts. Too few components miss modules; too many repeat what was noise in the cell that gave its state.

    Args:
        counts: (n, G) sparse.
        total: library sizes (n,).
        cell_type: ids (n,), -1 where there is none.
        group: numbers (n,) from 0; cells of one group have the same conditions.
        seed: of the cells that are held out and of the draws.
    """
    loudest = np.argsort(-np.asarray(counts.sum(axis=0))[0], kind="stable")[:GENES_AT_ONCE]
    counts = counts[:, np.sort(loudest)]
    rng = np.random.default_rng([seed, 79])
    order = rng.permutation(len(total))
    held, kept = np.split(order, [min(HELD_OUT, len(order) // 5)])
    x, largest, median = counts[kept], largest_means(counts[kept]), float(np.median(total[kept]))
    expected = _expected(x, total[kept], cell_type[kept])
    rows = [_of_groups(group[kept], group[held], rng) for _ in range(STATE_DRAWS)]
    real = np.log1p(counts[held].toarray())
    distances = {}
    for d in STATE_DIMS:
        if d + 1 < min(x.shape):
            center, components = principal_components(x, total[kept], median, d)
            state = np.log1p(x.toarray() / np.maximum(total[kept], 1)[:, None] * median) - center
            state = state @ components.T
            loadings, dispersion = state_loadings(x, expected, state, largest)
            mean = regressed(expected, loadings, state, largest)
            drawn = [np.log1p(rng.poisson(rng.gamma(1 / dispersion, mean[i] * dispersion))) for i in rows]
            distances[d] = float(np.mean([w2(cells, real) for cells in drawn]))
    return distances


def _expected(counts: csr_matrix, total: np.ndarray, cell_type: np.ndarray) -> np.ndarray:
    """Means (n, G) of the cells' types, times depth."""
    types, row = np.unique(cell_type, return_inverse=True)
    mean = np.stack([np.asarray(counts[row == index].mean(axis=0))[0] for index in range(len(types))])[row]
    depth = (total + 1) / (mean.sum(axis=1) + 1)
    return np.maximum(mean * depth[:, None], LOWEST_MEAN).astype(np.float32)


def _of_groups(groups: np.ndarray, wanted: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rows (m,) of ``groups`` (n,) that are of the groups ``wanted`` (m,), each once as far as they go; any row where
    there is none."""
    rows = np.empty(len(wanted), dtype=np.int64)
    for value in np.unique(wanted):
        found, places = np.flatnonzero(groups == value), np.flatnonzero(wanted == value)
        found = rng.permutation(found if len(found) else len(groups))
        rows[places] = np.resize(found, len(places))
    return rows


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


def state_mixture(residuals: np.ndarray, num_components: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit a mixture of Gaussians with one covariance to states around their groups' means.

    With fewer than :data:`CELLS_OF_A_COMPONENT` cells for each component there are fewer: the others have no weight.

    Returns:
        Log weights (M,), means (M, E) and Cholesky factor (E, E), lower triangle.
    """
    n, E = residuals.shape
    M = max(1, min(num_components, n // CELLS_OF_A_COMPONENT))
    log_weight, location = np.full(num_components, NO_WEIGHT), np.zeros((num_components, E))
    if n < 2:
        log_weight[0] = 0.0
        return log_weight, location, np.eye(E)
    fit = GaussianMixture(M, covariance_type="tied", reg_covar=1e-2, max_iter=500, random_state=seed).fit(residuals)
    log_weight[:M], location[:M] = np.log(fit.weights_), fit.means_
    return log_weight, location, np.linalg.cholesky(fit.covariances_)
