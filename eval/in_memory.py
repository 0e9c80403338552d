"""Compare cells that a program has in memory: the numbers of dcm-evaluate, and its picture of the cells."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    import anndata
    from matplotlib.figure import Figure

    from eval.comparison.cells import Comparison


def compare(
    real: anndata.AnnData,
    generated: anndata.AnnData | Mapping[str, anndata.AnnData],
    train: anndata.AnnData | None = None,
    *,
    protocol: str = "log",
    baselines: str = "none",
    condition_keys: str | None = None,
    control: str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Score generated cells against real ones, beside the floor: real cells against real cells.

    Args:
        real: raw counts in ``X``: cells that the model was not trained on.
        generated: counts of the same genes by name; or several generators' by their names.
        train: training cells, for the floor and baselines; default a random half of ``real``, and the comparison is
            with the other half.
        protocol: likewise ``baselines``, ``condition_keys``, ``control`` and ``seed``: options of ``dcm-evaluate``.

    Returns:
        The rows of ``results.json``: ``model`` (``floor`` for real cells), ``protocol``, ``grouping``, ``condition``,
        ``metric``, ``mean``, ``std``, ``n`` and ``seeds``.

    Raises:
        ValueError: values that are no counts, genes or conditions that do not fit.
    """
    from eval.comparison.baselines import fitted_baselines, named_baselines
    from eval.comparison.protocols import named_protocols
    from eval.evaluate import evaluate

    chosen, protocols = named_baselines(baselines), named_protocols(protocol)
    found = _comparison(real, generated, train, condition_keys=condition_keys, control=control, seed=seed)
    samplers = fitted_baselines(found.train, chosen, required=baselines not in ("default", "all"))
    return pd.DataFrame(evaluate(found, protocols, samplers, seed=seed))


def plot(
    real: anndata.AnnData,
    generated: anndata.AnnData,
    *,
    color: str | None = None,
    umap: bool = True,
    seed: int = 0,
) -> Figure:
    """Draw real and generated cells side by side, coloured by label, and both together with density contours.

    Args:
        real: raw counts in ``X``; at most 2,000 random cells are drawn.
        generated: likewise, of the same genes by name.
        color: column of ``obs`` in both; default the first of ``cell_type`` and ``perturbation`` that both have.
        umap: UMAP of 30 principal components where umap-learn is installed; else the first two of them.
        seed: of the choice of cells.
    """
    from eval.reports.figures import CELLS_DRAWN, embedding_figure

    shared = [name for name in ("cell_type", "perturbation") if name in real.obs and name in generated.obs]
    keys = color or (shared[0] if shared else "none")
    found = _comparison(real, generated, real, condition_keys=keys, control=None, seed=seed)
    (name, (cells, *_)), rng = next(iter(found.generated.items())), np.random.default_rng(seed)
    drawn = {"real": found.real.thinned(CELLS_DRAWN, rng), name: cells.thinned(CELLS_DRAWN, rng)}
    return embedding_figure(drawn, umap=umap)[0]


def _comparison(
    real: anndata.AnnData,
    generated: anndata.AnnData | Mapping[str, anndata.AnnData],
    train: anndata.AnnData | None,
    *,
    condition_keys: str | None,
    control: str | None,
    seed: int,
) -> Comparison:
    """What dcm-evaluate reads from files of these cells."""
    from eval.comparison.cells import read_comparison
    from eval.comparison.challenges import RESERVED_NAMES
    from training.data.formats import write_counts

    if train is None:
        is_train = np.random.default_rng(seed).permutation(real.n_obs) % 2 == 1
        real, train = real[~is_train], real[is_train]
    several = generated if isinstance(generated, Mapping) else {"generated": generated}
    with tempfile.TemporaryDirectory(prefix="dcm-compare-") as home:
        names = {Path(home) / f"{place}.h5ad": name for place, name in enumerate(several)}
        files = {**dict(zip(names, several.values())), Path(home) / "real": real, Path(home) / "train": train}
        for path, cells in files.items():
            write_counts(path, cells)
        options = {"reserved_names": RESERVED_NAMES, "condition_keys": condition_keys, "control": control}
        return read_comparison(names, Path(home) / "real", Path(home) / "train", **options)
