"""Properties of what training starts from: marginals, means, sizes and states of the training cells, as measured.

Letters: N cells, G genes, K largest count, T cell types.
"""

import shutil
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

from modeling_dcm import DCMForDenoising
from modeling_dcm.conditioning_dcm import ANY
from modeling_dcm.modeling_dcm import PRIOR_CELLS
from tests.tiny_training import tiny_training
from tokenization import DCMTokenizer
from training.config import TrainConfig
from training.convert_h5ad import main as convert
from training.data.loader import Cells
from training.loop.start import build_model, build_tokenizer, open_cells
from training.loop.told_effects import cell_states
from training.train import main as train

GENES = ["A", "B", "C"]
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_latents": 4}
TINY |= {"count_distribution": "categorical", "state_dim": 0}  # the head then emits the marginals


def write_cells(path: Path, genes: list[str], cell_types: list[str], means: dict[str, float], seed: int) -> Path:
    """Poisson counts with a mean for each gene, twice that in the cells of type "two"."""
    rng = np.random.default_rng(seed)
    factor = 1 + (np.array(cell_types) == "two")
    counts = rng.poisson(np.outer(factor, [means[gene] for gene in genes])).astype(np.float32)
    names = [f"{path.stem}{i}" for i in range(len(counts))]
    obs = pd.DataFrame({"line": cell_types}, index=names)
    anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=genes)).write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def union(tmp_path_factory) -> Path:
    """Shards of a file with all genes and cells of both types, and of one without C and cells of type "one" only."""
    folder, means = tmp_path_factory.mktemp("union"), {"A": 4.0, "B": 1.0, "C": 5.0}
    both = ["one", "two"] * 60
    files = [
        write_cells(folder / "all.h5ad", GENES, both, means, seed=0),
        write_cells(folder / "few.h5ad", ["B", "A"], ["one"] * 240, means, seed=1),
    ]
    convert(tuple(files), out=folder / "shards", cell_type_key="line", join="union")
    return folder / "shards"


@pytest.fixture(scope="module")
def started(union, tmp_path_factory) -> tuple[DCMForDenoising, DCMTokenizer, pd.DataFrame, np.ndarray]:
    """The fresh model and its tokenizer; of the training cells their types, and counts (N, G), NaN if not measured."""
    config = TrainConfig(data=union, out=tmp_path_factory.mktemp("run"), **TINY)
    tokenizer = build_tokenizer(config)
    train = anndata.read_h5ad(union / "train.h5ad")
    counts = train[:, tokenizer.genes].to_df().to_numpy().astype(float)
    is_short = train.obs_names.str.startswith("few")
    counts[np.ix_(is_short, [gene == "C" for gene in tokenizer.genes])] = np.nan
    assert 100 < is_short.sum() < len(train) - 50
    return build_model(config, tokenizer, open_cells(config, "train", tokenizer)), tokenizer, train.obs, counts


def test_marginals_are_those_of_the_cells_that_measured_a_gene(started):
    model, tokenizer, _, counts = started
    inputs = torch.full((1, len(tokenizer.genes)), tokenizer.mask_token_id)
    with torch.no_grad():
        p = model.eval()(inputs).logits[0].softmax(dim=-1).double().numpy()
    for g in range(len(tokenizer.genes)):
        values = counts[~np.isnan(counts[:, g]), g].astype(int)
        measured = np.bincount(values, minlength=p.shape[1])
        assert p[g] * (len(values) + 1) == pytest.approx(measured, abs=1)  # but for one pseudo-cell


def test_mean_counts_are_those_of_the_cells_that_measured_a_gene(started):
    model, tokenizer, obs, counts = started
    overall = np.nanmean(counts, axis=0)
    assert model.totals.gene_mean[-1].numpy() == pytest.approx(overall, rel=1e-5)
    for row, cell_type in enumerate(tokenizer.cell_types):
        of_type = (obs["cell_type"] == cell_type).to_numpy()
        N = of_type.sum()
        expected = (np.nanmean(counts[of_type], axis=0) * N + PRIOR_CELLS * overall) / (N + PRIOR_CELLS)
        assert model.totals.gene_mean[row].numpy() == pytest.approx(expected, rel=1e-5)


def test_library_sizes_are_drawn_as_if_every_gene_had_been_measured(started):
    model, _, _, counts = started
    whole, short = (counts[np.isnan(counts).any(axis=1) == lacks] for lacks in (False, True))
    mean = np.nanmean(counts, axis=0)
    share = mean[~np.isnan(short[0])].sum() / mean.sum()
    sizes = np.concatenate([whole.sum(axis=1), np.round(np.nansum(short, axis=1) / share)])
    everything = (model.library_sizes.keys == ANY).all(dim=1)
    quantiles = np.quantile(sizes, np.linspace(0, 1, model.library_sizes.quantiles.shape[1]))
    assert model.library_sizes.quantiles[everything][0].numpy() == pytest.approx(quantiles, rel=1e-5)


def test_names_that_no_training_cell_has_are_warned_of(tmp_path, caplog):
    cells = write_cells(tmp_path / "cells.h5ad", GENES, ["one", "two"] * 60, {"A": 4.0, "B": 1.0, "C": 5.0}, seed=0)
    convert(cells, out=tmp_path / "shards", cell_type_key="line", split="zero-shot", held_out_cell_type="two")
    config = TrainConfig(data=tmp_path / "shards", out=tmp_path / "run", **TINY)
    tokenizer = build_tokenizer(config)
    build_model(config, tokenizer, open_cells(config, "train", tokenizer))
    assert "no training cell has these cell types" in caplog.text
    assert "learns nothing of them: two" in caplog.text


def test_a_tokenizer_of_more_genes_than_the_shards_is_refused(union, tmp_path):
    shutil.copytree(union, tmp_path / "shards")
    with (tmp_path / "shards" / "tokenizer" / "genes.txt").open("a") as file:
        file.write("D\n")
    config = TrainConfig(data=tmp_path / "shards", out=tmp_path / "run", **TINY)
    tokenizer = build_tokenizer(config)
    with pytest.raises(ValueError, match="counts of 3 genes, but their tokenizer names 4"):
        build_model(config, tokenizer, open_cells(config, "train", tokenizer))


# --- where it starts from statistics ----------------------------------------------------------------------------------

FIRST = {"count_distribution": "nb", "state_dim": 3}


def start(shards, out, **options) -> tuple[DCMForDenoising, Cells]:
    tokenizer = DCMTokenizer.from_pretrained(shards / "tokenizer")
    cells = Cells(shards, "train", tokenizer)
    return build_model(tiny_training(shards, out, **FIRST | options), tokenizer, cells), cells


def nats(model: DCMForDenoising, cells: Cells, **options) -> float:
    """Cross-entropy of all genes of training cells that are wholly masked."""
    batch = cells[list(range(64))]
    masked = torch.full_like(batch["input_ids"].long(), model.config.mask_token_id)
    given = {"cell_type_ids": batch["cell_type_ids"], "library_size": batch["library_size"].float()}
    with torch.no_grad():
        return model(masked, labels=batch["input_ids"].long(), **given, **options).loss.item()


def test_the_first_network_knows_depth_and_state_and_the_paper_s_does_not(shards, tmp_path):
    model, cells = start(shards, tmp_path)
    paper, _ = start(shards, tmp_path, count_distribution="categorical", state_dim=0)
    told = cell_states(model, cells)[:64]
    assert nats(model, cells, state=told) < nats(model, cells) < nats(paper, cells)


def test_states_of_training_cells_are_white(shards, tmp_path):
    model, cells = start(shards, tmp_path)
    states = cell_states(model, cells)
    torch.testing.assert_close(states.mean(dim=0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cov(states.T), torch.eye(3), atol=1e-3, rtol=0)


@pytest.mark.parametrize("keep_states", [False, True])
def test_drawn_states_have_the_mean_of_their_cell_type(shards, tmp_path, keep_states):
    model, cells = start(shards, tmp_path, keep_states=keep_states)
    assert model.state_source.has_bank == keep_states
    states, types = cell_states(model, cells), cells.conditions["cell_type_ids"]
    for label in (0, 1):
        ids = torch.full((2_000,), label)
        keys = model.library_sizes.group_keys(2_000, ids, None, None)
        source = model.state_source
        if keep_states:
            drawn = source.bank[source.rows_of_bank(keys, 0)]
        else:
            drawn = source.draw(keys, ids, torch.Generator().manual_seed(0))
        own = states[types == label]
        assert (drawn[:, :3].mean(dim=0) - own.mean(dim=0)).abs().max() < 0.3
        assert (drawn[:, :3].std(dim=0) - own.std(dim=0)).abs().max() < 0.4


def test_a_checkpoint_draws_completes_and_scores_in_a_fresh_model_whose_state_has_the_loadings_of_the_start(
    shards, tmp_path
):
    model = DCMForDenoising.from_pretrained(train(tiny_training(shards, tmp_path / "out", **FIRST)))
    assert torch.equal(model.head.state_loading.weight, start(shards, tmp_path)[0].head.state_loading.weight)
    cells = model.generate(6, cell_type_ids=torch.arange(6) % 2, steps=2)
    assert cells.shape == (6, 15)
    assert torch.equal(model.generate(observed=cells), cells)
    assert bool(model.log_likelihood(cells, num_samples=2).isfinite().all())
    assert model.config.entropy_curve is not None


def test_fine_tuning_on_the_same_data_starts_as_the_same_function(shards, tmp_path):
    out = train(tiny_training(shards, tmp_path / "out", **FIRST))
    tuned = train(tiny_training(shards, tmp_path / "tuned", init_from=str(out), max_steps=1, learning_rate=1e-12))
    x = torch.full((2, 15), DCMForDenoising.from_pretrained(out).config.mask_token_id)
    given = {"library_size": torch.tensor([20.0, 40.0]), "state": torch.randn(2, 3)}
    first, second = (DCMForDenoising.from_pretrained(folder)(x, **given).logits for folder in (out, tuned))
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)


def test_the_first_network_draws_counts_as_often_as_the_cells_have_them(shards, tmp_path):
    model, cells = start(shards, tmp_path)
    labels = {"cell_type_ids": cells.conditions["cell_type_ids"]}
    drawn = torch.cat([model.eval().generate(len(cells), **labels, steps=1, seed=seed) for seed in range(4)])
    real = cells[list(range(len(cells)))]["input_ids"].long()
    for count in (0, 1, 2):
        share = (real == count).float().mean().item()
        assert (drawn == count).float().mean().item() == pytest.approx(share, abs=0.02)


def test_too_few_whole_cells_are_refused(shards, tmp_path):
    with pytest.raises(ValueError, match="training cells have every gene measured, expected more than 1001"):
        start(shards, tmp_path, state_dim=1000)
