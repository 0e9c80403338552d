"""Prepare what the loop of `training/train.py` works with, write what is due after each of its steps, and say when it
is to stop before the last one."""

import os
import signal
import threading
import time
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from modeling_dcm import DCMConfig, DCMForDenoising
from tokenization import DCMTokenizer
from training.config import TrainConfig
from training.data.files import written_aside
from training.data.loader import Cells
from training.loop import resume
from training.loop.accelerator import attention_implementation, compile_blocks, compiles, start_trackers
from training.loop.batches import TrainBatches
from training.loop.fine_tune import load_source, merged_tokenizer, shaped_like
from training.loop.log import TrainingLog, draw_curves, peak_flops, training_flops
from training.loop.start import build_model, build_tokenizer, empty_model, open_cells
from training.loop.step import NotFinite, build_optimizer, own_part, whole_averages
from training.loop.told_effects import training_effects
from training.loop.validation import Validation

SAVED_AFTER_SIGNAL = 75  # exit code, EX_TEMPFAIL of sysexits.h: the state is saved, start again with --resume
SAME_KEY = 1.0  # seconds: launchers pass Ctrl-C on to processes that the terminal has sent it already
AGREE_EVERY = 5  # steps between agreements of several processes


@dataclass(frozen=True)
class Run:
    """What a run works with."""

    config: TrainConfig
    accelerator: Accelerator
    network: DCMForDenoising  # as it is saved; the accelerator wraps it for the forward pass
    ema: list[torch.Tensor]  # averages of its parameters
    optimizer: torch.optim.Optimizer
    tokenizer: DCMTokenizer
    train_batches: TrainBatches
    validation: Validation | None  # of the main process
    log: TrainingLog
    facts: dict[str, object]  # see `run_facts`
    whole: DCMForDenoising | None  # of the main process, to look at, where FSDP2 has split the network

    def as_whole(self) -> tuple[DCMForDenoising | None, list[torch.Tensor]]:
        """The network and its averages as the main process looks at them and saves them; all processes call it."""
        if not self.facts["is_split"]:
            return self.network, self.ema
        return self.whole, whole_averages(self.ema, self.network)


def prepare_run(config: TrainConfig, accelerator: Accelerator) -> tuple[Run, torch.nn.Module, int]:
    """Return what the loop works with, the network as it is called, and the number of steps already done."""
    attn = attention_implementation(config, accelerator.device, accelerator.mixed_precision)
    config = replace(config, attn=attn, mixed_precision=accelerator.mixed_precision)
    is_split = accelerator.is_fsdp2
    facts = resume.run_facts(config, accelerator.num_processes, is_split=is_split)
    if len(set(gather_object([facts["hashes"]["data"]]))) > 1:
        raise ValueError(f"processes see different files in {str(config.data)!r}: copy the same shards to every node")
    network, tokenizer, cells, state = prepare_start(config, accelerator, facts)
    effects = training_effects(network, cells)
    optimizer, whole = build_optimizer(network, config), None
    if is_split:
        whole = deepcopy(network).to(accelerator.device) if accelerator.is_main_process else None
        network.get_input_embeddings = lambda: None  # accelerate asks for them, to split them apart
    if compiles(config, accelerator.device):
        compile_blocks(network)
    # buffers are the same everywhere: no need to send them around at each step
    buffers = [name for name, _ in network.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, buffers)
    model, optimizer = accelerator.prepare(network, optimizer)
    rank, device = accelerator.process_index, accelerator.device
    ema = [own_part(parameter.detach()).clone().float() for parameter in network.parameters()]
    part, start = rank if is_split else None, 0
    if state is not None:
        start = resume.restore_state(state, network, ema, optimizer, accelerator.scaler, part=part)
    told = {"state": network.state if network.config.state_dim else None, "effects": effects}
    of_run = {"rank": rank, "world": accelerator.num_processes, "device": device, **told}
    train_batches = TrainBatches(cells, config, network.config, **of_run)
    validation = None
    if accelerator.is_main_process:
        validation = Validation(config, tokenizer, cells, accelerator.autocast)
    flops, peak = training_flops(network.config, len(tokenizer.genes), config.query_genes), peak_flops(device)
    log = TrainingLog(config, start, accelerator, flops / peak if peak else None, train_batches)
    start_trackers(accelerator, config)
    run = Run(config, accelerator, network, ema, optimizer, tokenizer, train_batches, validation, log, facts, whole)
    return run, model, start


def prepare_start(
    config: TrainConfig, accelerator: Accelerator, facts: dict[str, object]
) -> tuple[DCMForDenoising, DCMTokenizer, Cells, Path | None]:
    """Return network, tokenizer and training cells, of the state to resume from or new ones, and that state.

    The first process reads the cells to know what a new network starts from, and sends the others what it found;
    effects of perturbations are estimated by each.
    """
    if accelerator.is_main_process:
        resume.remove_leftovers(config.out)
    with accelerator.local_main_process_first():
        state = resume.newest_state(config, facts)
        if state is not None:
            model, tokenizer = resume.load_state_model(state, config)
            return model, tokenizer, open_cells(config, "train", tokenizer), state
        source = load_source(config.init_from) if config.init_from else None
        if source is not None:
            config = shaped_like(config, source)
        tokenizer = build_tokenizer(config)
        if source is not None:
            tokenizer = merged_tokenizer(tokenizer, source.tokenizer)
        cells = open_cells(config, "train", tokenizer)
        built = build_model(config, tokenizer, cells, source) if accelerator.is_main_process else None
    return _sent_to_all(built, config, accelerator), tokenizer, cells, None


def _sent_to_all(built: DCMForDenoising | None, config: TrainConfig, accelerator: Accelerator) -> DCMForDenoising:
    """The network that the first process ``built``, in every process."""
    if accelerator.num_processes == 1:
        return built
    said = [None if built is None else built.config.to_dict()]
    broadcast_object_list(said)
    network = empty_model(DCMConfig.from_dict(said[0]), config) if built is None else built
    for value in network.state_dict().values():
        value.copy_(broadcast(value.to(accelerator.device)))
    return network


def write_what_is_due(run: Run, done: int, reason: str | None) -> None:
    """Log, validate, score and save after step number ``done``, which is the last one if there is a ``reason``."""
    config, log = run.config, run.log
    last = done == config.max_steps or reason == "time"
    validate = done % config.validate_every == 0 or last
    save = done % config.save_every == 0 or last or reason == "signal"
    try:
        if done % config.log_every == 0 or last:
            log.line(done)
        elif validate or save:
            log.check(done)
    except NotFinite as error:
        raise ValueError(_explained(error, run)) from error
    score = config.score_every is not None and (done % config.score_every == 0 or last)
    if not (validate or score or save):
        return
    network, ema = run.as_whole()
    if save and run.facts["is_split"]:
        resume.save_part(config.out, done, run.accelerator.process_index, run.network, run.ema, run.optimizer)
        run.accelerator.wait_for_everyone()
    if not run.accelerator.is_main_process:
        return
    with log.paused():
        seen = run.validation.losses(network, ema) if validate else {}
        if validate:
            log.write({"step": done, **seen})
        if score:
            scores = run.validation.score(network, ema)
            log.write({"step": done, **scores})
            seen |= scores
        if save:
            parts = (network, ema, None if run.facts["is_split"] else run.optimizer, run.tokenizer)
            resume.save_state(config, run.facts, done, *parts, scaler=run.accelerator.scaler, validation=seen)
            draw_curves(config.out)


def _explained(error: NotFinite, run: Run) -> str:
    """Write the batches of the step that went wrong, and say where, and what can be done."""
    config, of_run = run.config, run.train_batches
    first = (error.step - 1) * config.gradient_accumulation_steps
    batches = list(islice(of_run.starting_at(first), config.gradient_accumulation_steps))
    names = [name for name, value in batches[0].items() if torch.is_tensor(value)]
    tensors = {name: torch.cat([batch[name] for batch in batches]).cpu().contiguous() for name in names}
    of_process = f"-process-{of_run.rank}" if of_run.world > 1 else ""
    file = config.out / f"not-finite-step-{error.step}{of_process}.safetensors"
    with written_aside(file) as aside:
        save_file(tensors, aside)
    good = resume.all_states(config.out)[-1:]
    way_out = f"go on from the last good state with --init-from {good[0]}" if good else "start again"
    return f"{error}; its noised batch is in {str(file)!r}; {way_out}, a lower --learning-rate and another --out"


class Stopping:
    """When to stop before the last step: a signal to end (SIGTERM of Slurm's pre-emption, or Ctrl-C, a second of which
    ends the process at once), or the end of the time given.

    ``with Stopping(accelerator, minutes) as stopping:``, then ``stopping.reason(step)`` after each step.
    """

    def __init__(self, accelerator: Accelerator, max_time: float | None):
        self.accelerator = accelerator
        self.until = float("inf") if max_time is None else time.monotonic() + 60 * max_time
        self.signalled: float | None = None  # when
        self.before = {}

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is threading.main_thread():  # Python sets handlers nowhere else
            self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error) -> None:
        for number, before in self.before.items():
            signal.signal(number, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signalled is None:
            self.signalled = time.monotonic()
            if number == signal.SIGINT and self.accelerator.is_main_process:  # nothing else may write in a handler
                os.write(2, b"\nstopping after this step, to save a state; Ctrl-C again ends at once\n")
        elif number == signal.SIGINT and time.monotonic() - self.signalled > SAME_KEY:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def reason(self, step: int) -> str | None:
        """Return ``"signal"``, ``"time"`` or None after step number ``step``, the same in every process."""
        asked = [self.signalled is not None, time.monotonic() > self.until]
        if self.accelerator.num_processes > 1:
            if step % AGREE_EVERY:
                return None
            device = self.accelerator.device
            asked = self.accelerator.reduce(torch.tensor(asked, dtype=torch.float32, device=device), "sum").tolist()
        return "signal" if asked[0] else "time" if asked[1] else None
