"""The cell state z: what is drawn once for a whole cell, so that its genes agree with each other.

z are the first whitened principal components of log-normalised training cells: linear, fixed, and stored with the
weights. Letters: B cells, G genes, d components, E = d + 1 with the logarithm of the total, C cell types, M mixture
components, N groups of conditions, S stored states. A row of NaN is *not given*. What a perturbation does to the state,
and to single genes besides, is here too.
"""

from copy import copy

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


def combination_keys(ids: torch.Tensor, width: int) -> torch.Tensor:
    """Perturbations (B, P) as columns (B, ``width``) of a key: descending, then -1; -3, unknown, where more."""
    ids = ids.sort(dim=1, descending=True).values
    ids = nn.functional.pad(ids, (0, max(0, width - ids.shape[1])), value=-1)
    return ids[:, :width].masked_fill((ids[:, width:] >= 0).any(dim=1, keepdim=True), -3)


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
    """From the state (B, E) to a vector (B, D); a row of NaN is *not given*.

    With the negative binomial head, which has loadings of the state, the network hears only whether there is one (and
    the depth where no library size tells it): told its values as well, it learns to read the noise of the very cell out
    of them, and drawn cells have it twice.
    """

    def __init__(self, config: DCMConfig):
        super().__init__()
        self.is_given = nn.Embedding(2, config.hidden_size)
        is_told = config.count_distribution != "nb"
        self.values = nn.Linear(config.state_width, config.hidden_size, bias=False) if is_told else None

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        given = ~state.isnan().any(dim=-1)
        vector = self.is_given(given.long())
        if self.values is not None:
            z = torch.nan_to_num(state) * given[:, None]
            vector = vector + self.values(z.to(vector.dtype))
        return vector


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


class PerturbationEffects(nn.Module):
    """What perturbations do against control cells: shifts of (z, log1p(total)), and log fold changes of genes.

    Rows are groups of (cell type or :data:`ANY`, perturbations in descending order): sets that training cells have,
    single ones that are predicted from their vectors, and a last one, for all others, with the mean effect. A set that
    has no row is the damped sum of its members. Gene effects are kept twice: whole, for cells whose state is
    not told, and what is left beside the state. ``base`` is the same of control cells against all cells of a type.
    """

    def __init__(self, config: DCMConfig):
        super().__init__()
        R, kinds = config.effect_groups, 1 + bool(config.state_dim)
        G = config.num_genes if config.num_perturbations else 0
        self.register_buffer("keys", torch.full((R, 1 + config.max_perturbations_per_cell), ANY))
        self.register_buffer("genes", torch.zeros(kinds, R, G))
        self.register_buffer("base", torch.zeros(kinds, config.num_cell_types + 1, G))
        self.register_buffer("state", torch.zeros(R, config.state_dim + 1))
        self.register_buffer("damping", torch.ones(kinds + 1))  # of sums of gene effects, of sums of shifts
        # of the state, when they were estimated
        self.register_buffer("loading", torch.zeros(G, config.state_width + 1))
        self.register_buffer("control_id", torch.tensor(-1))
        self.register_buffer("ridge", torch.tensor(1.0))  # penalty of the prediction from vectors

    def find(self, cell_type_ids: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (B, P) whose sum is the effect of perturbations ``ids`` (B, P), and which of them count."""
        ids = ids.masked_fill(ids == self.control_id, -1).sort(dim=1, descending=True).values
        W, P = self.keys.shape[1] - 1, ids.shape[1]
        whole = first_match(self.keys, torch.cat([cell_type_ids[:, None], combination_keys(ids, W)], dim=1))
        single = combination_keys(ids.flatten()[:, None], W)  # (B P, W)
        types = cell_type_ids.repeat_interleave(P)[:, None]
        rows = first_match(self.keys, torch.cat([types, single], dim=1)).view(-1, P)
        is_known = (whole < len(self.keys) - 1)[:, None]
        first = torch.arange(P, device=ids.device) == 0
        return torch.where(is_known & first, whole[:, None], rows), torch.where(is_known, first, True) & (ids >= 0)

    def kind(self, state: torch.Tensor) -> torch.Tensor:
        """Which kind of gene effects (B,) belongs to states (B, E): 1 where one is told."""
        return (~state.isnan().any(dim=1)).long().clamp(max=len(self.genes) - 1)

    def of_genes(
        self,
        cell_type_ids: torch.Tensor,
        ids: torch.Tensor,
        gene_ids: torch.Tensor,
        kind: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Log fold changes (B, L) of genes (B, L) against all cells of the type; 0 where no perturbation is given.

        ``kind`` (B,) is 0 for whole effects, 1 for those beside the state; ``tables`` stand for ``genes`` and ``base``,
        with as many more kinds as they have.
        """
        rows, counts = self.find(cell_type_ids, ids)
        factor = torch.where(counts.sum(dim=1) > 1, self.damping[kind % len(self.genes)], 1.0)
        table, base = tables or (self.genes, self.base)
        effect = base[kind[:, None], cell_type_ids[:, None], gene_ids]
        for column in range(ids.shape[1]):
            of_one = table[kind[:, None], rows[:, column, None], gene_ids]
            effect = effect + of_one * (factor * counts[:, column])[:, None]
        return torch.where((ids >= 0).any(dim=1, keepdim=True), effect, 0.0)

    def of_state(self, cell_type_ids: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Shifts (B, E) of a control cell's (z, log1p(total))."""
        rows, counts = self.find(cell_type_ids, ids)
        factor = torch.where(counts.sum(dim=1) > 1, self.damping[-1], 1.0)
        return (self.state[rows] * counts[..., None]).sum(dim=1) * factor[:, None]

    def with_vectors(
        self,
        ids: torch.Tensor,
        embeds: torch.Tensor | None,
        targets: torch.Tensor | None,
        encoder: nn.Module,
        known_targets: torch.Tensor,
    ) -> tuple["PerturbationEffects", torch.Tensor]:
        """Effects in which vectors ``embeds`` (B, P', D) are labels that no training cell has, and the ids (B, P + P')
        of ``ids`` (B, P) and of these. ``targets`` (B, P') are genes that the vectors' perturbations target;
        ``encoder`` has the vectors of the known ones, which target ``known_targets``."""
        if embeds is None:
            return self, ids
        effects = copy(self)
        effects._buffers = dict(self._buffers)
        is_real = ~embeds.isnan().any(dim=-1)
        labels = torch.full_like(is_real, -1, dtype=torch.long)
        genes = targets if targets is not None and targets.shape == labels.shape else labels
        given = torch.cat([embeds.float(), genes[..., None]], dim=-1)[is_real]  # 16 bits would round a gene's number
        new, which = given.unique(dim=0, return_inverse=True)
        new_ids = len(encoder.has_vector) + torch.arange(len(new), device=ids.device)
        seen = (encoder.has_vector & ~encoder.is_unseen).nonzero()[:, 0]
        effects.add(new_ids, new[:, :-1], new[:, -1].long(), seen, encoder.table[seen], known_targets[seen])
        labels[is_real] = new_ids[which]
        return effects, torch.cat([ids, labels], dim=1)

    def add(
        self,
        ids: torch.Tensor,
        vectors: torch.Tensor,
        targets: torch.Tensor,
        known: torch.Tensor,
        known_vectors: torch.Tensor,
        known_targets: torch.Tensor,
    ) -> None:
        """Add rows for single perturbations ``ids`` (m,), predicted from ``vectors`` (m, D) by what is known of others,
        ``known`` (n,) with ``known_vectors`` (n, D); ``targets`` are genes of the panel, -1 for none."""
        keys = self.keys.new_full((len(ids), self.keys.shape[1]), -1)
        keys[:, 0], keys[:, 1] = ANY, ids
        singles = torch.where((self.keys[:, 0] == ANY) & (self.keys[:, 2:] < 0).all(dim=1), self.keys[:, 1], -1)
        has_row = torch.isin(known, singles)
        known_vectors, known_targets = known_vectors[has_row], known_targets[has_row]
        rows = (singles == known[has_row, None]).int().argmax(dim=1)
        if len(rows):
            weights = ridge_weights(vectors, known_vectors, float(self.ridge))
            others = left_out_weights(known_vectors, float(self.ridge))
        else:  # nobody to learn from: the mean effect
            weights, rows = torch.ones(len(ids), 1), torch.tensor([len(singles) - 1])
            others, known_targets = torch.zeros(1, 1), rows.new_full((1,), -1)
        of_genes = predicted_effects(self.genes[:, rows], known_targets, others, weights, targets)
        self.keys = torch.cat([self.keys[:-1], keys, self.keys[-1:]])
        for name, new in (("genes", of_genes), ("state", weights.to(self.state) @ self.state[rows])):
            table = getattr(self, name)
            setattr(self, name, torch.cat([table[..., :-1, :], new.to(table), table[..., -1:, :]], dim=-2))


def ridge_weights(vectors: torch.Tensor, known: torch.Tensor, penalty: float) -> torch.Tensor:
    """Weights (m, n), rows sum to 1, by which ridge regression makes predictions at ``vectors`` (m, D) of what is known
    at ``known`` (n, D); the penalty is in units of the mean squared length of centred vectors. A huge one: the mean."""
    n = len(known)
    mean = known.mean(dim=0)
    centred, new = (known - mean).double(), (vectors - mean).double()
    scale = centred.square().sum(dim=1).mean().clamp(min=1e-12)
    kernel = centred @ centred.T / scale
    weights = torch.linalg.solve(kernel + penalty * torch.eye(n, dtype=kernel.dtype), centred @ new.T / scale).T
    return weights + (1 - weights.sum(dim=1, keepdim=True)) / n


def left_out_weights(vectors: torch.Tensor, penalty: float) -> torch.Tensor:
    """Weights (n, n) of the others in what :func:`ridge_weights` predicts at each of ``vectors`` (n, D) without it."""
    weights = ridge_weights(vectors, vectors, penalty)
    own = weights.diagonal()
    return (weights - own.diag()) / (1 - own).clamp(min=1e-9)[:, None]


def predicted_effects(
    effects: torch.Tensor,
    targets: torch.Tensor,
    others: torch.Tensor,
    weights: torch.Tensor,
    new_targets: torch.Tensor,
) -> torch.Tensor:
    """Effects (.., m, G) of perturbations by ``weights`` (m, n) of those ``effects`` (.., n, G) that are known.

    What a known perturbation does to its own target (n,; -1 for none) says nothing of what others do there: what
    ``others`` (n, n), the weights that predict it, say of it takes its place. The mean of what it does beyond that is
    added at ``new_targets`` (m,).
    """
    known, new = (targets >= 0).nonzero()[:, 0], (new_targets >= 0).nonzero()[:, 0]
    at_own = (..., known, targets[known])
    of_others = (others.to(effects) @ effects)[at_own]
    beyond = (effects[at_own] - of_others).mean(dim=-1, keepdim=True).nan_to_num()
    effects = effects.clone()
    effects[at_own] = of_others
    predicted = weights.to(effects) @ effects
    predicted[..., new, new_targets[new]] += beyond
    return predicted
