"""What training starts from: the vocabulary it learns, and a network initialised with what the training cells say.

Knows nothing of the loop. Letters: N training cells, G genes, K largest count.
"""

import logging
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from scipy.sparse import csr_matrix

from modeling_dcm import SIZES, DCMConfig, DCMForDenoising
from modeling_dcm.conditioning_dcm import ANY
from modeling_dcm.count_distribution_dcm import LOWEST_MEAN
from modeling_dcm.state_dcm import CellState
from tokenization import DCMTokenizer
from tokenization.labels_dcm import shortened
from training.config import TrainConfig
from training.data.loader import Cells
from training.data.loader import open_cells as open_split
from training.data.statistics import Statistics, library_size_quantiles, read_statistics
from training.loop.fine_tune import NETWORK, Source, take_state_map, transfer
from training.loop.start_estimates import (
    calibrated_loadings,
    count_corrections,
    held_out_spread,
    largest_means,
    likely_dispersion,
    principal_components,
    regressed,
    state_mixture,
    type_shifts,
)
from training.loop.told_effects import cell_states
from training.perturbations.vectors import PerturbationTable, read_table

logger = logging.getLogger(__name__)


def open_cells(config: TrainConfig, split: str, tokenizer: DCMTokenizer) -> Cells:
    """One split of the shards of a run; see :func:`training.data.loader.open_cells`."""
    return open_split(config.shards, split, tokenizer, streaming=config.streaming)


def build_tokenizer(config: TrainConfig) -> DCMTokenizer:
    """The shards' vocabulary, less the conditions that are not learned, plus the names of a perturbation table."""
    shards = DCMTokenizer.from_pretrained(config.shards / "tokenizer")
    there = [*(["cell_type"] if shards.cell_types else []), *(["perturbation"] if shards.perturbations else [])]
    there += list(shards.covariates)
    wanted = {"all": there, "none": []}.get(config.conditions, config.conditions.split(","))
    unknown = [name for name in wanted if name not in there]
    if unknown:
        raise ValueError(f"conditions={config.conditions!r}: the shards have no {unknown}; they have {there}")
    perturbations = list(shards.perturbations) if "perturbation" in wanted else []
    if config.perturbation_embeddings is not None:
        perturbations = _names_with_table(config, perturbations, shards)
    return DCMTokenizer(
        genes=shards.genes,
        max_count=shards.max_count,
        count_bins=shards.count_bins,
        cell_types=shards.cell_types if "cell_type" in wanted else None,
        perturbations=perturbations or None,
        control=shards.control if perturbations else None,
        covariates={name: labels for name, labels in shards.covariates.items() if name in wanted},
        separator=shards.separator,
    )


def _names_with_table(config: TrainConfig, perturbations: list[str], shards: DCMTokenizer) -> list[str]:
    """The shards' names that have a vector or can learn one, then those of the table that no cell has: the model can
    be asked for them all the same."""
    if not perturbations:
        raise ValueError("perturbation_embeddings were given, but no perturbation is learned from these shards")
    path = config.perturbation_embeddings
    table = read_table(path, shards.control)
    without = [name for name in perturbations if name not in table.vectors and name != shards.control]
    forgotten = [name for name in without if name not in table.without_vector]
    if forgotten:
        raise ValueError(
            f"{str(path)!r} has no vector for {len(forgotten)} of {len(perturbations)} training perturbations: "
            f"{shortened(forgotten, 20)}; dcm-embed --allow-missing marks them, and they get learned vectors"
        )
    never_seen = []
    if without:
        seen = _seen(open_cells(config, "train", shards), "perturbation_ids", shards.perturbations)
        never_seen = [name for name in without if name not in seen]
        learned = [name for name in without if name in seen]
        if learned:
            logger.info("%d perturbations without a vector learn one: %s", len(learned), shortened(learned, 20))
    if never_seen:
        logger.warning(
            "%d perturbations have neither a vector nor a training cell, and the model will not know them: %s",
            len(never_seen),
            ", ".join(never_seen),
        )
    known = [name for name in perturbations if name not in never_seen]
    return known + sorted(set(table.vectors) - set(known))


def build_model(
    config: TrainConfig, tokenizer: DCMTokenizer, cells: Cells, source: Source | None = None
) -> DCMForDenoising:
    """A fresh network whose head emits the training marginals and that knows the training cells' library sizes.

    A gene's marginal and mean counts are those of the cells in which it was measured. With a ``source`` the weights are
    then taken over from there, see :func:`transfer`.
    """
    statistics = read_statistics(cells.folder)
    found, named = len(statistics.vocabulary["genes"]), len(tokenizer.genes)
    if found != named:
        raise ValueError(
            f"the shards in {str(cells.folder)!r} have counts of {found:,} genes, but their tokenizer names {named:,}: "
            "its genes.txt was changed; convert again"
        )
    shape = SIZES[config.size] if config.size else {}
    table = read_table(config.perturbation_embeddings, tokenizer.control) if config.perturbation_embeddings else None
    perturbations = cells.conditions.get("perturbation_ids")
    vector_size, table_sha256 = (None, None) if table is None else (table.dim, table.sha256)
    if source is not None and table is None and tokenizer.perturbations:
        vector_size = source.model.config.perturbation_dim
        table_sha256 = source.model.config.perturbation_table_sha256
    model_config = DCMConfig(
        **{name: getattr(config, name) for name in NETWORK} | shape,
        num_genes=len(tokenizer.genes),
        max_count=tokenizer.max_count,
        count_bins=tokenizer.count_bins,
        num_cell_types=len(tokenizer.cell_types),
        num_perturbations=len(tokenizer.perturbations),
        max_perturbations_per_cell=1 if perturbations is None else perturbations.shape[1],
        covariates={name: len(names) for name, names in tokenizer.covariates.items()},
        perturbation_dim=vector_size,
        perturbation_table_sha256=table_sha256,
    )
    model = empty_model(model_config, config)
    model.set_marginals(torch.from_numpy(statistics.histogram(tokenizer)))
    if tokenizer.cell_types:
        totals = statistics.cell_type_totals(tokenizer, model.totals.gene_mean[-1].numpy())
        model.set_cell_type_means(*map(torch.from_numpy, totals))
    model.target_gene_ids.copy_(torch.from_numpy(tokenizer.target_gene_ids))
    if config.library_size_conditioning:
        _set_library_sizes(model, tokenizer, statistics, cells)
    if model.config.condition_names:  # how many training cells have which labels
        labels = [cells.conditions.get(name) for name in ("cell_type_ids", "perturbation_ids", "covariate_ids")]
        keys, number = model.library_sizes.group_keys(len(cells), *labels).unique(dim=0, return_counts=True)
        model.label_counts.keys, model.label_counts.number, model.config.label_groups = keys, number, len(keys)
    set_estimates(model, config, cells, source)
    for index, name in enumerate(tokenizer.perturbations if table is not None else ()):
        if name in table.vectors:  # frozen; names without one, the control among them, keep their learned vector
            encoder = model.conditions.perturbation
            encoder.table[index], encoder.has_vector[index] = table.vectors[name], True
    if source is not None:
        transfer(source, model, tokenizer)
    if model_config.perturbation_dim:
        model_config.perturbations_without_cells = _vectors_without_cells(model, tokenizer, cells, source)
    _warn_of_names_never_seen(tokenizer, cells, table, source)
    logger.info(
        "model: %s, %s attention, %s parameters; %d genes, counts to %d; conditions: %s",
        config.backbone,
        model.config._attn_implementation,
        f"{sum(p.numel() for p in model.parameters()):,}",
        len(tokenizer.genes),
        tokenizer.max_count,
        ", ".join(model_config.condition_names) or "none",
    )
    return model


def empty_model(model_config: DCMConfig, config: TrainConfig) -> DCMForDenoising:
    """A network with random weights that computes as ``config`` says."""
    model_config._attn_implementation = None if config.attn == "auto" else config.attn
    model = DCMForDenoising(model_config)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def _seen(cells: Cells, ids: str, names: Sequence[str]) -> set[str]:
    """Which of the ``names`` some cell has."""
    return {names[id_] for id_ in cells.conditions[ids].unique().tolist() if id_ >= 0}


def _warn_of_names_never_seen(
    tokenizer: DCMTokenizer, cells: Cells, table: PerturbationTable | None, source: Source | None
) -> None:
    """Say which names the model takes and yet knows nothing of: no training cell has them, now or in the source, and
    they have no vector. Cells drawn for them are drawn for a random vector."""
    known = set() if table is None else set(table.vectors)
    if source is not None:
        known |= {*source.tokenizer.cell_types, *source.tokenizer.perturbations}
    kinds = [("cell types", "cell_type_ids", tokenizer.cell_types)] * bool(tokenizer.cell_types)
    kinds += [("perturbations", "perturbation_ids", tokenizer.perturbations)] * bool(tokenizer.perturbations)
    for what, ids, names in kinds:
        never_seen = [name for name in names if name not in _seen(cells, ids, names) | known]
        if never_seen:
            logger.warning(
                "no training cell has these %s, so the model takes the names but learns nothing of them: %s",
                what,
                shortened(never_seen, 20),
            )


def _vectors_without_cells(
    model: DCMForDenoising, tokenizer: DCMTokenizer, cells: Cells, source: Source | None
) -> list[int]:
    """Ids of perturbations whose frozen vector no training cell had, now or in the source."""
    seen = _seen(cells, "perturbation_ids", tokenizer.perturbations)
    if source is not None:
        unseen = source.model.config.perturbations_without_cells or ()
        seen |= {name for i, name in enumerate(source.tokenizer.perturbations) if i not in unseen}
    has_vector = model.conditions.perturbation.has_vector.tolist()
    return [i for i, name in enumerate(tokenizer.perturbations) if has_vector[i] and name not in seen]


def _set_library_sizes(model: DCMForDenoising, tokenizer: DCMTokenizer, statistics: Statistics, cells: Cells) -> None:
    """Their scale, and the quantiles of each group of conditions, from which generation draws."""
    mean, std = (statistics.tensors[f"library_size.{name}"].item() for name in ("log_mean", "log_std"))
    model.conditions.library_size.log_mean.fill_(mean)
    model.conditions.library_size.log_std.fill_(max(std, 1e-3))
    groups = statistics.library_sizes(tokenizer)
    if groups is None:
        conditions = {name: ids.numpy() for name, ids in cells.conditions.items()}
        gene_mean = model.totals.gene_mean[-1].numpy()
        groups = library_size_quantiles(cells.library_size.numpy(), conditions, cells.panel, cells.measured, gene_mean)
    model.library_sizes.keys, model.library_sizes.quantiles = map(torch.from_numpy, groups)
    model.config.library_size_groups = len(groups[0])


STATISTIC_CELLS = 8192  # that components, dispersions and loadings are estimated on
SHAPE_CELLS = 4096  # that corrections of counts are estimated on
SHRINKAGE = 5.0  # cells' worth of evidence that a group of conditions has the mean state of the group above it
STATE_CELLS = 1_000_000  # whose states are looked at, at most
BANK_CELLS = 200_000  # states of training cells that a checkpoint keeps, at most


def _statistic_cells(config: TrainConfig, cells: Cells) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the cells in which every gene was measured, and a random choice of them."""
    complete = np.flatnonzero(cells.measured.all(axis=1)[cells.panel])
    rng = np.random.default_rng([config.seed, 77])
    return complete, np.sort(cells.random_cells(complete, STATISTIC_CELLS, rng))


@torch.no_grad()
def set_estimates(model: DCMForDenoising, config: TrainConfig, cells: Cells, source: Source | None = None) -> None:
    """Start the count distribution and the cell state at what statistics of the training cells say.

    Only cells in which every gene was measured are looked at, a random choice where there are many. With a ``source``
    that has a cell state its map from counts to states is kept.

    Raises:
        ValueError: there are too few such cells.
    """
    if config.count_distribution != "nb" and not config.state_dim:
        return
    complete, rows = _statistic_cells(config, cells)
    if len(complete) <= config.state_dim + 1:
        raise ValueError(
            f"{len(complete)} training cells have every gene measured, expected more than {config.state_dim + 1}: "
            "pass a smaller --state-dim, or --state-dim 0 --count-distribution categorical"
        )
    counts, total = cells.csr(rows), cells.library_size.numpy()[rows].astype(np.float64)
    state = None
    if config.state_dim:
        if source is not None and source.model.config.state_dim:
            take_state_map(source, model, cells.tokenizer)
        else:
            _set_state_map(model, counts, total)
        if len(complete) > STATE_CELLS:
            others = cells.random_cells(complete, STATE_CELLS, np.random.default_rng([config.seed, 79]))
            complete = np.union1d(rows, others)
        states = cell_states(model, cells, complete)
        _set_state_source(model, config, cells, states, complete)
        state = states[np.searchsorted(complete, rows)].numpy()
    if config.count_distribution == "nb":
        types = cells.conditions.get("cell_type_ids")
        types = torch.full((len(rows),), -1) if types is None else types[rows]
        mean = model.totals.mean(torch.arange(counts.shape[1]).expand(len(rows), -1), types).numpy()
        tells_depth = config.library_size_conditioning or config.state_dim
        depth = (total + 1) / (mean.sum(axis=1) + 1) if tells_depth else np.ones(len(rows))
        expected = np.maximum(mean * depth[:, None], LOWEST_MEAN).astype(np.float32)
        types, largest = types.numpy(), largest_means(counts)
        estimates = [largest, likely_dispersion(counts, expected), None, None]
        if state is not None:
            spread = held_out_spread(
                counts, total, model.cell_state.median_total.item(), types, config.state_dim, config.seed
            )
            estimates[2:] = calibrated_loadings(
                counts, expected, state, largest, types, spread, partial(_encoded, model.cell_state), config.seed
            )
            expected = regressed(expected, estimates[2], state, largest)
            shifts = type_shifts(counts, expected, estimates[3], types, model.config.num_cell_types)
            expected *= np.exp(shifts[types])
        few = slice(None, None, -(-len(rows) // SHAPE_CELLS))
        around = estimates[1 if state is None else 3]
        estimates.append(count_corrections(counts[few], expected[few], around, model.config.num_small))
        estimates.append(None if state is None else shifts)
        model.head.set_estimates(*(None if value is None else torch.from_numpy(value) for value in estimates))


def _encoded(cell_state: CellState, counts: np.ndarray) -> np.ndarray:
    """Components of the state (n, d) of cells with ``counts`` (n, G); 0 of a cell without any."""
    return np.nan_to_num(cell_state(torch.from_numpy(counts)).numpy())


def _set_state_map(model: DCMForDenoising, counts: csr_matrix, total: np.ndarray) -> None:
    store, median = model.cell_state, float(np.median(total))
    center, components = principal_components(counts, total, median, model.config.state_dim)
    store.center.copy_(torch.from_numpy(center))
    store.components.copy_(torch.from_numpy(components))
    store.median_total.fill_(median)
    logs = torch.from_numpy(np.log1p(total))
    store.log_total.copy_(torch.stack([logs.mean(), logs.std().clamp(min=1e-6)]))


def _set_state_source(
    model: DCMForDenoising, config: TrainConfig, cells: Cells, state: torch.Tensor, rows: np.ndarray
) -> None:
    """The mean state of each group of conditions, shrunk to that of the group above it, the mixture around them for
    each cell type, and on request the states themselves; of the cells ``rows`` (n,) with states ``state`` (n, E)."""
    source, rows = model.state_source, torch.from_numpy(rows)
    log_total = torch.log1p(cells.library_size[rows].double())
    joint = torch.cat([state[:, : config.state_dim].double(), log_total[:, None]], dim=1)  # (n, E)
    labels = [cells.conditions.get(name) for name in ("cell_type_ids", "perturbation_ids", "covariate_ids")]
    labels = [None if ids is None else ids[rows] for ids in labels]
    keys = model.library_sizes.group_keys(len(joint), *labels)
    mean_of = torch.zeros_like(joint)  # of each cell's group so far
    groups: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # key, mean and members, general ones first
    for level in sorted({0, 1, 1 + len(model.config.covariates), keys.shape[1]}):
        masked = keys.clone()
        masked[:, level:] = ANY
        unique, group_of = masked.unique(dim=0, return_inverse=True)
        weight = SHRINKAGE if level else 0.0
        for index, key in enumerate(unique):
            members = (group_of == index).nonzero()[:, 0]
            mean = (joint[members].sum(dim=0) + weight * mean_of[members[0]]) / (len(members) + weight)
            groups.append((key, mean, members))
        for _, mean, members in groups[-len(unique) :]:
            mean_of[members] = mean
    groups.reverse()
    source.keys = torch.stack([key for key, _, _ in groups])
    source.mean = torch.stack([mean for _, mean, _ in groups]).float()
    source.span = torch.zeros(len(groups), 2, dtype=torch.long)
    model.config.state_groups = len(groups)
    residual = (joint - mean_of).numpy()
    for row in range(model.config.num_cell_types + 1):
        is_last = row == model.config.num_cell_types or labels[0] is None
        fit = state_mixture(
            residual if is_last else residual[labels[0] == row], model.config.state_mixture, config.seed
        )
        for table, values in zip((source.log_weight, source.location, source.scale), fit):
            table[row] = torch.from_numpy(values)
    if config.keep_states:
        order = _kept_states(keys, config.seed)
        place = torch.full((len(joint),), -1)
        place[order] = torch.arange(len(order))
        for row, (_, _, members) in enumerate(groups):
            kept = place[members][place[members] >= 0]
            source.span[row] = torch.stack([kept.min(), kept.max() + 1])
        source.bank = joint[order].float()
        model.config.state_bank = len(source.bank)


def _kept_states(keys: torch.Tensor, seed: int) -> torch.Tensor:
    """Rows of the cells whose states are kept, sorted by their ``keys`` (n, W): at most :data:`BANK_CELLS`, of small
    groups all, of large ones a random choice."""
    _, group, sizes = keys.unique(dim=0, return_inverse=True, return_counts=True)
    shuffled = torch.from_numpy(np.random.default_rng([seed, 78]).permutation(len(keys)))
    order = shuffled[group[shuffled].argsort(stable=True)]
    most = int(sizes.max())
    while int(sizes.clamp(max=most).sum()) > max(BANK_CELLS, len(sizes)):
        most = most * 9 // 10 if most > 10 else most - 1
    position = torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[group[order]]
    return order[position < most]
