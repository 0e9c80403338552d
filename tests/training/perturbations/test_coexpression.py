"""Vectors of genes from training controls, against scikit-learn's principal components."""

import anndata
import numpy as np
import pytest
from sklearn.decomposition import PCA

from training.data.loader import Cells
from training.perturbations.coexpression import coexpression_vectors


def test_coexpression_is_the_loadings_of_a_principal_component_analysis_of_the_training_controls(shards):
    train = anndata.read_h5ad(shards / "train.h5ad")
    controls = train[train.obs["perturbation"] == "control"]
    counts = controls.X.toarray().astype(float)
    logs = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
    for cell_type in controls.obs["cell_type"].unique():
        of_type = (controls.obs["cell_type"] == cell_type).to_numpy()
        logs[of_type] -= logs[of_type].mean(axis=0)
    oracle = PCA(5, svd_solver="full").fit(logs)
    expected = oracle.components_.T * np.sqrt(oracle.explained_variance_)
    expected *= np.sign(expected[np.abs(expected).argmax(axis=0), range(5)])
    expressed = counts.any(axis=0)
    expected = expected[expressed] / np.sqrt((expected[expressed] ** 2).mean())
    vectors = coexpression_vectors(Cells(shards, "train"), 5)
    assert list(vectors) == list(train.var_names[expressed])
    assert np.allclose(list(vectors.values()), expected, atol=1e-4)


def test_coexpression_of_held_out_cells_and_too_many_components_are_refused(shards):
    with pytest.raises(ValueError, match="coexpression of the test split; expected train: other cells are held out"):
        coexpression_vectors(Cells(shards, "test"), 5)
    with pytest.raises(ValueError, match="components is 15; expected 1 to 14"):
        coexpression_vectors(Cells(shards, "train"), 15)
