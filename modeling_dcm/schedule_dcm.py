"""How many genes each sampling step reveals: fixed shapes, and the schedule of least weighted loss by an entropy curve.

Genes revealed in one step are drawn independently of each other, which costs ``sum_j (h(k_s) - h(j))`` nats for the
genes j = k_s .. k_(s+1)-1 of step s, exactly, when the order is random: h(j) is the cross-entropy of a gene given j
random observed genes. Plain arithmetic; knows nothing of networks. Letters: G genes, S steps, k genes revealed, h nats
per gene.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np

SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda u: u,
    "cosine": lambda u: 1 - math.cos(math.pi * u / 2),
    "cubic": lambda u: u**3,
}
SCHEDULES = (*sorted(SHAPES), "optimal")
GRID_POINTS = 256
# Errors of the first genes are shared by all later ones (the cell's state and depth), so a nat there weighs more than
# the KL says: the cost of a step that begins with k genes known is multiplied by ((k + 1) / G) ** -EARLY_WEIGHT. So an
# "optimal" schedule may have a larger predicted KL than another one; eval/results/README.md has the comparison.
EARLY_WEIGHT = 0.5
AUTO_TOLERANCE = 1.5e-3  # nats per gene that steps="auto" may lose
MAX_AUTO_STEPS = 100

Curve = tuple[tuple[float, ...], tuple[float, ...]]


def reveal_schedule(
    num_genes: int, steps: int | str, schedule: str = "cubic", curve: Curve | None = None, num_known: int = 0
) -> list[int]:
    """Genes revealed after each step, ``k_0 = 0 < k_1 < ... < k_S = num_genes``; at most one step for each gene.

    Args:
        num_genes: masked genes to reveal.
        steps: S; ``"auto"``: the fewest whose predicted KL is at most :data:`AUTO_TOLERANCE` nats per gene.
        schedule: one of :data:`SCHEDULES`.
        curve: ``(j, h(j))``, see :func:`as_curve`; ``"optimal"`` and ``"auto"`` need it.
        num_known: genes that are observed from the start.

    Raises:
        ValueError: unknown schedule, fewer than one step, or no curve where one is needed.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r}, expected one of {', '.join(SCHEDULES)}")
    if (schedule == "optimal" or steps == "auto") and curve is None:
        asked = f"schedule={schedule!r}" if schedule == "optimal" else "steps='auto'"
        raise ValueError(
            f"{asked} needs the model's entropy curve, which this checkpoint lacks: measure it with "
            "'dcm-benchmark entropy CHECKPOINT --data shards/', or choose steps and one of "
            f"{', '.join(sorted(SHAPES))}"
        )
    if steps == "auto":
        return list(_auto(num_genes, schedule, curve, num_known))
    if isinstance(steps, str) or steps < 1 or steps != int(steps):
        raise ValueError(f"steps={steps!r}, expected at least 1, or 'auto'")
    steps = min(int(steps), num_genes)
    if schedule == "optimal":
        return list(_optimal(num_genes, steps, curve, num_known))
    return _of_shape(num_genes, steps, schedule)


def predicted_kl(revealed: list[int], curve: Curve, num_known: int = 0) -> float:
    """Nats per cell that a schedule ``k_0 = 0 .. k_S`` loses against one gene at a time."""
    h = entropies(curve, num_known + revealed[-1])[num_known:]
    total = np.concatenate([[0.0], np.cumsum(h)])
    k = np.asarray(revealed)
    return float(((k[1:] - k[:-1]) * h[k[:-1]] - (total[k[1:]] - total[k[:-1]])).sum())


def as_curve(entropy_curve: dict[str, list[float]] | None) -> Curve | None:
    """A configuration's ``entropy_curve`` in the hashable form of the functions here."""
    if entropy_curve is None:
        return None
    return tuple(map(float, entropy_curve["observed"])), tuple(map(float, entropy_curve["entropy"]))


def entropies(curve: Curve, num_genes: int) -> np.ndarray:
    """h(j) in nats for j = 0 .. num_genes - 1, linear between the curve's points."""
    return np.interp(np.arange(num_genes), *curve)


def curve_points(largest: int, points: int) -> list[int]:
    """Numbers of observed genes from 0 to ``largest``, spaced like logarithms."""
    spaced = np.geomspace(1, max(largest, 1), points - 1).round().astype(int)
    return sorted({0, *np.minimum(spaced, largest).tolist(), largest})


def fit_entropy(measured: dict[str, list[float]], num_genes: int, points: int = 64) -> dict[str, list[float]]:
    """A smooth, decreasing and convex curve through the points of ``measure_entropy`` (`scoring_dcm.py`).

    A non-negative mixture of decaying exponentials ``exp(-j / tau)`` with tau spaced like logarithms, and a constant:
    every such mixture is decreasing and convex.

    Returns:
        ``observed`` and ``entropy`` for the configuration; linear interpolation between them stays convex.
    """
    try:
        from scipy.optimize import nnls
    except ImportError as error:
        raise ImportError("fitting an entropy curve needs scipy: pip install scipy") from error
    j = np.asarray(measured["observed"])
    h = np.asarray(measured["entropy"])
    tau = np.geomspace(0.5, 4 * num_genes, 40)

    def basis(at: np.ndarray) -> np.ndarray:
        return np.concatenate([np.ones((len(at), 1)), np.exp(-at[:, None] / tau)], axis=1)

    weights, _ = nnls(basis(j), h)
    at = np.asarray(curve_points(num_genes - 1, points), dtype=float)
    return {"observed": at.tolist(), "entropy": (basis(at) @ weights).tolist()}


def _of_shape(num_genes: int, steps: int, schedule: str) -> list[int]:
    revealed = [0]
    for step in range(1, steps + 1):
        target = round(num_genes * SHAPES[schedule](step / steps))
        revealed.append(max(revealed[-1] + 1, min(target, num_genes - (steps - step))))
    return revealed


@lru_cache(maxsize=4096)
def _optimal(num_genes: int, steps: int, curve: Curve, num_known: int) -> tuple[int, ...]:
    """The schedule of least weighted cost on a grid of about 256 points, by dynamic programming."""
    grid = _grid(num_genes, steps)
    cost = _step_costs(grid, curve, num_known)
    M = len(grid)
    best = cost[0].copy()  # least cost of reaching each point in the steps so far
    choices = []
    for _ in range(steps - 1):
        through = best[:, None] + cost  # (from, to)
        choices.append(through.argmin(axis=0))
        best = through.min(axis=0)
    path = [M - 1]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return (0, *(int(grid[point]) for point in reversed(path)))


@lru_cache(maxsize=4096)
def _auto(num_genes: int, schedule: str, curve: Curve, num_known: int) -> tuple[int, ...]:
    low, high = 1, min(num_genes, MAX_AUTO_STEPS)
    while low < high:  # the predicted KL falls with the number of steps
        middle = (low + high) // 2
        revealed = reveal_schedule(num_genes, middle, schedule, curve, num_known)
        if predicted_kl(revealed, curve, num_known) <= AUTO_TOLERANCE * num_genes:
            high = middle
        else:
            low = middle + 1
    return tuple(reveal_schedule(num_genes, low, schedule, curve, num_known))


def _grid(num_genes: int, steps: int) -> np.ndarray:
    """Numbers of revealed genes to choose from, 0 and all among them: close while few are known, then coarser."""
    if num_genes <= GRID_POINTS:
        return np.arange(num_genes + 1)
    points = min(num_genes, max(GRID_POINTS, 2 * steps))
    u = np.linspace(0, 1, points + 1)
    spread = np.round(num_genes * (0.2 * u + 0.8 * u**3)).astype(int)
    return np.unique(np.concatenate([spread, np.arange(min(num_genes, steps) + 1), [num_genes]]))


def _step_costs(grid: np.ndarray, curve: Curve, num_known: int) -> np.ndarray:
    """Weighted cost (M, M) of a step from one point of the grid to a later one; infinite otherwise."""
    num_genes = int(grid[-1])
    h = entropies(curve, num_known + num_genes)[num_known:]
    total = np.concatenate([[0.0], np.cumsum(h)])
    at = h[np.minimum(grid, num_genes - 1)]
    cost = (grid[None, :] - grid[:, None]) * at[:, None] - (total[grid][None, :] - total[grid][:, None])
    cost = cost * ((num_known + grid + 1.0) / (num_known + num_genes))[:, None] ** -EARLY_WEIGHT
    return np.where(grid[None, :] > grid[:, None], cost, np.inf)
