"""From clean cells to what the network sees: batches in a known order, genes masked, conditions dropped.

All noise is keyed by the index of the batch in the run: any batch can be made again, by however many processes. What is
one number for each cell is drawn on the CPU for the global batch, in a thread that is one batch ahead; what is one for
each gene is drawn on the device, for :data:`BLOCK` rows of the global batch at a time. Letters: B cells, L genes.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from modeling_dcm import DCMConfig
from modeling_dcm.diffusion_dcm import (
    choose_queries,
    drop_labels,
    keyed_generator,
    mask_smallest,
    num_masked,
    stratified_uniform,
)
from training.config import TrainConfig
from training.data.cells import Cells

BLOCK = 32  # rows of the global batch whose keys come from one generator


@dataclass
class TrainBatches:
    """Noised batches of one process among ``world``, by their index in the run."""

    cells: Cells
    config: TrainConfig
    model_config: DCMConfig
    rank: int
    world: int
    device: torch.device | str
    state: Callable | None = None  # of whole cells, from ids and library sizes
    effects: object = None  # see :func:`drawn_for_cells`
    waited: float = 0.0  # seconds that the loop has waited for a batch of cells

    def __post_init__(self):
        self.device, self.several_panels = torch.device(self.device), len(self.cells.measured) > 1

    def starting_at(self, index: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yield batches without end, from number ``index`` of the run on."""
        config = self.config
        batches = self.cells.batches(
            batch_size=config.batch_size, seed=config.seed, rank=self.rank, world_size=self.world, start=index
        )
        drawn = (
            self._pinned(drawn_for_cells(batch, config, self.model_config, number, self.rank, self.world, self.effects))
            for number, batch in enumerate(batches, start=index)
        )
        for number, batch in enumerate(self._one_ahead(drawn), start=index):
            yield masked(batch, config, self.model_config, number, self.rank, self.device, self.state)

    def _one_ahead(self, batches: Iterable[dict]) -> Iterator[dict]:
        """The same batches, each made in a thread while the one before it is in use."""
        batches = iter(batches)
        # memory is pinned for the current device, which is another one in a new thread
        is_one_of_several = self.device.type == "cuda" and self.device.index is not None
        of_device = (torch.cuda.set_device, (self.device,)) if is_one_of_several else (None, ())
        with ThreadPoolExecutor(1, "batches", *of_device) as thread:
            ahead = thread.submit(next, batches)
            while True:
                began = time.perf_counter()
                batch = ahead.result()
                self.waited += time.perf_counter() - began
                ahead = thread.submit(next, batches)
                yield batch

    def _pinned(self, batch: dict) -> dict:
        """The batch in memory that a GPU reads while the CPU goes on."""
        if self.device.type != "cuda":
            return batch
        return {name: value.pin_memory() if torch.is_tensor(value) else value for name, value in batch.items()}


def noised(
    batch, config: TrainConfig, model_config: DCMConfig, index: int, rank: int, world: int, device, state=None
) -> dict[str, torch.Tensor]:
    """Make the arguments of the model's forward for one batch: genes masked, some conditions dropped; ``state`` as of
    :class:`TrainBatches`."""
    drawn = drawn_for_cells(batch, config, model_config, index, rank, world)
    return masked(drawn, config, model_config, index, rank, torch.device(device), state)


def drawn_for_cells(
    batch, config: TrainConfig, model_config: DCMConfig, index: int, rank: int, world: int, effects=None
) -> dict:
    """Draw how many genes of each cell are masked and which conditions are dropped; look at what is to be known.
    ``effects`` (:class:`training.loop.effects.TrainingEffects`) says what is told of those of perturbations.

    Drawn for the whole global batch from (seed, index of the batch); this process takes its rows. ``num_large`` is
    rounded up to a power of two, so that tensors have few sizes.
    """
    generator = keyed_generator(config.seed, index)
    x_0 = batch["input_ids"]
    B = len(x_0)
    own = slice(rank * B, (rank + 1) * B)
    u = stratified_uniform(B * world, generator)[own]
    n = (x_0 != model_config.pad_token_id).sum(dim=1)
    num_large = int(((x_0 >= model_config.num_small) & (x_0 < model_config.num_counts)).sum())
    drawn = {"input_ids": x_0, "k": num_masked(u, n), "all_measured": bool((n == x_0.shape[1]).all())}
    drawn["num_large"] = 1 << (num_large - 1).bit_length() if num_large else 0
    for name in ("cell_type_ids", "perturbation_ids"):
        if name in batch:
            drop = torch.rand(B * world, generator=generator)[own]
            drawn[name] = drop_labels(batch[name], drop, config.label_dropout)
    if "covariate_ids" in batch:
        columns = batch["covariate_ids"].unbind(dim=1)
        drops = torch.rand(len(columns), B * world, generator=generator)[:, own]
        dropped = [drop_labels(column, u, config.label_dropout) for column, u in zip(columns, drops, strict=True)]
        drawn["covariate_ids"] = torch.stack(dropped, dim=1)
    if config.library_size_conditioning:
        drop = torch.rand(B * world, generator=generator)[own]
        drawn["library_size"] = drop_labels(batch["library_size"].float(), drop, config.label_dropout)
    if model_config.state_dim:
        drawn["total"] = batch["library_size"]
        drawn["is_stateless"] = torch.rand(B * world, generator=generator)[own] < config.state_dropout
    if effects is not None:
        draw = torch.rand(B * world, generator=generator)[own]
        has_state = (
            (n == x_0.shape[1]) & (batch["library_size"] > 0) & ~drawn.get("is_stateless", torch.ones(B, dtype=bool))
        )
        drawn |= effects.shown(drawn, batch["library_size"], has_state, draw)
    return drawn


def masked(
    drawn: dict, config: TrainConfig, model_config: DCMConfig, index: int, rank: int, device: torch.device, state=None
) -> dict[str, torch.Tensor]:
    """Choose and mask genes on the device; see :func:`noised`."""
    inputs = {name: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for name, v in drawn.items()}
    x_0 = inputs["input_ids"].long()  # sent as narrow as they come
    keys = gene_keys(config.seed, index, rank * len(x_0), x_0.shape, device)
    ids = {"mask_token_id": model_config.mask_token_id, "pad_token_id": model_config.pad_token_id}
    inputs |= {"input_ids": mask_smallest(x_0, inputs.pop("k"), keys, **ids), "labels": x_0}
    if config.query_genes is not None and config.query_genes < x_0.shape[1]:
        inputs["query_positions"] = choose_queries(
            inputs["input_ids"], keys, config.query_genes, mask_token_id=model_config.mask_token_id
        )
    total, is_stateless = inputs.pop("total", None), inputs.pop("is_stateless", None)
    if state is not None:
        inputs["state"] = state(x_0, total).masked_fill(is_stateless[:, None], torch.nan)
    return inputs


def gene_keys(seed: int, index: int, first: int, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """Random numbers (B, L) in [0, 1) of rows ``first`` to ``first + B`` of global batch ``index``.

    A block of rows has its own generator, so that no process draws those of all.
    """
    B, L = shape
    blocks = range(first // BLOCK, (first + B - 1) // BLOCK + 1)
    # numbered from 1: numpy pads keys with zeros, and (seed, index) has drawn for cells
    generators = [keyed_generator(seed, index, block + 1, device=device) for block in blocks]
    keys = torch.cat([torch.rand(BLOCK, L, generator=generator, device=device) for generator in generators])
    return keys[first - blocks.start * BLOCK :][:B]
