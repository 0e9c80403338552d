"""A tiny random ESM-2, and proteins to give it."""

from pathlib import Path

import numpy as np
import torch
from transformers import EsmConfig, EsmModel, EsmTokenizer

RESIDUES = "LAGVSERTIDPKQNFYMHWC"
VOCABULARY = ["<cls>", "<pad>", "<eos>", "<unk>", *RESIDUES, *"XBUZO", ".", "-", "<null_1>", "<mask>"]
D = 8


def write_tiny_esm(folder: Path) -> Path:
    """A tiny ESM-2 of width ``D`` with random weights, as a local folder."""
    config = EsmConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=D,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=4 * D,
        position_embedding_type="rotary",
        token_dropout=True,
        emb_layer_norm_before=False,
        pad_token_id=1,
        mask_token_id=VOCABULARY.index("<mask>"),
        layer_norm_eps=1e-5,  # as in the published checkpoints
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = EsmModel(config, add_pooling_layer=False)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    EsmTokenizer(folder / "vocab.txt").save_pretrained(folder)
    return folder


def proteins_of(lengths: list[int], seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["M" + "".join(rng.choice(list(RESIDUES), length - 1)) for length in lengths]


def write_fasta(path: Path, records: dict[str, str]) -> Path:
    path.write_text("".join(f">{header}\n{sequence}\n" for header, sequence in records.items()))
    return path
