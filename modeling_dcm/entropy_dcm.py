"""The entropy curve h(j): how many nats a gene still costs when j random genes of its cell are observed.

Measured on held-out cells, fitted by a smooth, decreasing and convex function, stored in the configuration; schedules
(`schedule_dcm.py`) are made from it. Letters: B cells, L genes, Q queried genes, J points of the curve.
"""

from collections.abc import Iterable

import numpy as np
import torch

from .chunks_dcm import dropout_off
from .diffusion_dcm import keyed_generator

POINTS = 24
QUERIES = 64


def curve_points(largest: int, points: int = POINTS) -> list[int]:
    """Numbers of observed genes from 0 to ``largest``, spaced like logarithms."""
    spaced = np.geomspace(1, max(largest, 1), points - 1).round().astype(int)
    return sorted({0, *np.minimum(spaced, largest).tolist(), largest})


@torch.no_grad()
def measure_entropy(
    model, batches: Iterable[dict[str, torch.Tensor]], *, points: int = POINTS, seed: int = 0
) -> dict[str, list[float]]:
    """Mean cross-entropy of a masked gene given j random observed genes of its cell.

    Each cell has one random order of its genes. The first j of them are observed and the last :data:`QUERIES` (at most
    a quarter of the panel) are asked, so that all points of the curve share genes and orders, and differences between
    them are not noise. The curve ends where those begin.

    Args:
        model: a :class:`DCMForDenoising`.
        batches: ``input_ids`` (B, L), complete and clean, all genes measured, with the conditions of
            :meth:`DCMForDenoising.forward`.
        points: J.
        seed: of the random orders, keyed with the index of the batch.

    Returns:
        ``observed``: j; ``entropy``: h(j) in nats per gene; ``error``: its standard error over cells; ``cells``.

    Raises:
        ValueError: no cells, or cells with genes that were not measured.
    """
    nats: list[np.ndarray] = []
    observed: list[int] = []
    with dropout_off(model):
        for index, batch in enumerate(batches):
            batch = {name: value.to(model.device) for name, value in batch.items()}
            x_0 = batch.pop("input_ids")
            B, L = x_0.shape
            if bool((x_0 >= model.config.num_counts).any()):
                raise ValueError("the entropy curve needs cells in which every gene of the panel was measured")
            num_queries = min(QUERIES, -(-L // 4))
            observed = curve_points(L - num_queries, points)
            keys = torch.rand(B, L, generator=keyed_generator(seed, index, model.device), device=model.device)
            order = keys.argsort(dim=1)
            queries = order[:, L - num_queries :]
            labels = x_0.gather(1, queries)
            of_batch = []
            for j in observed:
                masked = torch.zeros_like(x_0, dtype=torch.bool).scatter_(1, order[:, j:], True)
                x_t = x_0.masked_fill(masked, model.config.mask_token_id)
                law = model.law(x_t, query_positions=queries, **batch)
                of_batch.append(law.cross_entropy(labels).double().mean(dim=1))
            nats.append(torch.stack(of_batch, dim=1).cpu().numpy())  # (B, J)
    if not nats:
        raise ValueError("no cells to measure the entropy curve on: convert with --validation-fraction above 0")
    all_nats = np.concatenate(nats)
    error = all_nats.std(axis=0, ddof=1) / np.sqrt(len(all_nats)) if len(all_nats) > 1 else np.zeros(len(observed))
    return {
        "observed": [float(j) for j in observed],
        "entropy": all_nats.mean(axis=0).tolist(),
        "error": error.tolist(),
        "cells": len(all_nats),
    }


def fit_entropy(measured: dict[str, list[float]], num_genes: int, points: int = 64) -> dict[str, list[float]]:
    """A smooth, decreasing and convex curve through the points of :func:`measure_entropy`.

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
