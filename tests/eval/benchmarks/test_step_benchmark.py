"""Properties of the training benchmark: it measures steps of training, like beside like, and knows its memory."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from eval.benchmarks.step_costs import interleaved, memory_growth, product_rate, shares_of_operations
from eval.benchmarks.step_report import figure, last_line, tables, with_spread
from eval.benchmarks.step_results import Result, Row, exponent
from eval.benchmarks.step_variants import (
    NO_BUDGET,
    OURS,
    PLAIN,
    Case,
    PlainStep,
    Training,
    head_loss,
    plain_loss,
    simulated_batch,
    start_accelerator,
    train_config,
    variants,
)
from eval.benchmarks.steps import Plan, _expected_seconds, main, measure, summarise
from training.loop.batches import noised
from training.loop.throughput import training_flops

CPU = torch.device("cpu")
CASE = Case("small", "dit", genes=12, cells=6, max_count=90, queries=5)


@pytest.fixture(scope="module")
def accelerator():
    return start_accelerator()


@pytest.fixture
def batch(make_model):
    """A noised batch of the case, and networks of its shape with weights that say something."""

    def make(backbone: str, **options):
        model = make_model(backbone, num_genes=CASE.genes, max_count=CASE.max_count, **options).train()
        clean = {"input_ids": simulated_batch(CASE)["input_ids"]}
        config = replace(train_config(CASE, "no"), library_size_conditioning=False)
        return model, noised(clean, config, model.config, 0, 0, 1, "cpu")

    return make


# --- what is compared ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [0, 20])
def test_the_plain_step_has_the_loss_of_the_network_with_every_gene_asked(batch, backbone, columns):
    model, inputs = batch(backbone, gene_output_bias=columns)
    del inputs["query_positions"]
    ours, plain = model(**inputs), PlainStep(model)(**inputs)
    torch.testing.assert_close(plain.loss, ours.loss)
    torch.testing.assert_close(plain.elbo, ours.elbo)


@pytest.mark.parametrize("asked", ["queries", "every gene"])
def test_head_and_loss_alone_give_the_loss_of_the_whole_network(batch, asked):
    model, inputs = batch("dit", gene_output_bias=20)
    everything = {name: value for name, value in inputs.items() if name != "query_positions"}
    seen = {}
    hook = model.head.register_forward_pre_hook(lambda module, args: seen.update(hidden=args[0], condition=args[1]))
    whole = model(**everything).loss
    hook.remove()
    if asked == "queries":
        whole = model(**inputs).loss
    else:
        inputs = everything
    alone = head_loss(model, OURS, inputs, seen["hidden"], seen["condition"])
    torch.testing.assert_close(alone, whole)
    if asked == "every gene":
        plain = head_loss(model, PLAIN, inputs, seen["hidden"], seen["condition"])
        torch.testing.assert_close(plain, whole)


def test_a_uniform_law_costs_log_of_its_outputs(batch):
    model, inputs = batch("dit", fresh=True, gene_output_bias=0)
    with torch.no_grad():
        distribution = model.distribution(inputs["input_ids"])
        elbo = plain_loss(distribution, inputs["input_ids"], inputs["labels"], model.config)[1]
    assert elbo.item() == pytest.approx(math.log(CASE.max_count + 1), rel=1e-5)


def test_variants_differ_in_what_their_names_say_alone(accelerator):
    trainings = {case.name: Training(case, accelerator) for case in variants(CASE)}
    assert list(trainings) == ["dit, plain", "dit, no budget", "dit, ours", "latent, plain", "latent, ours"]
    first = {name: training.batch() for name, training in trainings.items()}
    for name, inputs in first.items():
        assert torch.equal(inputs["input_ids"], first["dit, ours"]["input_ids"])
        assert ("query_positions" in inputs) == name.endswith(OURS)
    assert first["dit, ours"]["query_positions"].shape == (6, 5)
    shapes = {
        name: {p: tuple(value.shape) for p, value in training.network.named_parameters() if "head" not in p}
        for name, training in trainings.items()
    }
    assert shapes["dit, plain"] == shapes["dit, no budget"] == shapes["dit, ours"] != shapes["latent, ours"]
    assert trainings["dit, plain"].network.head.large is None
    assert trainings["dit, ours"].network.head.large is not None


@pytest.mark.parametrize("variant", [PLAIN, NO_BUDGET, OURS])
def test_a_step_changes_weights_and_averages(accelerator, variant):
    training = Training(replace(CASE, variant=variant), accelerator)
    weights = [parameter.detach().clone() for parameter in training.network.parameters()]
    averages = [average.clone() for average in training.ema]
    for _ in range(2):  # gates start at zero: the first step moves the head alone
        training.step()
    moved = [not torch.equal(a, b) for a, b in zip(weights, training.network.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2
    assert sum(not torch.equal(a, b) for a, b in zip(averages, training.ema, strict=True)) == sum(moved)


def test_what_stands_between_steps_is_weights_averages_and_two_moments(accelerator):
    training = Training(CASE, accelerator)
    weights = sum(parameter.numel() * 4 for parameter in training.network.parameters())
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in training.network.buffers())
    steps = 4 * len(list(training.network.parameters()))  # AdamW counts them for each tensor
    assert training.standing_bytes() == 4 * weights + buffers + steps
    training.step()
    assert training.standing_bytes() == 4 * weights + buffers + steps


# --- costs -----------------------------------------------------------------------------------------------------------


def test_memory_growth_is_the_largest_sum_of_what_is_alive_at_once():
    def work():
        first = torch.empty(3 * 2**20, dtype=torch.uint8)
        second = torch.empty(2 * 2**20, dtype=torch.uint8)
        del first
        third = torch.empty(2**20, dtype=torch.uint8)
        return second, third

    assert memory_growth(work, CPU) == pytest.approx(5.0, abs=1e-3)
    assert memory_growth(lambda: None, CPU) == 0


def test_memory_growth_counts_what_a_backward_pass_keeps():
    x = torch.randn(2**18, requires_grad=True)  # 1 MiB: exp keeps its result, its gradient and the gradient of x follow
    assert memory_growth(lambda: x.exp().sum().backward(), CPU) == pytest.approx(2.0, abs=1.01)
    x.grad = None
    kept = memory_growth(lambda: x.exp().exp().exp().exp().sum().backward(), CPU)
    assert kept >= 4.0


def test_flops_of_attention_are_counted_on_a_cpu():
    B, H, L, d = 2, 3, 16, 8

    class Attend(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x, x)

    x = torch.randn(B, H, L, d, requires_grad=True)
    assert training_flops(Attend(), {"x": x}) == 3 * (2 * 2 * B * H * L * L * d)


def test_flops_of_a_step_are_those_of_its_matrices(accelerator):
    case = replace(CASE, variant=PLAIN, genes=64, max_count=40)
    training = Training(case, accelerator)
    D, layers, tokens = 64, 2, case.cells * case.genes
    blocks = layers * tokens * (2 * 12 * D * D + 4 * case.genes * D)
    head = tokens * 2 * D * (case.max_count + 1)
    counted = training_flops(training.model, training.batch()) / 3
    assert blocks + head < counted < 1.2 * (blocks + head)  # conditions and embeddings besides


def test_works_take_turns_and_a_turn_repeats_its_work():
    order = []
    taken = interleaved({name: lambda n=name: order.append(n) for name in "ab"}, CPU, rounds=3, seconds=0.0)
    assert order == list("ababab")
    assert {name: len(seconds) for name, seconds in taken.items()} == {"a": 3, "b": 3}
    interleaved({"a": lambda: order.append("c")}, CPU, rounds=1, seconds=0.01)
    assert order.count("c") > 1


def test_shares_of_operations_sum_to_one_and_find_the_product():
    x = torch.randn(512, 512)
    shares = shares_of_operations(lambda: (x @ x, x.sort()), CPU)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert {"matrix products", "sorting for the noise"} <= set(shares)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)


def test_product_rate_is_positive():
    assert product_rate(CPU, size=64, times=2) > 0


# --- results ---------------------------------------------------------------------------------------------------------


def row(part: str, seconds: list[float], growth: float = 1.0, **case) -> Row:
    return Row(replace(CASE, **case), part, seconds, growth)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_exponent_of_a_power_law_is_its_power(power):
    genes = [500, 2000, 17_002]
    assert exponent(genes, [3.0 * g**power for g in genes]) == pytest.approx(power)
    assert math.isnan(exponent([500, 500], [1.0, 2.0]))


def test_the_last_line_compares_rounds_with_each_other():
    result = Result(
        [
            row("step", [6.0, 12.0, 30.0], genes=2000, variant=PLAIN),
            row("step", [3.0, 3.0, 10.0], genes=2000, variant=NO_BUDGET),
            row("step", [3.0, 4.0, 20.0], genes=2000),
            row("step", [9.0, 9.0, 9.0], genes=2000, backbone="latent", variant=PLAIN),
            row("step", [1.0, 2.0, 3.0], genes=2000, backbone="latent"),
            row("head", [1.0], 90.0, genes=2000, variant=PLAIN),
            row("head", [1.0], 10.0, genes=2000),
        ]
    )
    plan = Plan(("small",), (500, 2000), (), 6 * 2000, 5, 90, 3, 0.0, 20.0, False)
    summary = summarise(result, plan)
    assert summary == {"step_speedup": 2.0, "head_memory_ratio": 9.0, "latent_vs_dit": 6.0}
    assert last_line(summary) == "step_speedup=2 head_memory_ratio=9 latent_vs_dit=6"
    assert with_spread([2.0, 3.0, 1.5]) == "2.00 [1.50, 3.00]"
    assert all(math.isnan(value) for value in summarise(Result(), plan).values())


def test_the_expected_time_of_a_step_is_quadratic_for_dit_and_linear_for_latent():
    result = Result([row("step", [2.0]), row("step", [2.0], backbone="latent")])
    later = replace(CASE, genes=10 * CASE.genes, cells=3)
    assert _expected_seconds(result, later) == pytest.approx(100.0)
    assert _expected_seconds(result, replace(later, backbone="latent")) == pytest.approx(10.0)
    assert _expected_seconds(result, CASE) == 0


def test_what_would_take_too_long_is_left_out_and_named(accelerator):
    plan = Plan(("small",), (8, 16), (8, 16), 16, None, 30, 1, 0.0, 1e-9, False)
    result = measure(plan, accelerator, 1e9)
    assert {item.case.genes for item in result.rows} == {8}
    assert len(result.left_out) == 7  # five variants in the table, two backbones in the plot
    assert result.left_out[0].startswith("small dit, plain at 16 genes: a step of 1 would take about ")
    assert "dit" in tables(result)


def test_want_of_memory_leaves_a_comparison_out_and_the_run_goes_on(accelerator, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setattr("eval.benchmarks.steps._side_by_side", fail)
    plan = Plan(("small",), (8,), (8,), 16, None, 30, 1, 0.0, 20.0, False)
    result = measure(plan, accelerator, 1e9)
    assert result.left_out == [
        "one comparison, for want of memory on the GPU (CUDA out of memory. Tried to allocate 9 GiB.)"
    ]
    assert {item.part for item in result.rows} == {"growth"}


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_numbers_tables_and_a_picture(tmp_path, capsys):
    summary = main(
        sizes=("small",),
        genes=(12, 24),
        growth_genes=(12, 24),
        tokens=48,
        max_count=90,
        rounds=2,
        seconds=0.0,
        out=tmp_path / "out",
    )
    assert all(value > 0 for value in summary.values())
    printed = capsys.readouterr().out.strip().splitlines()
    assert printed[-1] == last_line(summary)
    assert [part.split("=")[0] for part in printed[-1].split()] == [
        "step_speedup",
        "head_memory_ratio",
        "latent_vs_dit",
    ]
    content = json.loads((tmp_path / "out" / "training.json").read_text())
    assert content["step_speedup"] == summary["step_speedup"]
    parts = [item["part"] for item in content["rows"]]
    assert {part: parts.count(part) for part in set(parts)} == {"step": 10, "head": 6, "growth": 4}
    assert all(len(item["seconds"]) == 2 for item in content["rows"])
    for backbone in ("dit", "latent"):
        assert sum(content["shares"][backbone].values()) == pytest.approx(1.0)
    assert (tmp_path / "out" / "training.md").read_text().endswith(f"{printed[-1]}\n")
    assert (tmp_path / "out" / "training.png").read_bytes().startswith(b"\x89PNG")


def test_the_figure_shows_both_backbones_with_their_exponents():
    rows = [
        row("growth", [3.0 * (genes / 500) ** power], genes=genes, backbone=backbone)
        for backbone, power in (("dit", 2.0), ("latent", 1.0))
        for genes in (500, 2000, 8000)
    ]
    canvas = figure({"device": "CPU", "precision": "float32"}, Result(rows))
    labels = [text.get_text() for text in canvas.axes[0].get_legend().get_texts()]
    assert "genes^2.00" in labels[0]
    assert "genes^1.00" in labels[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"genes": (0,)}, "--genes 0: expected at least 1"),
        ({"tokens": 0}, "--tokens 0: expected at least 1"),
        ({"query_genes": 0}, "--query-genes 0: expected at least 1"),
        ({"rounds": 0}, "--rounds 0: expected at least 1"),
        ({"longest": 0.0}, "longest above 0"),
    ],
)
def test_impossible_numbers_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        main(out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="is a file; expected the name of a folder"):
        main(out=tmp_path / "out")
