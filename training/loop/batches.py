"""From clean cells to what the network sees: batches in a known order, genes masked, conditions dropped.

All noise is keyed by the index of the batch in the run: any batch can be made again, by however many processes. What is
one number for each cell is drawn on the CPU for the global batch, in a thread that is one batch ahead; what is one for
each gene is drawn on the device, for :data:`BLOCK` rows of the global batch at a time. Letters: B cells, L genes.
"""

import time
from collections.abc import Callable, Iterator
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
from training.data.loader import Cells

BLOCK = 32  # rows of the global batch whose keys come from one generator


@dataclass
class TrainBatches:
    """Noised batches of one process among ``world``, by their index in the run."""

    cells: Cells | None  # None where batches are brought, to :meth:`noised`
    config: TrainConfig
    model_config: DCMConfig
    rank: int = 0
    world: int = 1
    device: torch.device | str = "cpu"
    state: Callable | None = None  # of whole cells, from ids and library sizes
    effects: object = None  # of perturbations, as cells are told: :class:`training.loop.told_effects.TrainingEffects`
    waited: float = 0.0  # seconds that the loop has waited for a batch of cells

    def __post_init__(self):
        self.device = torch.device(self.device)

    @property
    def several_panels(self) -> bool:
        return len(self.cells.measured) > 1

    def starting_at(self, index: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yield batches without end, from number ``index`` of the run on."""
        order = {"batch_size": self.config.batch_size, "seed": self.config.seed}
        order |= {"rank": self.rank, "world_size": self.world, "start": index}
        batches = enumerate(self.cells.batches(**order), start=index)
        drawn = (self._pinned(self.drawn_for_cells(batch, number)) for number, batch in batches)
        for number, batch in enumerate(self._one_ahead(drawn), start=index):
            yield self.masked(batch, number)

    def noised(self, batch: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
        """Make the arguments of the model's forward for one batch: genes masked, some conditions dropped."""
        return self.masked(self.drawn_for_cells(batch, index), index)

    def _one_ahead(self, batches: Iterator[dict]) -> Iterator[dict]:
        """The same batches, each made in a thread while the one before it is in use."""
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

    def drawn_for_cells(self, batch: dict[str, torch.Tensor], index: int) -> dict:
        """Draw how many genes of each cell are masked and which conditions are dropped; look at what is to be known.

        Drawn for the whole global batch from (seed, index of the batch); this process takes its rows. ``num_large`` is
        rounded up to a power of two, so that tensors have few sizes.
        """
        config, model_config, generator = self.config, self.model_config, keyed_generator(self.config.seed, index)
        x_0 = batch["input_ids"]
        B, whole = len(x_0), len(x_0) * self.world
        own = slice(self.rank * B, (self.rank + 1) * B)
        u = stratified_uniform(whole, generator)[own]
        n = (x_0 != model_config.pad_token_id).sum(dim=1)
        num_large = int(((x_0 >= model_config.num_small) & (x_0 < model_config.num_counts)).sum())
        drawn = {"input_ids": x_0, "k": num_masked(u, n), "all_measured": bool((n == x_0.shape[1]).all())}
        drawn["num_large"] = 1 << (num_large - 1).bit_length() if num_large else 0

        def draw(*columns: int) -> torch.Tensor:
            return torch.rand(*columns, whole, generator=generator)[..., own]

        for name in ("cell_type_ids", "perturbation_ids"):
            if name in batch:
                drawn[name] = drop_labels(batch[name], draw(), config.label_dropout)
        if "covariate_ids" in batch:
            columns = batch["covariate_ids"].unbind(dim=1)
            both = zip(columns, draw(len(columns)), strict=True)
            drawn["covariate_ids"] = torch.stack([drop_labels(*each, config.label_dropout) for each in both], dim=1)
        if config.library_size_conditioning:
            drawn["library_size"] = drop_labels(batch["library_size"].float(), draw(), config.label_dropout)
        has_state = (n == x_0.shape[1]) & (batch["library_size"] > 0)
        if model_config.state_dim:
            drawn["total"] = batch["library_size"]
            drawn["is_stateless"] = draw() < config.state_dropout
            has_state &= ~drawn["is_stateless"]
        if self.effects is not None:
            has_state &= bool(model_config.state_dim)
            drawn |= self.effects.shown(drawn, batch["library_size"], has_state, draw())
        return drawn

    def masked(self, drawn: dict, index: int) -> dict[str, torch.Tensor]:
        """Choose and mask genes on the device."""
        ids, budget = self.model_config, self.config.query_genes
        to_device = {"device": self.device, "non_blocking": True}
        inputs = {name: v.to(**to_device) if torch.is_tensor(v) else v for name, v in drawn.items()}
        x_0 = inputs["input_ids"].long()  # sent as narrow as they come
        keys = gene_keys(self.config.seed, index, self.rank * len(x_0), x_0.shape, self.device)
        special = {"mask_token_id": ids.mask_token_id, "pad_token_id": ids.pad_token_id}
        inputs |= {"input_ids": mask_smallest(x_0, inputs.pop("k"), keys, **special), "labels": x_0}
        if budget is not None and budget < x_0.shape[1]:
            queries = choose_queries(inputs["input_ids"], keys, budget, mask_token_id=ids.mask_token_id)
            inputs["query_positions"] = queries
        total, is_stateless = inputs.pop("total", None), inputs.pop("is_stateless", None)
        if self.state is not None:
            inputs["state"] = self.state(x_0, total).masked_fill(is_stateless[:, None], torch.nan)
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
