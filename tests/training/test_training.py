"""Properties of training: noise, start, and runs that repeat, resume and refuse.

Letters: B cells, L genes, k masked genes.
"""

import hashlib
import json
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from eval.metrics.distances import median_bandwidth, mmd2
from modeling_dcm import DCMConfig, DCMForDenoising
from tests.tiny_checkpoint import LABELS
from tests.tiny_training import shards_of_two_panels, tiny_training
from tokenization import DCMTokenizer
from training.config import TrainConfig
from training.data.loader import Cells, GlobalBatchSampler
from training.loop.accelerator import build_accelerator
from training.loop.batches import TrainBatches
from training.loop.start import build_model, build_tokenizer
from training.loop.step import build_optimizer, learning_rate, take_step, update_average
from training.loop.validation import Validation
from training.train import main


@pytest.fixture
def config(shards, tmp_path) -> TrainConfig:
    return tiny_training(shards, tmp_path / "checkpoint")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(first: Path, second: Path) -> None:
    here, there = weights(first), weights(second)
    assert here.keys() == there.keys()
    for name, value in here.items():
        assert torch.equal(value, there[name]), name


def test_learning_rate_warms_up_and_falls_to_zero_or_stays(config):
    cosine = replace(config, max_steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate(step, cosine) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1, abs=0.05)
    assert rates[100] == pytest.approx(0)
    constant = replace(cosine, learning_rate_schedule="constant")
    assert [learning_rate(step, constant) for step in (9, 50, 99)] == [1.0, 1.0, 1.0]


def test_weight_decay_is_on_matrices_and_neither_on_biases_nor_on_embeddings(config, make_model):
    model = make_model(conditioned=True)
    decayed, plain = (group["params"] for group in build_optimizer(model, config).param_groups)
    embeddings = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    assert {id(p) for p in embeddings} <= {id(p) for p in plain}
    assert all(p.ndim > 1 for p in decayed)
    assert len(decayed) + len(plain) == len(list(model.parameters()))


def test_weights_are_averaged_in_float32_and_faster_at_the_start():
    layer = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    ema, expected = [torch.zeros(1, 1)], 0.0
    for step in range(40):
        torch.nn.init.constant_(layer.weight, 1 + step / 8)
        update_average(ema, layer, step, decay=0.6)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * (1 + step / 8)
        assert ema[0].item() == pytest.approx(expected, rel=1e-5), step
    assert ema[0].dtype == torch.float32
    assert ema[0].to(torch.bfloat16).item() != ema[0].item()


def test_the_loss_of_a_step_is_the_sum_over_its_batches_by_all_measured_genes(config, make_model):
    """Of the first batch 6 of 7 genes were measured, of the second one only 2: not the mean of two ratios."""
    config = replace(config, gradient_accumulation_steps=2, clip_norm=1e9)
    model = make_model()
    mask, pad = model.config.mask_token_id, model.config.pad_token_id
    labels = torch.tensor([[0, 1, 2, 3, 4, 1, pad], [1, 4, *[pad] * 5]])
    inputs = torch.where(torch.tensor([[1, 1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]]).bool(), mask, labels)
    whole = {"input_ids": inputs, "labels": labels}
    whole_output = model(**whole)
    gradients = torch.autograd.grad(whole_output.loss, list(model.parameters()), allow_unused=True)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    accelerator = build_accelerator(config)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    batches = (rows(whole, index, index + 1) for index in range(2))
    loss, elbo, _ = take_step(prepared, optimizer, batches, accelerator, config, several_panels=True)
    torch.testing.assert_close((loss, elbo), (whole_output.loss.detach(), whole_output.elbo))
    for old, new, gradient in zip(before, model.parameters(), gradients):
        torch.testing.assert_close(old - new, torch.zeros_like(old) if gradient is None else gradient)


@torch.no_grad()
def test_the_validation_loss_is_the_sum_over_all_batches_by_all_measured_genes(config, cells_h5ad, tmp_path):
    config = replace(config, data=shards_of_two_panels(cells_h5ad, tmp_path), batch_size=3)
    model, tokenizer, cells = built(config)
    validation = Validation(config, tokenizer, cells)
    losses = validation.losses(model, [parameter.clone() for parameter in model.parameters()])
    total = measured = 0.0
    for index in range(0, min(len(validation.cells), 16), 3):
        batch = validation.cells[list(range(index, min(index + 3, len(validation.cells), 16)))]
        inputs = TrainBatches(None, validation.quiet, model.config).noised(batch, index)
        n = int((inputs["labels"] != tokenizer.pad_token_id).sum())
        total, measured = total + model.eval()(**inputs).loss.item() * n, measured + n
    assert losses["validation_loss"] == pytest.approx(total / measured)


def test_the_score_of_the_true_cells_is_perfect_where_genes_were_not_measured(
    config, cells_h5ad, tmp_path, monkeypatch
):
    config = replace(config, data=shards_of_two_panels(cells_h5ad, tmp_path))
    model, tokenizer, cells = built(config)
    names = anndata.read_h5ad(config.data / "validation.h5ad").obs_names
    true = anndata.read_h5ad(cells_h5ad)[names].copy()  # with the counts that the validation cells lack
    monkeypatch.setattr(model, "generate", lambda number, **_: tokenizer(true)["input_ids"][:number])
    score = Validation(config, tokenizer, cells).score(model, [parameter.detach() for parameter in model.parameters()])
    on_measured = np.log1p(true.X[:, :4].toarray())
    assert score["score_mmd2"] == pytest.approx(
        mmd2(on_measured, on_measured, bandwidths=[median_bandwidth(on_measured)])
    )
    assert [score["score_correlation"], score["score_correlation_slope"]] == pytest.approx([1, 1])


@pytest.fixture
def tokenizer() -> DCMTokenizer:
    return DCMTokenizer(genes=[f"g{i}" for i in range(9)], max_count=4, **LABELS)


def clean_batch(B: int, tokenizer: DCMTokenizer) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 5, (B, 9), generator=g)
    perturbations = torch.stack([torch.randint(0, 3, (B,), generator=g), torch.full((B,), -1)], dim=1)
    return {
        "input_ids": counts,
        "library_size": counts.sum(dim=1),
        "cell_type_ids": torch.randint(0, 2, (B,), generator=g),
        "perturbation_ids": perturbations,
        "covariate_ids": torch.stack([torch.randint(0, n, (B,), generator=g) for n in (2, 3)], dim=1),
    }


def ids(tokenizer) -> DCMConfig:
    return DCMConfig(num_genes=len(tokenizer.genes), max_count=tokenizer.max_count, gene_output_bias=4)


def rows(batch: dict[str, torch.Tensor], start: int, stop: int) -> dict[str, torch.Tensor]:
    return {name: value[start:stop] for name, value in batch.items()}


@pytest.mark.parametrize("world", [1, 2])
def test_batches_from_any_number_on_are_those_of_the_whole_run(config, world):
    """300 cells less those of test and validation are a few batches of 40: later ones are of another epoch."""
    options = replace(config, batch_size=40)
    tokenizer = build_tokenizer(options)
    cells = Cells(options.data, "train", tokenizer)
    batches = TrainBatches(cells, options, ids(tokenizer), rank=world - 1, world=world, device="cpu")
    whole = list(islice(batches.starting_at(0), 12))
    orders = GlobalBatchSampler(len(cells), batch_size=40, seed=options.seed, rank=world - 1, world_size=world)
    assert len(orders) < 7
    for start in (1, 7, 11):
        for expected, batch in zip(whole[start:], batches.starting_at(start)):
            assert expected.keys() == batch.keys()
            assert all(torch.equal(torch.as_tensor(expected[name]), torch.as_tensor(batch[name])) for name in batch)
    rows_of_first = next(orders.epoch(1))
    assert torch.equal(whole[len(orders)]["labels"], cells[rows_of_first]["input_ids"].long())


def test_noise_is_keyed_by_seed_and_batch_whoever_shares_it_and_leaves_the_global_state_alone(config, tokenizer):
    batch = clean_batch(12, tokenizer)
    alone = TrainBatches(None, config, ids(tokenizer)).noised(batch, 5)
    processes = [TrainBatches(None, config, ids(tokenizer), rank, world=2) for rank in (0, 1)]
    shared = [one.noised(rows(batch, 6 * one.rank, 6 * one.rank + 6), 5) for one in processes]
    assert alone.keys() == shared[0].keys()
    for name, value in alone.items():
        if torch.is_tensor(value):
            assert torch.equal(torch.cat([part[name] for part in shared]), value), name
    before = torch.get_rng_state()
    first, again, other, seeded = (
        TrainBatches(None, options, ids(tokenizer)).noised(batch, index)["input_ids"]
        for options, index in ((config, 5), (config, 5), (config, 6), (replace(config, seed=1), 5))
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, seeded)


def test_every_number_of_genes_is_masked_and_queried_ones_are_masked_and_within_the_budget(config, tokenizer):
    batch = clean_batch(90, tokenizer)
    inputs = TrainBatches(None, config, ids(tokenizer)).noised(batch, 0)
    queries = inputs["query_positions"]
    assert queries.shape == (90, 6)
    chosen = inputs["input_ids"].gather(1, queries.clamp(min=0))
    assert bool((chosen[queries >= 0] == tokenizer.mask_token_id).all())
    k = (inputs["input_ids"] == tokenizer.mask_token_id).sum(dim=1)
    assert torch.equal((queries >= 0).sum(dim=1), k.clamp(max=6))
    assert k.bincount(minlength=10).tolist() == [0, *[10] * 9]  # stratified over the batch
    observed = inputs["input_ids"] != tokenizer.mask_token_id
    assert torch.equal(inputs["input_ids"][observed], inputs["labels"][observed])
    for budget in (None, 9):
        everything = TrainBatches(None, replace(config, query_genes=budget), ids(tokenizer)).noised(batch, 0)
        assert "query_positions" not in everything


def test_each_condition_is_dropped_on_its_own_and_never_becomes_another_label(config, tokenizer):
    batch = clean_batch(4000, tokenizer)
    inputs = TrainBatches(None, replace(config, label_dropout=0.3), ids(tokenizer)).noised(batch, 0)
    clean, noisy = (
        {
            "cell_type": of["cell_type_ids"],
            "perturbation": of["perturbation_ids"][:, 0],
            "donor": of["covariate_ids"][:, 0],
            "day": of["covariate_ids"][:, 1],
            "library_size": of["library_size"].float(),
        }
        for of in (batch, inputs)
    )
    dropped = torch.stack([noisy[name] == -1 for name in clean]).double()
    assert (dropped.mean(dim=1) - 0.3).abs().max() < 0.03
    correlation = torch.corrcoef(dropped) - torch.eye(5)
    assert correlation.abs().max() < 0.07
    for name, value in clean.items():
        kept = noisy[name] != -1
        assert torch.equal(noisy[name][kept], value[kept]), name
    assert bool((inputs["perturbation_ids"][noisy["perturbation"] == -1] == -1).all())
    without = TrainBatches(None, replace(config, label_dropout=0.0), ids(tokenizer)).noised(batch, 0)
    assert all(torch.equal(without[name], batch[name]) for name in batch if name != "input_ids")


def built(config: TrainConfig):
    tokenizer = build_tokenizer(config)
    cells = Cells(config.data, "train", tokenizer)
    return build_model(config, tokenizer, cells), tokenizer, cells


def test_a_fresh_model_knows_the_targets(config):
    model, tokenizer, _ = built(config)
    named = {name: tokenizer.genes[gene] for name, gene in zip(tokenizer.perturbations, model.target_gene_ids.tolist())}
    assert all(named[name] == name for name in tokenizer.perturbations if name != "control")
    assert model.target_gene_ids[tokenizer.perturbations.index("control")] == -1


def test_conditions_can_be_left_out_and_what_is_not_there_is_refused_first(config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer/ in .* expected a folder that dcm-convert wrote"):
        main(replace(config, data=tmp_path))
    with pytest.raises(ValueError, match=r"conditions='donor': the shards have no \['donor'\]; they have"):
        build_tokenizer(replace(config, conditions="donor"))
    some, nothing = (build_tokenizer(replace(config, conditions=names)) for names in ("cell_type", "none"))
    assert (bool(some.cell_types), bool(some.perturbations), bool(nothing.cell_types)) == (True, False, False)
    with pytest.raises(FileNotFoundError, match="no perturbation table"):
        main(replace(config, perturbation_embeddings=tmp_path / "other.safetensors"))
    assert not config.out.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"A": torch.zeros(4)}, "vectors that are not finite, or all zero: A"),
        ({"A": torch.full((4,), torch.nan)}, "vectors that are not finite, or all zero: A"),
        (None, "is not a safetensors file"),
    ],
)
def test_a_bad_table_is_refused(config, tmp_path, content, message):
    table = tmp_path / "t.safetensors"
    table.write_text("name,vector\n") if content is None else save_file(content, table)
    with pytest.raises(ValueError, match=message):
        build_tokenizer(replace(config, perturbation_embeddings=table))


def test_the_table_is_frozen_kept_with_its_hash_and_unseen_names_can_be_drawn(config, perturbation_table, tmp_path):
    """The control's vector is learned even when the table has one."""
    table = tmp_path / "table.safetensors"
    vectors = {**load_file(perturbation_table), "UNSEEN": torch.tensor([0.5, -0.5, 1.0, 2.0])}
    save_file({**vectors, "control": torch.zeros(4)}, table)
    main(replace(config, perturbation_embeddings=table))
    model = DCMForDenoising.from_pretrained(config.out)
    tokenizer = DCMTokenizer.from_pretrained(config.out)
    assert model.config.perturbation_table_sha256 == hashlib.sha256(table.read_bytes()).hexdigest()
    encoder = model.conditions.perturbation
    for name, vector in vectors.items():
        index = tokenizer.perturbations.index(name)
        assert torch.equal(encoder.table[index], vector.float())
        assert encoder.has_vector[index]
    assert not encoder.has_vector[tokenizer.perturbations.index("control")]
    cells = model.generate(**tokenizer.conditions(perturbation="UNSEEN", num_cells=4), steps=2)
    assert cells.shape == (4, 15)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    config, block_shards, tmp_path, monkeypatch, streaming
):
    data = {"data": block_shards} if streaming else {}
    options = replace(config, **data, streaming=streaming, dropout=0.2, gradient_accumulation_steps=2, batch_size=40)
    whole = replace(options, out=tmp_path / "whole")
    main(whole)
    broken = replace(options, out=tmp_path / "broken")

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("training.loop.validation.Validation.losses", interrupted)
        with pytest.raises(KeyboardInterrupt):
            main(broken)
    assert [path.name for path in (broken.out / "checkpoints").iterdir()] == ["step-3"]
    assert not (broken.out / "model.safetensors").exists()
    with pytest.raises(ValueError, match=rf"cannot be resumed with other options .*streaming: {streaming} then, "):
        main(replace(broken, resume=True, streaming=not streaming))
    main(replace(broken, resume=True))
    assert_same_weights(whole.out, broken.out)
    logs = [(run.out / "training.jsonl").read_text().splitlines() for run in (whole, broken)]
    steps, losses = ([[json.loads(line).get(key) for line in log] for log in logs] for key in ("step", "loss"))
    assert steps[0] == steps[1]
    assert losses[0] == losses[1]


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory) -> TrainConfig:
    config = tiny_training(shards, tmp_path_factory.mktemp("runs") / "checkpoint")
    main(config)
    return config


def test_resuming_a_finished_run_changes_nothing_even_when_its_log_was_cut_off(finished, tmp_path):
    copy = replace(finished, out=tmp_path / "copy", resume=True)
    shutil.copytree(finished.out, copy.out)
    with (copy.out / "training.jsonl").open("a") as file:
        file.write('{"step": 1')
    main(copy)
    assert_same_weights(copy.out, finished.out)
    assert all("step" in json.loads(line) for line in (copy.out / "training.jsonl").read_text().splitlines())


def test_a_finished_run_is_a_checkpoint_of_averaged_weights_with_tokenizer_options_and_log(finished):
    names = {path.name for path in finished.out.iterdir()}
    assert {"config.json", "model.safetensors", "genes.txt", "conditions.json", "training.jsonl"} <= names
    assert {"training_options.json", "checkpoints"} <= names
    assert not any(name.startswith(".") or name.endswith((".bin", ".pt", ".pkl")) for name in names)
    model, tokenizer = (kind.from_pretrained(finished.out) for kind in (DCMForDenoising, DCMTokenizer))
    assert model.config.num_perturbations == len(tokenizer.perturbations)
    assert model.config.mask_token_id == tokenizer.mask_token_id
    lines = [json.loads(line) for line in (finished.out / "training.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 6, 6]
    assert {"loss", "elbo", "learning_rate", "gradient_norm"} <= lines[0].keys()
    assert {"validation_loss", "validation_elbo", "validation_loss_told"} <= lines[2].keys()
    assert {"score_w2", "score_w2_floor", "score_component_variance", "score_distance"} <= lines[3].keys()
    state = finished.out / "checkpoints" / "step-6"
    averages, latest = load_file(state / "model.safetensors"), load_file(state / "state.safetensors")
    assert all(torch.equal(parameter, averages[name]) for name, parameter in model.named_parameters())
    assert any(not torch.equal(latest[f"model.{name}"], p) for name, p in model.named_parameters())
    with pytest.raises(ValueError, match="holds a run already: add --resume, or choose another --out"):
        main(finished)


def test_shards_without_validation_cells_can_be_trained_on(config, shards, tmp_path):
    folder = tmp_path / "no_validation"
    shutil.copytree(shards, folder, ignore=shutil.ignore_patterns("validation"))
    out = main(replace(config, data=folder))
    assert (out / "model.safetensors").exists()
    assert "validation" not in (out / "training.jsonl").read_text()
