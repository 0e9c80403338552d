"""Load a checkpoint, and refuse what is none, or labels that it does not know, before anything slow is imported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tokenization.conditions_dcm import ConditionLabels
from tokenization.labels_dcm import read_text, shortened
from training.data.files import check_readable

if TYPE_CHECKING:
    from modeling_dcm import DCMForDenoising
    from tokenization import DCMTokenizer

FILES = {
    "config.json": "the configuration",
    "model.safetensors": "the weights",
    "genes.txt": "the tokenizer",
    "conditions.json": "the tokenizer's labels",
}


def check_checkpoint(checkpoint: str) -> None:
    """Raise unless this is the folder of a checkpoint, or may be its id on the Hub.

    Raises:
        FileNotFoundError: there is no such folder, or it lacks the weights or the tokenizer; the message says which.
        PermissionError: one of its files may not be read.
    """
    folder = Path(checkpoint)
    if folder.is_dir():
        for path in (folder, *(folder / name for name in FILES)):
            check_readable(path)
        there = {path.name for path in folder.iterdir()}
        if "model.safetensors.index.json" in there:  # weights in several files
            there.add("model.safetensors")
        missing = [f"{what} ({name})" for name, what in FILES.items() if name not in there]
        if missing:
            raise FileNotFoundError(
                f"{checkpoint!r} is no complete checkpoint: it has no {', '.join(missing)}; save model and tokenizer "
                "into one folder"
            )
    elif checkpoint.startswith((".", "/")) or checkpoint.endswith("/") or checkpoint.count("/") != 1:
        raise FileNotFoundError(f"no checkpoint folder {checkpoint!r} (an id on the Hub is USER/NAME)")


def condition_labels(checkpoint: str) -> ConditionLabels:
    """The labels of the conditions that a checkpoint knows; those of a folder without loading its tokenizer.

    Raises as :func:`load_checkpoint`.
    """
    check_checkpoint(checkpoint)
    with _failure_explained(checkpoint):
        if not Path(checkpoint).is_dir():
            from tokenization import DCMTokenizer

            return DCMTokenizer.from_pretrained(checkpoint)
        labels = ConditionLabels()
        labels._set_labels(**_read_json(checkpoint, "conditions.json"))
        return labels


@contextmanager
def unknown_label_explained(checkpoint: str) -> Iterator[None]:
    """Add to an unknown perturbation's error which names this checkpoint can be asked for."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("unknown perturbation") or not Path(checkpoint).is_dir():
            raise
        reason = "knows the names of its perturbation table only"
        if _read_json(checkpoint, "config.json").get("perturbation_dim") is None:
            needs = "others need --perturbation-embeddings in training"
            reason = f"learned a vector for each training perturbation: {needs}"
        raise ValueError(f"{error}; this model {reason}") from error


def load_checkpoint(checkpoint: str) -> tuple[DCMForDenoising, DCMTokenizer]:
    """Model and tokenizer of a folder or a Hub id.

    Raises:
        ValueError: weights that are damaged, incomplete, or do not fit this version.
        FileNotFoundError: no such checkpoint, or it lacks a file.
    """
    check_checkpoint(checkpoint)
    from safetensors import SafetensorError
    from transformers.utils import logging as transformers_logging

    from modeling_dcm import DCMForDenoising
    from tokenization import DCMTokenizer

    transformers_logging.disable_progress_bar()  # a moment's work
    with _failure_explained(checkpoint):
        try:
            model, loading = DCMForDenoising.from_pretrained(checkpoint, output_loading_info=True)
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"the weights of {checkpoint!r} cannot be loaded: damaged, or of another version of this package"
            ) from error
        tokenizer = DCMTokenizer.from_pretrained(checkpoint)
    missing = sorted(loading["missing_keys"])  # transformers would only warn, and draw them at random
    if missing:
        raise ValueError(
            f"the weights of {checkpoint!r} lack {len(missing)} tensors of this network ({shortened(missing, 3)}): "
            "they are of another version of this package"
        )
    return model, tokenizer


def cast_weights(model: DCMForDenoising, dtype: str) -> None:
    """Give a model's weights another precision; the buffers, statistics of the training cells, stay exact."""
    import torch

    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))


def _read_json(checkpoint: str, name: str) -> dict:
    return json.loads(read_text(Path(checkpoint, name)))


@contextmanager
def _failure_explained(checkpoint: str) -> Iterator[None]:
    """Turn what goes wrong while reading a checkpoint's files into one line that names it."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise ValueError(f"{checkpoint!r} holds a damaged JSON file ({error}): copy it again") from error
    except OSError as error:
        if Path(checkpoint).is_dir():
            raise
        raise FileNotFoundError(f"{checkpoint!r} is no checkpoint folder, and not found on the Hub: {error}") from error
