"""Properties of what can be seen of a run (log, score, curves, trackers), and of the ways to compute it faster."""

import importlib.util
import io
import json
import logging
import math
import re
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from torch._dynamo.testing import CompileCounter
from tqdm import tqdm
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_dcm.diffusion_dcm import keyed_generator, mask_counts
from modeling_dcm.layers_dcm import eager_attention
from tests.tiny_training import tiny_training
from training.config import TrainConfig
from training.data.command_line import AboveBars, user_errors
from training.loop.accelerator import attention_implementation, compile_blocks, tracker_names
from training.loop.log import (
    PEAK_FLOPS,
    TrainingLog,
    draw_curves,
    loss_still_falling,
    peak_flops,
)
from training.loop.step import MOST_SKIPPED, NotFinite, averaged_weights
from training.train import main

OPTIONS = {"max_steps": 4, "log_every": 2, "validate_every": 2, "save_every": 4}
OPTIONS |= {"score_every": 4, "score_cells": 24}


@pytest.fixture
def config(shards, tmp_path) -> TrainConfig:
    return tiny_training(shards, tmp_path / "checkpoint", **OPTIONS)


def lines(config: TrainConfig) -> list[dict[str, float]]:
    return [json.loads(line) for line in (config.out / "training.jsonl").read_text().splitlines()]


def test_a_training_that_was_too_short_is_told_by_its_validation_loss(tmp_path):
    def falling(*losses: float) -> float | None:
        lines = [{"step": 250 * (i + 1), "validation_loss": loss} for i, loss in enumerate(losses)]
        (tmp_path / "training.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in [*lines, {"step": 1}]))
        return loss_still_falling(tmp_path)

    assert falling(0.7, 0.6, 0.5) == pytest.approx(0.4)
    assert falling(0.6, 0.5, 0.499) is None
    assert falling(0.6) is None


def test_log_score_floor_utilisation_trackers_and_picture_of_a_run_whose_losses_no_score_disturbs(
    config, tmp_path, monkeypatch
):
    monkeypatch.setattr("training.loop.run.peak_flops", lambda device: 1e12)
    assert draw_curves(tmp_path) is None  # without a log
    main(replace(config, trackers="auto"))
    assert importlib.util.find_spec("tensorboard") is None or list((config.out / "trackers").rglob("events.*"))
    plain = replace(config, out=tmp_path / "plain", score_every=None)
    main(plain)
    losses = [[line["loss"] for line in lines(run) if "loss" in line] for run in (config, plain)]
    assert losses[0] == losses[1]
    first, validated, *_, score = lines(config)
    assert {"loss", "elbo", "gradient_norm", "learning_rate", "cells_per_second", "memory_gib"} <= first.keys()
    assert 0 < first["flop_utilisation"] < 1
    assert validated["validation_elbo"] > 0
    assert score["step"] == 4
    assert abs(score["score_mmd2"]) < 1
    assert {"score_mmd2_floor", "score_correlation_slope", "score_correlation_slope_floor"} <= score.keys()
    assert (config.out / "training_curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("backbone", ["latent", "dit"])
def test_all_that_runs_a_network_in_bf16_runs_attention_that_knows_no_float32(config, backbone, monkeypatch):
    """As flash attention does: steps, losses, scores and the entropy curve."""

    def stand_in(module, query, key, value, *arguments, **options):
        if {query.dtype, key.dtype, value.dtype} != {torch.bfloat16}:
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        return eager_attention(module, query, key, value, *arguments, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", stand_in)
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate allows one precision in a process
    try:
        main(replace(config, mixed_precision="bf16", attn="sdpa", backbone=backbone))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert "score_mmd2" in lines(config)[-1]
    assert json.loads((config.out / "config.json").read_text())["entropy_curve"]


def test_a_tracker_that_is_not_installed_or_not_known_is_refused_by_name(monkeypatch):
    monkeypatch.setattr("training.loop.accelerator.get_available_trackers", list)
    assert tracker_names("none") == tracker_names("auto") == []
    with pytest.raises(ValueError, match=r"tracker 'wandbb' is not installed, or none that .*; there are: auto, none"):
        tracker_names("wandbb")


class Processes:
    """What a log asks of the accelerator of a single process in fp16."""

    is_main_process, num_processes, device = True, 1, torch.device("cpu")

    def __init__(self, scaler: torch.amp.GradScaler | None):
        self.scaler = scaler

    def reduce(self, values: torch.Tensor, how: str) -> torch.Tensor:
        return values

    def log(self, values: dict[str, float], step: int) -> None:
        assert all(math.isfinite(value) for value in values.values())


def noted(config: TrainConfig, scaler, norms: list[float], loss: float = 1.0) -> TrainingLog:
    log = TrainingLog(config, 0, Processes(scaler), None)
    for norm in norms:
        log.note((torch.tensor(loss), torch.tensor(1.0), torch.tensor(norm)), 1e-3)
    return log


def test_with_fp16_steps_that_overflow_are_counted_and_are_a_failure_at_every_loss_scale_only(config):
    scaler = torch.amp.GradScaler("cpu")
    noted(config, scaler, [3.0, math.inf, math.nan, 1.0]).line(4)
    line = lines(config)[-1]
    assert line["gradient_norm"] == 2.0
    assert line["skipped_steps"] == 2
    noted(config, scaler, [math.inf] * 3).line(3)
    assert "gradient_norm" not in lines(config)[-1]
    with pytest.raises(NotFinite, match="the gradient norm is inf at step 2"):
        noted(config, None, [3.0, math.inf]).line(2)
    with pytest.raises(NotFinite, match="the loss is nan at step 1"):
        noted(config, scaler, [1.0], loss=math.nan).line(1)
    log = noted(config, scaler, [math.nan] * MOST_SKIPPED)
    log.check(MOST_SKIPPED)
    log.note((torch.tensor(1.0), torch.tensor(1.0), torch.tensor(math.nan)), 1e-3)  # at every loss scale
    with pytest.raises(NotFinite, match=f"the gradient norm is nan at step {MOST_SKIPPED + 1}"):
        log.check(MOST_SKIPPED + 1)


def test_peaks_are_known_by_the_device_name_and_not_for_a_cpu(monkeypatch):
    assert peak_flops(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    assert peak_flops(torch.device("cuda")) == PEAK_FLOPS["H100 PCIe"]


def test_attention_is_the_best_that_is_installed_and_fits(config, monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for has, expected in ((True, "flash_attention_2"), (False, "sdpa")):
        monkeypatch.setattr("training.loop.accelerator.is_flash_attn_2_available", lambda has=has: has)
        assert attention_implementation(config, gpu, "bf16") == expected
    assert attention_implementation(config, gpu, "no") == attention_implementation(config, cpu, "bf16") == "sdpa"
    with pytest.raises(ValueError, match=r"attn='flash_attention_2', but there is no flash attention: pip install"):
        attention_implementation(replace(config, attn="flash_attention_2"), gpu, "bf16")


def test_flash_attention_is_taken_from_the_hub_or_said_in_one_line_not_to_be_there(config, monkeypatch, caplog):
    caplog.set_level("INFO")
    gpu, asked = torch.device("cuda"), []

    def offline(repository):
        asked.append(repository)
        raise OSError("no network\nand a long story")

    monkeypatch.setattr("training.loop.accelerator.is_flash_attn_2_available", lambda: False)
    monkeypatch.setattr("training.loop.accelerator.is_kernels_available", lambda: True)
    monkeypatch.setattr("training.loop.accelerator.lazy_import_flash_attention", offline)
    assert attention_implementation(config, gpu, "bf16") == "sdpa"
    said = "its kernel can't be had from the Hub (no network): run once with a network"
    assert caplog.messages == [f"attention is PyTorch's own: {said}"]
    with pytest.raises(ValueError, match=re.escape(f"attn='flash_attention_2', but {said}, or take attn='sdpa'")):
        attention_implementation(replace(config, attn="flash_attention_2"), gpu, "bf16")
    monkeypatch.setattr("training.loop.accelerator.lazy_import_flash_attention", asked.append)
    assert attention_implementation(config, gpu, "bf16") == "flash_attention_2"
    assert asked == ["kernels-community/flash-attn2"] * 3


def batch_of(model, largest: int) -> dict[str, torch.Tensor]:
    generator = keyed_generator(0, 0)
    x_0 = torch.randint(0, largest + 1, (6, 7), generator=generator)
    special = {"mask_token_id": model.config.mask_token_id, "pad_token_id": model.config.pad_token_id}
    k = torch.tensor([1, 2, 4, 5, 6, 7])
    return {
        "input_ids": mask_counts(x_0, k, generator, **special),
        "labels": x_0,
        "cell_type_ids": torch.tensor([0, 1, 2, -1, 0, 1]),
        "perturbation_ids": torch.tensor([[0], [1], [2], [3], [-1], [0]]),
        "covariate_ids": torch.zeros(6, 2, dtype=torch.long),
        "library_size": x_0.sum(dim=1).float(),
    }


def gradients(model, batch) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("conditions_given", [True, False])
@pytest.mark.parametrize("largest", [0, 4])
def test_every_parameter_has_a_gradient_whatever_the_batch_holds(make_model, backbone, conditions_given, largest):
    """Processes that share a batch wait for each gradient: none may be missing without rare counts or conditions."""
    model = make_model(backbone, conditioned=True)
    batch = batch_of(model, largest)
    if not conditions_given:
        for name in ("cell_type_ids", "perturbation_ids", "covariate_ids"):
            batch[name] = torch.full_like(batch[name], -1)
        batch["library_size"] = -torch.ones(6)
    assert [name for name, gradient in gradients(model, batch).items() if gradient is None] == []


@pytest.mark.slow
def test_checkpointing_and_compiled_blocks_give_the_same_gradients(make_model, backbone):
    model = make_model(backbone, conditioned=True, num_hidden_layers=2)
    batch = batch_of(model, 4)
    expected = {name: gradient.clone() for name, gradient in gradients(model, batch).items()}
    model.gradient_checkpointing_enable()
    for name, gradient in gradients(model, batch).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
    model.gradient_checkpointing_disable()
    compile_blocks(model, backend="aot_eager")
    for name, gradient in gradients(model, batch).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


@pytest.mark.slow
def test_blocks_are_compiled_once_whatever_a_batch_holds_and_not_where_a_model_is_looked_at(make_model, backbone):
    """Rare counts, queries without one, validation batches and sampling have shapes of their own."""
    torch.compiler.reset()
    model = make_model(backbone, conditioned=True).train()
    compiled = CompileCounter()
    compile_blocks(model, backend=compiled)
    gradients(model, batch_of(model, 4))
    once = compiled.frame_count
    assert once == {"dit": 1, "latent": 3}[backbone]  # self-attention; besides, the ways into the latents and back
    for largest in (0, 1, 4):
        gradients(model, batch_of(model, largest))
    ema = [parameter.detach().clone() for parameter in model.parameters()]
    with averaged_weights(model, ema):
        model.generate(3, steps=4, library_size="null")
        model(**{name: value[:2] for name, value in batch_of(model, 4).items()})
    assert compiled.frame_count == once


def test_every_network_of_a_process_is_compiled_however_many_there_were(make_model):
    torch.compiler.reset()
    for heads in (1, 2, 3):  # shapes that torch's own limit, 8, is too low for
        model = make_model("latent", conditioned=True, hidden_size=4 * heads, num_attention_heads=heads)
        compiled = CompileCounter()
        compile_blocks(model, backend=compiled)
        gradients(model, batch_of(model, 4))
        assert compiled.frame_count == 3


def test_a_line_on_a_terminal_stands_alone_above_the_bar(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr("sys.stderr", terminal)
    with tqdm(total=3, desc="training", file=terminal, ncols=40):
        AboveBars(terminal).emit(logging.makeLogRecord({"msg": "2 cells have no count"}))
        with pytest.raises(SystemExit), user_errors():
            raise ValueError("no such file")
    for line in ("2 cells have no count", "error: no such file"):
        before, after = terminal.getvalue().split(line)
        assert before.endswith("\r"), before  # the bar was cleared
        assert after.startswith("\n\rtraining:"), after
    with pytest.raises(SystemExit, match="130"), user_errors():
        raise KeyboardInterrupt
    assert terminal.getvalue().endswith("interrupted\n")
