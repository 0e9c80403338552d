"""What training starts from: the vocabulary it learns, and a network initialised with what the training cells say.

Knows nothing of the loop. Letters: N training cells, G genes, K largest count.
"""

import logging
from collections.abc import Iterator

import numpy as np
import torch
from scipy.sparse import csr_matrix
from transformers.utils import is_flash_attn_2_available

from modeling_dcm import SIZES, DCMConfig, DCMForDenoising
from modeling_dcm.layers_dcm import Block
from tokenization import DCMTokenizer
from training.config import TrainConfig
from training.data.cells import Cells
from training.data.streaming import open_cells as open_split
from training.loop.fine_tune import Source, transfer
from training.perturbations.table import PerturbationTable, listed, read_table

logger = logging.getLogger(__name__)

# options of training that are the network's own configuration, besides those of its size
OWN = ("backbone", "masked_keys", "num_latents", "mlp_ratio", "dropout", "gene_output_bias", "cell_summary")
OWN += ("library_size_conditioning", "condition_tokens", "loss_weighting", "label_dropout")
BLOCK_CELLS = 4096


def open_cells(config: TrainConfig, split: str, tokenizer: DCMTokenizer) -> Cells:
    """One split of the shards of a run; see :func:`training.data.streaming.open_cells`."""
    return open_split(config.data, split, tokenizer, streaming=config.streaming)


def attention_implementation(config: TrainConfig, device: torch.device, mixed_precision: str) -> str:
    """What ``attn`` says, or for ``auto`` the fastest implementation that is installed and fits.

    Raises:
        ValueError: flash attention was asked for and is not installed.
    """
    has_flash = is_flash_attn_2_available()
    if config.attn == "auto":
        fits = device.type == "cuda" and mixed_precision in ("bf16", "fp16")
        return "flash_attention_2" if fits and has_flash else "sdpa"
    if config.attn == "flash_attention_2" and not has_flash:
        raise ValueError(
            "attn='flash_attention_2', but it is not installed: pip install flash-attn, or take attn='sdpa'"
        )
    return config.attn


def build_tokenizer(config: TrainConfig) -> DCMTokenizer:
    """The shards' vocabulary, less the conditions that are not learned, plus the names of a perturbation table.

    Raises:
        ValueError: an unknown condition, or perturbations that the table neither has nor marks as without vector.
    """
    folder = config.data / "tokenizer"
    if not folder.is_dir():
        raise FileNotFoundError(f"no tokenizer/ in {str(config.data)!r}; expected a folder that dcm-convert wrote")
    shards = DCMTokenizer.from_pretrained(folder)
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
            f"{listed(forgotten)}; dcm-embed --allow-missing marks them, and they get learned vectors"
        )
    never_seen = []
    if without:
        ids = open_cells(config, "train", shards).conditions["perturbation_ids"].unique().tolist()
        seen = {shards.perturbations[i] for i in ids if i >= 0}
        never_seen = [name for name in without if name not in seen]
        learned = [name for name in without if name in seen]
        if learned:
            logger.info("%d perturbations without a vector learn one: %s", len(learned), listed(learned))
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
    library_size = torch.cat([torch.from_numpy(counts.sum(axis=1).A1) for _, counts in _blocks(cells)])
    shape = SIZES[config.size] if config.size else {}
    table = read_table(config.perturbation_embeddings, tokenizer.control) if config.perturbation_embeddings else None
    own = OWN if shape else (*OWN, *SIZES["5m"])
    labels = cells.conditions.get("perturbation_ids")
    vector_size, table_sha256 = (None, None) if table is None else (table.dim, table.sha256)
    if source is not None and table is None and tokenizer.perturbations:
        vector_size = source.model.config.perturbation_dim
        table_sha256 = source.model.config.perturbation_table_sha256
    model_config = DCMConfig(
        **{name: getattr(config, name) for name in own},
        **shape,
        num_genes=len(tokenizer.genes),
        max_count=tokenizer.max_count,
        count_bins=tokenizer.count_bins,
        num_cell_types=len(tokenizer.cell_types),
        num_perturbations=len(tokenizer.perturbations),
        max_perturbations_per_cell=1 if labels is None else labels.shape[1],
        covariates={name: len(names) for name, names in tokenizer.covariates.items()},
        perturbation_dim=vector_size,
        perturbation_table_sha256=table_sha256,
    )
    model_config._attn_implementation = None if config.attn == "auto" else config.attn
    model = DCMForDenoising(model_config)
    model.set_marginals(_histogram(cells))
    if tokenizer.cell_types:
        model.set_cell_type_means(*_cell_type_totals(cells, model.totals.gene_mean[-1].numpy()))
    model.target_gene_ids.copy_(torch.from_numpy(tokenizer.target_gene_ids))
    if config.library_size_conditioning:
        _set_library_sizes(model, cells, library_size)
    if table is not None:
        _set_vectors(model, tokenizer, table)
    if source is not None:
        transfer(source, model, tokenizer)
    _warn_of_names_never_seen(tokenizer, cells, table, source)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
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


def _warn_of_names_never_seen(
    tokenizer: DCMTokenizer, cells: Cells, table: PerturbationTable | None, source: Source | None
) -> None:
    """Say which names the model takes and yet knows nothing of: no training cell has them, now or in the source, and
    they have no vector. Cells drawn for them are drawn for a random vector."""
    conditions = (("cell types", "cell_type_ids"), ("perturbations", "perturbation_ids"))
    for what, ids in conditions:
        names = tokenizer.cell_types if ids == "cell_type_ids" else tokenizer.perturbations
        if not names:
            continue
        known = set() if table is None else set(table.vectors)
        if source is not None:
            known |= {*source.tokenizer.cell_types, *source.tokenizer.perturbations}
        seen = {names[id_] for id_ in cells.conditions[ids].unique().tolist() if id_ >= 0}
        never_seen = [name for name in names if name not in seen | known]
        if never_seen:
            logger.warning(
                "no training cell has these %s, so the model takes the names but learns nothing of them: %s",
                what,
                listed(never_seen),
            )


def _blocks(cells: Cells) -> Iterator[tuple[np.ndarray, csr_matrix]]:
    """The training cells some thousands at a time, and which they are: their counts need not be in memory together."""
    for start in range(0, len(cells), BLOCK_CELLS):
        rows = np.arange(start, min(start + BLOCK_CELLS, len(cells)))
        yield rows, cells.csr(rows)


def _histogram(cells: Cells) -> torch.Tensor:
    """How many of the cells that measured a gene have each of its count ids (G, K+1)."""
    G, V = len(cells.tokenizer.genes), cells.tokenizer.num_count_ids
    histogram = np.zeros(G * V, dtype=np.int64)
    for _, counts in _blocks(cells):
        flat = counts.indices.astype(np.int64) * V + cells.tokenizer.count_ids(counts.data.astype(np.int64))
        histogram += np.bincount(flat, minlength=G * V)
    histogram = histogram.reshape(G, V)
    everything = csr_matrix(np.ones((1, len(cells))))
    histogram[:, 0] += _num_measured(cells, everything)[0].astype(np.int64) - histogram.sum(axis=1)
    return torch.from_numpy(histogram)


def _cell_type_totals(cells: Cells, gene_mean: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts (T, G) summed over the training cells of each type, and how many these are (T,).

    Where a gene was measured in some cells of a type only, the sum is that of as many cells with the mean of these;
    where in none, with its mean over all cells, ``gene_mean`` (G,).
    """
    types = cells.conditions["cell_type_ids"].numpy()
    given = np.flatnonzero(types >= 0)
    shape = (len(cells.tokenizer.cell_types), len(cells))
    of_type = csr_matrix((np.ones(len(given)), (types[given], given)), shape=shape)
    num_cells = np.asarray(of_type.sum(axis=1))  # (T, 1)
    num_measured = _num_measured(cells, of_type)  # (T, G)
    of_block = of_type.tocsc()
    totals = sum((of_block[:, rows] @ counts).toarray() for rows, counts in _blocks(cells))
    totals = totals * num_cells / np.maximum(num_measured, 1)
    totals = np.where(num_measured > 0, totals, gene_mean * num_cells)
    return torch.from_numpy(totals), torch.from_numpy(num_cells[:, 0])


def _num_measured(cells: Cells, member: csr_matrix) -> np.ndarray:
    """How many cells of each group measured each gene (groups, G); ``member`` (groups, N) is 1 where a cell belongs."""
    N, member = len(cells), member.tocsc()
    number = np.tile(np.asarray(member.sum(axis=1)), len(cells.tokenizer.genes))
    for start in range(0, N, BLOCK_CELLS):
        rows = np.arange(start, min(start + BLOCK_CELLS, N))
        missing = cells.not_measured(rows)
        if missing is None:
            break
        number -= member[:, rows] @ missing.astype(np.float32)
    return number


def _set_vectors(model: DCMForDenoising, tokenizer: DCMTokenizer, table: PerturbationTable) -> None:
    """Freeze the vectors of the table; names without one, the control among them, keep their learned vector."""
    encoder = model.conditions.perturbation
    for index, name in enumerate(tokenizer.perturbations):
        if name in table.vectors:
            encoder.table[index] = table.vectors[name]
            encoder.has_vector[index] = True


def _set_library_sizes(model: DCMForDenoising, cells: Cells, library_size: torch.Tensor) -> None:
    logs = torch.log1p(library_size.double())
    model.conditions.library_size.log_mean.fill_(logs.mean())
    model.conditions.library_size.log_std.fill_(logs.std(correction=0).clamp(min=1e-3))
    sizes, library_size = model.library_sizes, _over_all_genes(cells, library_size, model.totals.gene_mean[-1])
    ids = [cells.conditions.get(name) for name in ("cell_type_ids", "perturbation_ids", "covariate_ids")]
    keys = sizes.group_keys(len(library_size), *ids)
    group_keys, quantiles = sizes.from_cells(keys, library_size, num_context=1 + sizes.num_covariates)
    sizes.keys, sizes.quantiles = group_keys, quantiles
    model.config.library_size_groups = len(group_keys)


def _over_all_genes(cells: Cells, library_size: torch.Tensor, gene_mean: torch.Tensor) -> torch.Tensor:
    """Library sizes (N,) as if every gene had been measured, as generated cells have them: a cell that lacks genes is
    larger by the share that these have in a mean cell."""
    sizes = []
    for start in range(0, len(cells), BLOCK_CELLS):
        rows = np.arange(start, min(start + BLOCK_CELLS, len(cells)))
        missing = cells.not_measured(rows)
        if missing is None:
            return library_size
        share = torch.from_numpy(~missing).double() @ gene_mean.double() / gene_mean.double().sum()
        sizes.append(library_size[rows] / share.clamp(min=1 / len(gene_mean)))
    return torch.cat(sizes).round().to(library_size)


def compile_blocks(model: DCMForDenoising, backend: str = "inductor") -> None:
    """Compile each block in place, for static shapes; the rest of the network depends on the data (rare counts)."""
    for block in model.modules():
        if isinstance(block, Block):
            block.compile(backend=backend, dynamic=False)
