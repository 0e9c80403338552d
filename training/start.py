"""What training starts from: the vocabulary it learns, and a network initialised with what the training cells say.

Knows nothing of the loop. Letters: N training cells, G genes, K largest count.
"""

import hashlib
import logging
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from scipy.sparse import csr_matrix
from transformers.utils import is_flash_attn_2_available

from modeling_dcm import SIZES, DCMConfig, DCMForDenoising
from modeling_dcm.layers_dcm import Block
from tokenization import DCMTokenizer
from training.cells import Cells
from training.config import TrainConfig
from training.fine_tune import Source, transfer

logger = logging.getLogger(__name__)


def open_cells(config: TrainConfig, split: str, tokenizer: DCMTokenizer) -> Cells:
    """One split of the shards.

    Raises:
        ValueError: a shard is damaged; the message names it.
    """
    try:
        return Cells(config.data, split, tokenizer)
    except FileNotFoundError:
        raise
    except Exception:  # whatever datasets and Arrow make of broken bytes
        for file in sorted((config.data / split).glob("*.parquet")):
            try:
                for _ in pq.ParquetFile(file).iter_batches():
                    pass
            except Exception as why:
                reason = " ".join(str(why).split())
                raise ValueError(
                    f"the shard {str(file)!r} is damaged ({reason}): copy it again, or run dcm-convert again"
                ) from why
        raise


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
        ValueError: an unknown condition, or training perturbations that the table lacks.
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
        perturbations += _table_names(config.perturbation_embeddings, perturbations, shards.control)
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


def _table_names(path: Path, perturbations: list[str], control: str | None) -> list[str]:
    """Names of the table that the training cells do not have: the model can be asked for them all the same."""
    if not perturbations:
        raise ValueError("perturbation_embeddings were given, but no perturbation is learned from these shards")
    table = _read_table(path, control)
    missing = [name for name in perturbations if name not in table and name != control]
    if missing:
        shown = ", ".join(missing[:20]) + (", ..." if len(missing) > 20 else "")
        raise ValueError(
            f"{str(path)!r} has no vector for {len(missing)} of {len(perturbations)} training perturbations: {shown}"
        )
    return sorted(set(table) - set(perturbations))


def _read_table(path: Path, control: str | None) -> dict[str, torch.Tensor]:
    """Vectors by name, without the control's, whose vector is always learned."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no perturbation table {str(path)!r}; expected a safetensors file of one vector per name"
        )
    try:
        table = {name: vector.float().flatten() for name, vector in load_file(path).items()}
    except Exception as error:
        raise ValueError(f"{str(path)!r} is not a safetensors file ({error})") from error
    table.pop(control, None)
    sizes = {len(vector) for vector in table.values()}
    if len(sizes) != 1:
        raise ValueError(f"{str(path)!r} holds vectors of lengths {sorted(sizes)}, expected one length")
    broken = [name for name, vector in table.items() if not bool(vector.isfinite().all()) or not bool(vector.any())]
    if broken:
        raise ValueError(f"{str(path)!r}: vectors that are not finite, or all zero: {', '.join(broken[:20])}")
    return table


def build_model(
    config: TrainConfig, tokenizer: DCMTokenizer, cells: Cells, source: Source | None = None
) -> DCMForDenoising:
    """A fresh network whose head emits the training marginals and that knows the training cells' library sizes.

    With a ``source`` the weights are then taken over from there, see :func:`transfer`.
    """
    counts = cells.csr()
    library_size = torch.from_numpy(np.asarray(counts.sum(axis=1)).ravel())
    shape = SIZES[config.size] if config.size else {}
    table = _read_table(config.perturbation_embeddings, tokenizer.control) if config.perturbation_embeddings else None
    own = (
        "backbone",
        "masked_keys",
        "mlp_ratio",
        "num_latents",
        "dropout",
        "gene_output_bias",
        "library_size_conditioning",
    )
    own += (
        "condition_tokens",
        "cell_summary",
        "loss_weighting",
        "label_dropout",
        *(() if shape else tuple(SIZES["5m"])),
    )
    labels = cells.conditions.get("perturbation_ids")
    vector_size = None if table is None else len(next(iter(table.values())))
    table_sha256 = table and hashlib.sha256(config.perturbation_embeddings.read_bytes()).hexdigest()
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
    model.set_marginals(_histogram(counts, tokenizer))
    if tokenizer.cell_types:
        model.set_cell_type_means(
            *_cell_type_totals(counts, cells.conditions["cell_type_ids"], len(tokenizer.cell_types))
        )
    model.target_gene_ids.copy_(torch.from_numpy(tokenizer.target_gene_ids))
    if config.library_size_conditioning:
        _set_library_sizes(model, cells, library_size)
    if table is not None:
        for index, name in enumerate(tokenizer.perturbations):
            if name in table:
                model.conditions.perturbation.table[index] = table[name]
                model.conditions.perturbation.has_vector[index] = True
    if source is not None:
        transfer(source, model, tokenizer)
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


def _histogram(counts, tokenizer: DCMTokenizer) -> torch.Tensor:
    """How many training cells have each count id of each gene (G, K+1)."""
    G, V = counts.shape[1], tokenizer.num_count_ids
    flat = counts.indices.astype(np.int64) * V + tokenizer.count_ids(counts.data.astype(np.int64))
    histogram = np.bincount(flat, minlength=G * V).reshape(G, V)
    histogram[:, 0] += counts.shape[0] - histogram.sum(axis=1)
    return torch.from_numpy(histogram)


def _cell_type_totals(counts, cell_type_ids, num_cell_types: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed counts (T, G) of the training cells of each type, and how many they are (T,)."""
    given = np.flatnonzero(cell_type_ids >= 0)
    shape = (num_cell_types, counts.shape[0])
    of_type = csr_matrix((np.ones(len(given)), (np.asarray(cell_type_ids)[given], given)), shape=shape)
    num_cells = np.asarray(of_type.sum(axis=1)).ravel()
    return torch.from_numpy((of_type @ counts).toarray()), torch.from_numpy(num_cells)


def _set_library_sizes(model: DCMForDenoising, cells: Cells, library_size: torch.Tensor) -> None:
    logs = torch.log1p(library_size.double())
    model.conditions.library_size.log_mean.fill_(logs.mean())
    model.conditions.library_size.log_std.fill_(logs.std(correction=0).clamp(min=1e-3))
    sizes = model.library_sizes
    ids = [cells.conditions.get(name) for name in ("cell_type_ids", "perturbation_ids", "covariate_ids")]
    keys = sizes.group_keys(len(library_size), *ids)
    group_keys, quantiles = sizes.from_cells(keys, library_size, num_context=1 + sizes.num_covariates)
    sizes.keys, sizes.quantiles = group_keys, quantiles
    model.config.library_size_groups = len(group_keys)


def compile_blocks(model: DCMForDenoising, backend: str = "inductor") -> None:
    """Compile each block in place, for static shapes; the rest of the network depends on the data (rare counts)."""
    for block in model.modules():
        if isinstance(block, Block):
            block.compile(backend=backend, dynamic=False)
