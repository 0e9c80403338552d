"""Save and restore the state of a training run, in safetensors and JSON, written aside and renamed.

A state is a folder `OUT/checkpoints/step-N`: the averaged weights with configuration and tokenizer, a checkpoint that
loads like any other, and beside them all else that the loop needs to go on.
"""

import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import modeling_dcm
import tokenization
from modeling_dcm import DCMConfig, DCMForDenoising
from modeling_dcm.pipeline_dcm import CUSTOM_PIPELINES
from tokenization import DCMTokenizer
from tokenization.labels_dcm import shortened
from training.config import TrainConfig
from training.data.command_line import version_of
from training.data.files import sha256_of, share, written_aside
from training.data.shards import REMOTE
from training.loop.step import averaged_weights, own_part, split_like

logger = logging.getLogger(__name__)

# options that may differ between a run and its continuation; what the paths hold is compared by its hash
FREE_TO_CHANGE = {"data", "out", "config", "resume", "init_from", "perturbation_embeddings", "max_time"}
FREE_TO_CHANGE |= {"log_every", "validate_every", "score_every", "save_every", "keep_last", "keep_best", "trackers"}
FREE_TO_CHANGE |= {"validation_cells", "score_cells", "attn", "compile", "gradient_checkpointing"}
PART = "state-of-process-{:05d}.safetensors"  # of a network that is split over the processes
RANKED_BY = ("score_distance", "validation_loss")
PACKAGES = ("discrete-cell-models", "torch", "transformers", "accelerate", "datasets", "safetensors", "numpy")


def newest_state(config: TrainConfig, facts: dict[str, object]) -> Path | None:
    """The newest state of ``config.out`` when resuming; None starts afresh. ``facts`` as of :func:`run_facts`."""
    states = all_states(config.out)
    if not config.resume:
        if states or (config.out / "model.safetensors").exists():
            raise ValueError(f"{str(config.out)!r} holds a run already: add --resume, or choose another --out")
        return None
    if not states:
        logger.info("nothing to resume under %s: starting afresh", config.out / "checkpoints")
        return None
    _check_same_run(config, facts, states[-1])
    logger.info("resuming from %s", states[-1])
    return states[-1]


def all_states(out: Path) -> list[Path]:
    """Folders of the states of a run, oldest first."""
    return sorted((out / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def _check_same_run(config: TrainConfig, facts: dict[str, object], state: Path) -> None:
    before = _facts(state)
    defaults = {field.name: field.default for field in fields(TrainConfig) if field.default is not MISSING}
    then = {**defaults, **before["options"], "num_processes": before["num_processes"]}
    then["is_split"] = before.get("is_split", False)
    now = {**config.options(), **{name: facts[name] for name in ("num_processes", "is_split")}}
    differ = [name for name in now if name not in FREE_TO_CHANGE and then.get(name) != now[name]]
    if config.learning_rate_schedule == "constant" and "max_steps" in differ:
        differ.remove("max_steps")
    if differ:
        changes = ", ".join(f"{name}: {then.get(name)!r} then, {now[name]!r} now" for name in differ)
        hint = "; a cosine schedule ends at max_steps, only a constant one can be prolonged" * ("max_steps" in differ)
        raise ValueError(
            f"{state.name} cannot be resumed with other options ({changes}{hint}): give the same ones, or start "
            f"another run from its weights with --init-from {state} and another --out"
        )
    hashes = facts["hashes"]
    for what, value in (before["hashes"] | hashes).items():
        if what not in hashes:
            raise ValueError(f"{state.name} was trained with --{what.replace('_', '-')}: give the same file again")
        if what not in before["hashes"]:
            raise ValueError(f"{state.name} was trained without --{what.replace('_', '-')}: leave it out")
        if before["hashes"][what] != value:
            path = str(getattr(config, what))
            raise ValueError(f"{state.name} cannot be resumed: {path!r} does not hold the {what} it was trained with")


def _hashes(config: TrainConfig) -> dict[str, str]:
    """SHA-256 of what training reads: shards, their vocabularies, the table of perturbations.

    Of a shard the size and the footer are looked at, where Parquet says what lies where with which extremes: the counts
    of a hundred million cells would take longer than many a run."""
    data = config.shards
    digest = hashlib.sha256(sha256_of(data / "tokenizer").encode())
    if (data / REMOTE).is_file():
        digest.update((data / REMOTE).read_bytes())
    for shard in [file for split in ("train", "validation") for file in sorted(data.glob(f"{split}/*.parquet"))]:
        digest.update(f"{shard.relative_to(data).as_posix()} {shard.stat().st_size}\n".encode() + _footer(shard))
    hashes = {"data": digest.hexdigest()}
    if config.perturbation_embeddings is not None:
        hashes["perturbation_embeddings"] = sha256_of(config.perturbation_embeddings)
    return hashes


def _footer(shard: Path) -> bytes:
    """The metadata at the end of a Parquet file, whose length is in the four bytes before the last four."""
    with shard.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 8, 0))
        length = int.from_bytes(file.read(4), "little")
        file.seek(max(size - 8 - length, 0))
        return file.read(length)


def run_facts(config: TrainConfig, num_processes: int, *, is_split: bool = False) -> dict[str, object]:
    """What a state says of its run; ``is_split`` where the network is split over the processes."""
    return {
        "num_processes": num_processes,
        "is_split": is_split,
        "options": config.options(),
        "hashes": _hashes(config),
        "versions": {name: version_of(name) for name in PACKAGES},
    }


def save_state(
    config: TrainConfig,
    facts: dict[str, object],
    step: int,
    model: DCMForDenoising,
    ema: list[torch.Tensor],
    optimizer: torch.optim.Optimizer | None,
    tokenizer: DCMTokenizer,
    *,
    scaler: torch.amp.GradScaler | None = None,
    validation: dict[str, float] | None = None,
) -> None:
    """Write `checkpoints/step-N`, then remove the states that are neither among the last nor among the best.

    Without an ``optimizer`` each process has written its own part of the state, :func:`save_part`; ``model`` is whole.
    ``validation`` is what was seen there: the best have the least ``score_distance`` of generated cells; where no cells
    were scored, the least ``validation_loss``.
    """
    folder = config.out / "checkpoints" / f"step-{step}"
    seen = {name: (validation or {}).get(name) for name in RANKED_BY}
    said = {**facts, "step": step, **seen, "scaler": scaler and scaler.state_dict()}
    with _failure_named(folder, config.out), written_aside(folder) as aside:
        aside.mkdir(parents=True)
        with averaged_weights(model, ema) as averaged:
            averaged.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        if optimizer is None:
            for rank in range(facts["num_processes"]):
                os.replace(_waiting_part(config.out, step, rank), aside / PART.format(rank))
        else:
            save_file(_tensors(model, optimizer), aside / "state.safetensors")
        (aside / "state.json").write_text(json.dumps(said, indent=1))
        for file in aside.iterdir():
            _make_safe(file)
    _remove_others(config)


def save_part(
    out: Path, step: int, rank: int, model: torch.nn.Module, ema: list[torch.Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Write what this process holds of a network that is split, of its averages and of the optimiser's moments. It
    waits under a name of its own for the other parts, with which :func:`save_state` makes it a state."""
    names = (name for name, _ in model.named_parameters())
    averages = {f"average.{name}": average.clone() for name, average in zip(names, ema, strict=True)}
    place = _waiting_part(out, step, rank)
    place.parent.mkdir(parents=True, exist_ok=True)
    with _failure_named(place, out):
        save_file(_tensors(model, optimizer) | averages, place)
        _make_safe(place)


def _make_safe(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _waiting_part(out: Path, step: int, rank: int) -> Path:
    return out / "checkpoints" / f".step-{step}.{PART.format(rank)}"


def _tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What this process holds of the weights and of the optimiser's moments."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in moments.items()}
    return {name: own_part(value).contiguous().clone() for name, value in tensors.items()}


@contextmanager
def _failure_named(what: Path, out: Path) -> Iterator[None]:
    """Turn what writing raises into one OSError that says what is left, and the way out."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(out).free / 2**30
        earlier = ", ".join(state.name for state in all_states(out)[-1:]) or "nothing"
        raise OSError(
            f"{str(what)!r} could not be written ({error}; {free:.2f} GiB are free there); {earlier} is as it was: "
            "make room, and go on with --resume"
        ) from error


def _remove_others(config: TrainConfig) -> None:
    states, ranks = all_states(config.out), {}
    for state in states:
        seen = [_facts(state).get(name) for name in RANKED_BY]
        if seen != [None] * len(RANKED_BY):
            ranks[state] = [math.inf if value is None else value for value in seen]
    best = sorted(ranks, key=ranks.get)
    for state in set(states) - set(states[-config.keep_last :]) - set(best[: config.keep_best]):
        old = state.with_name(f".{state.name}.old")
        os.replace(state, old)  # a kill while it is being removed must not leave half a state
        shutil.rmtree(old)


def remove_leftovers(out: Path) -> None:
    """Remove what a killed run left while it was writing or removing a state."""
    for pattern in ("checkpoints/.step-*", ".final-*"):
        for path in out.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def load_state_model(folder: Path, config: TrainConfig) -> tuple[DCMForDenoising, DCMTokenizer]:
    """Load the network, with averaged weights, and the tokenizer of a state.

    Raises:
        ValueError: the state is damaged, or of a version whose network has other weights.
    """
    with _damage_named(folder):
        options = {"config": DCMConfig.from_pretrained(folder), "attn_implementation": config.attn}
        model, loading = DCMForDenoising.from_pretrained(folder, **options, output_loading_info=True)
        tokenizer = DCMTokenizer.from_pretrained(folder)
    differ = sorted({*loading["missing_keys"], *loading["unexpected_keys"]})
    if differ:
        raise ValueError(
            f"{folder.name} cannot be resumed: another version of this package wrote it, whose network differs in "
            f"{shortened(differ, 3)}; start again with another --out"
        )
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model.train(), tokenizer


def restore_state(
    folder: Path,
    model: DCMForDenoising,
    ema: list[torch.Tensor],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None = None,
    *,
    part: int | None = None,
) -> int:
    """Load a state into model, average, optimiser and fp16's loss scaler; return the number of steps done. Of a network
    that is split, each process loads its ``part``."""
    with _damage_named(folder):
        tensors = load_file(folder / ("state.safetensors" if part is None else PART.format(part)))
        averages = load_file(folder / "model.safetensors") if part is None else {}
    values = model.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        of, _, name = name.partition(".")
        if of == "model":
            own_part(values[name]).copy_(value)
        elif of == "average":
            averages[name] = value
        else:
            index, key = name.split(".")
            like = parameters[int(index)]
            state.setdefault(int(index), {})[key] = value if key == "step" else split_like(value, like)
    for (name, _), average in zip(model.named_parameters(), ema, strict=True):
        average.copy_(averages[name])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    facts = _facts(folder)
    if scaler is not None and facts["scaler"] is not None:
        scaler.load_state_dict(facts["scaler"])
    return facts["step"]


def save_final(config: TrainConfig, model: DCMForDenoising, tokenizer: DCMTokenizer) -> None:
    """Write the checkpoint that users load: every file aside, then renamed, the weights last."""
    out = config.out
    with _failure_named(out, out), tempfile.TemporaryDirectory(dir=out, prefix=".final-") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        add_shipped_files(Path(folder))
        (Path(folder) / "training_options.json").write_text(json.dumps(config.options(), indent=1))
        share(folder)
        for file in sorted(Path(folder).iterdir(), key=lambda path: path.name == "model.safetensors"):
            os.replace(file, out / file.name)


def add_shipped_files(folder: Path) -> None:
    """Add pipeline and endpoint handler to a checkpoint, which works without this package then; what is there stays. A
    folder without code, as those in this repository, gets all of it."""
    has_code = (folder / "modeling_dcm.py").exists()
    names = ("handler.py", "pipeline_dcm.py" if has_code else "*_dcm.py")
    packages = [Path(package.__file__).parent for package in (modeling_dcm, tokenization)]
    for path in (path for package in packages for name in names for path in package.glob(name)):
        if not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text())
    said = {"custom_pipelines": CUSTOM_PIPELINES} | config
    (folder / "config.json").write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")


def save_config(config: TrainConfig, model: DCMForDenoising) -> None:
    """Write the final checkpoint's configuration again: aside, then renamed."""
    with written_aside(config.out / "config.json") as aside:
        model.config.to_json_file(aside)


@contextmanager
def _damage_named(folder: Path) -> Iterator[None]:
    """Turn what reading a damaged state raises into one error that names the folder."""
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"the state {str(folder)!r} is damaged ({error}): remove the folder to go on from the state before it, or "
            "afresh if it is the only one"
        ) from error


def _facts(state: Path) -> dict[str, object]:
    with _damage_named(state):
        return json.loads((state / "state.json").read_text())
