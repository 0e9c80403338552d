"""Measure a trained model's entropy curve on validation cells, for schedules that know what they lose.

Never looks at test cells. Knows nothing of schedules.
"""

from collections.abc import Iterator

import torch
from tqdm import tqdm

from modeling_dcm import DCMForDenoising
from modeling_dcm.schedule_dcm import fit_entropy
from modeling_dcm.scoring_dcm import measure_entropy
from training.data.cells import Cells

BATCH_SIZE = 64


def validation_entropy(
    model: DCMForDenoising, cells: Cells, *, num_cells: int = 256, seed: int = 0
) -> tuple[dict, dict[str, list[float]]]:
    """What was measured (see :func:`measure_entropy`) on the first validation ``cells``, and the fitted curve.

    Cells in which a gene of the panel was not measured are left out: their curve would end early.

    Raises:
        ValueError: there is no cell in which every gene was measured.
    """
    rows = complete_cells(cells, num_cells)
    measured = measure_entropy(model, _batches(cells, rows, model), seed=seed)
    return measured, fit_entropy(measured, len(cells.tokenizer.genes))


def complete_cells(cells: Cells, number: int) -> list[int]:
    """The first ``number`` cells in which every gene was measured, or as many as there are."""
    complete: list[int] = []
    for start in range(0, len(cells), BATCH_SIZE):
        rows = list(range(start, min(start + BATCH_SIZE, len(cells))))
        not_measured = cells.not_measured(rows)
        is_complete = [True] * len(rows) if not_measured is None else (~not_measured.any(axis=1)).tolist()
        complete += [row for row, complete_row in zip(rows, is_complete, strict=True) if complete_row]
        if len(complete) >= number:
            break
    return complete[:number]


def _batches(cells: Cells, rows: list[int], model: DCMForDenoising) -> Iterator[dict[str, torch.Tensor]]:
    starts = range(0, len(rows), BATCH_SIZE)
    for start in tqdm(starts, desc="entropy curve", unit="batch", delay=1, disable=None):
        batch = cells[rows[start : start + BATCH_SIZE]]
        batch["input_ids"] = batch["input_ids"].long()
        library_size = batch.pop("library_size").float()
        if model.config.library_size_conditioning:
            batch["library_size"] = library_size
        yield batch
