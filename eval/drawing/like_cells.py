"""What a file of cells asks for: conditions of one drawn cell for each of its cells, and their library sizes.

Labels are read from `obs`, library sizes from the counts in blocks, so that a file of any size fits in memory. Knows
nothing of models and sampling.
"""

from pathlib import Path

import numpy as np
import torch
from anndata.io import read_elem

from eval.drawing.file_counts import listed, opened_counts, panel_columns
from tokenization import DCMTokenizer
from training.data.h5ad import damage_named, open_h5ad


def conditions_of(
    path: Path,
    tokenizer: DCMTokenizer,
    *,
    cell_type: str | None = None,
    perturbation: str | None = None,
    covariates: dict[str, str] | None = None,
) -> dict[str, torch.Tensor | int]:
    """Conditions of the cells of an h5ad file, as ids; counts are not looked at.

    Args:
        path: the file.
        tokenizer: every condition that it knows is read from ``obs``, under its canonical name.
        cell_type: of all cells, whatever the file says; likewise the other conditions (a covariate by its name).

    Returns:
        As :meth:`DCMTokenizer.conditions`.

    Raises:
        ValueError: a missing column, cells without label, or unknown labels.
    """
    with open_h5ad(path) as file, damage_named(path):
        obs = read_elem(file["obs"])
    given = {"cell_type": cell_type, "perturbation": perturbation, **(covariates or {})}
    given = {name: label for name, label in given.items() if label is not None}
    known = [*(["cell_type"] if tokenizer.cell_types else []), *(["perturbation"] if tokenizer.perturbations else [])]
    needed = [name for name in (*known, *tokenizer.covariates) if name not in given]
    missing = [name for name in needed if name not in obs]
    if missing:
        raise ValueError(f"{str(path)!r} has no obs column {missing}; its columns: {', '.join(obs.columns) or 'none'}")
    for name in needed:
        unlabelled = int(obs[name].isna().sum())
        if unlabelled:
            raise ValueError(
                f"{str(path)!r}: {unlabelled:,} cells have no label in obs[{name!r}]; label or remove them"
            )
    wanted = {name: obs[name] for name in needed} | given
    fixed = {name: wanted.pop(name) for name in ("cell_type", "perturbation") if name in wanted}
    return tokenizer.conditions(num_cells=len(obs), covariates=wanted or None, **fixed)


def library_sizes_of(path: Path, genes: list[str], layer: str | None = None) -> torch.Tensor:
    """Total counts (n,) float32 of the n cells of an h5ad file over ``genes``, which are matched by name.

    Args:
        path: the file.
        genes: the panel; the file must have all of them.
        layer: where the counts are; None is ``X``.

    Raises:
        ValueError: no such layer, values that are not counts, missing or repeated genes.
    """
    with opened_counts(path, layer, layer_option="--like-layer {}") as file:
        columns = panel_columns(path.name, file.genes, genes)
        absent = [gene for gene, column in zip(genes, columns) if column < 0]
        if absent:
            raise ValueError(
                f"{str(path)!r} lacks {len(absent):,} of the panel's {len(genes):,} genes ({listed(absent)}): library "
                "sizes need all of them; leave out --like-library-size to draw them from the training cells"
            )
        sizes = np.asarray(file.over(columns, "library sizes").sum(axis=1)).ravel()
    return torch.from_numpy(sizes.astype(np.float32))
