"""Properties of library sizes read from a file: the panel's totals, however the counts are stored."""

import anndata
import numpy as np
import pytest
from scipy import sparse

from eval.drawing.measured import library_sizes_of
from training.data import h5ad

GENES = ["a", "b", "c"]
COUNTS = np.array([[5, 1, 0, 2], [0, 0, 0, 9], [7, 3, 4, 0]])
NAMES = ["other", "c", "a", "b"]


@pytest.fixture
def write(tmp_path):
    """Write a file of counts, in ``X`` or in a layer, and return its path."""

    def written(matrix, names=NAMES, layer=None):
        cells = anndata.AnnData(matrix if layer is None else np.log1p(COUNTS))
        cells.var_names = names
        if layer is not None:
            cells.layers[layer] = matrix
        cells.write_h5ad(tmp_path / "cells.h5ad")
        return tmp_path / "cells.h5ad"

    return written


@pytest.mark.parametrize("stored", [sparse.csr_matrix, sparse.csc_matrix, np.asarray])
@pytest.mark.parametrize("block_values", [1, 2**20])
def test_library_sizes_are_the_totals_over_the_panel_whatever_the_storage(write, monkeypatch, stored, block_values):
    monkeypatch.setattr(h5ad, "BLOCK_VALUES", block_values)
    monkeypatch.setattr(h5ad, "BLOCK_STORED", block_values)
    assert library_sizes_of(write(stored(COUNTS)), GENES).tolist() == [3, 9, 7]
    assert library_sizes_of(write(stored(COUNTS), layer="counts"), GENES, "counts").tolist() == [3, 9, 7]


def test_a_missing_gene_would_make_the_total_too_small_and_is_refused(write):
    with pytest.raises(ValueError, match=r"lacks 2 of the panel's 4 genes \(d, e\)"):
        library_sizes_of(write(COUNTS), ["a", "d", "b", "e"])
