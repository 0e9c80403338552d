"""The steps that are compared: one of training as it is, and plain ones, on simulated counts of any shape.

A step here is what `train.py` does between two lines of its log: noise for a global batch, forward and backward pass,
clipping, the optimiser, the averages. Reading cells, logging, validation and saving are left out. Knows nothing of
clocks and memory. Letters: B cells, L genes, Q queried genes, D width, K largest count.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from eval.benchmarks.simulated_counts import simulated_blocks
from modeling_dcm import SIZES, DCMConfig, DCMForDenoising
from modeling_dcm.count_distribution_dcm import TwoStageCategorical
from modeling_dcm.diffusion_dcm import denoising_loss
from modeling_dcm.modeling_dcm import DCMOutput
from training.config import TrainConfig
from training.loop.batches import noised
from training.loop.optimiser import build_optimizer, update_average
from training.loop.processes import build_accelerator
from training.loop.start import attention_implementation, compile_blocks
from training.train import take_step

SHAPES = {"small": {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}, **SIZES}

PLAIN = "plain"  # every gene is asked, the head has one stage, log-softmax over all counts in float32
NO_BUDGET = "no budget"  # every gene is asked, by the two-stage law
OURS = "ours"  # as training does it

NUM_CELL_TYPES, NUM_PERTURBATIONS = 4, 100
MEAN_COUNT = 1.5  # of a gene in a cell: deep data, as large counts are what the two-stage law spends time on


@dataclass(frozen=True)
class Case:
    """One network on one batch: what is measured side by side has the same ``size``, ``genes`` and ``cells``."""

    size: str
    backbone: str
    genes: int  # G
    cells: int  # B
    max_count: int  # K
    queries: int  # Q, the budget of OURS
    variant: str = OURS

    @property
    def name(self) -> str:
        return f"{self.backbone}, {self.variant}"


class PlainStep(nn.Module):
    """A network as the naive step calls it: the head at every gene, and a float32 log-softmax over all counts."""

    def __init__(self, network: DCMForDenoising):
        super().__init__()
        self.network = network

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **conditions: torch.Tensor) -> DCMOutput:
        """Loss and elbo; arguments as of the network's forward."""
        distribution = self.network.distribution(input_ids, **conditions)
        uniform, elbo = plain_loss(distribution, input_ids, labels, self.network.config)
        return DCMOutput(loss=uniform, elbo=elbo.detach())


def plain_loss(
    distribution: TwoStageCategorical, input_ids, labels, config: DCMConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and elbo from logits of every gene and count; ids (B, L)."""
    log_p = distribution.full().float().log_softmax(dim=-1)  # (B, L, K+1)
    is_masked = input_ids == config.mask_token_id
    cross_entropy = -log_p.gather(2, labels.masked_fill(~is_masked, 0)[..., None])[..., 0]
    return denoising_loss(cross_entropy, is_masked, is_masked.sum(dim=1), (input_ids != config.pad_token_id).sum(dim=1))


def head_loss(network: DCMForDenoising, variant: str, batch: dict, hidden: torch.Tensor, condition: torch.Tensor):
    """The loss from hidden states ``hidden`` (B, L, D) of all genes and the condition (B, D): head and loss alone."""
    input_ids, labels = batch["input_ids"], batch["labels"]
    queried = network.partial_cells(input_ids)
    if variant == PLAIN:
        return plain_loss(network.head(hidden, condition, queried), input_ids, labels, network.config)[0]
    is_query = is_masked = input_ids == network.config.mask_token_id
    if "query_positions" in batch:
        positions = batch["query_positions"].clamp(min=0)
        hidden = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
        queried, labels = queried.at(positions), labels.gather(1, positions)
        is_query = is_masked.gather(1, positions) & (batch["query_positions"] >= 0)
    cross_entropy = network.head(hidden, condition, queried).cross_entropy(labels.masked_fill(~is_query, 0))
    n = (input_ids != network.config.pad_token_id).sum(dim=1)
    return denoising_loss(cross_entropy, is_query, is_masked.sum(dim=1), n)[0]


class Training:
    """One network in training: ``step()`` takes the next step, ``head_step()`` that of head and loss alone."""

    def __init__(self, case: Case, accelerator: Accelerator, *, compiled: bool = False):
        self.case, self.accelerator = case, accelerator
        self.config = train_config(case, accelerator.mixed_precision, compiled=compiled)
        torch.manual_seed(0)
        self.network = build_network(case, self.config, accelerator)
        optimizer = build_optimizer(self.network, self.config)
        if compiled:
            compile_blocks(self.network)
        asked = PlainStep(self.network) if case.variant == PLAIN else self.network
        self.model, self.optimizer = accelerator.prepare(asked.train(), optimizer)
        for parameter in self.network.parameters():  # so that the optimiser's state stands before the first step
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema = [parameter.detach().clone().float() for parameter in self.network.parameters()]
        self.batches = self._batches()

    def step(self) -> None:
        """Everything from noise to averages, once."""
        take_step(self.model, self.optimizer, self.batches, self.accelerator, self.config)
        update_average(self.ema, self.network, 0, self.config.ema_decay)

    def batch(self) -> dict[str, torch.Tensor]:
        """The next batch."""
        return next(self.batches)

    def head_step(self):
        """A callable that does head and loss, forward and backward, always for the same hidden states."""
        batch, network, device = self.batch(), self.network, self.accelerator.device
        B, L = batch["input_ids"].shape
        D = network.config.hidden_size
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision, torch.float32)
        hidden = torch.randn(B, L, D, device=device, dtype=dtype, requires_grad=True)
        condition = torch.randn(B, D, device=device, dtype=dtype, requires_grad=True)

        def step() -> None:
            with self.accelerator.autocast():
                loss = head_loss(network, self.case.variant, batch, hidden, condition)
            loss.backward()
            hidden.grad = condition.grad = None
            network.zero_grad()

        return step

    def standing_bytes(self) -> int:
        """Bytes that stay between steps: weights, buffers, the optimiser's state, averages."""
        tensors = [*self.network.parameters(), *self.network.buffers(), *self.ema]
        tensors += [
            value for state in self.optimizer.state.values() for value in state.values() if torch.is_tensor(value)
        ]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        cells = simulated_batch(self.case)
        for index in count():
            yield noised(cells, self.config, self.network.config, index, 0, 1, self.accelerator.device)


def train_config(case: Case, mixed_precision: str, *, compiled: bool = False) -> TrainConfig:
    """Options of training for a case."""
    return TrainConfig(
        data=Path("simulated"),
        out=Path("unused"),
        backbone=case.backbone,
        batch_size=case.cells,
        query_genes=case.queries if case.variant == OURS else None,
        mixed_precision=mixed_precision,
        compile=compiled,
        trackers="none",
    )


def build_network(case: Case, config: TrainConfig, accelerator: Accelerator) -> DCMForDenoising:
    """A fresh network of the case; that of the plain step has the paper's head, one stage without biases of genes."""
    model_config = DCMConfig(
        **SHAPES[case.size],
        num_genes=case.genes,
        max_count=case.max_count,
        backbone=case.backbone,
        num_latents=config.num_latents,
        num_cell_types=NUM_CELL_TYPES,
        num_perturbations=NUM_PERTURBATIONS,
        library_size_conditioning=True,
        gene_output_bias=0 if case.variant == PLAIN else config.gene_output_bias,
    )
    model_config._attn_implementation = attention_implementation(
        config, accelerator.device, accelerator.mixed_precision
    )
    return DCMForDenoising(model_config)


def start_accelerator() -> Accelerator:
    """One process on the GPU in bf16, or on the CPU in float32."""
    precision = "bf16" if torch.cuda.is_available() else "no"
    config = TrainConfig(data=Path("simulated"), out=Path("unused"), mixed_precision=precision, trackers="none")
    return build_accelerator(config)


def simulated_batch(case: Case) -> dict[str, torch.Tensor]:
    """Clean cells of a case and their conditions, as `Cells` gives them."""
    blocks = simulated_blocks(case.cells, case.genes, counts_per_cell=MEAN_COUNT * case.genes, seed=0)
    counts = torch.from_numpy(np.concatenate([block.toarray() for block in blocks])).long().clamp(max=case.max_count)
    cell = torch.arange(case.cells)
    return {
        "input_ids": counts,
        "cell_type_ids": cell % NUM_CELL_TYPES,
        "perturbation_ids": (cell % NUM_PERTURBATIONS)[:, None],
        "library_size": counts.sum(dim=1),
    }


def variants(case: Case) -> list[Case]:
    """What is measured side by side at one size, number of genes and number of cells."""
    asked = {"dit": (PLAIN, NO_BUDGET, OURS), "latent": (PLAIN, OURS)}
    return [replace(case, backbone=backbone, variant=name) for backbone, names in asked.items() for name in names]
