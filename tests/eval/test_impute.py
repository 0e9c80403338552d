"""Properties of completing cells: what is kept, what is filled, and that what is filled is calibrated.

The calibration test knows the truth: cells of a mixture of states, in each of which genes are independent Poisson
counts, so that the distribution of hidden genes given the others is exact. Letters: N cells, G genes, K largest count,
D draws, S states.
"""

import math
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse, stats

from eval.impute import MaskedEntries, main, weighted_correlation
from modeling_dcm import DCMForDenoising
from modeling_dcm.diffusion_dcm import keyed_generator, mask_counts, num_masked, stratified_uniform
from tokenization import DCMTokenizer

GENES = [f"g{index}" for index in range(7)]
K = 4


@pytest.fixture(scope="module")
def checkpoint(make_model, tmp_path_factory) -> str:
    """A tiny model with cell types and library sizes."""
    folder = tmp_path_factory.mktemp("imputed") / "checkpoint"
    make_model("latent", num_cell_types=2, library_size_conditioning=True).save_pretrained(folder)
    DCMTokenizer(genes=GENES, max_count=K, cell_types=["a", "b"]).save_pretrained(folder)
    return str(folder)


def measured_cells(genes: list[str], num_cells: int = 12) -> anndata.AnnData:
    rng = np.random.default_rng(0)
    obs = pd.DataFrame({"cell_type": rng.choice(["a", "b"], num_cells), "quality": rng.random(num_cells)})
    obs.index = [f"cell{index}" for index in range(num_cells)]
    counts = sparse.csr_matrix(rng.integers(0, K + 1, (num_cells, len(genes))).astype(np.float32))
    cells = anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=genes), uns={"source": "a test"})
    cells.obsm["X_pca"] = rng.random((num_cells, 2))
    return cells


def completed(checkpoint: str, cells: anndata.AnnData, folder: Path, **options) -> anndata.AnnData:
    cells.write_h5ad(folder / "cells.h5ad")
    options = {"draws": 2, "steps": 2, "batch_size": 5, **options}
    return anndata.read_h5ad(main(checkpoint, folder / "cells.h5ad", out=folder / "complete.h5ad", **options))


def test_counts_and_annotations_are_kept_and_missing_genes_filled_in_the_models_order(checkpoint, tmp_path, caplog):
    cells = measured_cells(["g5", "other", "g0", "g3"])
    cells.X = sparse.csr_matrix(np.vstack([[900, 1, 0, 2], cells.X.toarray()[1:]]))  # 900: above the model's largest
    out = completed(checkpoint, cells, tmp_path, seed=3)
    assert list(out.var_names) == GENES
    assert out.var["measured"].tolist() == [gene in ("g0", "g3", "g5") for gene in GENES]
    given = ["g0", "g3", "g5"]
    assert np.issubdtype(out.X.dtype, np.integer)
    for matrix in (out[:, given].X, out[:, given].layers["posterior_mean"]):
        np.testing.assert_array_equal(matrix.toarray(), cells[:, given].X.toarray())
    filled = out[:, ~out.var["measured"].to_numpy()]
    assert filled.X.max() <= K
    np.testing.assert_array_equal(out.layers["imputed"].toarray(), np.tile(~out.var["measured"], (12, 1)))
    assert "cells.h5ad lacks 4 of the model's 7 genes (g1, g2, g4, g6)" in caplog.text
    assert "cells.h5ad: 1 genes are unknown to the model and left out" in caplog.text
    assert "original" not in out.layers
    pd.testing.assert_frame_equal(out.obs.astype(str), cells.obs.astype(str))
    np.testing.assert_array_equal(out.obsm["X_pca"], cells.obsm["X_pca"])
    assert out.uns["source"] == "a test"
    assert out.uns["dcm_conditions"].tolist() == ["cell_type"]
    assert out.uns["dcm_imputation"].items() >= {"draws": 2, "steps": 2, "seed": 3}.items()


def test_genes_that_were_not_measured_in_some_cells_are_filled_there(checkpoint, tmp_path):
    cells = measured_cells(GENES)
    cells.obs["panel"] = ["few", "all"] * 6
    few = np.isin(GENES, ["g0", "g3", "g5"])
    cells.uns["dcm_panels"] = {"all": np.ones(7, bool), "few": few}
    out = completed(checkpoint, cells, tmp_path)
    filled = np.zeros((12, 7), bool)
    filled[::2] = ~few
    np.testing.assert_array_equal(out.layers["imputed"].toarray(), filled)
    np.testing.assert_array_equal(out.X.toarray()[~filled], cells.X.toarray()[~filled])
    assert out.var["measured"].tolist() == few.tolist()
    assert "dcm_panels" not in out.uns
    hidden = completed(checkpoint, cells, tmp_path, mask_fraction=0.4).layers["imputed"].toarray().sum(axis=1)
    assert hidden.tolist() == [4 + 1, 3] * 6


def test_posterior_mean_and_variance_are_those_of_the_draws_and_x_is_the_first(checkpoint, tmp_path):
    out = completed(checkpoint, measured_cells(GENES[:4]), tmp_path)
    first, mean, variance = (
        matrix.toarray() for matrix in (out.X, out.layers["posterior_mean"], out.layers["posterior_variance"])
    )
    second = 2 * mean - first
    assert np.isin(second, range(K + 1)).all()
    assert not np.array_equal(first, second)
    np.testing.assert_allclose(variance, (first - second) ** 2 / 2)
    assert not variance[:, :4].any()
    assert mean.dtype == variance.dtype == np.float32


def test_a_fraction_of_each_cells_measured_genes_is_masked_and_the_truth_kept(checkpoint, tmp_path):
    cells = measured_cells(GENES)
    out = completed(checkpoint, cells, tmp_path, mask_fraction=0.4)
    hidden = out.layers["imputed"].toarray() == 1
    assert set(hidden.sum(axis=1)) == {3}  # of 7
    assert len({tuple(row) for row in hidden.tolist()}) > 1
    np.testing.assert_array_equal(out.layers["original"].toarray(), cells.X.toarray())
    np.testing.assert_array_equal(out.X.toarray()[~hidden], cells.X.toarray()[~hidden])
    assert out.uns["dcm_imputation"]["masked"]["entries"] == 36
    cells.X = sparse.csr_matrix(
        np.where(hidden, K - cells.X.toarray(), cells.X.toarray())
    )  # what is masked is not seen
    again = completed(checkpoint, cells, tmp_path, mask_fraction=0.4)
    np.testing.assert_array_equal(again.X.toarray(), out.X.toarray())
    other = completed(checkpoint, cells, tmp_path, mask_fraction=0.4, seed=1)
    assert not np.array_equal(other.layers["imputed"].toarray() == 1, hidden)


def test_binned_counts_are_filled_with_counts_and_not_with_ids(make_model, tmp_path):
    model = make_model("latent", max_count=40, count_bins=[2, 20])  # ids 0, 1, 2 (2 to 19) and 3 (20 to 40)
    model.save_pretrained(tmp_path / "checkpoint")
    DCMTokenizer(genes=GENES, max_count=40, count_bins=[2, 20]).save_pretrained(tmp_path / "checkpoint")
    cells = measured_cells(GENES[:4])
    cells.X = cells.X * 5
    out = completed(str(tmp_path / "checkpoint"), cells, tmp_path)
    np.testing.assert_array_equal(out.X.toarray()[:, :4], cells.X.toarray())
    assert np.setdiff1d(out.X.toarray()[:, 4:], [0, 1, 2, 3, 20]).size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_fraction": 1.0}, r"--mask-fraction 1.0: expected a number between 0 and 1"),
        ({"mask_fraction": 0.0}, r"--mask-fraction 0.0: expected a number between 0 and 1"),
        ({"draws": 1}, r"--draws 1: expected at least 2, as the variance is over draws"),
        ({"steps": 0}, r"steps=0, expected at least 1"),
        ({"schedule": "fast"}, r"schedule='fast', expected one of"),
        ({"batch_size": 0}, r"batch_size=0, expected at least 1"),
        ({"genes": GENES}, r"nothing to fill: .*cells.h5ad' has all 7 genes of the model; mask some with"),
    ],
)
def test_bad_options_are_refused_and_nothing_is_written(checkpoint, tmp_path, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        completed(checkpoint, measured_cells(options.pop("genes", GENES[:3])), tmp_path, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cells.h5ad"]


def test_scores_of_masked_entries_are_those_of_scipy_on_all_entries():
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(1, 3, (60, 8)))
    hidden = rng.random(counts.shape) < 0.3
    drawn = rng.poisson(counts[hidden] / 2 + 1, (5, hidden.sum()))
    entries, start = MaskedEntries(8, seed=0), 0
    for rows in (slice(0, 25), slice(25, 60)):
        number = int(hidden[rows].sum())
        entries.add(counts[rows], hidden[rows], drawn[:, start : start + number])
        start += number
    scores, mean = entries.scores(), drawn.mean(axis=0)
    gene_means = np.array([counts[~hidden[:, gene], gene].mean() for gene in range(8)])[np.where(hidden)[1]]
    assert scores["entries"] == hidden.sum()
    assert scores["pearson"] == pytest.approx(stats.pearsonr(mean, counts[hidden])[0])
    assert scores["spearman"] == pytest.approx(stats.spearmanr(mean, counts[hidden])[0])
    assert scores["pearson_gene_means"] == pytest.approx(stats.pearsonr(gene_means, counts[hidden])[0])
    assert math.isnan(weighted_correlation(np.ones(4), np.arange(4.0), np.ones(4, dtype=int)))
    assert math.isnan(weighted_correlation(np.ones(1), np.ones(1), np.ones(1, dtype=int)))  # and no warning


@pytest.mark.parametrize("scale", [0.1, 1, 30])
def test_intervals_cover_nine_tenths_of_truths_distributed_as_the_draws_also_where_most_are_zero(scale):
    rng = np.random.default_rng(1)
    rate = rng.gamma(1, scale, (200, 50))
    entries = MaskedEntries(50, seed=0)
    entries.add(rng.poisson(rate), np.ones(rate.shape, dtype=bool), rng.poisson(rate.ravel(), (9, rate.size)))
    assert entries.scores()["coverage_90"] == pytest.approx(0.9, abs=4 * math.sqrt(0.09 / rate.size))


class Mixture:
    """Cells of S states with independent counts 0..K, Poisson cut off at K; everything about them is known."""

    def __init__(self, num_genes: int = 12, largest: int = 12, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
        rates = rng.choice([0.3, 3.0], size=(3, num_genes))
        distribution = stats.poisson.pmf(np.arange(largest + 1), rates[..., None])
        self.distribution = torch.from_numpy(distribution / distribution.sum(axis=-1, keepdims=True))  # (S, G, K+1)
        self.mask = largest + 1

    def draw(self, num_cells: int, seed: int) -> torch.Tensor:
        """Cells (N, G)."""
        generator = torch.Generator().manual_seed(seed)
        state = self.weights.multinomial(num_cells, replacement=True, generator=generator)
        distribution = self.distribution[state]
        return distribution.flatten(0, 1).multinomial(1, generator=generator).view(num_cells, -1)

    def posterior_mean(self, x_t: torch.Tensor) -> torch.Tensor:
        """Mean counts (N, G) given the counts of ``x_t`` (N, G) that are not MASK."""
        genes, K = torch.arange(x_t.shape[1]), self.mask - 1
        log_p = self.distribution.log()[:, genes, x_t.clamp(max=K)].masked_fill(x_t == self.mask, 0).sum(dim=-1)
        state = (log_p.T + self.weights.log()).softmax(dim=-1)  # (N, S)
        return state @ (self.distribution @ torch.arange(self.mask, dtype=torch.float64))


def trained(mixture: Mixture, model: DCMForDenoising, *, steps: int) -> DCMForDenoising:
    """``model`` after learning the mixture from 20,000 cells."""
    cells, batch_size = mixture.draw(20_000, seed=3), 128
    model.set_marginals(torch.nn.functional.one_hot(cells, mixture.mask).sum(dim=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    model.train()
    for step in range(steps):
        generator = keyed_generator(0, step)
        x_0 = cells[torch.randint(len(cells), (batch_size,), generator=generator)]
        k = num_masked(stratified_uniform(batch_size, generator), torch.full((batch_size,), 12))
        x_t = mask_counts(x_0, k, generator, mask_token_id=mixture.mask, pad_token_id=mixture.mask + 1)
        model(x_t, labels=x_0).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


@pytest.mark.slow
def test_a_trained_model_completes_half_of_the_genes_with_nearly_the_exact_posterior(make_model, tmp_path):
    mixture = Mixture()
    model = make_model("latent", fresh=True, num_genes=12, max_count=12, num_latents=8, gene_output_bias=13)
    trained(mixture, model, steps=250).save_pretrained(tmp_path / "checkpoint")
    genes = [f"g{index}" for index in range(12)]
    DCMTokenizer(genes=genes, max_count=12).save_pretrained(tmp_path / "checkpoint")
    truth = mixture.draw(300, seed=4)
    cells = anndata.AnnData(sparse.csr_matrix(truth.numpy()), var=pd.DataFrame(index=genes))
    options = {"mask_fraction": 0.5, "draws": 30, "steps": 6, "batch_size": 300}
    out = completed(str(tmp_path / "checkpoint"), cells, tmp_path, **options)
    hidden = out.layers["imputed"].toarray() == 1  # six of the twelve genes of each cell
    exact = mixture.posterior_mean(truth.masked_fill(torch.from_numpy(hidden), mixture.mask)).numpy()[hidden]
    mean, variance = (out.layers[f"posterior_{name}"].toarray()[hidden] for name in ("mean", "variance"))
    noise = (variance / 30).mean()  # of a mean over 30 draws
    off = max(0.0, ((mean - exact) ** 2).mean() - noise)
    gene_means = np.broadcast_to(mixture.draw(20_000, seed=3).double().mean(dim=0).numpy(), hidden.shape)[hidden]
    marginal = ((gene_means - exact) ** 2).mean()
    assert off < 0.1 * marginal  # mean squared distance to the exact posterior mean
    assert out.uns["dcm_imputation"]["masked"]["coverage_90"] == pytest.approx(0.9, abs=0.03)  # 1,800 entries
