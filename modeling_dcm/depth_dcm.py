"""How far a cell is revealed, and how deep it was sequenced as far as its observed genes tell.

Sums over whole cells, compared with the mean of the training cells; knows nothing of the network. Letters: B cells,
L genes in the sequence, V ids.
"""

from typing import NamedTuple

import torch
from torch import nn

from .configuration_dcm import DCMConfig


class Progress(NamedTuple):
    """How far a cell is revealed; of each cell (B,), over all its measured genes."""

    t: torch.Tensor  # masked genes over measured genes: the noise level
    observed_total: torch.Tensor  # sum of the observed counts
    expected_observed: torch.Tensor  # what the observed genes sum to in a mean training cell
    expected_masked: torch.Tensor  # what the masked genes sum to in a mean training cell
    depth: torch.Tensor  # factor between this cell's masked genes and a mean cell's, as far as it is known


class CellTotals(nn.Module):
    """Mean counts of the training cells, by which a partly observed cell shows how deep it was sequenced."""

    def __init__(self, config: DCMConfig):
        super().__init__()
        self.mask_token_id, self.pad_token_id = config.mask_token_id, config.pad_token_id
        # one row for each cell type, and a last one of all cells
        self.register_buffer("gene_mean", torch.ones(config.num_cell_types + 1, config.num_genes))
        # twice the count: the middle of a bin is an integer or a half, and integers survive a cast of the model to bf16
        self.register_buffer("twice_count", (2 * count_values(config)).long())

    def mean(self, gene_ids: torch.Tensor, cell_type_ids: torch.Tensor | None) -> torch.Tensor:
        """Mean counts (B, L) of genes (B, L) in each cell's type, or in all cells where it is not given (-1)."""
        if cell_type_ids is None:
            return self.gene_mean[-1][gene_ids].float()
        row = torch.where(cell_type_ids < 0, len(self.gene_mean) - 1, cell_type_ids)
        return self.gene_mean[row[:, None], gene_ids].float()

    def forward(
        self,
        input_ids: torch.Tensor,
        gene_ids: torch.Tensor,
        cell_type_ids: torch.Tensor | None = None,
        library_size: torch.Tensor | None = None,
    ) -> Progress:
        """The progress of cells ``input_ids`` (B, L) over genes ``gene_ids`` (B, L)."""
        is_masked = input_ids == self.mask_token_id
        is_measured = input_ids != self.pad_token_id
        mean = self.mean(gene_ids, cell_type_ids) * is_measured
        expected_masked = (mean * is_masked).sum(dim=1)
        return progress_of(
            t=is_masked.sum(dim=1) / is_measured.sum(dim=1).clamp(min=1),
            observed_total=self.total(input_ids),
            expected_observed=mean.sum(dim=1) - expected_masked,
            expected_masked=expected_masked,
            library_size=library_size,
        )

    def total(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Sum (B,) of the counts among ids (B, L)."""
        return self.twice_count[input_ids].sum(dim=1).float() / 2


def progress_of(
    t: torch.Tensor,
    observed_total: torch.Tensor,
    expected_observed: torch.Tensor,
    expected_masked: torch.Tensor,
    library_size: torch.Tensor | None,
) -> Progress:
    """The progress of cells with these sums, each (B,). The depth is told by what is left of the library size, or else
    (None, or negative) by the observed counts."""
    depth = log_ratio(observed_total, expected_observed)
    if library_size is not None:
        remainder = log_ratio(library_size.float() - observed_total, expected_masked)
        depth = torch.where(library_size >= 0, remainder, depth)
    return Progress(t, observed_total, expected_observed, expected_masked, depth.exp())


def count_values(config: DCMConfig) -> torch.Tensor:
    """The count that each id stands for (V,), the middle of a bin; 0 for MASK and PAD."""
    edges = list(range(config.num_counts)) if config.count_bins is None else list(range(config.count_bins[0]))
    values = [float(edge) for edge in edges]
    if config.count_bins is not None:
        last = [*config.count_bins[1:], config.max_count + 1]
        values += [(left + right - 1) / 2 for left, right in zip(config.count_bins, last, strict=True)]
    return torch.tensor([*values, 0.0, 0.0])


def log_ratio(total: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """``log((total + 1) / (expected + 1))``: depth against a mean cell, drawn to 0 where little is expected."""
    return torch.log1p(total.clamp(min=0)) - torch.log1p(expected.clamp(min=0))
