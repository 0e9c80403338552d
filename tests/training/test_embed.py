"""Properties of dcm-embed: which protein a name means, what its vector is, and that nothing is invented or lost.

The language model is a tiny random EsmModel. Letters: D its width.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file
from sklearn.decomposition import PCA
from transformers import EsmConfig, EsmModel, EsmTokenizer

from eval.sample import main as sample
from modeling_dcm import DCMForDenoising
from tokenization import DCMTokenizer
from training.config import TrainConfig
from training.convert_h5ad import main as convert
from training.data.cells import Cells
from training.embed_perturbations import main, perturbation_names
from training.loop.start import build_tokenizer
from training.perturbations.coexpression import coexpression_vectors
from training.perturbations.protein_vectors import ProteinEncoder, batches, embed_proteins, windows
from training.perturbations.proteins import match_proteins, read_fasta
from training.perturbations.table import read_table, write_table
from training.train import main as train

RESIDUES = "LAGVSERTIDPKQNFYMHWC"
VOCABULARY = ["<cls>", "<pad>", "<eos>", "<unk>", *RESIDUES, *"XBUZO", ".", "-", "<null_1>", "<mask>"]
KINASES = Path(__file__).resolve().parents[3] / "shared" / "data" / "human_kinases.fasta"
D = 8


@pytest.fixture(scope="module")
def esm_folder(tmp_path_factory) -> Path:
    """A tiny ESM-2 with random weights, as a local folder."""
    folder = tmp_path_factory.mktemp("esm")
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


def encoder(folder: Path, *, window: int = 1022, overlap: int = 256, batch_tokens: int = 8192) -> ProteinEncoder:
    return ProteinEncoder.load(str(folder), window=window, overlap=overlap, batch_tokens=batch_tokens)


def proteins_of(lengths: list[int], seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["M" + "".join(rng.choice(list(RESIDUES), length - 1)) for length in lengths]


def write_fasta(path: Path, records: dict[str, str]) -> Path:
    path.write_text("".join(f">{header}\n{sequence}\n" for header, sequence in records.items()))
    return path


@pytest.fixture
def fasta(shards, tmp_path) -> Path:
    """A protein for each perturbation of the simulated shards."""
    names = perturbation_names(shards)
    records = {f"{name} simulated": seq for name, seq in zip(names, proteins_of([30, 21, 44]), strict=True)}
    return write_fasta(tmp_path / "proteins.fasta", records)


# --- names and proteins ----------------------------------------------------------------------------------------------


def matched(tmp_path, records: dict[str, str], *names: str):
    return match_proteins(names, read_fasta(write_fasta(tmp_path / "some.fasta", records)))


@pytest.mark.parametrize(
    ("header", "names"),
    [
        (
            "sp|Q13351|KLF1_HUMAN Krueppel-like factor 1 OS=Homo sapiens OX=9606 GN=KLF1 PE=1 SV=3",
            "KLF1 Q13351 KLF1_HUMAN",
        ),
        (
            "Q96D53|COQ8B_HUMAN|Atypical kinase COQ8B, mitochondrial|GN=COQ8B|OS=Homo sapiens",
            "COQ8B Q96D53 COQ8B_HUMAN",
        ),
        (
            "ENSP00000264834.3 pep chromosome:GRCh38:19:1:2:-1 gene:ENSG00000105610.6 transcript:ENST00000264834.6 "
            "gene_biotype:protein_coding gene_symbol:KLF1 description:KLF transcription factor 1",
            "KLF1 ENSG00000105610 ENSG00000105610.6 ENST00000264834 ENSP00000264834",
        ),
        ("anything|KLF1|of a kind", "KLF1"),
        ("KLF1", "KLF1"),
        ("KLF1 with a description", "KLF1"),
    ],
)
def test_a_name_is_found_in_every_kind_of_header(tmp_path, header, names):
    match = matched(tmp_path, {header: "MKV", "other GN=OTHER": "MA"}, *names.split())
    assert {name: protein.sequence for name, protein in match.found.items()} == dict.fromkeys(names.split(), "MKV")
    assert not match.ambiguous


@pytest.mark.parametrize(
    "header", ["P1 gene:ENSG00000105610.6 gene_symbol:KLF1", "ENSG00000105610.6", "ENSG00000105610"]
)
def test_an_ensembl_id_is_found_in_any_version_but_first_in_its_own(tmp_path, header):
    for name in ("ENSG00000105610", "ENSG00000105610.6", "ENSG00000105610.12"):
        assert matched(tmp_path, {header: "MKV"}, name).found[name].sequence == "MKV"
    records = {"ENSG00000105610.6": "MKV", "ENSG00000105610.12": "MAAAAA"}
    assert matched(tmp_path, records, "ENSG00000105610.6").found["ENSG00000105610.6"].sequence == "MKV"
    assert matched(tmp_path, {"RP11-34P13.7": "MKV"}, "RP11-34P13.8").missing == ["RP11-34P13.8"]  # a clone's gene


def test_words_of_a_description_and_databases_are_no_names(tmp_path):
    header = "sp|Q13351|KLF1_HUMAN Krueppel-like factor binds GATA1 OS=Homo sapiens GN=KLF1 PE=1"
    assert matched(tmp_path, {header: "MKV"}, "GATA1", "sp", "OS", "klf1").missing == ["GATA1", "sp", "OS", "klf1"]


def test_a_gene_symbol_comes_before_a_record_of_that_name(tmp_path):
    match = matched(tmp_path, {"KLF1 something else GN=KLF2": "MAAAA", "P1 GN=KLF1": "MKV"}, "KLF1")
    assert match.found["KLF1"].sequence == "MKV"


def test_of_several_proteins_the_rule_takes_reviewed_then_canonical_then_longest(tmp_path):
    records = {
        "tr|A0A024|A_HUMAN GN=G": "MAAAAAAAAA",
        "sp|Q13351-2|B_HUMAN Isoform 2 of B GN=G": "MCCCCCC",
        "sp|Q13351|B_HUMAN B GN=G": "MDD",
        "sp|Q13352|C_HUMAN C GN=G": "MEEE",
    }
    for expected, number in (("MEEE", 4), ("MDD", 3), ("MCCCCCC", 2), ("MAAAAAAAAA", None)):
        match = matched(tmp_path, records, "G")
        assert match.found["G"].sequence == expected
        assert match.ambiguous.get("G") == number
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


def test_names_are_those_of_the_shards_of_a_checkpoint_or_of_a_file_without_the_control(shards, tmp_path):
    singles = [name for name in DCMTokenizer.from_pretrained(shards / "tokenizer").perturbations if name != "control"]
    assert perturbation_names(shards) == perturbation_names(shards / "tokenizer") == singles
    (tmp_path / "names.txt").write_text("B\n\nA\nB\n")
    assert perturbation_names(tmp_path / "names.txt") == ["A", "B"]
    with pytest.raises(FileNotFoundError, match="expected shards of dcm-convert, a checkpoint, or a file of names"):
        perturbation_names(tmp_path / "nothing")


# --- vectors ---------------------------------------------------------------------------------------------------------


def hidden_states(folder: Path, sequence: str) -> torch.Tensor:
    """Last hidden states of the residues, by transformers' own tokenizer."""
    tokens = EsmTokenizer.from_pretrained(folder)(sequence, return_tensors="pt")
    with torch.no_grad():
        return EsmModel.from_pretrained(folder, add_pooling_layer=False)(**tokens).last_hidden_state[0, 1:-1]


def test_a_vector_is_the_mean_over_residues_whatever_else_is_in_the_batch(esm_folder):
    sequences = proteins_of([5, 40, 17, 1, 23])
    expected = torch.stack([hidden_states(esm_folder, sequence).mean(dim=0) for sequence in sequences])
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


def test_batches_hold_everything_once_and_no_more_than_they_may():
    items = sorted(range(1, 30), reverse=True)
    cut = list(batches(items, lambda length: length, 64))
    assert [item for batch in cut for item in batch] == items
    assert all(len(batch) == 1 or len(batch) * (batch[0] + 2) <= 64 for batch in cut)


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


def test_a_checkpoint_that_lacks_weights_is_refused(esm_folder, tmp_path):
    model = EsmModel.from_pretrained(esm_folder, add_pooling_layer=False)
    weights = {name: w for name, w in model.state_dict().items() if "layer.1.output.dense" not in name}
    model.save_pretrained(tmp_path)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 2 weights of an EsmModel, such as encoder.layer.1.output.dense.bias"):
        encoder(tmp_path)


def test_a_residue_that_the_language_model_does_not_know_is_refused(esm_folder, tmp_path):
    with pytest.raises(ValueError, match=r"the sequence MK1V... has \['1'\]; expected residues ABC"):
        embed_proteins(["MKV", "MK1V"], encoder(esm_folder), tmp_path)


# --- cache -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def computed(monkeypatch) -> list[str]:
    """Sequences that were computed, in order."""
    seen: list[str] = []
    vectors = ProteinEncoder.vectors
    monkeypatch.setattr(ProteinEncoder, "vectors", lambda self, new: seen.extend(new) or vectors(self, new))
    return seen


def test_a_rerun_computes_only_what_is_new(esm_folder, tmp_path, computed):
    first, new = proteins_of([20, 20, 7]), proteins_of([33], seed=1)
    before = embed_proteins([*first, first[0]], encoder(esm_folder), tmp_path)
    assert sorted(computed) == sorted(first)
    computed.clear()
    after = embed_proteins([*first, *new], encoder(esm_folder), tmp_path)
    assert computed == new
    assert all(torch.equal(after[sequence], before[sequence]) for sequence in first)


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


# Imports once, then forks a process for each run that it is told to start. Batches and writing are slow, so that many
# kills find a file half written.
STARTER = """
import os, sys, time
from pathlib import Path
from training import embed_perturbations
from training.perturbations import protein_vectors
vectors, save_file = protein_vectors.ProteinEncoder.vectors, protein_vectors.save_file

def slow_vectors(self, sequences):
    time.sleep(0.01)
    return vectors(self, sequences)

def slow_save(tensors, path):
    save_file(tensors, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    time.sleep(0.01)
    path.write_bytes(whole)

protein_vectors.ProteinEncoder.vectors, protein_vectors.save_file = slow_vectors, slow_save
names, out, fasta, model = sys.argv[1:]
for _ in sys.stdin:
    child = os.fork()
    if not child:
        embed_perturbations.main(Path(names), Path(out), proteins=Path(fasta), model=model, batch_tokens=80)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture
def killed(esm_folder, tmp_path) -> Iterator[Callable[[int, float], None]]:
    """Embeds ``p.fasta`` in a process of its own, and kills that some seconds after so many batches were written."""
    names, fasta, out = (tmp_path / name for name in ("names.txt", "p.fasta", "killed/table.safetensors"))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", STARTER, *map(str, (names, out, fasta, esm_folder))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes) as starter:

        def run_and_kill(after_batches: int, after_seconds: float) -> None:
            wanted, deadline = len(cache_of(out)) + after_batches, time.monotonic() + 60
            starter.stdin.write("go\n")
            starter.stdin.flush()
            child = int(starter.stdout.readline())
            while len(cache_of(out)) < wanted and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(after_seconds)
            os.kill(child, signal.SIGKILL)
            assert int(starter.stdout.readline()) == signal.SIGKILL

        yield run_and_kill
        starter.kill()


@pytest.mark.slow
def test_killed_ten_times_a_rerun_has_identical_bytes_and_what_was_computed_is_kept(
    killed, esm_folder, tmp_path, computed
):
    names, rng = [f"P{i}" for i in range(80)], np.random.default_rng(0)
    (tmp_path / "names.txt").write_text("\n".join(names))
    fasta = write_fasta(tmp_path / "p.fasta", dict(zip(names, proteins_of(rng.permutation(np.arange(10, 90))))))
    whole, out = (tmp_path / name / "table.safetensors" for name in ("whole", "killed"))
    options = {"proteins": fasta, "model": str(esm_folder), "batch_tokens": 80}
    main(tmp_path / "names.txt", whole, **options)
    expected, kept = cache_of(whole), {}
    for batches_before, seconds in zip(rng.integers(0, 4, 10), rng.uniform(0, 0.05, 10)):
        killed(batches_before, seconds)
        now = cache_of(out)
        assert now.items() >= kept.items()  # nothing that was computed is lost
        assert now.items() <= expected.items()  # and no file is half there
        kept = now
        assert not out.exists()
    computed.clear()
    main(tmp_path / "names.txt", out, **options)
    assert out.read_bytes() == whole.read_bytes()
    assert cache_of(out) == expected
    known = sum(len(load(content)) for content in kept.values())
    assert 0 < known < len(names)
    assert len(computed) == len(names) - known


def cache_of(out: Path) -> dict[str, bytes]:
    """Content of each file of the cache beside a table."""
    files = out.parent.glob("dcm-embed-cache/*/*.safetensors")
    return {str(file.relative_to(out.parent)): file.read_bytes() for file in files if not file.name.startswith(".")}


# --- the table -------------------------------------------------------------------------------------------------------


def test_every_perturbation_but_the_control_gets_a_vector_and_the_file_says_from_what(
    esm_folder, shards, fasta, tmp_path
):
    out = main(shards, tmp_path / "table.safetensors", proteins=fasta, model=str(esm_folder))
    table = load_file(out)
    assert list(table) == perturbation_names(shards)
    assert all(vector.shape == (D,) and vector.dtype == torch.float32 for vector in table.values())
    with safe_open(out, "pt") as file:
        assert '"proteins": "proteins.fasta"' in file.metadata()["dcm_embed"]
    again = main(shards, tmp_path / "again.safetensors", proteins=fasta, model=str(esm_folder))
    assert again.read_bytes() == out.read_bytes()


def test_a_name_without_a_protein_is_an_error_or_marked_and_never_zeros(esm_folder, shards, fasta, tmp_path, caplog):
    names = perturbation_names(shards)
    fasta.write_text(fasta.read_text().replace(names[1], "NOTHING"))
    out = tmp_path / "table.safetensors"
    with pytest.raises(ValueError, match=rf"1 of 3 perturbations have no protein in .*: {names[1]}; --allow-missing"):
        main(shards, out, proteins=fasta, model=str(esm_folder))
    assert not out.exists()
    main(shards, out, proteins=fasta, model=str(esm_folder), allow_missing=True)
    assert f"get a learned vector in training: {names[1]}" in caplog.text
    assert list(load_file(out)) == [names[0], names[2]]
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["dcm_embed"])["without_vector"] == [names[1]]
    table = read_table(out, "control")
    assert (table.vectors.keys(), table.without_vector, table.dim) == ({names[0], names[2]}, {names[1]}, D)
    save_file(table.vectors, out)  # nobody says that the name was not forgotten
    with pytest.raises(
        ValueError, match=f"no vector for 1 of 4 training perturbations: {names[1]}; dcm-embed --allow-m"
    ):
        train(TrainConfig(data=shards, out=tmp_path / "checkpoint", perturbation_embeddings=out))


def test_proteins_of_other_names_are_an_error_even_when_names_may_be_missing(esm_folder, shards, tmp_path):
    fasta = write_fasta(tmp_path / "other.fasta", {"P1": "MKV"})
    with pytest.raises(ValueError, match=r"3 of 3 perturbations have no protein .*are the names of the same kind"):
        main(shards, tmp_path / "table.safetensors", proteins=fasta, model=str(esm_folder), allow_missing=True)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_vectors_of_a_file_are_taken_by_name(shards, perturbation_table, tmp_path, suffix):
    vectors = load_file(perturbation_table)
    more = {**vectors, "control": torch.ones(4), "NOT_ASKED_FOR": torch.ones(4)}
    path = tmp_path / f"vectors{suffix}"
    torch.save(more, path) if suffix == ".pt" else save_file(more, path)
    table = load_file(main(shards, tmp_path / "table.safetensors", str(path)))
    assert table.keys() == vectors.keys()
    assert all(torch.equal(table[name], vector) for name, vector in vectors.items())


class Attack:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pt_file_that_would_run_code_is_refused(shards, tmp_path):
    torch.save({"A": Attack(tmp_path / "ran")}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"cannot be read .*expected safetensors, or a \.pt dictionary of tensors"):
        main(shards, tmp_path / "table.safetensors", str(tmp_path / "bad.pt"))
    assert not (tmp_path / "ran").exists()


def test_vectors_that_cannot_be_used_are_refused(shards, perturbation_table, tmp_path):
    vectors, path = load_file(perturbation_table), tmp_path / "vectors.safetensors"
    name = next(iter(vectors))
    for wrong, message in (
        (torch.zeros(4), f"vectors that are not finite, or all zero: {name}"),
        (torch.full((4,), torch.nan), f"vectors that are not finite, or all zero: {name}"),
        (torch.ones(5), r"the table holds vectors of lengths \[4, 5\]"),
    ):
        save_file({**vectors, name: wrong}, path)
        with pytest.raises(ValueError, match=message):
            main(shards, tmp_path / "table.safetensors", str(path))
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match="holds Tensor; expected a dictionary of names and tensors"):
        main(shards, tmp_path / "table.safetensors", str(tmp_path / "tensor.pt"))


def test_options_that_contradict_each_other_are_refused(shards, fasta, tmp_path):
    out = tmp_path / "table.safetensors"
    with pytest.raises(ValueError, match="--proteins is None with --from proteins; expected a FASTA file"):
        main(shards, out)
    with pytest.raises(ValueError, match="with --from coexpression; expected a FASTA file with --from proteins"):
        main(shards, out, "coexpression", proteins=fasta)
    with pytest.raises(FileNotFoundError, match="--from expects proteins, coexpression, or a file with vectors"):
        main(shards, out, "vectors.npz")


@pytest.mark.slow
def test_the_command_line_lists_missing_names_in_one_line(shards, tmp_path):
    fasta = write_fasta(tmp_path / "other.fasta", {"P1": "MKV"})
    arguments = [
        "--perturbations",
        shards,
        "--proteins",
        fasta,
        "--out",
        tmp_path / "table.safetensors",
        "--model",
        "x",
    ]
    run = subprocess.run(
        [sys.executable, "-m", "training.embed_perturbations", *map(str, arguments)],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith("error: 3 of 3 perturbations have no protein")


# --- coexpression ----------------------------------------------------------------------------------------------------


def test_coexpression_is_the_loadings_of_a_principal_component_analysis_of_the_training_controls(shards):
    cells = Cells(shards, "train")
    train = anndata.read_h5ad(shards / "train.h5ad")
    controls = train[train.obs["perturbation"] == "control"]
    counts = controls.X.toarray().astype(float)
    logs = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
    for cell_type in controls.obs["cell_type"].unique():
        of_type = (controls.obs["cell_type"] == cell_type).to_numpy()
        logs[of_type] -= logs[of_type].mean(axis=0)
    oracle = PCA(5, svd_solver="full").fit(logs)
    expected = oracle.components_.T * np.sqrt(oracle.explained_variance_)
    expected *= np.sign(expected[np.abs(expected).argmax(axis=0), range(5)])
    expressed = counts.any(axis=0)
    expected = expected[expressed] / np.sqrt((expected[expressed] ** 2).mean())
    vectors = coexpression_vectors(cells, 5)
    assert list(vectors) == list(train.var_names[expressed])
    assert np.allclose(list(vectors.values()), expected, atol=1e-4)


def test_coexpression_is_deterministic_and_needs_the_gene_in_the_panel(shards, tmp_path):
    files = [main(shards, tmp_path / name, "coexpression", components=5) for name in ("a.safetensors", "b.safetensors")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert list(load_file(files[0])) == perturbation_names(shards)
    (tmp_path / "names.txt").write_text(f"{perturbation_names(shards)[0]}\nELSEWHERE\n")
    options = {"source": "coexpression", "shards": shards, "components": 5}
    with pytest.raises(ValueError, match=r"1 of 2 perturbations have no gene that is in the panel .*: ELSEWHERE"):
        main(tmp_path / "names.txt", tmp_path / "c.safetensors", **options)
    with pytest.raises(ValueError, match="is a file of names; coexpression needs --shards"):
        main(tmp_path / "names.txt", tmp_path / "c.safetensors", "coexpression")
    with pytest.raises(ValueError, match="components is 15; expected 1 to 14"):
        main(shards, tmp_path / "c.safetensors", "coexpression", components=15)


def test_coexpression_of_held_out_cells_is_refused(shards):
    with pytest.raises(ValueError, match="coexpression of the test split; expected train: other cells are held out"):
        coexpression_vectors(Cells(shards, "test"), 5)


# --- end to end ------------------------------------------------------------------------------------------------------


TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_latents": 4, "trackers": "none"}
TINY |= {"max_steps": 4, "batch_size": 8, "validation_cells": 8, "learning_rate": 1e-2}


def load_checkpoint(folder: Path) -> tuple[DCMForDenoising, DCMTokenizer]:
    return DCMForDenoising.from_pretrained(folder).eval(), DCMTokenizer.from_pretrained(folder)


@torch.no_grad()
def logits_of(model: DCMForDenoising, tokenizer: DCMTokenizer, name: str) -> torch.Tensor:
    """Of a cell of which nothing is known but its perturbation (1, 15, K+1)."""
    inputs = torch.full((1, 15), tokenizer.mask_token_id)
    return model(inputs, perturbation_ids=tokenizer.perturbation_ids([name])).logits


@pytest.fixture(scope="module")
def held_out_shards(cells_h5ad, tmp_path_factory) -> tuple[Path, str]:
    """Shards of which no training cell has a certain perturbation, and its name."""
    labels = anndata.read_h5ad(cells_h5ad).obs["perturbation"].astype(str)
    held_out = min({name for label in labels for name in label.split("+")} - {"control"})
    out = tmp_path_factory.mktemp("held_out") / "shards"
    keys = {"cell_type_key": "cell_type", "perturbation_key": "perturbation"}
    convert(cells_h5ad, out=out, split="held-out-perturbations", held_out=held_out, **keys)
    return out, held_out


@pytest.mark.slow
def test_from_proteins_to_cells_of_a_perturbation_held_out_of_training(esm_folder, held_out_shards, tmp_path):
    shards, held_out = held_out_shards
    names, tables = perturbation_names(shards), []
    for seed in (0, 1):
        records = dict(zip(names, proteins_of([30, 21, 44], seed)))
        fasta = write_fasta(tmp_path / f"{seed}.fasta", records)
        tables.append(main(shards, tmp_path / f"{seed}.safetensors", proteins=fasta, model=str(esm_folder)))
    options = TINY | {"max_steps": 20, "warmup_steps": 0}  # enough to hear of the conditions
    runs = [
        train(TrainConfig(data=shards, out=tmp_path / table.stem, perturbation_embeddings=table, **options))
        for table in tables
    ]
    sample(str(runs[0]), out=tmp_path / "cells.h5ad", like=shards / "test.h5ad", steps=2)
    cells, test = anndata.read_h5ad(tmp_path / "cells.h5ad"), anndata.read_h5ad(shards / "test.h5ad")
    assert held_out in set(cells.obs["perturbation"])
    assert cells.obs["perturbation"].astype(str).tolist() == test.obs["perturbation"].astype(str).tolist()
    assert cells.X.sum() > 0
    first, other = (logits_of(*load_checkpoint(run), held_out) for run in runs)
    assert (first - other).abs().max() > 1e-4


@pytest.fixture(scope="module")
def without_protein(esm_folder, shards, tmp_path_factory) -> tuple[Path, str]:
    """A checkpoint that was trained with a table in which one perturbation has no vector, and that name."""
    folder = tmp_path_factory.mktemp("missing")
    first, missing, last = perturbation_names(shards)
    fasta = write_fasta(folder / "p.fasta", dict(zip((first, last, "UNSEEN"), proteins_of([30, 21, 44]))))
    (folder / "names.txt").write_text("\n".join([first, missing, last, "UNSEEN", "NOWHERE"]))
    options = {"proteins": fasta, "model": str(esm_folder), "allow_missing": True}
    table = main(folder / "names.txt", folder / "table.safetensors", **options)
    return train(TrainConfig(data=shards, out=folder / "run", perturbation_embeddings=table, **TINY)), missing


def test_only_perturbations_without_a_protein_learn_a_vector(without_protein):
    folder, missing = without_protein
    model, tokenizer = load_checkpoint(folder)
    encoder = model.conditions.perturbation
    with_vector = {name for name, has in zip(tokenizer.perturbations, encoder.has_vector) if has}
    assert "UNSEEN" in with_vector
    assert with_vector == set(tokenizer.perturbations) - {"control", missing}
    ids = torch.arange(len(tokenizer.perturbations))[:, None]
    inputs = torch.full((len(ids), 15), tokenizer.mask_token_id)
    model(inputs, perturbation_ids=ids, labels=torch.zeros_like(inputs)).loss.backward()
    learns = encoder.learned.weight.grad.any(dim=1)[:-1]
    assert {name for name, does in zip(tokenizer.perturbations, learns) if does} == {"control", missing}


def test_a_learned_vector_is_one_of_its_own_and_survives_saving_and_new_perturbations(without_protein, tmp_path):
    folder, missing = without_protein
    model, tokenizer = load_checkpoint(folder)
    learned = logits_of(model, tokenizer, missing)
    for other in ("control", None, "UNSEEN"):
        assert (learned - logits_of(model, tokenizer, other)).abs().max() > 1e-4
    new = {"NEW": torch.ones(D)}
    ids = tokenizer.add_perturbations(new)
    model.add_perturbations(new, tokenizer.target_gene_ids[ids])
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    model, tokenizer = load_checkpoint(tmp_path / "saved")
    assert torch.equal(logits_of(model, tokenizer, missing), learned)
    sample(str(tmp_path / "saved"), out=tmp_path / "cells.h5ad", num_cells=5, perturbation=f"{missing}+NEW", steps=2)
    assert anndata.read_h5ad(tmp_path / "cells.h5ad").shape == (5, 15)
    with pytest.raises(ValueError, match="unknown perturbation 'NOWHERE'"):  # it has neither a vector nor a cell
        tokenizer.conditions(perturbation="NOWHERE")


def test_a_perturbation_with_neither_vector_nor_training_cell_is_not_known(held_out_shards, tmp_path, caplog):
    shards, held_out = held_out_shards
    first, *others = sorted(set(perturbation_names(shards)) - {held_out})
    write_table({name: torch.ones(3) for name in others}, tmp_path / "t.safetensors", {}, [first, held_out])
    config = TrainConfig(data=shards, out=tmp_path / "run", perturbation_embeddings=tmp_path / "t.safetensors", **TINY)
    assert set(build_tokenizer(config).perturbations) == {"control", first, *others}
    assert (
        f"1 perturbations have neither a vector nor a training cell, and the model will not know them: {held_out}"
        in (caplog.text)
    )


@pytest.mark.slow
@pytest.mark.skipif(not KINASES.exists(), reason=f"no {KINASES.name} in the shared data")
def test_every_protein_of_a_real_file_gets_its_vector(esm_folder, tmp_path):
    proteins = read_fasta(KINASES)
    assert len(proteins) == 524
    names = sorted({name for protein in proteins for name in protein.symbols})
    assert len(names) > 500
    (tmp_path / "names.txt").write_text("\n".join(names))
    table = load_file(
        main(tmp_path / "names.txt", tmp_path / "table.safetensors", proteins=KINASES, model=str(esm_folder))
    )
    assert list(table) == names
    longest = max(proteins, key=lambda protein: len(protein.sequence))
    assert len(longest.sequence) > 2 * 1022
    vectors = torch.stack(list(table.values()))
    assert len(vectors.unique(dim=0)) == len({protein.sequence for protein in proteins})
