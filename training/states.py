"""Save and restore the state of a training run, in safetensors and JSON, written aside and renamed.

A state is a folder `OUT/checkpoints/step-N` with everything that the loop needs to go on. Knows nothing of data.
"""

import json
import logging
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from modeling_dcm import DCMForDenoising
from tokenization.files import written_aside
from training.config import TrainConfig

# options that may differ between a run and its continuation
FREE_TO_CHANGE = ("data", "out", "config", "resume", "log_every", "validate_every", "validation_cells", "save_every")


def newest_state(config: TrainConfig, num_processes: int, *, log: logging.Logger | None) -> Path | None:
    """The newest state of ``config.out`` when resuming; None starts afresh.

    Raises:
        ValueError: without ``resume`` the folder holds a run already, or the state was trained with other options.
    """
    folder = config.out / "checkpoints"
    states = sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    if not config.resume:
        if states or (config.out / "model.safetensors").exists():
            raise ValueError(f"{str(config.out)!r} holds a run already: add --resume, or choose another --out")
        return None
    if not states:
        if log:
            log.info("nothing to resume under %s: starting afresh", folder)
        return None
    before = json.loads((states[-1] / "options.json").read_text())
    now = {**_options(config), "num_processes": num_processes}
    differ = [name for name in now if name not in FREE_TO_CHANGE and before.get(name) != now[name]]
    differ = [name for name in differ if name != "max_steps" or config.learning_rate_schedule != "constant"]
    if differ:
        changes = ", ".join(f"{name}: {before.get(name)!r} then, {now[name]!r} now" for name in differ)
        raise ValueError(f"{states[-1].name} cannot be resumed with other options ({changes})")
    if log:
        log.info("resuming from %s", states[-1])
    return states[-1]


def save_state(
    config: TrainConfig,
    num_processes: int,
    step: int,
    model: DCMForDenoising,
    ema: list[torch.Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write `checkpoints/step-N` and remove the states before it."""
    folder = config.out / "checkpoints"
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"ema.{index}": average for index, average in enumerate(ema)}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in moments.items()}
    with written_aside(folder / f"step-{step}") as aside:
        aside.mkdir(parents=True)
        save_file({name: value.contiguous().clone() for name, value in tensors.items()}, aside / "state.safetensors")
        options = {**_options(config), "num_processes": num_processes}
        (aside / "options.json").write_text(json.dumps(options, indent=1))
        (aside / "step.json").write_text(json.dumps({"step": step}))
    for other in folder.glob("step-*"):
        if other.name != f"step-{step}":
            shutil.rmtree(other)


def restore_state(
    folder: Path, model: DCMForDenoising, ema: list[torch.Tensor], optimizer: torch.optim.Optimizer
) -> int:
    """Load a state into model, average and optimiser; return the number of steps done."""
    tensors = load_file(folder / "state.safetensors")
    model.load_state_dict(_part(tensors, "model."))
    for index, average in enumerate(ema):
        average.copy_(tensors[f"ema.{index}"])
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in _part(tensors, "optimizer.").items():
        index, key = name.split(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return json.loads((folder / "step.json").read_text())["step"]


def save_final(config: TrainConfig, model: DCMForDenoising, tokenizer) -> None:
    """Write the checkpoint that users load: every file aside, then renamed, the weights last."""
    with tempfile.TemporaryDirectory(dir=config.out, prefix=".final-") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (Path(folder) / "training_options.json").write_text(json.dumps(_options(config), indent=1))
        for file in sorted(Path(folder).iterdir(), key=lambda path: path.name == "model.safetensors"):
            os.replace(file, config.out / file.name)


def _options(config: TrainConfig) -> dict[str, object]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
