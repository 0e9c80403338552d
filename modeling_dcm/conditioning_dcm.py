"""What the network is told about a cell: conditions become vectors, and library sizes are drawn for generation.

Every condition has a learned null for *not given*; the control is an ordinary label; -1 beside real ids is padding.
Knows nothing of labels' names. Letters: B cells, P perturbations of a cell, C covariates, D width, N groups.
"""

import torch
from torch import nn

from .configuration_dcm import DCMConfig
from .depth_dcm import Progress, log_ratio
from .layers_dcm import sinusoidal

CONDITIONS = ("cell_type_ids", "perturbation_ids", "perturbation_embeds", "covariate_ids", "library_size")
SMOOTH_FEATURES = 16
LIBRARY_QUANTILES = 65
ANY = -2  # in a group's key: whatever label


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
        if value.ndim != dimensions or (name == "covariate_ids" and value.shape[1] != C):
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {shape}")
        if name in ("perturbation_embeds", "target_gene_ids") or value.device.type != "cpu" or not value.numel():
            continue
        largest = value.amax(dim=0) if name == "covariate_ids" else value.max()[None]
        for id_, size in zip(largest.tolist(), sizes, strict=True):
            if id_ >= size:
                raise ValueError(f"{name} holds {id_}, expected labels 0..{size - 1}, or -1 for not given")


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

    The control has no protein: it always has a learned vector. All -1 is *not given*, the learned null.
    """

    def __init__(self, config: DCMConfig):
        super().__init__()
        self.learned = LabelEncoder(config.num_perturbations, config.hidden_size)
        self.linear = None
        if config.perturbation_dim is not None:
            self.linear = nn.Linear(config.perturbation_dim, config.hidden_size, bias=False)
            self.register_buffer("table", torch.zeros(config.num_perturbations, config.perturbation_dim))
            self.register_buffer("has_vector", torch.zeros(config.num_perturbations, dtype=torch.bool))

    def forward(self, ids: torch.Tensor, embeds: torch.Tensor | None) -> torch.Tensor:
        """Condition vectors (B, D) of ``ids`` (B, P); ``embeds`` (B, P, vector) are added, NaN rows are padding."""
        given = ids >= 0
        vectors = self.learned(ids.clamp(min=0))  # (B, P, D)
        if self.linear is not None:
            known = ids.clamp(min=0)
            from_table = self.linear(self.table[known].to(self.linear.weight.dtype))
            vectors = torch.where(self.has_vector[known][..., None], from_table, vectors)
        total = (vectors * given[..., None]).sum(dim=1)
        anything = given.any(dim=1)
        if embeds is not None:
            if self.linear is None:
                raise ValueError("perturbation_embeds were given, but this model learned its perturbations as labels")
            real = ~embeds.isnan().any(dim=-1)  # (B, P)
            extra = self.linear(torch.nan_to_num(embeds).to(self.linear.weight.dtype))
            total = total + (extra * real[..., None]).sum(dim=1)
            anything = anything | real.any(dim=1)
        null = self.learned(ids.new_full((1,), -1))
        return torch.where(anything[:, None], total, null)


class LibrarySizeEncoder(nn.Module):
    """From log1p of the total over the panel to a vector; below zero or NaN is *not given*, the learned null.

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
        return torch.where(given[:, None], self.up(features.to(self.up.weight.dtype)), self.null.weight)


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
        self.time = nn.Linear(SMOOTH_FEATURES + 1, D)
        self.summary = nn.Linear(D + SMOOTH_FEATURES + 1, D) if config.cell_summary else None
        num_vectors = 1 + len(config.condition_names) + config.cell_summary
        self.mlp = nn.Sequential(nn.Linear(D * num_vectors, D), nn.SiLU(), nn.Linear(D, D), nn.SiLU())

    def forward(
        self,
        progress: Progress,
        observed: torch.Tensor,
        cell_type_ids: torch.Tensor | None,
        perturbation_ids: torch.Tensor | None,
        perturbation_embeds: torch.Tensor | None,
        covariate_ids: torch.Tensor | None,
        library_size: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The condition (B, D) for AdaLN and the condition tokens (B, E, D), None unless configured.

        ``observed`` (B, D) is the sum of the observed genes' readings."""
        B, device = len(observed), observed.device
        missing = torch.full((B,), -1, device=device)
        vectors = []
        if self.cell_type is not None:
            vectors.append(self.cell_type(missing if cell_type_ids is None else cell_type_ids))
        if self.perturbation is not None:
            ids = missing[:, None] if perturbation_ids is None else perturbation_ids
            vectors.append(self.perturbation(ids, perturbation_embeds))
        for index, encoder in enumerate(self.covariates.values()):
            vectors.append(encoder(missing if covariate_ids is None else covariate_ids[:, index]))
        if self.library_size is not None:
            vectors.append(self.library_size(missing if library_size is None else library_size, progress))
        tokens = torch.stack(vectors, dim=1) if vectors and self.config.condition_tokens else None
        vectors.append(self.time(smooth_features(2 * progress.t - 1).to(self.time.weight.dtype)))
        if self.summary is not None:
            depth = smooth_features(log_ratio(progress.observed_total, progress.expected_observed))
            vectors.append(self.summary(torch.cat([observed, depth.to(observed.dtype)], dim=-1)))
        return self.mlp(torch.cat(vectors, dim=-1)), tokens


class LibrarySizes(nn.Module):
    """Quantiles of the training cells' library sizes for each group of conditions; generation draws from them.

    A group's key is (cell type, covariates..., perturbations...) with -2 for *whatever*; rows stand from the most
    specific to the one that matches everything.
    """

    def __init__(self, config: DCMConfig):
        super().__init__()
        self.key_width = 1 + len(config.covariates) + config.max_perturbations_per_cell
        self.num_covariates = len(config.covariates)
        groups = config.library_size_groups
        self.register_buffer("keys", torch.full((groups, self.key_width), ANY))
        self.register_buffer("quantiles", torch.zeros(groups, LIBRARY_QUANTILES))

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
        unique, cell_key = keys.unique(dim=0, return_inverse=True)
        matches = ((self.keys[None] == unique[:, None]) | (self.keys[None] == ANY)).all(dim=-1)  # (U, N)
        rows = matches.int().argmax(dim=1)[cell_key]
        position = torch.rand(num_cells, generator=generator, device=keys.device) * (LIBRARY_QUANTILES - 1)
        left = position.long().clamp(max=LIBRARY_QUANTILES - 2)
        low, high = self.quantiles[rows, left].float(), self.quantiles[rows, left + 1].float()
        return (low + (position - left) * (high - low)).round()

    def group_keys(self, num_cells, cell_type_ids, perturbation_ids, covariate_ids) -> torch.Tensor:
        """Keys (B, W) of cells; a combination is sorted, and one wider than the table's is marked as unknown."""
        device = self.keys.device
        width = self.key_width - 1 - self.num_covariates
        missing = torch.full((num_cells, 1), -1, device=device)
        covariates = missing.expand(-1, self.num_covariates) if covariate_ids is None else covariate_ids
        perturbations = missing if perturbation_ids is None else perturbation_ids.sort(dim=1, descending=True).values
        too_wide = (perturbations[:, width:] >= 0).any(dim=1, keepdim=True)
        missing_columns = max(0, width - perturbations.shape[1])
        perturbations = nn.functional.pad(perturbations[:, :width], (0, missing_columns), value=-1)
        perturbations = torch.where(too_wide, -3, perturbations)
        cell_type = missing if cell_type_ids is None else cell_type_ids[:, None]
        return torch.cat([cell_type, covariates[:, : self.num_covariates], perturbations], dim=1)

    @staticmethod
    def from_cells(keys: torch.Tensor, library_size: torch.Tensor, num_context: int, min_cells: int = 50):
        """Keys (N, W) and quantiles (N, 65) of training cells with ``keys`` (B, W) and ``library_size`` (B,).

        Groups below ``min_cells`` are left out: they fall back to the same context (the first ``num_context`` columns:
        cell type and covariates) with any perturbation, then to the cell type, then to all cells.
        """
        levels = [keys.shape[1], num_context, 1, 0]
        levels = [level for i, level in enumerate(levels) if level not in levels[:i]]
        all_keys, all_quantiles = [], []
        q = torch.linspace(0, 1, LIBRARY_QUANTILES, dtype=torch.float64)
        for level in levels:
            masked = keys.clone()
            masked[:, level:] = ANY
            groups, members = masked.unique(dim=0, return_inverse=True)
            for index, group in enumerate(groups):
                sizes = library_size[members == index].double()
                if len(sizes) >= min_cells or level == 0:
                    all_keys.append(group)
                    all_quantiles.append(torch.quantile(sizes, q))
        return torch.stack(all_keys), torch.stack(all_quantiles).float()
