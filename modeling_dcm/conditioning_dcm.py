"""What is known of a partly revealed cell, and how the network is told: conditions, noise and depth become vectors.

*Not given* is -1 in every tensor, ids and ``library_size`` alike (any negative number), and has a learned null. So has
an argument that is left out (None), but for ``generate(library_size=None)``, which draws it; there ``"null"`` is -1.
The control is an ordinary label; -1 beside real ids of perturbations is padding, as are NaN rows of vectors.
Letters: B cells, L genes in the sequence, P perturbations of a cell, C covariates, D width, N groups, V ids.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn

from .configuration_dcm import DCMConfig
from .state_dcm import ANY, StateEncoder, combination_keys, first_match

SMOOTH_FEATURES = 16
LIBRARY_QUANTILES = 65


class Progress(NamedTuple):
    """How far a cell is revealed; of each cell (B,), over all its measured genes."""

    t: torch.Tensor  # masked genes over measured genes: the noise level
    observed_total: torch.Tensor  # sum of the observed counts
    expected_observed: torch.Tensor  # what the observed genes sum to in a mean training cell
    expected_masked: torch.Tensor  # what the masked genes sum to in a mean training cell
    depth: torch.Tensor  # factor between this cell's masked genes and a mean cell's, as far as it is known


@dataclass(frozen=True)
class PartialCells:
    """What is known of cells: the genes of the sequence as far as they are revealed, and each cell as a whole.

    Conditions and ``progress`` are of the whole cell, also where the sequence is a part of its genes.
    """

    input_ids: torch.Tensor  # (B, L) counts, MASK or PAD
    gene_ids: torch.Tensor  # (B, L), or (1, L) where all cells have the same genes: they are then looked up once
    mean: torch.Tensor  # (B, L) mean counts of the genes in training cells of the cell's type, times exp(effect)
    effect: torch.Tensor  # (B, L) logarithm of what the perturbations change
    is_target: torch.Tensor | None  # (B, L) genes that the cell's perturbations target; None: nobody said
    progress: Progress
    cell_type_ids: torch.Tensor  # (B,)
    perturbation_ids: torch.Tensor  # (B, P)
    perturbation_embeds: torch.Tensor | None  # (B, P, vector)
    covariate_ids: torch.Tensor  # (B, C)
    library_size: torch.Tensor  # (B,)
    state: torch.Tensor  # (B, E), NaN where not given
    total: torch.Tensor  # (B,) what tells the depth: library_size, or what the state says where that is no condition
    all_measured: bool | None = None  # whether there is no PAD; None: somebody has to look

    @property
    def expected(self) -> torch.Tensor:
        """Counts (B, L) that the genes would have in a mean cell of this type and depth."""
        return self.mean * self.progress.depth[:, None]

    def at(self, positions: torch.Tensor) -> "PartialCells":
        """The same cells with the genes at ``positions`` (B, Q) as their sequence."""
        names = ("input_ids", "gene_ids", "mean", "effect", *(() if self.is_target is None else ("is_target",)))
        B = len(positions)
        return replace(self, **{name: getattr(self, name).expand(B, -1).gather(1, positions) for name in names})


def check_numbers(name: str, values: torch.Tensor, size: int, expected: str) -> None:
    """Refuse numbers that are not 0..size - 1; they are read on the CPU only, as in :func:`check_conditions`."""
    if values.is_floating_point():
        raise ValueError(f"{name} are {values.dtype}, expected integers")
    if values.device.type == "cpu" and values.numel():
        for number in torch.stack(values.aminmax()).tolist():
            if not 0 <= number < size:
                raise ValueError(f"{name} hold {number}, expected {expected}")


def check_conditions(config: DCMConfig, given: dict[str, torch.Tensor | None]) -> None:
    """Refuse a condition that the model does not have, a wrong shape, and ids that are no labels.

    ``library_size`` is let through: a tokenizer returns it for every model. Ids are read on the CPU only, as reading
    them would make an accelerator wait.

    Raises:
        ValueError: with the name, what was given and what was expected.
    """
    C = len(config.covariates)
    expected = {  # name: number of labels, dimensions, shape
        "cell_type_ids": ([config.num_cell_types], 1, "(B,)"),
        "perturbation_ids": ([config.num_perturbations], 2, "(B, P)"),
        "covariate_ids": (list(config.covariates.values()), 2, f"(B, {C})"),
        "perturbation_embeds": ([config.num_perturbations], 3, f"(B, P, {config.perturbation_dim})"),
        "target_gene_ids": ([config.num_perturbations], 2, "(B, P)"),
    }
    for name, (sizes, dimensions, shape) in expected.items():
        value = given.get(name)
        if value is None:
            continue
        if not any(sizes):
            known = ", ".join(config.condition_names) or "no condition"
            raise ValueError(f"{name} were given, but this model knows: {known}")
        if name == "perturbation_embeds" and config.perturbation_dim is None:
            raise ValueError("perturbation_embeds were given, but this model learned its perturbations as labels")
        if value.ndim != dimensions or (name == "covariate_ids" and value.shape[1] != C):
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {shape}")
        if name in ("perturbation_embeds", "target_gene_ids") or value.device.type != "cpu" or not value.numel():
            continue
        largest = value.amax(dim=0) if name == "covariate_ids" else value.max()[None]
        for id_, size in zip(largest.tolist(), sizes, strict=True):
            if id_ >= size:
                raise ValueError(f"{name} holds {id_}, expected labels 0..{size - 1}, or -1 for not given")


class CellTotals(nn.Module):
    """Mean counts of the training cells, by which a partly observed cell shows how deep it was sequenced."""

    def __init__(self, config: DCMConfig):
        super().__init__()
        self.mask_token_id, self.pad_token_id = config.mask_token_id, config.pad_token_id
        # one row for each cell type, and a last one of all cells
        self.register_buffer("gene_mean", torch.ones(config.num_cell_types + 1, config.num_genes))
        # twice the count: the middle of a bin is an integer or a half, and integers survive a cast of the model to bf16
        self.register_buffer("twice_count", (2 * count_values(config)).long())

    def mean(self, gene_ids: torch.Tensor, cell_type_ids: torch.Tensor) -> torch.Tensor:
        """Mean counts (B, L) of genes (B or 1, L) in each cell's type, or in all cells where it is not given (-1)."""
        row = torch.where(cell_type_ids < 0, len(self.gene_mean) - 1, cell_type_ids)
        return self.gene_mean[row[:, None], gene_ids].float()

    def progress(self, input_ids: torch.Tensor, mean: torch.Tensor, library_size: torch.Tensor) -> Progress:
        """The progress of cells ``input_ids`` (B, L) whose genes have ``mean`` counts (B, L)."""
        is_masked = input_ids == self.mask_token_id
        is_measured = input_ids != self.pad_token_id
        mean = mean * is_measured
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
    library_size: torch.Tensor,
) -> Progress:
    """The progress of cells with these sums, each (B,). What is left of the library size tells the depth, or where that
    is not given the observed counts do."""
    remainder = log_ratio(library_size.float() - observed_total, expected_masked)
    depth = torch.where(library_size >= 0, remainder, log_ratio(observed_total, expected_observed))
    return Progress(t, observed_total, expected_observed, expected_masked, depth.exp())


def count_values(config: DCMConfig) -> torch.Tensor:
    """The count that each id stands for (V,), the middle of a bin; 0 for MASK and PAD."""
    bins = config.count_bins or []
    edges = [*range(config.num_counts - len(bins)), *bins, config.max_count + 1]
    return torch.tensor([*((left + right - 1) / 2 for left, right in pairwise(edges)), 0.0, 0.0])


def log_ratio(total: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """``log((total + 1) / (expected + 1))``: depth against a mean cell, drawn to 0 where little is expected."""
    return torch.log1p(total.clamp(min=0)) - torch.log1p(expected.clamp(min=0))


def sinusoidal(x: torch.Tensor, dim: int, max_period: float = 10_000.0) -> torch.Tensor:
    """Sines and cosines (B, dim) of a scalar of each cell (B,)."""
    frequencies = torch.exp(-math.log(max_period) * torch.arange(dim // 2, device=x.device) / (dim // 2))
    angles = x.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def smooth_features(z: torch.Tensor) -> torch.Tensor:
    """Smooth functions (B, 17) of a number of order one of each cell (B,)."""
    return torch.cat([z[:, None], sinusoidal(3 * z, SMOOTH_FEATURES, max_period=10.0)], dim=-1)


class LabelEncoder(nn.Embedding):
    """One learned vector for each label (one-hot, then linear) and a last one for *not given* (-1)."""

    def __init__(self, num_labels: int, dim: int):
        super().__init__(num_labels + 1, dim)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.where(ids < 0, self.num_embeddings - 1, ids))


class PerturbationEncoder(nn.Module):
    """Sum over a cell's perturbations of linear(frozen vector), or of a learned vector where a name has none.

    The control has no protein: it always has a learned vector. All -1 is *not given*, the learned null. A perturbation
    of which only a predicted effect is known, ``is_unseen``, is told by that alone, as training told others by theirs.
    """

    def __init__(self, config: DCMConfig):
        super().__init__()
        self.learned = LabelEncoder(config.num_perturbations, config.hidden_size)
        self.linear = None
        if config.perturbation_dim is not None:
            self.linear = nn.Linear(config.perturbation_dim, config.hidden_size, bias=False)
            self.register_buffer("table", torch.zeros(config.num_perturbations, config.perturbation_dim))
            self.register_buffer("has_vector", torch.zeros(config.num_perturbations, dtype=torch.bool))
        self.register_buffer("is_unseen", torch.zeros(config.num_perturbations, dtype=torch.bool))

    def forward(self, ids: torch.Tensor, embeds: torch.Tensor | None) -> torch.Tensor:
        """Condition vectors (B, D) of ``ids`` (B, P); ``embeds`` (B, P, vector) are added, NaN rows are padding."""
        given = (ids >= 0) & ~self.is_unseen[ids.clamp(min=0)]
        vectors = self.learned(ids.clamp(min=0))  # (B, P, D)
        if self.linear is not None:
            known = ids.clamp(min=0)
            from_table = self.linear(self.table[known].to(vectors.dtype))
            vectors = torch.where(self.has_vector[known][..., None], from_table, vectors)
        total = (vectors * given[..., None]).sum(dim=1)
        anything = given.any(dim=1)
        if embeds is not None:
            real = ~embeds.isnan().any(dim=-1)  # (B, P)
            extra = self.linear(torch.nan_to_num(embeds).to(self.learned.weight.dtype))
            total = total + (extra * real[..., None]).sum(dim=1)
            anything = anything | real.any(dim=1)
        null = self.learned(ids.new_full((1,), -1))
        return torch.where(anything[:, None], total, null)


class LibrarySizeEncoder(nn.Module):
    """From log1p of the total over the panel to a vector; -1 is *not given*, the learned null.

    The logarithm is standardised by the training cells' mean and standard deviation, and its features are smooth: cells
    of nearly the same size get nearly the same vector. With ``config.cell_summary`` the encoder also says how much the
    masked genes still have to sum to, against what they sum to in a mean cell.
    """

    def __init__(self, config: DCMConfig):
        super().__init__()
        self.register_buffer("log_mean", torch.tensor(0.0))
        self.register_buffer("log_std", torch.tensor(1.0))
        self.knows_remainder = config.cell_summary
        self.up = nn.Linear((SMOOTH_FEATURES + 1) * (1 + config.cell_summary), config.hidden_size)
        self.null = LabelEncoder(0, config.hidden_size)

    def forward(self, library_size: torch.Tensor, progress: Progress) -> torch.Tensor:
        given = library_size >= 0
        size = torch.where(given, library_size, 0).float()
        features = smooth_features((torch.log1p(size) - self.log_mean) / self.log_std)
        if self.knows_remainder:
            remainder = log_ratio(size - progress.observed_total, progress.expected_masked)
            features = torch.cat([features, smooth_features(remainder)], dim=-1)
        return torch.where(given[:, None], self.up(features.to(self.null.weight.dtype)), self.null.weight)


class ConditionEncoder(nn.Module):
    """Noise level and all conditions, concatenated, through one MLP (the paper's Section 3.2).

    With ``config.cell_summary`` the genes observed so far are one more of them, summed, with their depth against a mean
    cell: every gene hears of the cell's state through AdaLN directly, besides attention. Without it this is the paper's
    conditioning.
    """

    def __init__(self, config: DCMConfig):
        super().__init__()
        D = config.hidden_size
        self.config = config
        self.cell_type = LabelEncoder(config.num_cell_types, D) if config.num_cell_types else None
        self.perturbation = PerturbationEncoder(config) if config.num_perturbations else None
        self.covariates = nn.ModuleDict({name: LabelEncoder(size, D) for name, size in config.covariates.items()})
        self.library_size = LibrarySizeEncoder(config) if config.library_size_conditioning else None
        self.state = StateEncoder(config) if config.state_dim else None
        self.time = nn.Linear(SMOOTH_FEATURES + 1, D)
        self.summary = nn.Linear(D + SMOOTH_FEATURES + 1, D) if config.cell_summary else None
        num_vectors = 1 + len(config.condition_names) + config.cell_summary + (self.state is not None)
        self.mlp = nn.Sequential(nn.Linear(D * num_vectors, D), nn.SiLU(), nn.Linear(D, D), nn.SiLU())

    def forward(self, cells: PartialCells, observed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The condition (B, D) for AdaLN and the condition tokens (B, E, D), None unless configured.

        ``observed`` (B, D) is the sum of the observed genes' readings.
        """
        progress = cells.progress
        vectors = []
        if self.cell_type is not None:
            vectors.append(self.cell_type(cells.cell_type_ids))
        if self.perturbation is not None:
            vectors.append(self.perturbation(cells.perturbation_ids, cells.perturbation_embeds))
        for index, encoder in enumerate(self.covariates.values()):
            vectors.append(encoder(cells.covariate_ids[:, index]))
        if self.library_size is not None:
            vectors.append(self.library_size(cells.library_size, progress))
        if self.state is not None:
            vectors.append(self.state(cells.state))
        tokens = torch.stack(vectors, dim=1) if vectors and self.config.condition_tokens else None
        vectors.append(self.time(smooth_features(2 * progress.t - 1).to(observed.dtype)))
        if self.summary is not None:
            observed = observed / self.config.num_genes**0.5
            depth = smooth_features(log_ratio(progress.observed_total, progress.expected_observed))
            vectors.append(self.summary(torch.cat([observed, depth.to(observed.dtype)], dim=-1)))
        return self.mlp(torch.cat(vectors, dim=-1)), tokens


class LibrarySizes(nn.Module):
    """Quantiles of the training cells' library sizes for each group of conditions; generation draws from them.

    A group's key is (cell type, covariates..., perturbations...) with :data:`ANY` for *whatever*; rows stand from the
    most specific to the one that matches everything.
    """

    def __init__(self, config: DCMConfig):
        super().__init__()
        self.num_covariates = len(config.covariates)
        self.perturbation_columns = config.max_perturbations_per_cell
        width = 1 + self.num_covariates + self.perturbation_columns
        self.register_buffer("keys", torch.full((config.library_size_groups, width), ANY))
        self.register_buffer("quantiles", torch.zeros(config.library_size_groups, LIBRARY_QUANTILES))

    def draw(
        self,
        num_cells: int,
        cell_type_ids: torch.Tensor | None,
        perturbation_ids: torch.Tensor | None,
        covariate_ids: torch.Tensor | None,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """Library sizes (B,) by the inverse of the quantile function of the first group that matches each cell."""
        if len(self.keys) == 0:
            raise ValueError("this model stores no library sizes of its training cells: give library_size=, or 'null'")
        keys = self.group_keys(num_cells, cell_type_ids, perturbation_ids, covariate_ids)  # (B, W)
        rows = first_match(self.keys, keys)
        position = torch.rand(num_cells, generator=generator, device=keys.device) * (LIBRARY_QUANTILES - 1)
        left = position.long().clamp(max=LIBRARY_QUANTILES - 2)
        low, high = self.quantiles[rows, left].float(), self.quantiles[rows, left + 1].float()
        return (low + (position - left) * (high - low)).round()

    def group_keys(self, num_cells, cell_type_ids, perturbation_ids, covariate_ids) -> torch.Tensor:
        """Keys (B, W) of cells; a combination is sorted, and one wider than the table's is marked as unknown."""
        missing = self.keys.new_full((num_cells, 1), -1)
        covariates = missing.expand(-1, self.num_covariates) if covariate_ids is None else covariate_ids
        perturbations = missing if perturbation_ids is None else perturbation_ids
        perturbations = combination_keys(perturbations, self.keys.shape[1] - 1 - self.num_covariates)
        cell_type = missing if cell_type_ids is None else cell_type_ids[:, None]
        return torch.cat([cell_type, covariates[:, : self.num_covariates], perturbations], dim=1)


class LabelCounts(nn.Module):
    """How many training cells had which labels; cells of which nobody said a label get labels in these proportions.

    ``keys`` are those of :meth:`LibrarySizes.group_keys`.
    """

    def __init__(self, config: DCMConfig, key_width: int):
        super().__init__()
        self.num_single = 1 + len(config.covariates)  # columns of the cell type and the covariates
        self.register_buffer("keys", torch.full((config.label_groups, key_width), -1))
        self.register_buffer("number", torch.zeros(config.label_groups, dtype=torch.long))

    def complete(self, keys: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Keys (B, W) with the labels that are not given drawn from the training cells that have the given ones, where
        there are any."""
        wanted, drawn = keys.clone(), keys.clone()
        single, several = wanted[:, : self.num_single], wanted[:, self.num_single :]
        single[single == -1] = ANY
        several[(several == -1).all(dim=1)] = ANY
        known, number = self.keys.to(keys.device), self.number.to(keys.device)
        unique, group = wanted.unique(dim=0, return_inverse=True)
        for index, key in enumerate(unique):
            weight = number * ((known == key) | (key == ANY)).all(dim=1)
            rows = (group == index).nonzero()[:, 0]
            if (key == ANY).any() and weight.any():
                drawn[rows] = known[weight.double().multinomial(len(rows), replacement=True, generator=generator)]
        return drawn
