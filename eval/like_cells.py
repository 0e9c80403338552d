"""What a file of cells asks for: conditions of one drawn cell for each of its cells, and their library sizes.

Labels are read from `obs`, library sizes from the counts in blocks, so that a file of any size fits in memory. Knows
nothing of models and sampling.
"""

from pathlib import Path

import h5py
import numpy as np
import torch
from anndata.io import read_elem, sparse_dataset
from tqdm.auto import tqdm

from tokenization import DCMTokenizer
from tokenization.counts_dcm import CountCheck
from tokenization.files import damage_explained, open_h5ad

BLOCK_VALUES = 2**24  # of a dense matrix; a sparse block holds fewer
NAMES_SHOWN = 5


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
    with open_h5ad(path) as file, damage_explained(path):
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
    with open_h5ad(path) as file:
        layers = sorted(file.get("layers", ()))
        if layer is not None and layer not in layers:
            raise ValueError(f"{str(path)!r} has no layer {layer!r}; layers there: {', '.join(layers) or 'none'}")
        if layer is None and "X" not in file:
            raise ValueError(f"{str(path)!r} has no X; pass --like-layer with one of: {', '.join(layers)}")
        with damage_explained(path):
            names = read_elem(file["var"]).index.astype(str)
            element = file["X"] if layer is None else file["layers"][layer]
            matrix = element if isinstance(element, h5py.Dataset) else sparse_dataset(element)
        if not names.is_unique:
            repeated = names[names.duplicated()].unique()
            raise ValueError(f"{str(path)!r} has {len(repeated):,} duplicate gene names ({_listed(repeated)})")
        absent = sorted(set(genes) - set(names))
        if absent:
            raise ValueError(
                f"{str(path)!r} lacks {len(absent):,} of the panel's {len(genes):,} genes ({_listed(absent)}): library "
                "sizes need all of them; leave out --like-library-size to draw them from the training cells"
            )
        check = CountCheck()
        sizes = _totals(matrix, names.isin(genes), check, path)
    source = f"{'X' if layer is None else f'layer {layer!r}'} of {path.name}"
    check.raise_if_bad(source, layers=layers, layer_option="--like-layer {}")
    return torch.from_numpy(sizes.astype(np.float32))


def _totals(matrix, in_panel: np.ndarray, check: CountCheck, path: Path) -> np.ndarray:
    """Totals (n,) over the genes ``in_panel`` (genes,), in blocks along the axis by which the file is stored."""
    by_gene = getattr(matrix, "format", None) == "csc"
    length, width = matrix.shape[::-1] if by_gene else matrix.shape
    step = max(1, BLOCK_VALUES // max(1, width))
    sizes = np.zeros(matrix.shape[0])
    with tqdm(total=length, desc="library sizes", unit_scale=True, delay=1, disable=None) as bar:
        for start in range(0, length, step):
            block = slice(start, min(start + step, length))
            with damage_explained(path):
                values = matrix[:, block] if by_gene else matrix[block]
            check.add(values.data if hasattr(values, "indptr") else values)
            if by_gene:
                sizes += np.asarray(values[:, in_panel[block]].sum(axis=1, dtype=np.float64)).ravel()
            else:
                sizes[block] = np.asarray(values[:, in_panel].sum(axis=1, dtype=np.float64)).ravel()
            bar.update(block.stop - block.start)
    return sizes


def _listed(names) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - NAMES_SHOWN:,} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
