"""Train a Discrete Cell Model on shards: the whole loop on one page.

    accelerate launch training/train.py --config training/configs/demo.yaml --data shards/ --out checkpoint/

One process or many, CPU or GPU: what `accelerate config` chose. Order of cells, noise and label dropout are keyed by
(seed, index of the batch) and drawn for the global batch, so processes that share one global batch do what a single
process would do with all of it. Writes
`OUT/model.safetensors` (averaged weights) with configuration and tokenizer, `OUT/training.jsonl`, and states to resume
from under `OUT/checkpoints/`. Knows nothing of how cells are stored (`cells.py`) or drawn (`modeling_dcm`).
"""

import argparse
import json
import logging
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

import datasets
import torch
import transformers
import tyro
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.auto import tqdm

from modeling_dcm import DCMForDenoising
from modeling_dcm.diffusion_dcm import (
    choose_queries,
    drop_labels,
    keyed_generator,
    mask_smallest,
    num_masked,
    stratified_uniform,
)
from tokenization.command_line import user_errors
from tokenization.files import written_aside
from training.cells import Cells, GlobalBatchSampler
from training.config import TrainConfig, read_config
from training.entropy import validation_entropy
from training.start import build_model, build_tokenizer
from training.states import newest_state, restore_state, save_final, save_state

logger = logging.getLogger(__name__)


def main(config: TrainConfig) -> Path:
    """Train, and return the checkpoint folder.

    Raises:
        ValueError: options, data and an earlier state do not fit together.
        FileNotFoundError: no shards, no state to resume from, no embeddings.
    """
    set_seed(config.seed)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        cpu=not torch.cuda.is_available(),
    )
    world = accelerator.num_processes
    state = newest_state(config, world, log=logger if accelerator.is_main_process else None)
    tokenizer = build_tokenizer(config)
    cells = Cells(config.data, "train", tokenizer)
    model = build_model(config, tokenizer, cells)
    optimizer = build_optimizer(model, config)
    ema = [parameter.detach().clone().float() for parameter in model.parameters()]
    start = restore_state(state, model, ema, optimizer) if state else 0
    model, optimizer = accelerator.prepare(model, optimizer)
    ema = [average.to(accelerator.device) for average in ema]
    log = TrainingLog(config, start, accelerator.is_main_process)
    batches = train_batches(cells, config, start, accelerator)
    for step in range(start, config.max_steps):
        # of dropout: keyed by the step as all other noise is, so that a resumed run draws what it would have drawn
        torch.manual_seed(keyed_generator(config.seed, step * world + accelerator.process_index).initial_seed())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
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
        update_average(ema, model, step, config.ema_decay)
        log.step(
            step, {"loss": loss, "elbo": elbo, "gradient_norm": norm, "learning_rate": learning_rate(step, config)}
        )
        last = step + 1 == config.max_steps
        if accelerator.is_main_process and ((step + 1) % config.validate_every == 0 or last):
            log.write({"step": step + 1, **validate(accelerator.unwrap_model(model), ema, config, tokenizer)})
        if accelerator.is_main_process and ((step + 1) % config.save_every == 0 or last):
            save_state(config, world, step + 1, accelerator.unwrap_model(model), ema, optimizer)
    log.close()
    if accelerator.is_main_process:
        with averaged_weights(accelerator.unwrap_model(model), ema) as averaged:
            if has_validation_cells(config):
                averaged.config.entropy_curve = validation_entropy(averaged, config.data, tokenizer, seed=config.seed)[1]
            save_final(config, averaged, tokenizer)
        logger.info("checkpoint: %s", config.out)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return config.out


def build_optimizer(model: DCMForDenoising, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only, neither on biases nor on embeddings."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    matrices = [p for p in model.parameters() if p.ndim > 1 and id(p) not in embeddings]
    others = [p for p in model.parameters() if p.ndim <= 1 or id(p) in embeddings]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.99), fused=True)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then cosine to zero at ``max_steps`` or constant."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.learning_rate_schedule == "constant":
        return config.learning_rate * warmup
    return config.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * step / config.max_steps))


def train_batches(cells: Cells, config: TrainConfig, start_step: int, accelerator: Accelerator):
    """Endless noised batches of this process, from the batch where ``start_step`` begins."""
    rank, world = accelerator.process_index, accelerator.num_processes
    sampler = GlobalBatchSampler(
        len(cells), batch_size=config.batch_size, seed=config.seed, rank=rank, world_size=world
    )
    done = start_step * config.gradient_accumulation_steps
    epoch, skip = divmod(done, len(sampler))
    while True:
        sampler.set_epoch(epoch)
        for index, rows in enumerate(sampler):
            if index >= skip:
                yield noised(
                    cells[rows], config, cells.tokenizer, epoch * len(sampler) + index, rank, world, accelerator.device
                )
        epoch, skip = epoch + 1, 0


def noised(batch, config: TrainConfig, tokenizer, index: int, rank: int, world: int, device) -> dict[str, torch.Tensor]:
    """Arguments of the model's forward for one batch: genes masked, some conditions dropped.

    Noise is drawn for the whole global batch from (seed, index of the batch), and this process takes its rows.
    """
    generator = keyed_generator(config.seed, index)
    x_0 = batch["counts"]
    B, L = x_0.shape
    own = slice(rank * B, (rank + 1) * B)
    u = stratified_uniform(B * world, generator)[own]
    keys = torch.rand(B * world, L, generator=generator)[own]
    ids = {"mask_token_id": tokenizer.mask_token_id, "pad_token_id": tokenizer.pad_token_id}
    k = num_masked(u, (x_0 != tokenizer.pad_token_id).sum(dim=1))
    inputs = {"input_ids": mask_smallest(x_0, k, keys, **ids), "labels": x_0}
    if config.query_genes is not None and config.query_genes < L:
        inputs["query_positions"] = choose_queries(
            inputs["input_ids"], keys, config.query_genes, mask_token_id=tokenizer.mask_token_id
        )
    for name in ("cell_type_ids", "perturbation_ids"):
        if name in batch:
            drop = torch.rand(B * world, generator=generator)[own]
            inputs[name] = drop_labels(batch[name], drop, config.label_dropout)
    if "covariate_ids" in batch:
        columns = batch["covariate_ids"].unbind(dim=1)
        drops = torch.rand(len(columns), B * world, generator=generator)[:, own]
        dropped = [drop_labels(column, u, config.label_dropout) for column, u in zip(columns, drops, strict=True)]
        inputs["covariate_ids"] = torch.stack(dropped, dim=1)
    if config.library_size_conditioning:
        drop = torch.rand(B * world, generator=generator)[own]
        inputs["library_size"] = drop_labels(batch["library_size"].float(), drop, config.label_dropout)
    return {name: value.to(device, non_blocking=True) for name, value in inputs.items()}


@torch.no_grad()
def update_average(ema: list[torch.Tensor], model: torch.nn.Module, step: int, decay: float) -> None:
    """Exponential moving average of the weights in float32, faster at the start."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(ema, [parameter.detach().float() for parameter in model.parameters()], 1 - decay)


class averaged_weights:  # noqa: N801 (reads as a statement: `with averaged_weights(model, ema)`)
    """Context in which the model has the averaged weights."""

    def __init__(self, model: DCMForDenoising, ema: list[torch.Tensor]):
        self.model, self.ema = model, ema

    def _swap(self) -> None:
        for parameter, average in zip(self.model.parameters(), self.ema, strict=True):
            kept = parameter.detach().clone()
            parameter.data.copy_(average)
            average.copy_(kept)

    def __enter__(self) -> DCMForDenoising:
        self._swap()
        return self.model

    def __exit__(self, *error) -> None:
        self._swap()


def has_validation_cells(config: TrainConfig) -> bool:
    return any((config.data / "validation").glob("*.parquet"))


@torch.no_grad()
def validate(model: DCMForDenoising, ema: list[torch.Tensor], config: TrainConfig, tokenizer) -> dict[str, float]:
    """Loss and elbo (nats per gene) of the averaged weights on validation cells, always under the same noise."""
    if not has_validation_cells(config):
        return {}
    cells = Cells(config.data, "validation", tokenizer)
    rows = list(range(min(len(cells), config.validation_cells)))
    if not rows:
        return {}
    quiet = TrainConfig(**{**asdict(config), "label_dropout": 0.0, "query_genes": None})
    sums = {"validation_loss": 0.0, "validation_elbo": 0.0}
    with averaged_weights(model, ema):
        model.eval()
        for index in range(0, len(rows), config.batch_size):
            batch = cells[rows[index : index + config.batch_size]]
            output = model(**noised(batch, quiet, tokenizer, index, 0, 1, model.device))
            sums["validation_loss"] += output.loss.item() * len(batch["counts"]) / len(rows)
            sums["validation_elbo"] += output.elbo.item() * len(batch["counts"]) / len(rows)
        model.train()
    return sums


class TrainingLog:
    """`training.jsonl`, a bar on a terminal, and one readable line per interval elsewhere."""

    def __init__(self, config: TrainConfig, start: int, is_main: bool):
        self.config, self.is_main = config, is_main
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=config.max_steps, initial=start, unit="step", desc="training", disable=not (is_main and self.terminal)
        )
        self.recent: list[dict] = []
        self.since = time.perf_counter()
        self.last_line = 0.0
        if is_main:
            config.out.mkdir(parents=True, exist_ok=True)
            self._forget_after(start)

    def _forget_after(self, start: int) -> None:
        """Drop the lines of steps that will be taken again."""
        path = self.config.out / "training.jsonl"
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if _is_of_step_before(line, start)]
            with written_aside(path) as aside:
                aside.write_text("".join(f"{line}\n" for line in lines))

    def step(self, step: int, values: dict[str, object]) -> None:
        """Note one step; every ``log_every`` of them are averaged, checked to be finite, and written."""
        self.recent.append(values)
        self.bar.update(1)
        if (step + 1) % self.config.log_every and step + 1 < self.config.max_steps:
            return
        means = {name: sum(float(values[name]) for values in self.recent) / len(self.recent) for name in values}
        if not math.isfinite(means["loss"]):
            raise ValueError(f"the loss is {means['loss']} near step {step + 1}: lower learning_rate, or use bf16")
        now = time.perf_counter()
        cells = len(self.recent) * self.config.batch_size * self.config.gradient_accumulation_steps
        cells_per_second = cells / (now - self.since)
        self.bar.set_postfix_str(f"loss {means['loss']:.4f}, {cells_per_second:.0f} cells/s")
        self.write({"step": step + 1, **means, "cells_per_second_per_process": cells_per_second})
        self.recent, self.since = [], now

    def write(self, values: dict[str, object]) -> None:
        if not self.is_main:
            return
        with (self.config.out / "training.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")
        now = time.perf_counter()
        if not self.terminal and ("validation_loss" in values or now - self.last_line > 30):
            logger.info(", ".join(f"{name} {value:.4g}" for name, value in values.items()))
            self.last_line = now

    def close(self) -> None:
        self.bar.close()


def _is_of_step_before(line: str, start: int) -> bool:
    try:
        return json.loads(line)["step"] <= start
    except json.JSONDecodeError:  # cut off when the run was killed
        return False


def parse(arguments: list[str]) -> TrainConfig:
    """Options from the command line over those of ``--config`` over the defaults."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--config", type=Path)
    known, _ = first.parse_known_args(arguments)
    from_file = read_config(known.config) if known.config else {}
    defaults = {"data": tyro.MISSING, "out": tyro.MISSING, **from_file}
    return tyro.cli(TrainConfig, default=TrainConfig(**defaults), args=arguments)


def cli() -> None:
    """Entry point of ``dcm-train``."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    with user_errors():
        main(parse(sys.argv[1:]))


if __name__ == "__main__":
    cli()
