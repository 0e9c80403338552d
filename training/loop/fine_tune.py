"""Start from a trained checkpoint on other data: genes and labels matched by name, everything else taken over.

On the genes and labels that the checkpoint knows, the new network starts as the same function; what is new starts at
the marginals of the new training cells. Letters: G genes, K largest count, D width, R count features.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from modeling_dcm import DCMConfig, DCMForDenoising
from modeling_dcm.count_distribution_dcm import CategoricalHead, NegativeBinomialHead
from modeling_dcm.layers_dcm import LOWEST_LEVEL, count_features, level_features
from tokenization import DCMTokenizer
from tokenization.labels_dcm import shortened
from training.config import OPTIONS, TrainConfig
from training.data.checkpoint import load_checkpoint

logger = logging.getLogger(__name__)

NETWORK = OPTIONS.keys() & {field.name for field in fields(DCMConfig)}  # options that are the network's own
SHAPE = sorted(NETWORK - {"dropout", "label_dropout", "library_size_conditioning", "loss_weighting"})
RIDGE = 1e-4  # keeps the weights of fitted features small where the data say nothing


@dataclass(frozen=True)
class Source:
    """A checkpoint to start from."""

    name: str
    model: DCMForDenoising
    tokenizer: DCMTokenizer


@dataclass(frozen=True)
class SharedNames:
    """Positions of the names that an old and a new vocabulary share, and how many names only one of them has."""

    old: list[int]
    new: list[int]
    num_new: int
    num_left_out: int

    @classmethod
    def between(cls, old: Sequence[str], new: Sequence[str]) -> "SharedNames":
        position = {name: index for index, name in enumerate(old)}
        pairs = [(position[name], index) for index, name in enumerate(new) if name in position]
        return cls([i for i, _ in pairs], [j for _, j in pairs], len(new) - len(pairs), len(old) - len(pairs))

    def __str__(self) -> str:
        left_out = f", {self.num_left_out} of the checkpoint left out" * bool(self.num_left_out)
        return f"{len(self.new)} known and {self.num_new} new{left_out}"


def load_source(name: str) -> Source:
    """Load the checkpoint in a folder or on the Hub."""
    try:
        return Source(name, *load_checkpoint(name))
    except PermissionError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"init_from={name!r} is no checkpoint ({reason}); expected a folder or a Hub id") from error


def shaped_like(config: TrainConfig, source: Source) -> TrainConfig:
    """Return the options with the shape of the checkpoint, which none may contradict."""
    theirs = {name: getattr(source.model.config, name) for name in SHAPE}
    for name, value in theirs.items():
        if config.is_set(name) and getattr(config, name) != value:
            mine = getattr(config, name)
            raise ValueError(f"{name}={mine!r} contradicts init_from, whose checkpoint has {value!r}: leave {name} out")
    if not config.is_set("library_size_conditioning"):
        theirs["library_size_conditioning"] = source.model.config.library_size_conditioning
    return replace(config, **theirs)


def merged_tokenizer(new: DCMTokenizer, source: DCMTokenizer) -> DCMTokenizer:
    """Return the genes and conditions of the new data, the checkpoint's labels and counts before the new ones."""
    if not set(new.genes) & set(source.genes):
        raise ValueError(
            f"no gene of the shards ({shortened(new.genes, 3)}) is in the checkpoint ({shortened(source.genes, 3)}): "
            "expected the same kind of names"
        )
    bins = [tokenizer.count_bins and (*tokenizer.count_bins, tokenizer.max_count) for tokenizer in (new, source)]
    if bins[0] != bins[1]:
        raise ValueError(f"count bins {bins[0]} in the shards and {bins[1]} in the checkpoint: expected the same")
    known = [new.control if name == source.control else name for name in source.perturbations]
    return DCMTokenizer(
        genes=new.genes,
        max_count=max(new.max_count, source.max_count),
        count_bins=new.count_bins,
        cell_types=_union(source.cell_types, new.cell_types),
        perturbations=_union([name for name in known if name is not None], new.perturbations),
        control=new.control,
        covariates={name: _union(source.covariates.get(name, []), new.covariates[name]) for name in new.covariates},
        separator=new.separator,
    )


def _union(old: Sequence[str], new: Sequence[str]) -> list[str]:
    """Labels of a condition that the new data have, the checkpoint's first; none where they do not have it."""
    return list(dict.fromkeys([*old, *new])) if new else []


@torch.no_grad()
def transfer(source: Source, model: DCMForDenoising, tokenizer: DCMTokenizer) -> None:
    """Take the checkpoint's weights over into a fresh ``model`` of ``tokenizer``; the log says what is new."""
    old, names = source.model, source.tokenizer
    theirs = dict(old.named_parameters())
    fresh_head = {name: value.clone() for name, value in model.head.state_dict().items()}
    for name, parameter in model.named_parameters():
        if name in theirs and theirs[name].shape == parameter.shape:
            parameter.copy_(theirs[name])
    genes = SharedNames.between(names.genes, tokenizer.genes)
    for part in ("gene", "gene_reading"):
        rows, to = (getattr(m.backbone.embedding, part).weight for m in (old, model))
        to.copy_(rows.mean(dim=0))  # a new gene starts as a mean one
        to[genes.new] = rows[genes.old]
    labels = _take_labels(source, model, tokenizer)
    _take_condition_mlp(old, model)
    types = labels.get("cell types", SharedNames([], [], 0, 0))
    _take_gene_means(old, model, genes, types)
    _take_head(old.head, model.head, fresh_head, genes)
    if isinstance(model.head, NegativeBinomialHead):
        _take_estimates(old.head, model.head, fresh_head, genes, types)
        _take_effects(old, model, genes, labels)
    if model.config.num_counts != old.config.num_counts:
        _refit_counts(old, model)
    said = [f"{kind}: {shared}" for kind, shared in [("genes", genes), *labels.items()]]
    if tokenizer.max_count != names.max_count:
        said.append(f"counts to {tokenizer.max_count} instead of {names.max_count}")
    logger.info("starting from %s: %s", source.name, "; ".join(said))


def _take_labels(source: Source, model: DCMForDenoising, tokenizer: DCMTokenizer) -> dict[str, SharedNames]:
    """Vectors of the labels that both know; the last row of each table is *not given*."""
    old, new, names = source.model.conditions, model.conditions, source.tokenizer
    dropped = [name for name in source.model.config.condition_names if name not in model.config.condition_names]
    if dropped:
        logger.warning(
            "conditions of the checkpoint that the new shards lack are dropped: %s; dcm-convert takes them with "
            "--cell-type-key, --perturbation-key and --covariate-keys",
            ", ".join(dropped),
        )
    both = {}  # kind: the tables, and the names of their rows
    if old.cell_type is not None and new.cell_type is not None:
        both["cell types"] = old.cell_type, new.cell_type, names.cell_types, tokenizer.cell_types
    if old.perturbation is not None and new.perturbation is not None:
        known = [tokenizer.control if name == names.control else name for name in names.perturbations]
        both["perturbations"] = old.perturbation.learned, new.perturbation.learned, known, tokenizer.perturbations
        if new.perturbation.linear is not None:
            _take_vectors(old.perturbation, new.perturbation, known, tokenizer)
    for name in [name for name in new.covariates if name in old.covariates]:
        both[name] = old.covariates[name], new.covariates[name], names.covariates[name], tokenizer.covariates[name]
    shared = {}
    for kind, (theirs, mine, their_names, my_names) in both.items():
        shared[kind] = rows = SharedNames.between(their_names, my_names)
        mine.weight[rows.new] = theirs.weight[rows.old]
        mine.weight[-1] = theirs.weight[-1]
    if old.library_size is not None and new.library_size is not None:
        new.library_size.log_mean.copy_(old.library_size.log_mean)
        new.library_size.log_std.copy_(old.library_size.log_std)
    return shared


def _take_vectors(old: torch.nn.Module, new: torch.nn.Module, known: Sequence[str], tokenizer: DCMTokenizer) -> None:
    """Frozen vectors of ``known`` perturbations, where the new table has none. What has none in either keeps the one
    that it learned, which :func:`_take_labels` copies; new perturbations that must learn one are logged."""
    if old.linear is None or old.linear.weight.shape != new.linear.weight.shape:
        width = "learned them as labels" if old.linear is None else f"has vectors of {old.linear.in_features} numbers"
        raise ValueError(
            f"perturbation_embeddings has vectors of {new.linear.in_features} numbers, but the checkpoint of init_from "
            f"{width}: leave perturbation_embeddings out, or take the checkpoint's kind"
        )
    shared = SharedNames.between(known, tokenizer.perturbations)
    for i, j in zip(shared.old, shared.new, strict=True):
        if old.has_vector[i] and not new.has_vector[j]:
            new.table[j], new.has_vector[j] = old.table[i], True
    with_vector = [name for name, has in zip(tokenizer.perturbations, new.has_vector.tolist(), strict=True) if has]
    learned = sorted(set(tokenizer.perturbations) - {*with_vector, *known, tokenizer.control})
    if learned:
        logger.warning(
            "%d new perturbations have no frozen vector and learn one (a table from dcm-embed in "
            "perturbation_embeddings gives them theirs): %s",
            len(learned),
            ", ".join(learned),
        )


def _take_condition_mlp(old: DCMForDenoising, model: DCMForDenoising) -> None:
    """The first layer reads one block of columns for each condition.

    A new condition's columns start at zero; one that the new data lack is left at its *not given*, in the bias.
    """
    theirs, mine = old.conditions, model.conditions
    D = model.config.hidden_size
    old_weight, weight = theirs.mlp[0].weight, mine.mlp[0].weight
    extra = [*(["state"] if model.config.state_dim else []), "time"]
    extra += ["summary"] if model.config.cell_summary else []
    of_old, of_new = ([*m.config.condition_names, *extra] for m in (old, model))
    bias = theirs.mlp[0].bias.clone()
    columns = {name: old_weight[:, i * D : (i + 1) * D] for i, name in enumerate(of_old)}
    nulls = {"cell_type": theirs.cell_type, "perturbation": theirs.perturbation and theirs.perturbation.learned}
    nulls |= dict(theirs.covariates.items())
    nulls["library_size"] = theirs.library_size and theirs.library_size.null
    for name in set(of_old) - set(of_new):
        bias += columns[name] @ nulls[name].weight[-1]
    weight.copy_(torch.cat([columns.get(name, torch.zeros(D, D)) for name in of_new], dim=1))
    mine.mlp[0].bias.copy_(bias)
    if mine.summary is not None:  # the sum over genes is divided by the root of their number
        mine.summary.weight[:, :D] *= (model.config.num_genes / old.config.num_genes) ** 0.5


def _take_gene_means(old: DCMForDenoising, model: DCMForDenoising, genes: SharedNames, types: SharedNames) -> None:
    """Known genes of known cell types keep their mean counts; the others are brought to the checkpoint's depth."""
    theirs, mine = old.totals.gene_mean, model.totals.gene_mean
    mine *= theirs[-1, genes.old].sum() / mine[-1, genes.new].sum().clamp(min=1e-6)
    for i, j in [*zip(types.old, types.new, strict=True), (-1, -1)]:
        mine[j, genes.new] = theirs[i, genes.old]


def _take_head(old: CategoricalHead, new: CategoricalHead, fresh: dict[str, torch.Tensor], genes: SharedNames) -> None:
    """Biases of counts and genes; the weights that do not depend on either have been copied.

    Old counts of known genes keep their distribution; new counts, and new genes, keep the marginals of the new training
    cells, which the ``state_dict`` of the ``fresh`` head has.
    """
    shared = min(old.num_counts, new.num_small)  # counts that are small in the new head and exist in the old one
    bias, old_bias, fresh_bias = new.bias.weight[0], old.bias.weight[0], fresh["bias.weight"][0]
    bias.copy_(fresh_bias)
    if old.large is not None or old.gene_bias is None:  # a distribution over the same counts and more
        first = 0 if old.gene_bias is None else old.num_small
        known = old_bias[first:]
        bias[first : old.num_counts] = known
        bias[old.num_counts :] += known.logsumexp(0) - fresh_bias[first : old.num_counts].logsumexp(0)
    if old.gene_bias is None:
        return
    table = fresh["gene_bias.weight"].clone()  # (G, C)
    theirs = old.gene_bias.weight[genes.old]
    if old.large is not None:
        theirs = theirs.clone()
        if not isinstance(old, NegativeBinomialHead):  # the number of large counts, which may have grown, is a factor
            theirs[:, -1] += math.log((old.num_counts - old.num_small) / (new.num_counts - new.num_small))
        table[genes.new] = theirs
    else:
        theirs = theirs[:, :shared] + old_bias[:shared]
        mine = table[genes.new]
        shift = theirs.logsumexp(1, keepdim=True) - mine[:, :shared].logsumexp(1, keepdim=True)
        table[genes.new] = torch.cat([theirs, mine[:, shared:] + shift], dim=1)
    new.gene_bias.weight.copy_(table)


def _take_estimates(
    old: NegativeBinomialHead, new: NegativeBinomialHead, fresh, genes: SharedNames, types: SharedNames
) -> None:
    """Loadings, dispersions and corrections of known genes; new genes, counts and cell types keep what was estimated on
    the new training cells."""
    tables = {"loading.weight": 0, "state_loading.weight": 0, "log_size": 1}  # and the dimension of genes
    theirs, mine = old.state_dict(), new.state_dict()
    shared = min(old.correction.shape[1], new.correction.shape[1])
    new.correction[genes.new, :shared] = old.correction[genes.old, :shared]
    if new.type_shift is not None:
        for i, j in zip(types.old, types.new, strict=True):
            new.type_shift[j, genes.new] = old.type_shift[i, genes.old]
    bounds = mine["largest_mean"]
    bounds[genes.new] = bounds[genes.new].maximum(theirs["largest_mean"][genes.old])
    for name in tables.keys() & mine.keys():
        values = fresh[name].clone()
        rows = theirs[name].index_select(tables[name], torch.tensor(genes.old))
        mine[name].copy_(values.index_copy(tables[name], torch.tensor(genes.new), rows))


def _take_effects(old: DCMForDenoising, new: DCMForDenoising, genes: SharedNames, labels) -> None:
    """Effects of perturbations, whose ids are the same; none are known of new genes."""
    theirs, mine = old.effects, new.effects
    same_kinds = old.config.library_size_conditioning == new.config.library_size_conditioning
    if not old.config.effect_groups or "perturbations" not in labels or not same_kinds:
        return
    W = mine.keys.shape[1]
    width = max(0, W - theirs.keys.shape[1])
    fits = (theirs.keys[:, W:] < 0).all(dim=1)
    padded = torch.nn.functional.pad(theirs.keys[fits, :W], (0, width), value=-1)
    padded[-1] = theirs.keys[-1, 0]  # the row of everything
    mine.keys, mine.state = padded, theirs.state[fits]
    mine.genes = theirs.genes.new_zeros(len(mine.genes), len(padded), new.config.num_genes)
    mine.genes[:, :, genes.new] = theirs.genes[:, fits][:, :, genes.old]
    types = labels.get("cell types", SharedNames([], [], 0, 0))
    for i, j in [*zip(types.old, types.new, strict=True), (-1, -1)]:
        mine.base[:, j, genes.new] = theirs.base[:, i, genes.old]
    mine.loading.copy_(new.head.state_loading.weight if new.head.state_loading is not None else mine.loading)
    for name in ("damping", "control_id", "ridge"):
        getattr(mine, name).copy_(getattr(theirs, name))
    new.config.effect_groups = len(padded)


@torch.no_grad()
def take_state_map(source: Source, model: DCMForDenoising, tokenizer: DCMTokenizer) -> None:
    """Take the map from counts to the cell state over, so that states keep their meaning; new genes do not count."""
    old, new = source.model.cell_state, model.cell_state
    if source.model.config.state_width != model.config.state_width:
        raise ValueError(
            f"library_size_conditioning={model.config.library_size_conditioning} contradicts init_from: the "
            "checkpoint's cell state was made with the other; leave it out"
        )
    genes = SharedNames.between(source.tokenizer.genes, tokenizer.genes)
    new.components.zero_()
    new.components[:, genes.new] = old.components[:, genes.old]
    new.center.zero_()
    new.center[genes.new] = old.center[genes.old]
    new.median_total.copy_(old.median_total)
    new.log_total.copy_(old.log_total)


def _refit_counts(old: DCMForDenoising, new: DCMForDenoising) -> None:
    """Weights on the new counts' features that give old counts what they had; larger ones start like the largest.

    The features are bumps over the range of counts, which has grown: the fit is exact for the smallest counts, which
    have a feature each, and smooth above.
    """
    K = old.config.num_counts - 1
    counts = torch.arange(new.config.num_counts).clamp(max=K)
    device = torch.device("cpu")
    theirs = count_features(old.config.num_counts, device)[counts].double()
    mine = count_features(new.config.num_counts, device).double()
    for part in ("backbone.embedding.count", "head.counts"):
        layer, old_layer = new.get_submodule(part), old.get_submodule(part)
        layer.weight.copy_(_fitted(mine, theirs @ old_layer.weight.double().T).T)
    level = new.backbone.embedding.level
    if level is not None:
        top, old_top = new.config.max_count, old.config.max_count
        expected = torch.from_numpy(np.geomspace(LOWEST_LEVEL / 10, top, 400)).float()
        theirs = level_features(expected.clamp(max=old_top), old_top).double()
        values = theirs @ old.backbone.embedding.level.weight.double().T
        level.weight.copy_(_fitted(level_features(expected, top).double(), values).T)


def _fitted(features: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Weights (R, D) of ``features`` (N, R) for ``values`` (N, D), least squares with a small ridge."""
    R = features.shape[1]
    augmented = torch.cat([features, RIDGE**0.5 * torch.eye(R, dtype=features.dtype)])
    return torch.linalg.lstsq(augmented, torch.cat([values, values.new_zeros(R, values.shape[1])])).solution
