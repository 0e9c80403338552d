"""Compute once what a fresh network starts from: statistics of the training cells' counts, written beside the shards.

``statistics.safetensors`` is a plain dictionary of tensors, whose header names genes and labels. All sums are integers,
so neither the order of the cells nor the number of processes changes them:

    num_measured                                   (G,) cells in which each gene was measured
    histogram.indptr, histogram.counts, histogram.cells    CSR: how many of these have each count that occurs
    cell_type.num_cells, .num_measured, .sums      (T,), (T, G), (T, G) the same of each cell type, and its total counts
    library_size.log_mean, library_size.log_std    of log1p(library size)
    library_size.keys, library_size.quantiles      (R, W), (R, Q) of each group of conditions

Letters: N cells, G genes, T cell types, P panels of measured genes, K largest count, W columns of a key: cell type,
covariates, perturbations.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy.sparse import csr_matrix

from modeling_dcm.conditioning_dcm import ANY, LIBRARY_QUANTILES
from tokenization import DCMTokenizer
from tokenization.count_errors_dcm import library_size

STATISTICS = "statistics.safetensors"
SMALL_COUNTS = 256  # are counted in a dense table; larger ones are rare
FEWEST_CELLS = 50  # of a group of conditions with library sizes of its own


def compute_statistics(
    blocks: Iterable[csr_matrix],
    conditions: Mapping[str, np.ndarray],
    *,
    max_count: int,
    num_cell_types: int,
    panel: np.ndarray,
    measured: np.ndarray,
) -> dict[str, np.ndarray]:
    """Compute the statistics of N cells in one pass.

    Args:
        blocks: their counts, some thousands of cells at a time.
        conditions: ``cell_type_ids`` (N,), ``perturbation_ids`` (N, ..), ``covariate_ids`` (N, C), if there are.
        max_count: K or more.
        num_cell_types: T.
        panel: (N,) the panel of each cell.
        measured: (P, G) which genes were measured in the cells of each panel.
    """
    num_panels, G = measured.shape
    V = max(SMALL_COUNTS, max_count + 1)
    types = conditions.get("cell_type_ids", np.full(len(panel), -1))
    small, large = np.zeros(G * SMALL_COUNTS, dtype=np.int64), csr_matrix((G, V), dtype=np.int64)
    type_sums = np.zeros((num_cell_types, G), dtype=np.int64)
    sizes = np.zeros(len(panel), dtype=np.int64)
    start = 0
    for counts in blocks:
        rows = slice(start, start + counts.shape[0])
        start = rows.stop
        sizes[rows] = library_size(counts)
        genes, values = counts.indices.astype(np.int64), counts.data.astype(np.int64)
        is_small = values < SMALL_COUNTS
        small += np.bincount(genes[is_small] * SMALL_COUNTS + values[is_small], minlength=len(small))
        pairs = (genes[~is_small], values[~is_small])
        large = large + csr_matrix((np.ones(len(pairs[0]), dtype=np.int64), pairs), shape=(G, V))
        if num_cell_types:
            given = np.flatnonzero(types[rows] >= 0)
            member = csr_matrix(
                (np.ones(len(given), dtype=np.int64), (types[rows][given], given)),
                (num_cell_types, len(counts.indptr) - 1),
            )
            type_sums += (member @ counts).toarray()
    num_measured = np.bincount(panel, minlength=num_panels) @ measured
    small = small.reshape(G, SMALL_COUNTS)
    small[:, 0] += num_measured - small.sum(axis=1) - np.asarray(large.sum(axis=1)).ravel()
    histogram = csr_matrix(small)
    histogram.resize(G, V)
    histogram = histogram + large
    statistics = {
        "num_measured": num_measured,
        "histogram.indptr": histogram.indptr.astype(np.int64),
        "histogram.counts": histogram.indices.astype(np.int64),
        "histogram.cells": histogram.data,
    }
    if num_cell_types:
        of_type_and_panel = np.zeros((num_cell_types, num_panels), dtype=np.int64)
        np.add.at(of_type_and_panel, (types[types >= 0], panel[types >= 0]), 1)
        statistics["cell_type.num_cells"] = of_type_and_panel.sum(axis=1)
        statistics["cell_type.num_measured"] = of_type_and_panel @ measured
        statistics["cell_type.sums"] = type_sums
    return statistics | _of_library_sizes(sizes, conditions, panel, measured, _gene_mean(histogram, num_measured))


def merged_statistics(
    parts: Sequence["Statistics"],
    tokenizer: DCMTokenizer,
    sizes: np.ndarray,
    conditions: Mapping[str, np.ndarray],
    *,
    panel: np.ndarray,
    measured: np.ndarray,
) -> dict[str, np.ndarray]:
    """What :func:`compute_statistics` would say of the cells of all ``parts``, whose genes are the same, without a look
    at a count: of the N cells only library sizes (N,), conditions and panels are asked for."""
    G, types = len(tokenizer.genes), tokenizer.cell_types
    merged = {"num_measured": sum(part.tensors["num_measured"] for part in parts)}
    histogram = csr_matrix((G, max(SMALL_COUNTS, tokenizer.max_count + 1)), dtype=np.int64)
    for part in parts:
        arrays = (part.tensors[f"histogram.{name}"] for name in ("cells", "counts", "indptr"))
        histogram = histogram + csr_matrix(tuple(arrays), shape=histogram.shape)
    for name, array in (("indptr", histogram.indptr), ("counts", histogram.indices), ("cells", histogram.data)):
        merged[f"histogram.{name}"] = array.astype(np.int64)
    for name, shape in (("num_cells", ()), ("num_measured", (G,)), ("sums", (G,))) if types else ():
        merged[f"cell_type.{name}"] = total = np.zeros((len(types), *shape), dtype=np.int64)
        for part in parts:
            total[[types.index(label) for label in part.vocabulary["cell_types"]]] += part.tensors[f"cell_type.{name}"]
    gene_mean = _gene_mean(histogram, merged["num_measured"])
    return merged | _of_library_sizes(sizes, conditions, panel, measured, gene_mean)


def _gene_mean(histogram: csr_matrix, num_measured: np.ndarray) -> np.ndarray:
    """Mean count (G,) of each gene in the cells that measured it."""
    return (histogram @ np.arange(histogram.shape[1]) / np.maximum(num_measured, 1)).astype(np.float32)


# --- library sizes ----------------------------------------------------------------------------------------------------


def _of_library_sizes(sizes: np.ndarray, *arguments: object) -> dict[str, np.ndarray]:
    """The entries of library sizes (N,); ``arguments`` are the others of :func:`library_size_quantiles`."""
    logs = np.log1p(sizes.astype(np.float64))
    keys, quantiles = library_size_quantiles(sizes, *arguments)
    return {
        "library_size.log_mean": np.array([logs.mean()]),
        "library_size.log_std": np.array([logs.std()]),
        "library_size.keys": keys,
        "library_size.quantiles": quantiles,
    }


def library_size_quantiles(
    sizes: np.ndarray,
    conditions: Mapping[str, np.ndarray],
    panel: np.ndarray,
    measured: np.ndarray,
    gene_mean: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Quantiles (R, Q) of library sizes (N,) in each group of cells with the same conditions, and their keys (R, W).

    A key has -1 for a condition that there is not, and a combination's perturbations in descending order. Groups of
    fewer than :data:`FEWEST_CELLS` cells are left out: they fall back to the same cell type and covariates with any
    perturbation, then to the cell type, then to all cells. The most specific groups stand first. Sizes are those as if
    every gene had been measured, as generated cells have them: a cell that lacks genes is larger by the share that
    these have in a mean cell, ``gene_mean`` (G,). Takes one sort of the cells for each of these four levels.
    """
    N = len(sizes)
    if not measured.all():
        weights = gene_mean.astype(np.float64)
        share = measured.astype(np.float64) @ weights / weights.sum()
        sizes = np.round(sizes / np.maximum(share, 1 / len(weights))[panel]).astype(np.int64)
    missing = np.full((N, 1), -1)
    cell_types, covariates = conditions.get("cell_type_ids"), conditions.get("covariate_ids", missing[:, :0])
    perturbations = -np.sort(-conditions.get("perturbation_ids", missing), axis=1)
    keys = np.hstack([missing if cell_types is None else cell_types[:, None], covariates, perturbations])
    W = keys.shape[1]
    levels = list(dict.fromkeys([W, 1 + covariates.shape[1], 1, 0]))  # columns that tell groups apart
    group = np.zeros(N, dtype=np.int64)
    groups = {0: group}
    for level, values in enumerate(keys.T - keys.min(axis=0)[:, None], start=1):
        group = np.unique(group * (values.max() + 1) + values, return_inverse=True)[1].ravel()  # in the keys' order
        groups |= {level: group} if level in levels else {}
    by_size = np.argsort(sizes, kind="stable")
    all_keys, all_quantiles = [], []
    for level in levels:
        order = by_size[np.argsort(groups[level][by_size], kind="stable")]
        number = np.bincount(groups[level])
        kept = (number >= FEWEST_CELLS) | (level == 0)
        starts = (np.cumsum(number) - number)[kept]
        all_keys.append(np.full((len(starts), W), ANY))
        all_keys[-1][:, :level] = keys[order[starts], :level]
        all_quantiles.append(_quantiles(sizes[order], starts, number[kept]))
    return np.concatenate(all_keys), np.concatenate(all_quantiles)


def _quantiles(ordered: np.ndarray, starts: np.ndarray, number: np.ndarray) -> np.ndarray:
    """Quantiles (R, Q) float32, linearly interpolated, of runs of ascending values that begin at ``starts`` (R,)."""
    place = torch.linspace(0, 1, LIBRARY_QUANTILES, dtype=torch.float64) * torch.from_numpy(number - 1)[:, None]
    left = place.long()
    right = place.ceil().long()
    values, first = torch.from_numpy(ordered).double(), torch.from_numpy(starts)[:, None]
    return torch.lerp(values[first + left], values[first + right], place - left).float().numpy()


# --- the file ---------------------------------------------------------------------------------------------------------


def vocabulary_of(tokenizer: DCMTokenizer) -> dict[str, object]:
    """Names of genes and labels: the ids of the statistics are positions in these lists."""
    names = ("genes", "cell_types", "perturbations")
    return {name: list(getattr(tokenizer, name)) for name in names} | {"covariates": dict(tokenizer.covariates)}


def write_statistics(path: Path, tensors: Mapping[str, np.ndarray], vocabulary: Mapping[str, object]) -> None:
    """Write what :func:`compute_statistics` returned, with the ``vocabulary`` of its ids."""
    contiguous = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    save_file(contiguous, path, metadata={"vocabulary": json.dumps(vocabulary)})


def read_statistics(folder: Path) -> "Statistics":
    """Read the statistics of a folder of shards.

    Raises:
        ValueError: it has none, or the file is damaged.
    """
    path = folder / STATISTICS
    if not path.is_file():
        raise ValueError(f"no {STATISTICS} in {str(folder)!r}: an older dcm-convert wrote it; convert again")
    try:
        with safe_open(path, "numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
            return Statistics(tensors, json.loads(file.metadata()["vocabulary"]))
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}): copy it again, or convert again") from error


@dataclass(frozen=True)
class Statistics:
    """What the file says; methods give it for the vocabulary of a ``tokenizer``, which may have its names in another
    order, more labels, larger counts or fewer conditions."""

    tensors: dict[str, np.ndarray]  # by the names above
    vocabulary: dict[str, object]  # of their ids

    def histogram(self, tokenizer: DCMTokenizer) -> np.ndarray:
        """How many of the cells that measured a gene have each of its count ids (G, K+1)."""
        counts = self.tensors["histogram.counts"]
        shape = (len(self.vocabulary["genes"]), tokenizer.num_count_ids)
        ids = tokenizer.count_ids(counts)
        histogram = csr_matrix((self.tensors["histogram.cells"], ids, self.tensors["histogram.indptr"]), shape=shape)
        return histogram.toarray()[self._genes(tokenizer)]

    def cell_type_totals(self, tokenizer: DCMTokenizer, gene_mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Counts (T, G) summed over the cells of each type, and how many these are (T,).

        Where a gene was measured in some cells of a type only, the sum is that of as many cells with the mean of these;
        where in none, with its mean over all cells, ``gene_mean`` (G,).
        """
        known, genes = self.vocabulary["cell_types"], self._genes(tokenizer)
        rows = np.array([known.index(name) if name in known else len(known) for name in tokenizer.cell_types])
        sums, num_measured, num_cells = (
            np.concatenate([values, np.zeros_like(values[:1])])[rows].astype(np.float64)
            for values in (self.tensors[f"cell_type.{name}"] for name in ("sums", "num_measured", "num_cells"))
        )
        sums, num_measured, num_cells = sums[:, genes], num_measured[:, genes], num_cells[:, None]
        totals = sums * num_cells / np.maximum(num_measured, 1)
        return np.where(num_measured > 0, totals, gene_mean * num_cells), num_cells[:, 0]

    def library_sizes(self, tokenizer: DCMTokenizer) -> tuple[np.ndarray, np.ndarray] | None:
        """Keys (R, W) and quantiles (R, Q) as :func:`library_size_quantiles` gives them; None where other conditions
        are learned than the shards have, as the groups are others then."""
        old, new = self.vocabulary, vocabulary_of(tokenizer)
        if _conditions(old) != _conditions(new):
            return None
        stored, quantiles = self.tensors["library_size.keys"], self.tensors["library_size.quantiles"]
        names = [(old["cell_types"], new["cell_types"])]
        names += [(labels, new["covariates"][name]) for name, labels in old["covariates"].items()]
        first = len(names)  # of the perturbations
        names += [(old["perturbations"], new["perturbations"])] * (stored.shape[1] - first)
        keys = np.stack([_renamed(ids, *pair) for ids, pair in zip(stored.T, names, strict=True)], axis=1)
        keys[:, first:] = -np.sort(-keys[:, first:], axis=1)
        order = np.lexsort((*keys.T[::-1], -(keys != ANY).sum(axis=1)))
        return keys[order], quantiles[order]

    def _genes(self, tokenizer: DCMTokenizer) -> np.ndarray:
        """Positions of the tokenizer's genes."""
        position = {name: index for index, name in enumerate(self.vocabulary["genes"])}
        return np.array([position[name] for name in tokenizer.genes])


def _conditions(vocabulary: Mapping[str, object]) -> list[str]:
    """Names of the conditions that have labels."""
    return [name for name in ("cell_types", "perturbations") if vocabulary[name]] + list(vocabulary["covariates"])


def _renamed(ids: np.ndarray, old: Sequence[str], new: Sequence[str]) -> np.ndarray:
    """Ids of the same labels in another vocabulary; -1 and :data:`ANY`, -2, stay."""
    position = {name: index for index, name in enumerate(new)}
    return np.array([*(position.get(name, -1) for name in old), ANY, -1])[ids]
