"""Train a Discrete Cell Model on shards: the whole loop on one page.

    accelerate launch training/train.py --config training/configs/demo.yaml --data shards/ --out checkpoint/

One process or many, CPU or GPU: what `accelerate config` chose. Order of cells, noise and label dropout are keyed by
(seed, index of the batch) and drawn for the global batch, so processes that share one global batch do what a single
process would do with all of it. Writes
`OUT/model.safetensors` (averaged weights) with configuration and tokenizer, `OUT/training.jsonl` and its picture, and
states to resume from under `OUT/checkpoints/`; on SIGTERM it saves a state and exits with code 75. Knows nothing of how
cells are stored (`cells.py`) or drawn (`modeling_dcm`).
"""

import argparse
import logging
import os
import sys
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import datasets
import torch
import transformers
import tyro
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from modeling_dcm import DCMForDenoising
from modeling_dcm.diffusion_dcm import keyed_generator
from tokenization import DCMTokenizer
from training.config import TrainConfig, read_config
from training.data.cells import Cells
from training.data.command_line import user_errors
from training.data.files import written_aside
from training.loop.batches import TrainBatches
from training.loop.curves import draw_curves
from training.loop.fine_tune import load_source, merged_tokenizer, shaped_like
from training.loop.log import NotFinite, TrainingLog
from training.loop.optimiser import averaged_weights, build_optimizer, learning_rate, update_average
from training.loop.processes import build_accelerator, start_trackers
from training.loop.start import attention_implementation, build_model, build_tokenizer, compile_blocks, open_cells
from training.loop.states import (
    all_states,
    load_state_model,
    newest_state,
    remove_leftovers,
    restore_state,
    run_facts,
    save_final,
    save_state,
)
from training.loop.stopping import SAVED_AFTER_SIGNAL, Stopping
from training.loop.throughput import peak_flops, training_flops
from training.loop.validation import Validation

logger = logging.getLogger(__name__)


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


def main(config: TrainConfig) -> Path:
    """Train, and return the checkpoint folder.

    Raises:
        ValueError: options, data and an earlier state do not fit together, or the loss is no longer finite.
        FileNotFoundError: no shards, no state to resume from, no embeddings.
        SystemExit: with code 75 after SIGTERM, when the state has been saved.
    """
    set_seed(config.seed)
    accelerator = build_accelerator(config)
    run, model, start = prepare_run(config, accelerator)
    config, world = run.config, accelerator.num_processes
    batches = run.train_batches.starting_at(start * config.gradient_accumulation_steps)
    done, reason = start, None
    with Stopping(accelerator, config.max_time) as stopping:
        for step in range(start, config.max_steps):
            # of dropout: keyed by the step as all other noise is, so that a resumed run draws what it would have drawn
            torch.manual_seed(keyed_generator(config.seed, step * world + accelerator.process_index).initial_seed())
            rate = learning_rate(step, config)
            for group in run.optimizer.param_groups:
                group["lr"] = rate
            measured = take_step(model, run.optimizer, batches, accelerator, config)
            update_average(run.ema, run.network, step, config.ema_decay)
            run.log.note(measured, rate)
            done, reason = step + 1, stopping.reason(step + 1)
            write_what_is_due(run, done, reason)
            if reason:
                break
    run.log.close()
    accelerator.wait_for_everyone()
    if reason == "signal":
        logger.info("SIGTERM: the state of step %d is saved; go on with --resume", done)
        accelerator.end_training()
        sys.exit(SAVED_AFTER_SIGNAL)
    if reason == "time":
        logger.info("%g minutes are over at step %d of %d; --resume goes on", config.max_time, done, config.max_steps)
    if accelerator.is_main_process:
        with averaged_weights(run.network, run.ema) as averaged:
            averaged.config.entropy_curve = run.validation.entropy_curve(averaged)
            save_final(config, averaged, run.tokenizer)
        logger.info("checkpoint: %s", config.out)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return config.out


def prepare_run(config: TrainConfig, accelerator: Accelerator) -> tuple[Run, torch.nn.Module, int]:
    """What the loop works with, the network as it is called, and the number of steps already done."""
    attn = attention_implementation(config, accelerator.device, accelerator.mixed_precision)
    config = replace(config, attn=attn, mixed_precision=accelerator.mixed_precision)
    network, tokenizer, cells, state = prepare_start(config, accelerator)
    facts = run_facts(config, accelerator.num_processes)
    if len(set(gather_object([facts["hashes"]["data"]]))) > 1:
        raise ValueError(f"processes see different files in {str(config.data)!r}: copy the same shards to every node")
    optimizer = build_optimizer(network, config)
    ema = [parameter.detach().clone().float() for parameter in network.parameters()]
    start = restore_state(state, network, ema, optimizer, accelerator.scaler) if state else 0
    if config.compile:
        compile_blocks(network)
    # buffers are the same everywhere: no need to send them around at each step
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        network, [n for n, _ in network.named_buffers()]
    )
    model, optimizer = accelerator.prepare(network, optimizer)
    ema = [average.to(accelerator.device) for average in ema]
    rank, world = accelerator.process_index, accelerator.num_processes
    train_batches = TrainBatches(cells, config, rank=rank, world=world, device=accelerator.device)
    validation = Validation(config, tokenizer, cells) if accelerator.is_main_process else None
    log = TrainingLog(config, start, accelerator, utilisation_per_cell(network, train_batches, accelerator.device))
    start_trackers(accelerator, config)
    run = Run(config, accelerator, network, ema, optimizer, tokenizer, train_batches, validation, log, facts)
    return run, model, start


def prepare_start(
    config: TrainConfig, accelerator: Accelerator
) -> tuple[DCMForDenoising, DCMTokenizer, Cells, Path | None]:
    """Network, tokenizer and training cells, of the state to resume from or new ones, and that state."""
    if accelerator.is_main_process:
        remove_leftovers(config.out)
    with accelerator.local_main_process_first():
        state = newest_state(config, accelerator.num_processes, log=logger if accelerator.is_main_process else None)
        if state is not None:
            model, tokenizer = load_state_model(
                state, attn=config.attn, gradient_checkpointing=config.gradient_checkpointing
            )
            return model, tokenizer, open_cells(config, "train", tokenizer), state
        source = load_source(config.init_from) if config.init_from else None
        if source is not None:
            config = shaped_like(config, source)
        tokenizer = build_tokenizer(config)
        if source is not None:
            tokenizer = merged_tokenizer(tokenizer, source.tokenizer)
        cells = open_cells(config, "train", tokenizer)
        return build_model(config, tokenizer, cells, source), tokenizer, cells, None


def take_step(model, optimizer, batches, accelerator: Accelerator, config: TrainConfig) -> tuple[torch.Tensor, ...]:
    """One step of the optimiser over one global batch; loss, elbo and gradient norm of this process."""
    loss = elbo = 0.0
    for _ in range(config.gradient_accumulation_steps):
        batch = next(batches)
        with accelerator.accumulate(model):
            output = model(**batch)
            accelerator.backward(output.loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), config.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        loss += output.loss.detach() / config.gradient_accumulation_steps
        elbo += output.elbo / config.gradient_accumulation_steps
    return loss, elbo, norm


def write_what_is_due(run: Run, done: int, reason: str | None) -> None:
    """Log, validate, score and save after step number ``done``, which is the last one if there is a ``reason``.

    Raises:
        ValueError: a loss or gradient since the last look was not finite; what was saved before is good.
    """
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
        raise ValueError(explain(error, run)) from error
    if not run.accelerator.is_main_process:
        return
    with log.paused():
        losses = run.validation.losses(run.network, run.ema) if validate else {}
        if validate:
            log.write({"step": done, **losses})
        if config.score_every is not None and (done % config.score_every == 0 or last):
            log.write({"step": done, **run.validation.score(run.network, run.ema)})
        if save:
            scaler, loss = run.accelerator.scaler, losses.get("validation_loss")
            parts = (run.network, run.ema, run.optimizer, run.tokenizer)
            save_state(config, run.facts, done, *parts, scaler=scaler, validation_loss=loss)
            draw_curves(config.out)


def explain(error: NotFinite, run: Run) -> str:
    """Write the batches of the step that went wrong, and say where, and what can be done."""
    config, of_run = run.config, run.train_batches
    first = (error.step - 1) * config.gradient_accumulation_steps
    batches = list(islice(of_run.starting_at(first), config.gradient_accumulation_steps))
    tensors = {name: torch.cat([batch[name] for batch in batches]).cpu().contiguous() for name in batches[0]}
    of_process = f"-process-{of_run.rank}" if of_run.world > 1 else ""
    file = config.out / f"not-finite-step-{error.step}{of_process}.safetensors"
    with written_aside(file) as aside:
        save_file(tensors, aside)
    states = all_states(config.out)
    way_out = f"go on from the last good state with --init-from {states[-1]}" if states else "start again"
    return f"{error}; its noised batch is in {str(file)!r}; {way_out}, a lower --learning-rate and another --out"


def utilisation_per_cell(network: DCMForDenoising, train_batches: TrainBatches, device: torch.device) -> float | None:
    """Share of one second of the device's peak that a cell needs; None where the peak is not known."""
    peak = peak_flops(device)
    if peak is None:
        return None
    batch = next(train_batches.starting_at(0))
    return training_flops(network, batch) / len(batch["input_ids"]) / peak


def parse(arguments: list[str]) -> TrainConfig:
    """Options from the command line over those of ``--config`` over the defaults."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    first.add_argument("--size")
    known, _ = first.parse_known_args(arguments)
    from_file = read_config(known.config) if known.config else {}
    if known.size not in (None, "None"):  # the command line's size wins over the file's shape
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            from_file.pop(name, None)
    defaults = {"data": tyro.MISSING, "out": tyro.MISSING, **from_file}
    return tyro.cli(TrainConfig, default=TrainConfig(**defaults), args=arguments)


def cli() -> None:
    """Entry point of ``dcm-train``."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    with user_errors():
        if os.environ.get("RANK", "0") != "0":
            logging.getLogger().setLevel(logging.WARNING)  # one process speaks
        main(parse(sys.argv[1:]))


if __name__ == "__main__":
    cli()
