"""Work on many cells in chunks: which rows, which arguments, and a network that draws nothing of its own.

Knows nothing of what is done with a chunk. Letters: N all cells, B cells of a chunk, L genes.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def row_chunks(num_cells: int, batch_size: int) -> Iterator[tuple[int, slice]]:
    """Index and rows of each chunk of at most ``batch_size`` cells.

    Raises:
        ValueError: ``batch_size`` below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}, expected at least 1")
    for chunk, start in enumerate(range(0, num_cells, batch_size)):
        yield chunk, slice(start, min(start + batch_size, num_cells))


def of_rows(
    arguments: dict[str, torch.Tensor | None], rows: slice, device: torch.device | str
) -> dict[str, torch.Tensor]:
    """Arguments of a chunk of cells, on ``device``; ``gene_ids`` (L,) are those of every cell."""
    arguments = {name: value for name, value in arguments.items() if value is not None}
    is_shared = {name: name == "gene_ids" and value.ndim == 1 for name, value in arguments.items()}
    return {name: (v if is_shared[name] else v[rows]).to(device) for name, v in arguments.items()}


@contextmanager
def dropout_off(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
