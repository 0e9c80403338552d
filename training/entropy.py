"""Measure a trained model's entropy curve on validation cells, for schedules that know what they lose.

Never looks at test cells. Knows nothing of schedules.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from modeling_dcm import DCMForDenoising
from modeling_dcm.entropy_dcm import fit_entropy, measure_entropy
from tokenization import DCMTokenizer
from training.cells import Cells


def validation_entropy(
    model: DCMForDenoising, data: Path, tokenizer: DCMTokenizer, *, num_cells: int = 256, seed: int = 0
) -> tuple[dict, dict[str, list[float]]]:
    """What was measured (see :func:`measure_entropy`) on validation cells of shards ``data``, and the fitted curve.

    Raises:
        ValueError: the shards have no validation cells.
    """
    cells = Cells(data, "validation", tokenizer)
    measured = measure_entropy(model, _batches(cells, min(num_cells, len(cells)), model), seed=seed)
    return measured, fit_entropy(measured, len(tokenizer.genes))


def _batches(cells: Cells, num_cells: int, model: DCMForDenoising, size: int = 64) -> Iterator[dict[str, torch.Tensor]]:
    for start in range(0, num_cells, size):
        batch = cells[list(range(start, min(start + size, num_cells)))]
        batch["input_ids"] = batch.pop("counts")
        library_size = batch.pop("library_size").float()
        if model.config.library_size_conditioning:
            batch["library_size"] = library_size
        yield batch
