"""Properties of the scoring stage: which numbers are written, under which names, and what is refused.

Letters: N cells, G genes of the panel.
"""

import logging
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from eval.score import main
from modeling_dcm import DCMForDenoising
from tokenization import DCMTokenizer
from training.data import command_line, h5ad

GENES = [f"g{index}" for index in range(7)]
GIVEN = "_given_library_size"
COLUMNS = ["dcm_elbo", "dcm_elbo_per_gene", "dcm_elbo_error"]


def save(model: DCMForDenoising, folder: Path) -> str:
    """A checkpoint of a tiny model, with a tokenizer that fits it."""
    conditioned = {
        "cell_types": ["hepg2", "k562", "rpe1"],
        "perturbations": ["control", "g1", "g2", "g5"],
        "control": "control",
        "covariates": {"donor": ["d1", "d2"], "day": ["0", "1", "2"]},
    }
    labels = conditioned if model.config.num_cell_types else {}
    model.save_pretrained(folder)
    DCMTokenizer(genes=GENES, max_count=4, **labels).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(make_model, tmp_path_factory) -> str:
    """A model with every condition."""
    return save(make_model("latent", conditioned=True), tmp_path_factory.mktemp("scored") / "checkpoint")


@pytest.fixture(scope="module")
def plain(make_model, tmp_path_factory) -> str:
    """A model without conditions."""
    return save(make_model("latent"), tmp_path_factory.mktemp("scored") / "plain")


def measured_cells(num_cells: int = 20) -> anndata.AnnData:
    """Cells with every condition, all genes of the panel in another order, and two others."""
    rng = np.random.default_rng(0)
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(rng.choice(["hepg2", "k562", "rpe1"], num_cells)),
            "perturbation": rng.choice(["control", "g1", "g1+g5"], num_cells),
            "donor": pd.Categorical(rng.choice(["d1", "d2"], num_cells)),
            "day": rng.integers(0, 3, num_cells),
            "quality": rng.random(num_cells),
        },
        index=[f"cell{index}" for index in range(num_cells)],
    )
    names = ["g6", "other", "g0", "g1", "g2", "g5", "another", "g4", "g3"]
    var = pd.DataFrame({"length": range(9)}, index=names)
    counts = sparse.csr_matrix(rng.integers(0, 5, (num_cells, 9)).astype(np.float32))
    cells = anndata.AnnData(counts, obs=obs, var=var, uns={"source": "a test"})
    cells.layers["log"], cells.obsm["X_pca"] = counts.log1p(), rng.random((num_cells, 2))
    cells.raw = cells
    return cells


def written(cells: anndata.AnnData, path: Path) -> Path:
    cells.write_h5ad(path)
    return path


@pytest.fixture
def file(tmp_path) -> Path:
    return written(measured_cells(), tmp_path / "cells.h5ad")


def scored(checkpoint: str, file: Path, **options) -> anndata.AnnData:
    out = file.with_name("scored.h5ad")
    return anndata.read_h5ad(main(checkpoint, file, out=out, **options))


def of_two_panels(cells: anndata.AnnData, lacking: list[str]) -> anndata.AnnData:
    """Every second cell is of a panel without some genes; whatever stands there was not measured."""
    cells.obs["panel"] = pd.Categorical(["all", "few"] * (len(cells) // 2))
    cells.uns["dcm_panels"] = {"all": np.ones(cells.n_vars, bool), "few": ~cells.var_names.isin(lacking)}
    return cells


def test_scores_are_the_models_bound_and_embedding_of_each_cell_under_its_conditions(checkpoint, file):
    model, tokenizer = DCMForDenoising.from_pretrained(checkpoint), DCMTokenizer.from_pretrained(checkpoint)
    batch = dict(tokenizer(anndata.read_h5ad(file)))
    batch["library_size"] = batch["library_size"].float()
    out = scored(checkpoint, file, num_samples=16, batch_size=20)
    elbo, error = out.obs["dcm_elbo" + GIVEN], out.obs["dcm_elbo_error" + GIVEN]
    expected, its_error = (
        values.numpy() for values in model.log_likelihood(**batch, num_samples=32, seed=9, return_error=True)
    )
    assert np.all(np.abs(elbo - expected) < 5 * np.hypot(error, its_error))
    np.testing.assert_allclose(out.obs["dcm_elbo_per_gene" + GIVEN], elbo / 7)
    np.testing.assert_allclose(out.obsm["X_dcm"], model.embed(**batch).numpy(), rtol=1e-4, atol=1e-4)
    assert out.obsm["X_dcm"].dtype == np.float32


def test_everything_else_of_the_file_stays_as_it_is_also_genes_of_others(checkpoint, file, caplog):
    out, before = scored(checkpoint, file, num_samples=2), anndata.read_h5ad(file)
    pd.testing.assert_frame_equal(out.obs.drop(columns=[name + GIVEN for name in COLUMNS]), before.obs)
    pd.testing.assert_frame_equal(out.var, before.var)
    assert set(out.uns) - {"dcm_score" + GIVEN} == {"source"}
    np.testing.assert_array_equal(out.obsm["X_pca"], before.obsm["X_pca"])
    for matrix, expected in ((out.X, before.X), (out.layers["log"], before.layers["log"]), (out.raw.X, before.raw.X)):
        assert matrix.dtype == expected.dtype
        assert (matrix != expected).nnz == 0
    assert "cells.h5ad: 2 genes are unknown to the model and left out" in caplog.text


def test_a_bound_given_the_library_size_and_one_without_it_have_different_names_and_stand_side_by_side(
    checkpoint, file
):
    first = file.with_name("first.h5ad")
    main(checkpoint, file, out=first, num_samples=2)
    out = scored(checkpoint, first, num_samples=2, library_size="null")
    assert set(COLUMNS) | {name + GIVEN for name in COLUMNS} <= set(out.obs)
    assert out.uns["dcm_score"]["library_size"] == "null"
    assert out.uns["dcm_score" + GIVEN]["library_size"] == "conditioned"
    assert not np.allclose(out.obs["dcm_elbo"], out.obs["dcm_elbo" + GIVEN])


def test_the_same_seed_gives_the_same_numbers_in_place_and_another_seed_others(plain, file):
    torch.manual_seed(0)
    before, numbers = torch.get_rng_state(), []
    for seed in (3, 3, 4):
        main(plain, file, out=file, num_samples=2, seed=seed)  # in place: earlier scores are replaced
        cells = anndata.read_h5ad(file)
        assert cells.uns["dcm_score"]["seed"] == seed
        assert cells.obs.columns.is_unique
        numbers.append(cells.obs["dcm_elbo"].to_numpy())
    assert np.array_equal(numbers[0], numbers[1])
    assert not np.array_equal(numbers[0], numbers[2])
    assert torch.equal(torch.get_rng_state(), before)  # of everybody else


@pytest.mark.parametrize("stored", [np.asarray, sparse.csc_matrix, sparse.csr_matrix, np.float16])
def test_scores_do_not_depend_on_how_and_where_counts_are_stored(plain, tmp_path, stored, monkeypatch):
    cells = measured_cells()
    expected = scored(plain, written(cells, tmp_path / "cells.h5ad"), num_samples=2).obs["dcm_elbo"]
    monkeypatch.setattr(h5ad, "BLOCK_VALUES", 1)  # a cell at a time
    cells.X = stored(cells.X.toarray())
    in_x = written(cells, tmp_path / "x.h5ad")
    in_raw = written(
        anndata.AnnData(cells.X * 0.5, cells.obs, cells.var, raw=cells.raw.to_adata()), tmp_path / "r.h5ad"
    )
    cells.layers["counts"], cells.X, cells.raw = cells.X, None, None
    in_layer = written(cells, tmp_path / "layer.h5ad")
    for file, layer in ((in_x, None), (in_raw, "raw"), (in_layer, "counts")):
        found = scored(plain, file, num_samples=2, layer=layer).obs["dcm_elbo"]
        np.testing.assert_allclose(found, expected)


def test_genes_that_were_not_measured_do_not_count_and_the_library_size_is_then_not_given(checkpoint, tmp_path, caplog):
    cells = measured_cells()
    file = written(cells[:, ~cells.var_names.isin(["g2", "g6"])].copy(), tmp_path / "cells.h5ad")
    out = scored(checkpoint, file, num_samples=2)
    assert "cells.h5ad lacks 2 of the model's 7 genes (g2, g6)" in caplog.text
    assert "2 were not measured: it is not given, as with --library-size null" in caplog.text
    assert out.uns["dcm_score"]["library_size"] == "null"
    assert out.uns["dcm_score"]["num_genes"] == 5
    np.testing.assert_allclose(out.obs["dcm_elbo_per_gene"], out.obs["dcm_elbo"] / 5)
    assert "dcm_elbo" + GIVEN not in out.obs
    with pytest.raises(
        ValueError, match=r"--library-size conditioned: .*2 were not measured; pass --library-size null"
    ):
        scored(checkpoint, file, library_size="conditioned")


def test_a_model_that_knows_no_library_size_says_so(plain, file):
    out = scored(plain, file, num_samples=2)
    assert out.uns["dcm_score"]["library_size"] == "none"
    assert "dcm_elbo" in out.obs
    with pytest.raises(ValueError, match="this model was trained without library sizes; leave it out"):
        scored(plain, file, library_size="conditioned")


def test_a_condition_without_column_or_label_is_not_given_and_that_is_said(checkpoint, tmp_path, caplog):
    cells = measured_cells()
    cells.obs = cells.obs.drop(columns="donor")
    cells.obs.loc[cells.obs_names[:3], "cell_type"] = np.nan
    out = scored(checkpoint, written(cells, tmp_path / "cells.h5ad"), num_samples=2)
    assert "cells.h5ad has no obs column 'donor': the model is not told the donor" in caplog.text
    assert "cells.h5ad: 3 cells have no label in obs['cell_type']: not given" in caplog.text
    assert out.uns["dcm_score" + GIVEN]["conditions"].tolist() == ["cell_type", "perturbation", "day"]


def test_counts_above_the_largest_are_clipped_for_the_model_with_one_warning(plain, tmp_path, caplog):
    cells = measured_cells()
    clipped = written(cells, tmp_path / "clipped.h5ad")
    expected = scored(plain, clipped, num_samples=2, batch_size=4).obs["dcm_elbo"]
    fours = cells.X.toarray() == 4
    cells.X = sparse.csr_matrix(np.where(fours, 400, cells.X.toarray()))
    caplog.clear()
    found = scored(plain, written(cells, tmp_path / "loud.h5ad"), num_samples=2, batch_size=4).obs["dcm_elbo"]
    np.testing.assert_allclose(found, expected)
    loud = int(fours[:, cells.var_names.isin(GENES)].sum())
    assert caplog.text.count("above") == 1
    assert f"loud.h5ad: {loud} counts are above the model's largest, 4 (up to 400): it sees 4 there" in caplog.text


def renamed(cells: anndata.AnnData, *names: str) -> anndata.AnnData:
    cells.var_names = [*names, *(f"ENSG{index}" for index in range(9 - len(names)))]
    return cells


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cells: cells[:0].copy(), "has 0 cells and 9 genes; expected some of both"),
        (renamed, r"none of the 9 genes of 'cells.h5ad' .* is known to the model"),
        (lambda cells: renamed(cells, "g1", "g1", *GENES), r"'cells.h5ad' has 1 genes twice \(g1\); sum or drop"),
        (lambda cells: cells.obs.insert(0, "cell_type", "k561"), r"unknown cell_type 'k561'; near matches: 'k562'"),
        (
            lambda cells: of_two_panels(cells, ["g0"])[:, :8].copy(),
            r"uns\['dcm_panels'\] is of \[9\] genes, the file has 8",
        ),
        (
            lambda cells: of_two_panels(cells, ["g0"]).obs.pop("panel"),
            r"obs\['panel'\] must name one of all, few .* but it is not there",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_nothing_is_written(checkpoint, tmp_path, change, message):
    cells = measured_cells()
    del cells.obs["cell_type"]
    other = change(cells)
    file = written(other if isinstance(other, anndata.AnnData) else cells, tmp_path / "cells.h5ad")
    with pytest.raises(ValueError, match=message):
        scored(checkpoint, file)
    assert not file.with_name("scored.h5ad").exists()


def test_progress_is_a_line_every_half_minute_where_there_is_no_terminal(monkeypatch, caplog):
    now = [0]
    monkeypatch.setattr(command_line.time, "monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO), command_line.ProgressReport(100, task="scoring", unit="cells") as report:
        for now[0] in (10, 32, 40):
            report.update(20)
    assert [record.message for record in caplog.records] == ["scoring: 40 of 100 cells, 1.25 per second, 48 s left"]


def test_what_was_not_measured_in_a_cell_is_no_count(checkpoint, tmp_path, caplog):
    cells = of_two_panels(measured_cells(), ["g0", "g2", "g5"])
    zeros, junk = cells.copy(), cells.copy()
    unmeasured = np.ix_(np.arange(1, 20, 2), cells.var_names.isin(["g0", "g2", "g5"]))
    for other, value in ((zeros, 0), (junk, 3)):
        dense = other.X.toarray()
        dense[unmeasured] = value
        other.X = sparse.csr_matrix(dense)
    a, b = (
        scored(checkpoint, written(other, tmp_path / "cells.h5ad"), num_samples=4).copy() for other in (zeros, junk)
    )
    pd.testing.assert_frame_equal(a.obs, b.obs)
    np.testing.assert_array_equal(a.obsm["X_dcm"], b.obsm["X_dcm"])
    np.testing.assert_allclose(a.obs["dcm_elbo"] / a.obs["dcm_elbo_per_gene"], [7, 4] * 10)
    assert a.uns["dcm_score"]["num_genes"].tolist() == [4, 7]
    assert "4 of the model's 7 genes were measured in every cell" in caplog.text
    assert "3 were not measured in every cell: it is not given" in caplog.text
