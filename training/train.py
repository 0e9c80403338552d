"""Train a Discrete Cell Model on shards: the whole loop on one page.

    dcm-train --config laptop --data shards/ --out checkpoint/
    accelerate launch -m training.train --config laptop --data shards/ --out checkpoint/

One process or many, CPU or GPU: what `accelerate config` chose. Order of cells, noise and label dropout are keyed by
(seed, index of the batch) and the row in the global batch, so processes that share one global batch do what a single
process would do with all of it, on the same kind of device. Writes `OUT/model.safetensors` (averaged weights) with
configuration and tokenizer, `OUT/training.jsonl` and its picture, and states to resume from under `OUT/checkpoints/`;
on SIGTERM and Ctrl-C it saves a state and exits with code 75. Knows nothing of how cells are stored (`training/data/`)
or drawn (`modeling_dcm/`).
"""

import logging
import os
import sys
from contextlib import closing
from pathlib import Path

from training.config import TrainConfig, parse
from training.data.command_line import user_errors

logger = logging.getLogger(__name__)


def main(config: TrainConfig) -> Path:
    """Train, and return the checkpoint folder; after SIGTERM or Ctrl-C exit with code 75, when a state is saved."""
    config.check_files()
    import torch  # from here on everything is needed; until here an answer comes at once
    from accelerate.utils import set_seed

    from modeling_dcm.diffusion_dcm import keyed_generator
    from training.loop.accelerator import build_accelerator
    from training.loop.log import loss_still_falling
    from training.loop.resume import save_config, save_final
    from training.loop.run import SAVED_AFTER_SIGNAL, Stopping, prepare_run, write_what_is_due
    from training.loop.step import averaged_weights, learning_rate, take_step, update_average

    set_seed(config.seed)
    accelerator = build_accelerator(config)
    run, model, start = prepare_run(config, accelerator)
    config, world = run.config, accelerator.num_processes
    batches = run.train_batches.starting_at(start * config.gradient_accumulation_steps)
    done, reason = start, None
    with Stopping(accelerator, config.max_time) as stopping, closing(run.log):
        for step in range(start, config.max_steps):
            # of dropout: keyed by the step as all other noise is, so that a resumed run draws what it would have drawn
            torch.manual_seed(keyed_generator(config.seed, step * world + accelerator.process_index).initial_seed())
            rate = learning_rate(step, config)
            for group in run.optimizer.param_groups:
                group["lr"] = rate
            panels = {"several_panels": run.train_batches.several_panels}
            measured = take_step(model, run.optimizer, batches, accelerator, config, **panels)
            update_average(run.ema, run.network, step, config.ema_decay)
            run.log.note(measured, rate)
            done, reason = step + 1, stopping.reason(step + 1)
            write_what_is_due(run, done, reason)
            if reason:
                break
    accelerator.wait_for_everyone()
    if reason == "signal":
        logger.info("stopped: the state of step %d is saved; go on with --resume", done)
        accelerator.end_training()
        sys.exit(SAVED_AFTER_SIGNAL)
    if reason == "time":
        logger.info("%g minutes are over at step %d of %d; --resume goes on", config.max_time, done, config.max_steps)
    network, ema = run.as_whole()
    if accelerator.is_main_process:
        with averaged_weights(network, ema) as averaged:
            save_final(config, averaged, run.tokenizer)
            averaged.config.entropy_curve = run.validation.entropy_curve(averaged)  # the weights are safe by now
            falling = averaged.config.loss_still_falling = loss_still_falling(config.out)
            save_config(config, averaged)
        if falling is not None:
            logger.warning("validation loss still falling by %.3g per 1,000 steps: train longer", falling)
        logger.info("checkpoint: %s", config.out)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return config.out


def cli() -> None:
    """Entry point of ``dcm-train``."""
    with user_errors():
        config = parse(sys.argv[1:])
        config.check_files()
        import datasets
        import transformers

        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
        if os.environ.get("RANK", "0") != "0":
            logging.getLogger().setLevel(logging.WARNING)  # one process speaks
        main(config)


if __name__ == "__main__":
    cli()
