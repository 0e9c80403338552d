"""The cell state z: what is drawn once for a whole cell, so that its genes agree with each other.

z are the first whitened principal components of log-normalised training cells: linear, fixed, and stored with the
weights. Letters: B cells, G genes, d components, E = d + 1 with the logarithm of the total, C cell types, M mixture
components, N groups of conditions, S stored states. A row of NaN is *not given*.
"""

import torch
from torch import nn

from .configuration_dcm import DCMConfig

CANDIDATES = 16
ANY = -2  # in a group's key: whatever label


def first_match(groups: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The first of ``groups`` (N, W), whose keys may hold :data:`ANY`, that matches each cell's key (B, W)."""
    unique, cell_key = keys.unique(dim=0, return_inverse=True)
    matches = ((groups[None] == unique[:, None]) | (groups[None] == ANY)).all(dim=-1)  # (U, N)
    return matches.int().argmax(dim=1)[cell_key]


class CellState(nn.Module):
    """The map from the counts of a whole cell to its state: ``z = W (log1p(x / total * median total) - mean)``."""

    def __init__(self, config: DCMConfig):
        super().__init__()
        self.register_buffer("center", torch.zeros(config.num_genes))
        self.register_buffer("components", torch.zeros(config.state_dim, config.num_genes))
        self.register_buffer("median_total", torch.tensor(1.0))
        self.register_buffer("log_total", torch.tensor([0.0, 1.0]))  # mean and standard deviation of log1p(total)

    def forward(self, counts: torch.Tensor, total: torch.Tensor | None = None) -> torch.Tensor:
        """Return states (B, d) of cells with ``counts`` (B, G), negative where a gene was not measured.

        A cell without a count, or with a gene that was not measured, has no state: its row is NaN. ``total`` (B,)
        is the library size over the panel; default: the sum of the counts.
        """
        counts = counts.to(self.components.dtype)
        total = counts.sum(dim=1) if total is None else total.to(counts.dtype)
        logs = torch.log1p(counts / total.clamp(min=1)[:, None] * self.median_total)
        z = nn.functional.linear(logs - self.center, self.components)
        has_state = (counts >= 0).all(dim=1) & (total > 0)
        return z.masked_fill(~has_state[:, None], torch.nan)

    def standardized(self, log_total: torch.Tensor) -> torch.Tensor:
        """The logarithm of totals, log1p, in standard deviations of the training cells'."""
        return (log_total - self.log_total[0]) / self.log_total[1]

    def total(self, state: torch.Tensor) -> torch.Tensor:
        """Library sizes (B,) that states (B, d + 1) tell; -1 where the state is not given."""
        total = (state[:, -1] * self.log_total[1] + self.log_total[0]).expm1()
        return torch.where(total.isnan(), -1, total)


class StateEncoder(nn.Module):
    """From the state (B, E) to a vector (B, D); a row of NaN is *not given*, the learned null."""

    def __init__(self, width: int, hidden_size: int):
        super().__init__()
        self.linear = nn.Linear(width, hidden_size)
        self.null = nn.Embedding(1, hidden_size)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        given = ~state.isnan().any(dim=-1, keepdim=True)
        vector = self.linear(torch.nan_to_num(state).to(self.linear.weight.dtype))
        return torch.where(given, vector, self.null.weight)


class StateSource(nn.Module):
    """Where generation draws (z, log1p(total)) from, together, for the conditions of a cell.

    The *prior* is a mixture of Gaussians with one covariance around a mean: the mixture is that of the cell type (the
    last one of all cells), the mean that of the most specific group of conditions that matches. The *bank* holds states
    of training cells in an order in which each group is one stretch; it is empty where training was asked to keep none.
    Groups are rows of keys as in the table of library sizes, from the most specific to the one that matches everything.
    """

    def __init__(self, config: DCMConfig, key_width: int):
        super().__init__()
        E, C, M = config.state_dim + 1, config.num_cell_types + 1, config.state_mixture
        self.register_buffer("keys", torch.full((config.state_groups, key_width), ANY))
        self.register_buffer("mean", torch.zeros(config.state_groups, E))
        self.register_buffer("log_weight", torch.zeros(C, M))
        self.register_buffer("location", torch.zeros(C, M, E))
        self.register_buffer("scale", torch.zeros(C, E, E))  # lower triangles of Cholesky's factors
        self.register_buffer("span", torch.zeros(config.state_groups, 2, dtype=torch.long))  # of each group in the bank
        self.register_buffer("bank", torch.zeros(config.state_bank, E))

    @property
    def has_bank(self) -> bool:
        return len(self.bank) > 0

    def draw(
        self,
        keys: torch.Tensor,
        cell_type_ids: torch.Tensor | None,
        generator: torch.Generator,
        log_total: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Draw states (B, E) from the prior of each cell's conditions.

        Where ``log_total`` (B,) is known, each is the nearest in it of :data:`CANDIDATES` draws.
        """
        if log_total is not None:
            repeated = None if cell_type_ids is None else cell_type_ids.repeat(CANDIDATES)
            draws = self.draw(keys.repeat(CANDIDATES, 1), repeated, generator).view(CANDIDATES, len(keys), -1)
            nearest = (draws[..., -1] - log_total).abs().argmin(dim=0)
            return draws[nearest, torch.arange(len(keys), device=keys.device)]
        mean = self.mean[first_match(self.keys, keys)]
        row = torch.full((len(keys),), len(self.log_weight) - 1, device=keys.device)
        if cell_type_ids is not None:
            row = torch.where(cell_type_ids < 0, row, cell_type_ids)
        part = self.log_weight[row].exp().multinomial(1, generator=generator)[:, 0]
        noise = torch.randn(len(keys), mean.shape[1], generator=generator, device=keys.device)
        return mean + self.location[row, part] + (self.scale[row] @ noise[..., None])[..., 0]

    def rows_of_bank(self, keys: torch.Tensor, seed: int) -> torch.Tensor:
        """Draw rows of the bank (N,), of each cell's conditions, without replacement as far as they go.

        The cells of one call share the states: what a cell gets depends on all of ``keys`` and on ``seed``.
        """
        group = first_match(self.keys, keys).cpu()
        span = self.span.cpu()
        rows = torch.empty(len(keys), dtype=torch.long)
        for index in group.unique().tolist():
            wanted = (group == index).nonzero()[:, 0]
            start, stop = span[index].tolist()
            size = stop - start
            generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
            rounds = [torch.randperm(size, generator=generator) for _ in range(-(-len(wanted) // size))]
            rows[wanted] = start + torch.cat(rounds)[: len(wanted)]
        return rows
