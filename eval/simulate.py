"""Make a Perturb-seq-like h5ad with known truth, for ``make demo`` and the tests.

Counts are negative binomial. A cell's expected expression is a gene's base level, shifted by its cell type, by gene
programmes whose activity varies from cell to cell (so genes correlate) and by its perturbations: each knocks down its
own target gene and shifts the programmes by a fixed linear map of its vector, so that the effect of a perturbation
never seen can be predicted from its vector. Pairs add.

    dcm-simulate --out cells.h5ad
"""

import logging
from functools import partial
from itertools import combinations
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from safetensors.numpy import save_file
from scipy import sparse

from training.data.command_line import run
from training.data.files import check_writable, written_aside

logger = logging.getLogger(__name__)

CONTROL = "control"
NUM_PROGRAMMES = 6
VECTOR_RANK = 4  # vectors lie near a plane of this dimension, so a few perturbations tell the map
COUNTS_PER_GENE = 0.9
LIBRARY_SIZE_CV = 0.35
DISPERSION = 8.0
BASE_LEVEL_SD = 1.4
CELL_TYPE_SD = 0.8
LOADING = 0.9
MAX_ACTIVITY = 2.0  # of a resting cell; keeps the largest counts, and so the model's head, small
EFFECT_SD = 0.5
KNOCK_DOWN = 0.15  # what is left of the target's expression
CONTROL_SHARE = 0.2


def simulate(
    *,
    num_cells: int = 4000,
    num_genes: int = 200,
    num_cell_types: int = 3,
    num_perturbations: int = 8,
    num_pairs: int = 3,
    vector_dim: int = 16,
    seed: int = 0,
) -> tuple[anndata.AnnData, dict[str, np.ndarray]]:
    """Simulate cells and the perturbations' vectors, by the options of :func:`main`.

    Returns:
        The cells: CSR int32 counts (num_cells, num_genes); ``obs`` ``cell_type`` and ``perturbation`` (a gene of the
        panel, a pair ``A+B`` or ``control``; no such column without perturbations); the truth in
        ``varm["programme_loadings"]`` (num_genes, 6), ``varm["base_level"]`` (num_genes, cell types; log scale),
        ``obsm["programme_activity"]`` and ``uns["simulation"]`` (programme shift of every perturbation, what is left of
        a target). And the table: name of each single perturbation -> (vector_dim,) float32.

    Raises:
        ValueError: a number out of range, or fewer cells than conditions.
    """
    num_possible = num_perturbations * (num_perturbations - 1) // 2
    conditions = num_cell_types * (1 + num_perturbations + num_pairs)
    for name, value, holds, expected in (
        ("num_genes", num_genes, num_genes >= 2, "2 or more"),
        ("num_cell_types", num_cell_types, num_cell_types >= 1, "1 or more"),
        ("vector_dim", vector_dim, vector_dim >= 1, "1 or more"),
        ("num_perturbations", num_perturbations, 0 <= num_perturbations <= num_genes, f"0 to num_genes={num_genes}"),
        ("num_pairs", num_pairs, 0 <= num_pairs <= num_possible, f"0 to {num_possible}, pairs of perturbations"),
        ("num_cells", num_cells, num_cells >= conditions, f"one or more for each of the {conditions} conditions"),
    ):
        if not holds:
            raise ValueError(f"{name}={value}: expected {expected}")
    rng = np.random.default_rng(seed)
    genes = np.array([f"GENE{index:0{max(4, len(str(num_genes - 1)))}d}" for index in range(num_genes)])
    loadings = _programme_loadings(num_genes, rng)
    base = rng.normal(0, BASE_LEVEL_SD, (num_genes, 1)) + rng.normal(0, CELL_TYPE_SD, (num_genes, num_cell_types))

    expressed = np.sort(np.argsort(-base.mean(axis=1), kind="stable")[: max(num_perturbations, num_genes // 2)])
    targets = np.sort(rng.choice(expressed, num_perturbations, replace=False))
    vectors, shifts = _vectors_and_shifts(num_perturbations, vector_dim, rng)
    pairs = list(combinations(range(num_perturbations), 2))
    chosen = np.sort(rng.choice(len(pairs), num_pairs, replace=False))
    members = [(), *((single,) for single in range(num_perturbations)), *(pairs[index] for index in chosen)]

    cell_type, perturbation = _assign_conditions(num_cells, num_cell_types, len(members), rng)
    is_member = np.zeros((len(members), num_perturbations))  # which singles make up each label
    for label, singles in enumerate(members):
        is_member[label, list(singles)] = 1
    resting = rng.normal(0, 1, (num_cells, NUM_PROGRAMMES)).clip(-MAX_ACTIVITY, MAX_ACTIVITY)
    activity = resting + (is_member @ shifts)[perturbation]
    log_level = base.T[cell_type] + activity @ loadings.T
    log_level[:, targets] += np.log(KNOCK_DOWN) * is_member[perturbation]
    counts = _draw_counts(log_level, rng)

    names = [CONTROL, *("+".join(genes[targets[list(singles)]]) for singles in members[1:])]
    obs = pd.DataFrame({"cell_type": pd.Categorical([f"type{index}" for index in cell_type])})
    uns: dict[str, object] = {"dcm_conditions": ["cell_type"], "source": f"dcm-simulate, seed {seed}"}
    if num_perturbations:
        obs["perturbation"] = pd.Categorical([names[index] for index in perturbation])
        uns |= {"dcm_conditions": ["cell_type", "perturbation"], "dcm_control": CONTROL}
        effects = dict(zip(genes[targets].tolist(), shifts))
        uns["simulation"] = {"programme_shift": effects, "target_left": KNOCK_DOWN}
    obs.index = [f"cell{index:0{len(str(num_cells - 1))}d}" for index in range(num_cells)]
    adata = anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=genes), uns=uns)
    adata.varm["programme_loadings"], adata.varm["base_level"] = loadings, base
    adata.obsm["programme_activity"] = activity
    return adata, dict(zip(genes[targets].tolist(), vectors))


def main(
    out: Path,
    num_cells: int = 4000,
    num_genes: int = 200,
    num_cell_types: int = 3,
    num_perturbations: int = 8,
    num_pairs: int = 3,
    vector_dim: int = 16,
    seed: int = 0,
) -> None:
    """Simulate Perturb-seq-like cells with known truth.

    Writes the cells, and beside them (as NAME.perturbations.safetensors) one vector per perturbation that determines
    its effect.

    Args:
        out: The h5ad to write.
        num_cells: Cells in all.
        num_genes: Genes in the panel.
        num_cell_types: Cell types.
        num_perturbations: Single perturbations, each of a gene of the panel; 0 leaves perturbations out.
        num_pairs: Pairs of them, labelled A+B.
        vector_dim: Length of a perturbation's vector.
        seed: The same seed gives the same cells.
    """
    options = {name: value for name, value in locals().items() if name != "out"}
    check_writable(out)
    adata, vectors = simulate(**options)
    with written_aside(out) as aside:
        adata.write_h5ad(aside, compression="gzip")
    zeros = 100 * (1 - adata.X.nnz / (num_cells * num_genes))
    logger.info("%s: %d cells x %d genes, %.0f %% zeros, largest count %d", out, *adata.shape, zeros, adata.X.max())
    if vectors:
        table = out.with_name(f"{out.name.removesuffix('.h5ad')}.perturbations.safetensors")
        with written_aside(table) as aside:
            save_file(vectors, aside)
        logger.info("%s: %d vectors of length %d", table, len(vectors), vector_dim)


def _programme_loadings(num_genes: int, rng: np.random.Generator) -> np.ndarray:
    """(num_genes, 6) log-scale loadings: most genes in one programme, some in two, a few in none."""
    loadings = np.zeros((num_genes, NUM_PROGRAMMES))
    for share in (0.9, 0.3):
        programme = rng.integers(NUM_PROGRAMMES, size=num_genes)
        strength = LOADING * rng.uniform(0.5, 1.2, num_genes) * rng.choice([-1, 1], num_genes, p=[0.25, 0.75])
        loadings[np.arange(num_genes), programme] += strength * (rng.random(num_genes) < share)
    return loadings


def _vectors_and_shifts(num: int, dim: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(num, dim) float32 vectors, and the (num, 6) programme shifts that a fixed linear map makes of them."""
    rank = min(VECTOR_RANK, dim)
    plane = rng.normal(0, 1, (rank, dim))
    weights = rng.normal(0, EFFECT_SD, (rank, NUM_PROGRAMMES)) / np.sqrt(rank)
    factors = rng.normal(0, 1, (num, rank))
    vectors = (factors @ plane).astype(np.float32)
    return vectors, vectors @ (np.linalg.pinv(plane) @ weights)


def _assign_conditions(
    num_cells: int, num_cell_types: int, num_labels: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(num_cells,) cell type and (num_cells,) label of each cell; label 0 is the control and the largest.

    Every condition has one cell or more; the others differ in size by up to about two.
    """
    weights = rng.uniform(0.7, 1.4, (num_cell_types, num_labels))
    if num_labels > 1:
        weights[:, 0] = weights[:, 1:].max(axis=1) + CONTROL_SHARE / (1 - CONTROL_SHARE) * weights[:, 1:].sum(axis=1)
    expected = (weights / weights.sum()).ravel() * (num_cells - weights.size)
    sizes = 1 + np.floor(expected).astype(np.int64)
    left = num_cells - sizes.sum()
    sizes[np.argsort(-(expected % 1), kind="stable")[:left]] += 1
    condition = rng.permutation(np.repeat(np.arange(weights.size), sizes))
    return condition // num_labels, condition % num_labels


def _draw_counts(log_level: np.ndarray, rng: np.random.Generator) -> sparse.csr_matrix:
    """Negative-binomial counts (cells, genes) whose expected total follows a log-normal library size."""
    num_cells, num_genes = log_level.shape
    share = np.exp(log_level - log_level.max(axis=1, keepdims=True))
    share /= share.sum(axis=1, keepdims=True)
    sd = np.sqrt(np.log1p(LIBRARY_SIZE_CV**2))
    library = COUNTS_PER_GENE * num_genes * rng.lognormal(-(sd**2) / 2, sd, (num_cells, 1))
    rate = rng.gamma(DISPERSION, share * library / DISPERSION)
    return sparse.csr_matrix(rng.poisson(rate).astype(np.int32))


cli = partial(run, main)

if __name__ == "__main__":
    cli()
