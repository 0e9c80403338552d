"""Statistics of training cells: what a recount of them gives, in any vocabulary, exact beyond 2^24 cells."""

import shutil
from pathlib import Path

import anndata
import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from modeling_dcm.conditioning_dcm import ANY
from tests.training.test_convert_h5ad import KEYS, made_up
from tokenization import DCMTokenizer
from training.convert_h5ad import main
from training.data.loader import Cells, open_cells
from training.data.statistics import STATISTICS, _quantiles, library_size_quantiles, read_statistics

CELL_TYPES = ["rpe1", "hela", "k562"]  # those of the shards in another order, and one more
PERTURBATIONS = ["g3", "new", "g2", "g1", "control"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Shards of two files, the second without three genes, with some large counts."""
    folder = tmp_path_factory.mktemp("statistics")
    cells = made_up(n=1500)
    cells.X.data[::500] = np.arange(len(cells.X.data[::500])) % 7 * 100
    cells.X.eliminate_zeros()
    cells[:800].copy().write_h5ad(folder / "a.h5ad")
    cells[800:, :27].copy().write_h5ad(folder / "b.h5ad")
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    yield main((folder / "a.h5ad", folder / "b.h5ad"), out=folder / "shards", join="union", **KEYS)
    patch.undo()


@pytest.fixture(scope="module")
def renamed(folder) -> DCMTokenizer:
    """The shards' vocabulary with labels in another order, more of them, and larger counts."""
    old = DCMTokenizer.from_pretrained(folder / "tokenizer")
    return DCMTokenizer(
        genes=old.genes[::-1],
        max_count=old.max_count + 10,
        cell_types=CELL_TYPES,
        perturbations=PERTURBATIONS,
        control="control",
        covariates={"donor": ["2", "1"]},
        separator="+",
    )


@pytest.fixture(scope="module")
def table(folder) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Counts of the training cells, NaN where not measured, and their annotations."""
    train = anndata.read_h5ad(folder / "train.h5ad")
    counts = train.to_df().astype(float)
    counts.loc[train.obs["source_file"] == "b", ["g27", "g28", "g29"]] = np.nan
    return counts, train.obs


def test_the_histogram_counts_the_cells_that_measured_a_gene(folder, renamed, table):
    histogram = read_statistics(folder).histogram(renamed)
    assert histogram.shape == (30, renamed.max_count + 1)
    assert histogram[:, 256:].sum() > 3  # larger counts are kept in another way
    for gene, row in zip(renamed.genes, histogram):
        values = table[0][gene].dropna().astype(int)
        assert row.tolist() == np.bincount(values, minlength=len(row)).tolist()


def test_counts_in_bins_are_added_up(folder):
    old = DCMTokenizer.from_pretrained(folder / "tokenizer")
    binned = DCMTokenizer(genes=old.genes, max_count=old.max_count, count_bins=[3, 10])
    whole, bins = read_statistics(folder).histogram(old), read_statistics(folder).histogram(binned)
    assert np.array_equal(np.add.reduceat(whole, [0, 1, 2, 3, 10], axis=1), bins)


def test_totals_of_cell_types_are_found_by_name(folder, renamed, table):
    counts, obs = table
    gene_mean = np.arange(30.0)
    totals, num_cells = read_statistics(folder).cell_type_totals(renamed, gene_mean)
    assert num_cells.tolist() == [(obs["cell_type"] == name).sum() for name in CELL_TYPES]
    for row, name in zip(totals, CELL_TYPES):
        here = counts.loc[obs["cell_type"] == name, renamed.genes]
        np.testing.assert_allclose(row, 0 if here.empty else here.mean() * len(here), rtol=1e-12)


def test_library_sizes_of_groups_are_found_by_name(folder, renamed, table):
    """As counted anew from the column of the shards, in the other vocabulary."""
    statistics, cells = read_statistics(folder), Cells(folder, "train")
    gene_mean = table[0].mean().to_numpy().astype(np.float32)
    conditions = {
        "cell_type_ids": renamed.cell_type_ids(cells.labels("cell_type")).numpy(),
        "perturbation_ids": renamed.perturbation_ids(cells.labels("perturbation")).numpy(),
        "covariate_ids": renamed.covariate_ids({"donor": cells.labels("donor")}).numpy(),
    }
    sizes = cells.library_size.numpy()
    expected = library_size_quantiles(sizes, conditions, cells.panel, cells.measured, gene_mean)
    found = statistics.library_sizes(renamed)
    assert all(np.array_equal(*pair) for pair in zip(found, expected))
    assert (found[0][:, -1] >= 0).any()  # a combination
    logs = np.log1p(sizes)
    assert statistics.tensors["library_size.log_mean"] == pytest.approx(logs.mean())
    assert statistics.tensors["library_size.log_std"] == pytest.approx(logs.std())
    fewer = DCMTokenizer(genes=renamed.genes, max_count=99, cell_types=CELL_TYPES)
    assert statistics.library_sizes(fewer) is None


def test_groups_of_library_sizes_are_torchs_quantiles_and_small_ones_fall_back():
    rng = np.random.default_rng(0)
    types, perturbations = rng.integers(0, 2, 500), rng.choice([0, 1, 2], 500, p=[0.5, 0.45, 0.05])
    sizes = rng.poisson(1000, 500)
    conditions = {"cell_type_ids": types, "perturbation_ids": perturbations[:, None]}
    one = np.ones((1, 4), dtype=bool)
    keys, quantiles = library_size_quantiles(sizes, conditions, np.zeros(500, dtype=int), one, np.ones(4))
    assert keys.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, ANY], [1, ANY], [ANY, ANY]]
    steps = torch.linspace(0, 1, quantiles.shape[1], dtype=torch.float64)
    for (cell_type, perturbation), row in zip(keys, quantiles):
        here = np.isin(types, cell_type if cell_type != ANY else types)
        here &= np.isin(perturbations, perturbation if perturbation != ANY else perturbations)
        assert torch.equal(torch.quantile(torch.from_numpy(sizes[here]).double(), steps).float(), torch.tensor(row))


def test_quantiles_are_exact_beyond_the_cells_that_torch_can_sort():
    values = np.arange(2**24 + 65)
    row = _quantiles(values, np.array([0]), np.array([len(values)]))[0]
    assert row.tolist() == np.linspace(0, len(values) - 1, len(row)).astype(np.float32).tolist()


def test_shards_of_an_older_conversion_are_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "shards")
    (copy / STATISTICS).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"statistics.safetensors' is damaged .*: copy it again, or convert again"):
        read_statistics(copy)
    (copy / STATISTICS).unlink()
    with pytest.raises(ValueError, match=r"no statistics.safetensors in .*: an older dcm-convert .*; convert again"):
        read_statistics(copy)
    for file in (copy / "train").glob("*.parquet"):
        pq.write_table(pq.read_table(file).drop_columns(["library_size"]), file)
    for streaming in (False, True):
        with pytest.raises(ValueError, match="no column 'library_size': an older dcm-convert wrote them; convert"):
            open_cells(copy, "train", streaming=streaming)
