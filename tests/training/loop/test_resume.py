"""Properties of saved runs: which states are kept, which are refused, and what is left when something goes wrong."""

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from modeling_dcm import DCMForDenoising
from tests.tiny_training import tiny_training
from tokenization import DCMTokenizer
from training.config import TrainConfig
from training.loop import step as one_step
from training.loop.resume import all_states, newest_state, remove_leftovers, restore_state, run_facts, save_state
from training.loop.step import build_optimizer
from training.train import main

OFTEN = {"log_every": 2, "validate_every": 2, "save_every": 2, "learning_rate_schedule": "constant"}


@pytest.fixture
def config(shards, tmp_path) -> TrainConfig:
    return tiny_training(shards, tmp_path / "checkpoint", **OFTEN)


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory) -> TrainConfig:
    config = tiny_training(shards, tmp_path_factory.mktemp("runs") / "checkpoint", **OFTEN)
    main(config)
    return config


@pytest.fixture
def copy(finished, tmp_path) -> TrainConfig:
    """A finished run of its own, to be resumed as it was saved."""
    shutil.copytree(finished.out, tmp_path / "copy")
    facts = json.loads((finished.out / "checkpoints" / "step-6" / "state.json").read_text())
    return replace(finished, out=tmp_path / "copy", resume=True, mixed_precision=facts["options"]["mixed_precision"])


def parts(config: TrainConfig, make_model):
    model = make_model(conditioned=True, fresh=True)
    optimizer = build_optimizer(model, config)
    return model, [p.detach().clone() for p in model.parameters()], optimizer


@pytest.fixture
def tokenizer() -> DCMTokenizer:
    return DCMTokenizer(genes=[f"g{i}" for i in range(7)], max_count=4)


def test_the_last_states_are_kept_and_the_best_by_validation(config, make_model, tokenizer):
    kept = replace(config, keep_last=2, keep_best=1)
    written = parts(kept, make_model)
    for step, loss in ((2, 3.0), (4, 1.0), (6, None), (8, 2.0), (10, None)):
        save_state(kept, {"options": {}}, step, *written, tokenizer, validation={"validation_loss": loss})
    assert [state.name for state in all_states(kept.out)] == ["step-4", "step-8", "step-10"]
    for step, distance in ((12, 0.2), (14, 0.1), (16, 0.3), (18, 0.3)):  # cells were scored: that decides
        seen = {"validation_loss": 1 / step, "score_distance": distance}
        save_state(kept, {"options": {}}, step, *written, tokenizer, validation=seen)
    assert [state.name for state in all_states(kept.out)] == ["step-14", "step-16", "step-18"]
    save_state(replace(kept, keep_last=1, keep_best=0), {"options": {}}, 20, *written, tokenizer)
    assert [state.name for state in all_states(kept.out)] == ["step-20"]


def test_weights_averages_moments_and_loss_scale_come_back(config, make_model, tokenizer):
    model, ema, optimizer = parts(config, make_model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    save_state(config, {"options": {}}, 3, model, ema, optimizer, tokenizer, scaler=scaler)
    other, averages, fresh = parts(config, lambda **options: make_model(seed=1, **options))
    restored = torch.amp.GradScaler("cpu", init_scale=4.0)
    assert restore_state(config.out / "checkpoints" / "step-3", other, averages, fresh, restored) == 3
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(averages, ema, strict=True))
    here, there = fresh.state_dict()["state"], optimizer.state_dict()["state"]
    assert all(torch.equal(here[index][key], there[index][key]) for index in there for key in there[index])
    assert restored.state_dict() == scaler.state_dict()


def resumed_from(config: TrainConfig, processes: int = 1) -> Path | None:
    return newest_state(config, run_facts(config, processes))


def test_what_made_a_state_is_known_and_only_how_the_same_numbers_are_computed_may_change_on_resume(copy, tmp_path):
    state = all_states(copy.out)[-1]
    model, tokenizer = DCMForDenoising.from_pretrained(state), DCMTokenizer.from_pretrained(state)
    assert model.generate(**tokenizer.conditions(num_cells=2), steps=2).shape == (2, 15)
    facts = json.loads((state / "state.json").read_text())
    assert facts["versions"]["torch"]
    assert facts["hashes"] == run_facts(copy, 1)["hashes"]
    assert facts["validation_loss"] > 0
    other = replace(copy, attn="eager", compile=True, gradient_checkpointing=True, max_steps=7)
    assert resumed_from(other).name == "step-6"
    with pytest.raises(ValueError, match="num_processes: 1 then, 2 now"):
        resumed_from(copy, 2)
    with pytest.raises(ValueError, match=r"learning_rate: 0.002 then, 0.1 now"):
        resumed_from(replace(copy, learning_rate=0.1))
    moved = tmp_path / "moved"
    shutil.copytree(copy.data, moved)
    assert resumed_from(replace(copy, data=moved)).name == "step-6"
    shutil.copy(*(next((moved / split).glob("*.parquet")) for split in ("validation", "train")))
    with pytest.raises(ValueError, match=r"step-6 cannot be resumed: .*moved' does not hold the data it was trained"):
        resumed_from(replace(copy, data=moved))


def test_the_weights_are_saved_before_the_entropy_curve_is_measured(config, monkeypatch):
    def dies(self, model):
        saved = json.loads((config.out / "config.json").read_text())
        dies.found = set(load_file(config.out / "model.safetensors")), saved
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr("training.loop.validation.Validation.entropy_curve", dies)
        main(config)
    names, saved = dies.found
    assert set(DCMForDenoising.from_pretrained(config.out).state_dict()) == names
    main(replace(config, resume=True))
    again = json.loads((config.out / "config.json").read_text())
    assert again.pop("entropy_curve")["entropy"]
    assert again == {name: value for name, value in saved.items() if name != "entropy_curve"}


def test_only_a_constant_schedule_can_be_prolonged(copy):
    assert resumed_from(replace(copy, max_steps=9)).name == "step-6"
    cosine = replace(copy, learning_rate_schedule="cosine")
    for state in all_states(copy.out):
        facts = json.loads((state / "state.json").read_text())
        facts["options"]["learning_rate_schedule"] = "cosine"
        (state / "state.json").write_text(json.dumps(facts))
    said = r"max_steps: 6 then, 9 now; a cosine schedule ends at max_steps, only a constant one can be prolonged\): "
    with pytest.raises(ValueError, match=said + "give the same ones, or start another run from .* with --init-from .*"):
        resumed_from(replace(cosine, max_steps=9))


def test_leftovers_of_a_killed_run_are_removed_and_a_damaged_state_is_named_with_the_way_out(copy):
    (copy.out / "checkpoints" / ".step-9.0123.part").mkdir()
    (copy.out / ".final-abc").mkdir()
    remove_leftovers(copy.out)
    assert not list(copy.out.rglob(".*"))
    weights = all_states(copy.out)[-1] / "state.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"the state .*step-6' is damaged .*remove the folder to go on from the state"):
        main(copy)


def test_a_state_of_a_version_with_another_network_is_named_with_what_differs(copy):
    weights = all_states(copy.out)[-1] / "model.safetensors"
    tensors = load_file(weights)
    tensors["head.of_before"] = tensors.pop("head.log_size")
    save_file(tensors, weights, metadata={"format": "pt"})
    said = r"step-6 cannot be resumed: another version .* differs in head.log_size, head.of_before; start again with"
    with pytest.raises(ValueError, match=said):
        main(copy)


def test_a_full_disk_leaves_the_last_state_and_says_so(config, monkeypatch):
    main(replace(config, max_steps=2))

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("training.loop.resume.save_file", full)
    with pytest.raises(OSError, match=r"step-4' could not be written .*No space left.* step-2 is as it was: make room"):
        main(replace(config, max_steps=6, resume=True))
    monkeypatch.undo()
    assert [path.name for path in (config.out / "checkpoints").iterdir()] == ["step-2"]


def test_a_disk_that_is_full_at_the_end_leaves_the_last_state_and_says_so(config, monkeypatch):
    def full(*arguments):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("training.loop.resume.add_shipped_files", full)
    with pytest.raises(OSError, match=r"checkpoint' could not be written .*No space left.* step-6 is as it was: make"):
        main(config)
    monkeypatch.undo()
    assert not (config.out / "model.safetensors").exists()
    assert not list(config.out.glob(".*"))
    main(replace(config, resume=True))
    assert (config.out / "model.safetensors").exists()


def test_a_loss_that_is_not_finite_ends_the_run_at_the_last_good_state(config, monkeypatch):
    def broken(*arguments, real=one_step.take_step, **options):
        broken.steps += 1
        loss, elbo, norm = real(*arguments, **options)
        return (loss * float("nan") if broken.steps == 3 else loss), elbo, norm

    broken.steps = 0
    monkeypatch.setattr(one_step, "take_step", broken)
    with pytest.raises(ValueError, match=r"the loss is nan at step 3; its noised batch is in .*--init-from .*step-2,"):
        main(config)
    assert [state.name for state in all_states(config.out)] == ["step-2"]
    batch = load_file(config.out / "not-finite-step-3.safetensors")
    assert batch["input_ids"].shape == (8, 15)
    averages = load_file(config.out / "checkpoints" / "step-2" / "model.safetensors")
    assert all(bool(value.isfinite().all()) for value in averages.values() if value.is_floating_point())


def test_time_that_is_over_ends_with_a_checkpoint_and_can_be_prolonged(config):
    main(replace(config, max_time=1e-9))
    assert (config.out / "model.safetensors").exists()
    assert [state.name for state in all_states(config.out)] == ["step-1"]
    main(replace(config, resume=True))
    assert [state.name for state in all_states(config.out)][-1] == "step-6"


def test_a_table_of_perturbations_is_neither_changed_nor_left_out_nor_added_on_the_way(
    config, perturbation_table, tmp_path
):
    plain, with_table = (replace(config, out=config.out / name, max_steps=2) for name in ("plain", "table"))
    main(plain)
    with pytest.raises(ValueError, match="step-2 was trained without --perturbation-embeddings: leave it out"):
        main(replace(plain, resume=True, perturbation_embeddings=perturbation_table))
    main(replace(with_table, perturbation_embeddings=perturbation_table))
    with pytest.raises(ValueError, match="step-2 was trained with --perturbation-embeddings: give the same file again"):
        main(replace(with_table, resume=True))
    other = tmp_path / "other.safetensors"
    save_file({name: 2 * vector for name, vector in load_file(perturbation_table).items()}, other)
    with pytest.raises(ValueError, match="does not hold the perturbation_embeddings it was trained with"):
        main(replace(with_table, resume=True, perturbation_embeddings=other))
