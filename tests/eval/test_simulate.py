"""What the simulated cells must be: reproducible, like real ones, and true to what is written beside them."""

import anndata
import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from eval.simulate import CONTROL, main, simulate


@pytest.fixture(scope="module")
def simulated():
    return simulate()


def test_counts_look_like_cells(simulated):
    adata, _ = simulated
    assert adata.shape == (4000, 200)
    assert adata.X.dtype == np.int32
    assert 0.6 < 1 - adata.X.nnz / np.prod(adata.shape) < 0.9
    sizes = np.asarray(adata.X.sum(axis=1)).ravel()
    assert 0.3 < sizes.std() / sizes.mean() < 0.5
    means = np.asarray(adata.X.mean(axis=0)).ravel()
    assert means.max() > 20 * np.median(means)  # a few loud genes


def test_programmes_make_genes_correlate(simulated):
    """Genes that share a programme correlate, in the direction of their loadings, among control cells of one type."""
    adata, _ = simulated
    chosen = (adata.obs["perturbation"] == CONTROL) & (adata.obs["cell_type"] == "type0")
    cells = np.log1p(adata[chosen].X.toarray())
    expressed = np.flatnonzero(cells.mean(axis=0) > 0.5)
    loadings = adata.varm["programme_loadings"][expressed]
    upper = np.triu_indices(expressed.size, k=1)
    shared = (loadings @ loadings.T)[upper]
    correlation = np.corrcoef(cells[:, expressed].T)[upper]
    assert correlation[shared > 0.3].mean() > 0.2
    assert np.corrcoef(shared, correlation)[0, 1] > 0.6


def test_every_condition_is_there_controls_are_largest_and_sizes_differ(simulated):
    adata, vectors = simulated
    sizes = adata.obs.groupby(["cell_type", "perturbation"], observed=True).size()
    assert sizes.size == 3 * (1 + 8 + 3)
    assert sizes.nunique() > 5
    for cell_type in adata.obs["cell_type"].unique():
        assert sizes[cell_type].idxmax() == CONTROL
    labels = set(adata.obs["perturbation"]) - {CONTROL}
    assert {name for label in labels for name in label.split("+")} == set(vectors) <= set(adata.var_names)
    assert adata.uns["dcm_conditions"] == ["cell_type", "perturbation"]
    assert adata.uns["dcm_control"] == CONTROL


def test_a_perturbation_knocks_its_target_down(simulated):
    adata, vectors = simulated
    control = adata[adata.obs["perturbation"] == CONTROL]
    for name in vectors:
        perturbed = adata[adata.obs["perturbation"] == name]
        assert perturbed[:, name].X.mean() < 0.6 * control[:, name].X.mean()


def test_shifts_are_one_linear_map_of_the_vectors_and_pairs_add(simulated):
    adata, vectors = simulated
    shifts = adata.uns["simulation"]["programme_shift"]
    names = list(vectors)
    table, shift = np.stack([vectors[n] for n in names]).astype(float), np.stack([shifts[n] for n in names])
    learned = np.linalg.pinv(table[:6], rcond=1e-4) @ shift[:6]
    assert table[6:] @ learned == pytest.approx(shift[6:], abs=1e-4)  # two held-out perturbations

    activity = pd.DataFrame(adata.obsm["programme_activity"]).groupby(adata.obs["perturbation"].to_numpy()).mean()
    pair = next(label for label in activity.index if "+" in label)
    expected = sum(shifts[name] for name in pair.split("+"))
    assert (activity.loc[pair] - activity.loc[CONTROL]).to_numpy() == pytest.approx(expected, abs=0.35)


def test_main_writes_the_cells_and_the_table_beside_them(tmp_path):
    out = tmp_path / "cells.h5ad"
    main(out, num_cells=200, num_genes=30, num_perturbations=3, num_pairs=1, vector_dim=5)
    sizes = {"num_cells": 200, "num_genes": 30, "num_perturbations": 3, "num_pairs": 1, "vector_dim": 5}
    (adata, vectors), (other, _) = (simulate(**sizes, seed=seed) for seed in (0, 1))
    assert (adata.X != other.X).nnz > 0
    written, table = anndata.read_h5ad(out), load_file(tmp_path / "cells.perturbations.safetensors")
    assert (written.X != adata.X).nnz == 0
    assert written.obs["perturbation"].tolist() == adata.obs["perturbation"].tolist()
    assert list(written.uns["dcm_conditions"]) == ["cell_type", "perturbation"]
    assert {name: vector.tolist() for name, vector in table.items()} == {n: v.tolist() for n, v in vectors.items()}
    assert all(vector.dtype == np.float32 and vector.shape == (5,) for vector in table.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cells.h5ad", "cells.perturbations.safetensors"]
    plain = tmp_path / "plain" / "cells.h5ad"  # without perturbations: neither column nor table
    plain.parent.mkdir()
    main(plain, num_cells=50, num_genes=10, num_perturbations=0, num_pairs=0)
    assert "perturbation" not in anndata.read_h5ad(plain).obs
    assert [path.name for path in plain.parent.iterdir()] == ["cells.h5ad"]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_genes": 1}, "num_genes=1: expected 2 or more"),
        ({"num_perturbations": 300}, "num_perturbations=300: expected 0 to num_genes=200"),
        ({"num_perturbations": 2, "num_pairs": 3}, "num_pairs=3: expected 0 to 1, pairs of perturbations"),
        ({"num_cells": 35}, "num_cells=35: expected one or more for each of the 36 conditions"),
    ],
)
def test_impossible_sizes_are_refused(sizes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        main(tmp_path / "cells.h5ad", **sizes)
    assert not list(tmp_path.iterdir())
