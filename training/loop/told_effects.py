"""Effects of perturbations in training: the network's own are set, and each cell is told some that it had no part in.

A cell is told what the other half of the training cells says, or, for a share of them, what would be said of its
perturbations if no cell had them. Letters: B cells, G genes, K kinds of gene effects, R rows, T cell types.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy

import numpy as np
import torch

from modeling_dcm import DCMForDenoising
from modeling_dcm.count_distribution_dcm import LOWEST_MEAN
from modeling_dcm.state_dcm import ANY, PerturbationEffects
from training.data.loader import Cells
from training.data.statistics import read_statistics
from training.loop.start_estimates import state_effect
from training.perturbations.effects import FOLDS, Effects, LabelledCells, estimate_effects

PREDICTED_SHARE = 0.2  # of cells that are told a predicted effect
STATE_BATCH = 512
TYPICAL_SIZE = 2.0  # r of a negative binomial, where no network has estimated it


def fold_of(library_size: torch.Tensor) -> torch.Tensor:
    """Which half (B,) a cell is in: whether its total is even. It can be said again of any cell, wherever it is."""
    return library_size.long() % FOLDS


class TrainingEffects:
    """What training cells are told of their perturbations' effects on genes."""

    def __init__(self, effects: PerturbationEffects, target_gene_ids: torch.Tensor, estimates: Effects):
        self.effects, self.targets = deepcopy(effects), target_gene_ids  # copies stay where batches are made
        row_of = {tuple(key): row for row, key in enumerate(estimates.keys.tolist())}
        rows = torch.tensor([row_of.get(tuple(key), -1) for key in effects.keys.tolist()])  # -1: a checkpoint knew it
        found = [*estimates.folds, *estimates.predicted]
        tables = [torch.where((rows >= 0)[:, None], torch.from_numpy(each)[:, rows], effects.genes) for each in found]
        base = torch.cat([*torch.from_numpy(estimates.base_folds)] * 2)
        self.tables = torch.cat(tables).float(), base.float()  # (4K, R, G) and (4K, T+1, G)
        self.is_unseen = torch.from_numpy(estimates.by_vector)[rows] & (rows >= 0)

    def shown(
        self, inputs: dict[str, torch.Tensor], library_size: torch.Tensor, has_state: torch.Tensor, draw: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Arguments of the model's forward for labels ``inputs``: the effect (B, G), and labels without those of
        perturbations that are told by a predicted effect alone, which is where ``draw`` (B,) is small.

        ``has_state`` (B,) says which cells are told their state.
        """
        ids = inputs["perturbation_ids"]
        types = inputs.get("cell_type_ids", torch.full((len(ids),), -1))
        K = len(self.effects.genes)
        kind = has_state.long().clamp(max=K - 1)
        rows, counts = self.effects.find(types, ids)
        is_predicted = (draw < PREDICTED_SHARE) & counts.any(dim=1)
        table = FOLDS * is_predicted + FOLDS - 1 - fold_of(library_size)
        genes = torch.arange(self.tables[0].shape[-1]).expand(len(ids), -1)
        effect = self.effects.of_genes(types, ids, genes, kind + K * table, self.tables)
        targets = self.targets[ids.clamp(min=0)].masked_fill(ids < 0, -1)
        is_hidden = (
            is_predicted
            & (counts.sum(dim=1) == 1)
            & self.is_unseen[rows].gather(1, counts.long().argmax(1, True))[:, 0]
        )
        return {
            "effect": effect,
            "perturbation_ids": ids.masked_fill(is_hidden[:, None], -1),
            "target_gene_ids": targets,
        }


@torch.no_grad()
def training_effects(model: DCMForDenoising, cells: Cells) -> TrainingEffects | None:
    """Estimate effects on the training cells and give them to a ``model``; what it knew of others stays.

    None where there is nothing to estimate: no perturbations or no control, or a head that starts at no statistics.
    """
    tokenizer, config = cells.tokenizer, model.config
    if config.count_distribution != "nb" or not config.num_perturbations or tokenizer.control is None:
        return None
    store, encoder = model.effects, model.conditions.perturbation
    control = tokenizer.perturbations.index(tokenizer.control)
    if not config.effect_groups and config.state_dim:
        store.loading.copy_(model.head.state_loading.weight)
    vectors = {}
    if config.perturbation_dim:
        vectors = {id_: encoder.table[id_] for id_ in encoder.has_vector.nonzero()[:, 0].tolist() if id_ != control}
    found = estimate_effects(labelled_cells(model, cells, control), vectors)
    if found is None:
        return None
    take_rows(store, found)
    base = torch.from_numpy(found.base).to(store.base)
    store.base.copy_(torch.where(base == 0, store.base, base))
    if not config.effect_groups:
        ids = cells.conditions["perturbation_ids"].unique()
        has_cells = torch.zeros(config.num_perturbations, dtype=bool)
        has_cells[ids[ids >= 0]] = True
        encoder.is_unseen |= ~has_cells.to(encoder.is_unseen.device)
        store.damping.copy_(torch.from_numpy(found.damping))
        store.control_id.fill_(control)
        store.ridge.fill_(found.penalty)
    config.effect_groups = len(store.keys)
    encoder.is_unseen[config.perturbations_without_cells or []] = True
    return TrainingEffects(store, model.target_gene_ids.clone(), found)


def take_rows(store: PerturbationEffects, found: Effects) -> None:
    """Put rows that the cells tell in the place of those of the same groups: specific ones first, the rest last."""
    told = {tuple(key) for key in found.keys.tolist()}
    kept = torch.tensor([row for row, key in enumerate(store.keys.tolist()) if tuple(key) not in told], dtype=int)
    for name, axis in (("keys", 0), ("state", 0), ("genes", 1)):
        old = getattr(store, name)
        values = torch.from_numpy(getattr(found, name)).to(old)
        setattr(store, name, torch.cat([old.index_select(axis, kept), values], dim=axis))
    keys = store.keys.cpu().numpy()
    order = torch.from_numpy(np.lexsort(((keys == ANY).all(axis=1), keys[:, 0] == ANY)))
    store.keys, store.state, store.genes = store.keys[order], store.state[order], store.genes[:, order]


def leave_one_out(cells: Cells, vectors: Mapping[str, torch.Tensor]) -> tuple[int, float] | None:
    """How far ``vectors`` of training perturbations tell each other's effects on genes: how many have one, and what is
    left of the squared error of the mean effect, leaving one out at a time.

    None with fewer than three of them, or where there is nothing to compare with.
    """
    tokenizer = cells.tokenizer
    if tokenizer.control is None or not tokenizer.perturbations:
        return None
    statistics = read_statistics(cells.folder)
    histogram = statistics.histogram(tokenizer)
    mean = (histogram @ np.arange(histogram.shape[1]) / np.maximum(histogram.sum(axis=1), 1))[None]  # of count ids
    if tokenizer.cell_types:
        totals, number = statistics.cell_type_totals(tokenizer, mean[0])
        mean = np.concatenate([totals / np.maximum(number, 1)[:, None], mean])
    size = np.full((1, mean.shape[1]), TYPICAL_SIZE, dtype=np.float32)
    control = tokenizer.perturbations.index(tokenizer.control)
    table = {tokenizer.perturbations.index(name): v for name, v in vectors.items() if name in tokenizer.perturbations}
    found = estimate_effects(labelled(cells, control, mean.astype(np.float32), size), table)
    return None if found is None or found.error is None else (found.num_known, found.error)


def labelled_cells(model: DCMForDenoising, cells: Cells, control: int) -> LabelledCells:
    """The training cells as effects are estimated from them, with what ``model`` started at."""
    store, config = model.effects, model.config
    mean, size = model.totals.gene_mean.numpy(), model.head.log_size[: len(store.genes)].exp().numpy()
    if not config.state_dim:
        return labelled(cells, control, mean, size)
    raw = cell_states(model, cells)
    state = torch.cat([raw[:, : config.state_dim].double(), torch.log1p(cells.library_size.double())[:, None]], dim=1)

    of_type = model.head.type_shift.exp().numpy()

    def factor(rows: np.ndarray, types: np.ndarray) -> np.ndarray:
        return state_effect(store.loading.numpy(), torch.nan_to_num(raw[rows]).numpy()) * of_type[types]

    return labelled(cells, control, mean, size, state.numpy(), factor)


def labelled(
    cells: Cells,
    control: int,
    gene_mean: np.ndarray,
    size: np.ndarray,
    state: np.ndarray | None = None,
    factor: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> LabelledCells:
    """The training cells with mean counts by cell type (T + 1, G), the last row of all cells, and r (K, G); ``factor``
    of some rows (n, G), of cells of some types (n,), is that of the state (N, E) on means."""
    N = len(cells)
    missing = torch.full((N,), -1)
    types = cells.conditions.get("cell_type_ids", missing)
    ids = cells.conditions["perturbation_ids"]
    others = ids.masked_fill(ids == control, -1).sort(dim=1, descending=True).values
    covariates = cells.conditions.get("covariate_ids", missing[:, None])
    context = torch.cat([types[:, None], covariates], dim=1).unique(dim=0, return_inverse=True)[1]

    def counts(rows: np.ndarray) -> np.ndarray:
        return cells.csr(rows).toarray().astype(np.float32)

    def expected(rows: np.ndarray) -> np.ndarray:
        of_rows = types[rows].numpy()
        mean = gene_mean[of_rows]  # -1 is the last row
        absent = cells.not_measured(rows)
        mean = mean if absent is None else np.where(absent, 0, mean)
        depth = (cells.library_size[rows].numpy() + 1) / (mean.sum(axis=1) + 1)
        whole = np.maximum(mean * depth[:, None], LOWEST_MEAN).astype(np.float32)
        return whole[None] if factor is None else np.stack([whole, whole * factor(rows, of_rows)])

    return LabelledCells(
        counts=counts,
        expected=expected,
        size=size,
        state=state,
        types=types.numpy(),
        context=context.numpy(),
        ids=others.numpy(),
        is_control=((ids == control).any(dim=1) & (others < 0).all(dim=1)).numpy(),
        fold=fold_of(cells.library_size).numpy(),
        num_types=len(gene_mean) - 1,
        targets=cells.tokenizer.target_gene_ids,
    )


def cell_states(model: DCMForDenoising, cells: Cells, rows: np.ndarray | None = None) -> torch.Tensor:
    """States (n, E) of some cells, or of all, NaN where a gene was not measured."""
    rows, parts = np.arange(len(cells)) if rows is None else rows, []
    for start in range(0, len(rows), STATE_BATCH):
        batch = cells[rows[start : start + STATE_BATCH]]
        parts.append(model.state(batch["input_ids"].long(), batch["library_size"]))
    return torch.cat(parts)
