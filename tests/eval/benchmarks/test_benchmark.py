"""Properties of the benchmark: what is stored, counted and written, and the two yardsticks of the sampler."""

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from eval.benchmarks import sampling as sampling_benchmark
from eval.benchmarks import start as start_benchmark
from eval.benchmarks.command import entropy, last_line, sampling, start, training
from eval.benchmarks.costs import interleaved, product_rate
from eval.benchmarks.sampling import AUTO, LINEAR_100, NAIVE, SETTINGS, Row, naive_cells, summary
from eval.benchmarks.training import OURS, PLAIN, Case, SimulatedCells, Training, start_accelerator
from modeling_dcm import DCMForDenoising
from modeling_dcm.diffusion_dcm import alpha, reveal_probability, sigma
from modeling_dcm.schedule_dcm import reveal_schedule

EPS = 1e-3
LAST_LINE = re.compile(r"speedup_vs_naive=(\S+) mmd2_minus_linear100=(\S+) se=(\S+)")


@pytest.fixture
def checkpoint(trained, tmp_path) -> Path:
    """A copy that has no entropy curve."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(trained, copy, ignore=shutil.ignore_patterns("checkpoints"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"entropy_curve": None}))
    return copy


def config_of(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "config.json").read_text())


def test_entropy_stores_the_curve_and_changes_nothing_else(checkpoint, shards, capsys):
    before, files = config_of(checkpoint), {path.name for path in checkpoint.iterdir()}
    fitted = entropy(checkpoint, data=shards, cells=16)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(fitted["entropy"]))
    after = config_of(checkpoint)
    assert after.pop("entropy_curve")["observed"][0] == 0
    assert after == {name: value for name, value in before.items() if name != "entropy_curve"}
    assert {path.name for path in checkpoint.iterdir()} == files
    printed = capsys.readouterr().out
    assert "16 cells" in printed
    assert re.search(r"cubic .*8 steps.*20 steps.*steps='auto' takes \d+", printed)
    cells = DCMForDenoising.from_pretrained(checkpoint).generate(3, steps="auto", schedule="optimal")
    assert cells.shape == (3, 15)


def test_entropy_refuses_shards_of_another_panel_and_too_few_cells(checkpoint, shards, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(shards, other)
    genes = (other / "tokenizer" / "genes.txt").read_text().splitlines()
    (other / "tokenizer" / "genes.txt").write_text("\n".join(reversed(genes)) + "\n")
    with pytest.raises(ValueError, match=r"has a panel of 15 genes.*expected the shards it was trained on"):
        entropy(checkpoint, data=other)
    with pytest.raises(FileNotFoundError, match=r"no folder 'org/dcm'.*hf download"):
        entropy(Path("org/dcm"), data=shards)
    with pytest.raises(ValueError, match="--cells 1: expected at least 2"):
        entropy(checkpoint, data=shards, cells=1)


def test_the_start_and_scvi_are_timed_until_both_are_near(shards, tmp_path, monkeypatch):
    asked = []

    def fit(train, *, from_prior, max_epochs):
        asked.append(max_epochs)
        factor = 1 if max_epochs == 50 else 9
        return lambda labels, rng: factor * train.counts[rng.choice(len(train), len(labels), replace=False)]

    monkeypatch.setattr(start_benchmark.scvi, "fit", fit)
    monkeypatch.setattr(start_benchmark, "NEAR", 1.3)
    found = start(data=shards, out=tmp_path, seeds=2)
    assert asked == [10, 10, 50, 50]
    assert found["scvi_seconds"] >= 0
    rows = json.loads((tmp_path / "start.json").read_text())["rows"]
    assert [row["name"] for row in rows][:3] == ["floor", "not trained, states: bank", "not trained, states: prior"]
    assert "against the floor" in (tmp_path / "start.md").read_text()


class Copycat:
    """A stub of a model: two genes that are always equal, 0 or 1, each with probability 1/2."""

    def __init__(self):
        self.config = SimpleNamespace(mask_token_id=2, num_genes=2, noise_eps=EPS, library_size_conditioning=False)
        self.device = torch.device("cpu")
        self.calls = 0

    def __call__(self, x_t: torch.Tensor) -> SimpleNamespace:
        self.calls += 1
        other = x_t.flip(1)
        logits = torch.zeros(*x_t.shape, 2)
        logits[..., 0] = torch.where(other == 1, -1e9, 0.0)
        logits[..., 1] = torch.where(other == 0, -1e9, 0.0)
        return SimpleNamespace(logits=logits)


def test_the_naive_loop_takes_euler_steps_that_keep_what_genes_share():
    t, s = torch.tensor(0.7), torch.tensor(0.65)
    ratio = alpha(t, EPS) / (1 - alpha(t, EPS))
    assert reveal_probability(t, s, EPS) == pytest.approx(float(sigma(t, EPS) * ratio * (t - s)), rel=1e-5)
    model = Copycat()
    cells = naive_cells(model, {}, 400)
    assert model.calls == 100
    assert (cells[:, 0] == cells[:, 1]).float().mean() > 0.97  # both in one step: once in 200 cells
    assert cells.float().mean() == pytest.approx(0.5, abs=0.1)


def test_the_naive_loop_draws_counts_for_the_conditions_of_every_cell(make_model, backbone):
    model = make_model(backbone, conditioned=True, library_size_groups=1)
    conditions = {"cell_type_ids": torch.arange(18) % 3}
    cells = naive_cells(model, conditions, 18, steps=5)
    assert cells.shape == (18, 7)
    assert cells.min() >= 0
    assert cells.max() < model.config.mask_token_id
    assert torch.equal(cells, naive_cells(model, conditions, 18, steps=5))


def run_sampling(checkpoint: Path, shards: Path, out: Path, capsys, **options) -> tuple[dict, str]:
    """What sampling.json holds, and what was printed."""
    options = {"num_cells": 24, "seeds": 2, "naive_cells": 1, "batch_size": 16} | options
    sampling(str(checkpoint), real=shards / "test.h5ad", out=out, **options)
    return json.loads((out / "sampling.json").read_text()), capsys.readouterr().out


def test_sampling_measures_every_setting_and_ends_with_the_line_for_machines(trained, shards, tmp_path, capsys):
    threads = torch.get_num_threads()
    found, printed = run_sampling(trained, shards, tmp_path / "out", capsys, train=shards / "train.h5ad")
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == [*SETTINGS, "naive loop", "floor"]
    for name in SETTINGS:
        row = rows[name]
        assert row["cells_per_second"] > 0
        assert row["predicted_kl"] is not None
        assert row["network_calls"] <= 15  # one gene a call at most
        assert len(row["scores"]["mmd2"]) == 2
    assert rows["naive loop"]["scores"] == {}
    assert torch.get_num_threads() == threads
    assert np.std(rows["floor"]["scores"]["mmd2"]) > 0
    speed = [float(rows[name]["cells_per_second"]) for name in (AUTO, "naive loop")]
    values = LAST_LINE.fullmatch(printed.splitlines()[-1]).groups()
    assert float(values[0]) == pytest.approx(speed[0] / speed[1], rel=1e-3)
    assert float(values[2]) > 0
    assert values[0] in (tmp_path / "out" / "sampling.md").read_text()


def test_without_an_entropy_curve_the_settings_that_need_one_are_left_out_and_that_is_said(
    checkpoint, shards, tmp_path, capsys
):
    found, printed = run_sampling(checkpoint, shards, tmp_path / "out", capsys, seeds=1, dtype="bfloat16")
    assert "bfloat16" in found["how"]
    assert "bfloat16" in printed.splitlines()[1]
    assert all(None not in row["scores"]["mmd2"] for row in found["rows"] if row["scores"])
    names = [row["name"] for row in found["rows"]]
    assert LINEAR_100 in names
    assert not [name for name in names if name.startswith(("optimal", "auto"))]
    assert all(row["predicted_kl"] is None for row in found["rows"])
    assert "This checkpoint has no entropy curve" in printed
    assert LAST_LINE.fullmatch(printed.splitlines()[-1]).groups() == ("nan", "nan", "nan")


def test_cells_are_drawn_for_the_conditions_of_the_real_ones(trained, shards, tmp_path, capsys, monkeypatch):
    given, generate = [], DCMForDenoising.generate
    monkeypatch.setattr(sampling_benchmark, "SETTINGS", {LINEAR_100: (100, "linear")})
    monkeypatch.setattr(
        DCMForDenoising, "generate", lambda *args, **options: given.append(options) or generate(*args, **options)
    )
    run_sampling(trained, shards, tmp_path / "a", capsys)
    assert all((options[name] >= 0).any() for options in given for name in ("cell_type_ids", "perturbation_ids"))


def test_a_real_file_without_a_condition_of_the_model_lists_its_columns(trained, shards, tmp_path):
    real = anndata.read_h5ad(shards / "test.h5ad")
    real.obs = real.obs[["cell_type"]]
    real.write_h5ad(tmp_path / "real.h5ad")
    with pytest.raises(ValueError, match=r"no obs column 'perturbation'; it has cell_type; rename one"):
        sampling(str(trained), real=tmp_path / "real.h5ad", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("option", "value"), [("num_cells", 1), ("seeds", 0), ("naive_cells", 0)])
def test_numbers_that_are_too_small_are_refused(tmp_path, option, value):
    with pytest.raises(ValueError, match=f"--{option.replace('_', '-')} {value}: expected at least"):
        sampling("nowhere/", real=tmp_path / "real.h5ad", out=tmp_path / "out", **{option: value})


@pytest.mark.parametrize("setting", ["one step", "linear 20", "cubic 8"])
def test_the_network_calls_that_are_reported_are_those_that_are_made(make_model, backbone, setting):
    steps, schedule = SETTINGS[setting]
    model = make_model(backbone, num_genes=40)
    calls = []
    handle = model.head.register_forward_hook(lambda *_: calls.append(1))
    model.generate(5, steps=steps, schedule=schedule, batch_size=5)
    handle.remove()
    assert len(calls) == len(reveal_schedule(40, steps, schedule)) - 1


def test_the_summary_compares_the_default_auto_with_linear_100_and_the_naive_loop():
    auto = Row(AUTO, "cubic", 5, cells_per_second=300.0, scores={"mmd2": [0.3, 0.5]})
    linear = Row(LINEAR_100, "linear", 100, cells_per_second=30.0, scores={"mmd2": [0.1, 0.1]})
    found = summary([linear, Row(NAIVE, cells_per_second=2.0), auto])
    assert found["speedup_vs_naive"] == 150
    assert found["mmd2_minus_linear100"] == pytest.approx(0.3)
    assert found["se"] == pytest.approx(np.std([0.3, 0.5], ddof=1) / np.sqrt(2))
    assert last_line(found) == "speedup_vs_naive=150 mmd2_minus_linear100=0.3 se=0.1"
    assert last_line(summary([])) == "speedup_vs_naive=nan mmd2_minus_linear100=nan se=nan"


def test_works_take_turns():
    order = []
    costs = interleaved({name: lambda n=name: order.append(n) for name in "ab"}, torch.device("cpu"), rounds=3)
    assert order == list("ababab")
    assert {name: len(cost.seconds) for name, cost in costs.items()} == {"a": 3, "b": 3}
    assert product_rate(torch.device("cpu"), size=64, times=2) > 0


@pytest.mark.parametrize("variant", [PLAIN, OURS])
def test_a_step_changes_weights_and_averages_and_the_plain_one_asks_every_gene(backbone, variant):
    training = Training(Case("small", backbone, variant, genes=12, cells=6), start_accelerator(), SimulatedCells(12, 6))
    assert ("query_positions" in next(training.batches)) == (variant == OURS)
    assert (training.network.head.large is None) == (variant == PLAIN)
    weights = [parameter.detach().clone() for parameter in training.network.parameters()]
    for _ in range(2):  # gates start at zero: the first step moves the head alone
        training.steps(1)
    moved = [not torch.equal(a, b) for a, b in zip(weights, training.network.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2


@pytest.mark.parametrize("variant", [PLAIN, OURS])
def test_flops_of_a_step_are_those_that_torch_counts(backbone, variant):
    def flops(query, key, value, *_, out_shape=None, **options) -> int:
        return sdpa_flop_count(query, key, value)

    # PyTorch counts the kernels of GPUs only
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    case = Case("small", backbone, variant, genes=1000, cells=1)
    training = Training(case, start_accelerator(), SimulatedCells(1000, 1))
    with FlopCounterMode(display=False, custom_mapping={attention: flops}) as counter:
        training.model(**next(training.batches))
    assert case.flops == pytest.approx(3 * counter.get_total_flops(), rel=0.1)


def test_training_writes_numbers_and_a_table_and_ends_with_the_line_for_machines(tmp_path, capsys):
    found = training(out=tmp_path / "out", sizes=("small",), genes=(8,), rounds=1)
    content = json.loads((tmp_path / "out" / "training.json").read_text())
    assert len(content["rows"]) == 4
    assert all(row["cells_per_second"] > 0 for row in content["rows"])
    seconds = {(row["backbone"], row["variant"]): row["seconds"] for row in content["rows"]}
    ratios = np.divide(seconds["dit", PLAIN], seconds["dit", OURS])
    assert found["step_speedup"] == pytest.approx(np.median(ratios))
    assert capsys.readouterr().out.splitlines()[-1] == last_line(found)
    assert last_line(found) in (tmp_path / "out" / "training.md").read_text()
