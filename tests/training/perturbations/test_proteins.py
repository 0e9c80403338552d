"""Which protein of a FASTA file a name means, what its vector is, and that nothing is computed twice or lost.

The language model is a tiny random ESM-2 of width D.
"""

import importlib
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file
from transformers import EsmModel, EsmTokenizer

from tests.tiny_esm import VOCABULARY, D, proteins_of, write_fasta
from training.embed_perturbations import main
from training.perturbations import proteins as protein_vectors
from training.perturbations.proteins import (
    ProteinEncoder,
    batches,
    embed_proteins,
    match_proteins,
    read_fasta,
    windows,
)

UNIPROT = "sp|Q13351|KLF1_HUMAN Krueppel-like factor 1 OS=Homo sapiens OX=9606 GN=KLF1 PE=1 SV=3"
BARS = "Q96D53|COQ8B_HUMAN|Atypical kinase COQ8B, mitochondrial|GN=COQ8B|OS=Homo sapiens"
ENSEMBL = (
    "ENSP00000264834.3 pep chromosome:GRCh38:19:1:2:-1 gene:ENSG00000105610.6 transcript:ENST00000264834.6 "
    "gene_biotype:protein_coding gene_symbol:KLF1 description:KLF transcription factor 1"
)


def matched(tmp_path, records: dict[str, str], *names: str) -> tuple[dict[str, str], dict[str, int]]:
    """Sequence of each name that is found, and the numbers of sequences of the ambiguous ones."""
    found, ambiguous = match_proteins(names, read_fasta(write_fasta(tmp_path / "some.fasta", records)))
    return {name: protein.sequence for name, protein in found.items()}, ambiguous


@pytest.mark.parametrize(
    ("header", "names"),
    [
        (UNIPROT, "KLF1 Q13351 KLF1_HUMAN"),
        (BARS, "COQ8B Q96D53 COQ8B_HUMAN"),
        (ENSEMBL, "KLF1 ENSG00000105610 ENSG00000105610.6 ENST00000264834 ENSP00000264834"),
        ("anything|KLF1|of a kind", "KLF1"),
        ("KLF1", "KLF1"),
        ("KLF1 with a description", "KLF1"),
    ],
)
def test_a_name_is_found_in_every_kind_of_header(tmp_path, header, names):
    found, ambiguous = matched(tmp_path, {header: "MKV", "other GN=OTHER": "MA"}, *names.split())
    assert found == dict.fromkeys(names.split(), "MKV")
    assert not ambiguous


@pytest.mark.parametrize(
    "header", ["P1 gene:ENSG00000105610.6 gene_symbol:KLF1", "ENSG00000105610.6", "ENSG00000105610"]
)
def test_an_ensembl_id_is_found_in_any_version_but_first_in_its_own(tmp_path, header):
    names = ("ENSG00000105610", "ENSG00000105610.6", "ENSG00000105610.12")
    assert matched(tmp_path, {header: "MKV"}, *names)[0] == dict.fromkeys(names, "MKV")
    records = {"ENSG00000105610.6": "MKV", "ENSG00000105610.12": "MAAAAA"}
    assert matched(tmp_path, records, "ENSG00000105610.6")[0] == {"ENSG00000105610.6": "MKV"}
    assert matched(tmp_path, {"RP11-34P13.7": "MKV"}, "RP11-34P13.8")[0] == {}  # a clone's gene


def test_words_of_a_description_and_databases_are_no_names(tmp_path):
    header = "sp|Q13351|KLF1_HUMAN Krueppel-like factor binds GATA1 OS=Homo sapiens GN=KLF1 PE=1"
    assert matched(tmp_path, {header: "MKV"}, "GATA1", "sp", "OS", "klf1")[0] == {}
    records = {"KLF1 something else GN=KLF2": "MAAAA", "P1 GN=KLF1": "MKV"}
    assert matched(tmp_path, records, "KLF1")[0] == {"KLF1": "MKV"}  # a gene symbol comes before a record of that name


def test_of_several_proteins_the_rule_takes_reviewed_then_canonical_then_longest(tmp_path):
    records = {
        "tr|A0A024|A_HUMAN GN=G": "MAAAAAAAAA",
        "sp|Q13351-2|B_HUMAN Isoform 2 of B GN=G": "MCCCCCC",
        "sp|Q13351|B_HUMAN B GN=G": "MDD",
        "sp|Q13352|C_HUMAN C GN=G": "MEEE",
    }
    for expected, number in (("MEEE", 4), ("MDD", 3), ("MCCCCCC", 2), ("MAAAAAAAAA", None)):
        found, ambiguous = matched(tmp_path, records, "G")
        assert (found["G"], ambiguous.get("G")) == (expected, number)
        records = {header: sequence for header, sequence in records.items() if sequence != expected}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MKV\n", "is not FASTA: it begins with 'MKV"),
        ("", "holds no protein; expected FASTA records"),
        (">a\nMK\n>b\n", "1 records without a sequence: b"),
    ],
)
def test_files_that_are_no_fasta_are_refused(tmp_path, text, message):
    (tmp_path / "bad.fasta").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_fasta(tmp_path / "bad.fasta")


# --- the language model -----------------------------------------------------------------------------------------------


def encoder(folder: Path, **options: int) -> ProteinEncoder:
    return ProteinEncoder.load(str(folder), **options)


def hidden_states(folder: Path, sequence: str) -> torch.Tensor:
    """Last hidden states of the residues, by transformers' own tokenizer."""
    tokens = EsmTokenizer.from_pretrained(folder)(sequence, return_tensors="pt")
    with torch.no_grad():
        return EsmModel.from_pretrained(folder, add_pooling_layer=False)(**tokens).last_hidden_state[0, 1:-1]


def test_a_vector_is_the_mean_over_residues_whatever_else_is_in_the_batch(esm_folder):
    sequences = proteins_of([5, 40, 17, 1, 23])
    expected = torch.stack([hidden_states(esm_folder, sequence).mean(dim=0) for sequence in sequences])
    cut = list(batches(range(29, 0, -1), lambda length: length, 64))
    assert [item for batch in cut for item in batch] == list(range(29, 0, -1))
    assert all(len(batch) == 1 or len(batch) * (batch[0] + 2) <= 64 for batch in cut)
    for batch_tokens in (1, 60, 8192):
        vectors = encoder(esm_folder, batch_tokens=batch_tokens).vectors(sequences)
        torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=0)


def test_windows_cover_every_residue_and_share_their_overlap():
    for length in (1, 9, 10, 11, 27, 28, 95):
        spans = windows(length, 10, 4)
        assert set().union(*(range(*span) for span in spans)) == set(range(length))
        assert all(last - first == min(length, 10) for first, last in spans)
        assert all(before[1] - after[0] >= 4 for before, after in pairwise(spans))


def test_a_long_protein_is_the_mean_over_residues_of_their_mean_over_windows(esm_folder):
    (sequence,) = proteins_of([25])
    total, seen = torch.zeros(25, D), torch.zeros(25, 1)
    for first, last in windows(25, 10, 4):
        total[first:last] += hidden_states(esm_folder, sequence[first:last])
        seen[first:last] += 1
    vectors = encoder(esm_folder, window=10, overlap=4, batch_tokens=24).vectors([sequence])
    torch.testing.assert_close(vectors[0], (total / seen).mean(dim=0), atol=1e-5, rtol=0)


def test_meta_s_own_esm2_with_the_same_weights_gives_the_same_vectors(esm_folder):
    oracle = importlib.import_module("esm.model.esm2")  # fair-esm, of the extra "dev"
    ours = EsmModel.from_pretrained(esm_folder, add_pooling_layer=False).state_dict()
    theirs = oracle.ESM2(num_layers=2, embed_dim=D, attention_heads=2, alphabet="ESM-1b", token_dropout=True).eval()
    assert theirs.alphabet.all_toks == VOCABULARY
    names = {
        "self_attn.q_proj": "attention.self.query",
        "self_attn.k_proj": "attention.self.key",
        "self_attn.v_proj": "attention.self.value",
        "self_attn.out_proj": "attention.output.dense",
        "self_attn_layer_norm": "attention.LayerNorm",
        "fc1": "intermediate.dense",
        "fc2": "output.dense",
        "final_layer_norm": "LayerNorm",
    }
    copied = {"embed_tokens.weight": ours["embeddings.word_embeddings.weight"]}
    for part in ("weight", "bias"):
        copied[f"emb_layer_norm_after.{part}"] = ours[f"encoder.emb_layer_norm_after.{part}"]
        for layer in range(2):
            for there, here in names.items():
                copied[f"layers.{layer}.{there}.{part}"] = ours[f"encoder.layer.{layer}.{here}.{part}"]
    missing = theirs.load_state_dict(copied, strict=False).missing_keys
    assert all(name.startswith(("contact_head.", "lm_head.")) or "inv_freq" in name for name in missing)
    sequences = proteins_of([5, 40, 17])
    _, _, tokens = theirs.alphabet.get_batch_converter()([(str(i), s) for i, s in enumerate(sequences)])
    with torch.no_grad():
        states = theirs(tokens, repr_layers=[2])["representations"][2]
    expected = torch.stack([states[i, 1 : len(s) + 1].mean(dim=0) for i, s in enumerate(sequences)])
    torch.testing.assert_close(encoder(esm_folder).vectors(sequences), expected, atol=1e-5, rtol=0)


def test_a_checkpoint_that_lacks_weights_and_a_residue_that_it_does_not_know_are_refused(esm_folder, tmp_path):
    model = EsmModel.from_pretrained(esm_folder, add_pooling_layer=False)
    weights = {name: w for name, w in model.state_dict().items() if "layer.1.output.dense" not in name}
    model.save_pretrained(tmp_path)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 2 weights of an EsmModel, such as encoder.layer.1.output.dense.bias"):
        encoder(tmp_path)
    with pytest.raises(ValueError, match=r"the sequence MK1V... has \['1'\]; expected residues ABC"):
        embed_proteins(["MKV", "MK1V"], encoder(esm_folder), tmp_path)


@pytest.fixture
def computed(monkeypatch) -> list[str]:
    """Sequences that were computed, in order."""
    seen: list[str] = []
    vectors = ProteinEncoder.vectors
    monkeypatch.setattr(ProteinEncoder, "vectors", lambda self, new: seen.extend(new) or vectors(self, new))
    return seen


def test_the_cache_of_another_model_or_window_is_not_used(esm_folder, tmp_path, computed):
    sequences = proteins_of([20])
    other = tmp_path / "other"
    model = EsmModel.from_pretrained(esm_folder, add_pooling_layer=False)
    model.encoder.layer[0].output.dense.bias.data[0] += 1
    model.save_pretrained(other)
    (other / "vocab.txt").write_text((esm_folder / "vocab.txt").read_text())
    for folder, window in ((esm_folder, 1022), (other, 1022), (esm_folder, 600), (esm_folder, 1022)):
        embed_proteins(sequences, encoder(folder, window=window), tmp_path / "cache")
    assert len(computed) == 3


def test_a_damaged_cache_file_is_computed_again(esm_folder, tmp_path, computed, caplog):
    sequences = proteins_of([20])
    before = embed_proteins(sequences, encoder(esm_folder), tmp_path)
    (file,) = tmp_path.glob("*/*.safetensors")
    file.write_bytes(file.read_bytes()[:30])
    after = embed_proteins(sequences, encoder(esm_folder), tmp_path)
    assert len(computed) == 2
    assert "is damaged" in caplog.text
    assert torch.equal(after[sequences[0]], before[sequences[0]])


def test_stopped_again_and_again_a_rerun_has_identical_bytes_and_what_was_computed_is_kept(
    esm_folder, tmp_path, computed, monkeypatch
):
    names = [f"P{i}" for i in range(40)]
    (tmp_path / "names.txt").write_text("\n".join(names))
    fasta = write_fasta(tmp_path / "p.fasta", dict(zip(names, proteins_of(list(range(10, 50))))))
    whole, out = (tmp_path / name / "table.safetensors" for name in ("whole", "stopped"))
    options = {"proteins": fasta, "model": str(esm_folder), "batch_tokens": 80}
    main(tmp_path / "names.txt", whole, **options)
    expected, kept = cache_of(whole), {}
    for batches_before in (0, 4, 2):
        left = iter(range(batches_before))

        def stops(tensors, path, left=left):
            save_file(tensors, path)
            if next(left, None) is None:
                path.write_bytes(path.read_bytes()[:30])
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(protein_vectors, "save_file", stops)
            main(tmp_path / "names.txt", out, **options)
        now = cache_of(out)
        assert kept.items() <= now.items() <= expected.items()  # nothing is lost, and no file is half there
        assert len(now) == len(kept) + batches_before
        kept = now
        assert not out.exists()
    computed.clear()
    main(tmp_path / "names.txt", out, **options)
    assert out.read_bytes() == whole.read_bytes()
    assert cache_of(out) == expected
    assert len(computed) == len(names) - sum(len(load(content)) for content in kept.values())


def cache_of(out: Path) -> dict[str, bytes]:
    """Content of each file of the cache beside a table."""
    files = out.parent.glob("dcm-embed-cache/*/*.safetensors")
    return {str(file.relative_to(out.parent)): file.read_bytes() for file in files if not file.name.startswith(".")}
