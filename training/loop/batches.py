"""From clean cells to what the network sees: batches in a known order, genes masked, conditions dropped.

Everything is keyed by (seed, index of the batch) and drawn for the global batch: any batch of a run can be made again.
Letters: B cells, L genes.
"""

from collections.abc import Iterator

import torch

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


class TrainBatches:
    """Noised batches of one process among ``world``, by their index in the run."""

    def __init__(self, cells: Cells, config: TrainConfig, *, rank: int, world: int, device, state=None):
        self.cells, self.config, self.rank, self.world, self.device = cells, config, rank, world, device
        self.several_panels = len(cells.measured) > 1
        self.state = state

    def starting_at(self, index: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yield batches without end, from number ``index`` of the run on."""
        config, cells = self.config, self.cells
        batches = cells.batches(
            batch_size=config.batch_size, seed=config.seed, rank=self.rank, world_size=self.world, start=index
        )
        for number, batch in enumerate(batches, start=index):
            yield noised(batch, config, cells.tokenizer, number, self.rank, self.world, self.device, self.state)


def noised(
    batch, config: TrainConfig, tokenizer, index: int, rank: int, world: int, device, state=None
) -> dict[str, torch.Tensor]:
    """Make the arguments of the model's forward for one batch: genes masked, some conditions dropped.

    Noise is drawn for the whole global batch from (seed, index of the batch), and this process takes its rows.
    ``state`` computes the states of whole cells from ids and library sizes; None where the model has none.
    """
    generator = keyed_generator(config.seed, index)
    x_0 = batch["input_ids"].to(device, non_blocking=True).long()  # sent as narrow as they come
    B, L = x_0.shape
    own = slice(rank * B, (rank + 1) * B)
    u = stratified_uniform(B * world, generator)[own]
    keys = torch.rand(B * world, L, generator=generator)[own].to(device, non_blocking=True)
    ids = {"mask_token_id": tokenizer.mask_token_id, "pad_token_id": tokenizer.pad_token_id}
    k = num_masked(u, (batch["input_ids"] != tokenizer.pad_token_id).sum(dim=1))
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
    if state is not None:
        drop = torch.rand(B * world, generator=generator)[own] < config.state_dropout
        inputs["state"] = state(x_0, batch["library_size"].to(device)).masked_fill(drop[:, None].to(device), torch.nan)
    return {name: value.to(device, non_blocking=True) for name, value in inputs.items()}
