"""Divide cells into training, validation and test cells.

Works on condition labels alone. Knows nothing of counts, genes and files, so no split can depend on them.
"""

import numpy as np

SPLITS = ("train", "validation", "test")


def random_split(
    strata: np.ndarray, *, test_fraction: float, validation_fraction: float, seed: int
) -> dict[str, np.ndarray]:
    """Random split, stratified: every condition gives its share to each part.

    A condition of c cells gives ``c * fraction`` cells, rounded down or up so that the whole part has its exact share
    of all cells; but at least one cell of every condition stays in training.

    Args:
        strata: (n,) integers, the full condition of each cell.
        test_fraction: share of all cells that is tested on.
        validation_fraction: share of the *remaining* cells that is validated on.
        seed: another seed gives other cells.

    Returns:
        ``train``, ``validation`` and ``test``: disjoint ascending positions that together are all n cells.

    Raises:
        ValueError: a fraction is outside [0, 1).
    """
    for name, fraction in (("test", test_fraction), ("validation", validation_fraction)):
        if not 0 <= fraction < 1:
            raise ValueError(f"{name} fraction is {fraction}; expected at least 0 and below 1")
    rng = np.random.default_rng(seed)
    test = _draw(strata, test_fraction, rng)
    rest = np.setdiff1d(np.arange(len(strata)), test)
    validation = rest[_draw(strata[rest], validation_fraction, rng)]
    return {"train": np.setdiff1d(rest, validation), "validation": validation, "test": test}


def _draw(strata: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Ascending positions of a stratified draw that leaves at least one cell of each stratum behind.

    Systematic sampling: conditions are laid end to end, and condition j gives the whole numbers that its piece of the
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
