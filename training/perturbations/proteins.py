"""Vectors of proteins: sequences from FASTA, the one that a perturbation's name means, a language model's mean states.

Knows headers of UniProt and Ensembl, and plain ones. A vector is the mean of the model's last hidden states over the
residues. Vectors are kept in a cache, batch by batch, so that a run that was killed, or that has a few new proteins,
computes only what is new. Letters: n proteins, B windows of a batch, T tokens of a window (residues and the two special
ones), D width of the language model.
"""

import gzip
import hashlib
import json
import logging
import re
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.constants import ENDPOINT
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import EsmModel, EsmTokenizer

from tokenization.gene_names_dcm import without_version
from tokenization.labels_dcm import shortened
from training.data.files import written_aside

logger = logging.getLogger(__name__)

# first fields of headers such as >sp|P12345|NAME_HUMAN: they say where a record is from, and name nothing
DATABASES = frozenset({"sp", "tr", "lcl", "gnl", "ref", "gb", "emb", "dbj", "pdb", "gi"})
SYMBOL = re.compile(r"(?:\bGN=|\bgene_symbol:)([^\s|]+)")
ENSEMBL_ID = re.compile(r"\b(?:gene|transcript):([^\s|]+)")
VERSION = re.compile(r"\.\d+$")
ISOFORM = re.compile(r"^[A-Z0-9]{6,10}-\d+$")  # UniProt's accession of an isoform
UNUSED_WEIGHTS = ("pooler.", "contact_head.")  # they have no part in hidden states
NOT_OF_THE_NETWORK = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype")


@dataclass(frozen=True)
class Protein:
    """One record of a FASTA file."""

    record: str  # the header's first word, for messages
    sequence: str  # residues in capitals
    symbols: frozenset[str]  # gene names, from ``GN=`` or ``gene_symbol:``
    ids: frozenset[str]  # the record's own, fields between bars, Ensembl ids with and without their version
    is_unreviewed: bool = False  # of UniProt's TrEMBL
    is_isoform: bool = False  # of UniProt's isoforms, not the canonical sequence


def read_fasta(path: Path) -> list[Protein]:
    """Read every record of a FASTA file (``.gz`` too), in order."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}; expected protein sequences as FASTA")
    records: list[tuple[str, list[str]]] = []
    open_text = gzip.open if path.suffix == ".gz" else open
    try:
        with open_text(path, "rt", encoding="utf-8-sig") as file:
            for line in file:
                if line.startswith(">"):
                    records.append((line[1:].strip(), []))
                elif records:
                    records[-1][1].append(line.strip())
                elif line.strip():
                    raise ValueError(f"{str(path)!r} is not FASTA: it begins with {line[:20]!r}, expected '>'")
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{str(path)!r} is not FASTA ({error}); copy it again") from error
    if not records:
        raise ValueError(f"{str(path)!r} holds no protein; expected FASTA records that begin with '>'")
    proteins = [_protein(header, "".join(lines)) for header, lines in records]
    empty = [protein.record for protein in proteins if not protein.sequence]
    if empty:
        raise ValueError(f"{str(path)!r}: {len(empty):,} records without a sequence: {shortened(empty)}")
    return proteins


def _protein(header: str, sequence: str) -> Protein:
    fields = [field.strip() for field in header.split("|")]
    ids = {field for field in fields if field and " " not in field and "=" not in field}
    if len(fields) == 1 or fields[0] in DATABASES:
        ids.update(fields[-1].split()[:1])
    ids.update(ENSEMBL_ID.findall(header))
    ids -= DATABASES
    ids |= {VERSION.sub("", name) for name in ids}
    return Protein(
        record=(header.split() or [""])[0],
        sequence=sequence.upper().removesuffix("*"),  # the stop codon of translated sequences
        symbols=frozenset(SYMBOL.findall(header)),
        ids=frozenset(ids),
        is_unreviewed=fields[0] == "tr",
        is_isoform=any(ISOFORM.match(name) for name in ids),
    )


def match_proteins(names: Iterable[str], proteins: Sequence[Protein]) -> tuple[dict[str, Protein], dict[str, int]]:
    """Find the protein of each name: by gene symbol, and only where no record has that symbol, by another id.

    Of several sequences the rule takes the reviewed one, then the canonical one, then the longest, then the first by
    record name. Capitals matter: ``Klf1`` is the gene of a mouse. A name that is an Ensembl id with a version finds the
    records of that id in any version, unless it finds some of its own.

    Returns:
        The names that a record matches, with their protein; and those that several sequences match, with their number.
    """
    by_symbol, by_id = defaultdict(list), defaultdict(list)
    for protein in proteins:
        for name in protein.symbols:
            by_symbol[name].append(protein)
        for name in protein.ids:
            by_id[name].append(protein)
    found, ambiguous = {}, {}
    for name in names:
        candidates = by_symbol.get(name) or by_id.get(name) or by_id.get(without_version(name))
        if not candidates:
            continue
        found[name] = min(candidates, key=lambda p: (p.is_unreviewed, p.is_isoform, -len(p.sequence), p.record))
        sequences = {protein.sequence for protein in candidates}
        if len(sequences) > 1:
            ambiguous[name] = len(sequences)
    return found, ambiguous


# --- the language model -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProteinEncoder:
    """A language model of proteins, ready to run."""

    model: EsmModel  # on its device, in its precision
    residue_ids: dict[str, int]  # token of each residue
    special_ids: tuple[int, int, int]  # tokens before the first residue, after the last one, and of padding
    window: int  # longest stretch of residues that the network sees at once; longer proteins are cut
    overlap: int  # residues that neighbouring windows share, at least
    batch_tokens: int  # of a batch, at most (a single window may be longer)

    @classmethod
    def load(cls, name: str, *, window: int = 1022, overlap: int = 256, batch_tokens: int = 8192) -> "ProteinEncoder":
        """Load transformers' ``EsmModel`` from a folder or the Hub; bfloat16 on a GPU, else float32 on the CPU."""
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens is {batch_tokens}; expected at least 1")
        offline = not Path(name).is_dir() and not hub_answers()
        options = {"add_pooling_layer": False, "dtype": torch.float32, "local_files_only": offline}
        try:
            model, report = EsmModel.from_pretrained(name, output_loading_info=True, **options)
        except OSError as error:
            if not offline:
                raise
            raise OSError(
                f"--model {name!r} is no folder, was not downloaded before, and the Hub cannot be reached: give a "
                "local folder of the model"
            ) from error
        lost = sorted(key for key in report["missing_keys"] if not key.startswith(UNUSED_WEIGHTS))
        if lost:
            raise ValueError(f"{name!r} lacks {len(lost)} weights of an EsmModel, such as {', '.join(lost[:3])}")
        longest = model.config.max_position_embeddings - model.config.pad_token_id - 3
        if model.config.position_embedding_type == "absolute" and window > longest:
            raise ValueError(f"{name!r} has positions for {longest} residues at most; expected {window} or more")
        tokenizer = EsmTokenizer.from_pretrained(name, local_files_only=offline)
        ids = {token: id_ for token, id_ in tokenizer.get_vocab().items() if len(token) == 1 and token.isalpha()}
        if not ids or max(ids.values()) >= model.config.vocab_size:
            raise ValueError(f"{name!r}: the tokenizer's residues do not fit the model's {model.config.vocab_size} ids")
        if torch.cuda.is_available():
            model = model.to("cuda", torch.bfloat16)
        special = tokenizer.cls_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        return cls(model.eval(), ids, special, window, overlap, batch_tokens)

    def fingerprint(self) -> str:
        """Hash everything that decides a protein's vector: weights, configuration, tokens, precision, windows."""
        digest = hashlib.sha256()
        config = {k: v for k, v in self.model.config.to_dict().items() if k not in NOT_OF_THE_NETWORK}
        numbers = [self.window, self.overlap, str(self.model.dtype), self.special_ids, sorted(self.residue_ids.items())]
        digest.update(json.dumps([config, numbers], sort_keys=True, default=str).encode())
        for name, weight in sorted(self.model.state_dict().items()):
            if not name.startswith(UNUSED_WEIGHTS):
                digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
                digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    @torch.inference_mode()
    def vectors(self, sequences: Sequence[str]) -> torch.Tensor:
        """Compute the mean hidden state over the residues of each sequence, (n, D) float32 on the CPU.

        Special tokens do not count. A residue in several windows has the mean of its states there.
        """
        totals = torch.zeros(len(sequences), self.model.config.hidden_size, dtype=torch.float64)
        spans = []  # (sequence, first residue, weight of each residue)
        for index, sequence in enumerate(sequences):
            of_sequence = windows(len(sequence), self.window, self.overlap)
            times_seen = np.zeros(len(sequence))
            for first, last in of_sequence:
                times_seen[first:last] += 1
            spans += [(index, first, 1 / (times_seen[first:last] * len(sequence))) for first, last in of_sequence]
        spans.sort(key=lambda span: -len(span[2]))  # neighbours in length together, so that little is padded
        for batch in batches(spans, lambda span: len(span[2]), self.batch_tokens):
            T = 2 + max(len(weights) for _, _, weights in batch)
            tokens = torch.full((len(batch), T), self.special_ids[2])
            weight = torch.zeros(len(batch), T)
            for row, (index, first, weights) in enumerate(batch):
                residues = sequences[index][first : first + len(weights)]
                ids = [self.special_ids[0], *(self.residue_ids[residue] for residue in residues), self.special_ids[1]]
                tokens[row, : len(ids)] = torch.tensor(ids)
                weight[row, 1 : len(ids) - 1] = torch.from_numpy(weights)
            tokens, weight = tokens.to(self.model.device), weight.to(self.model.device)
            hidden = self.model(tokens, attention_mask=tokens != self.special_ids[2]).last_hidden_state  # (B, T, D)
            pooled = torch.einsum("bt,btd->bd", weight, hidden.float()).double().cpu()
            for (index, _, _), vector in zip(batch, pooled):
                totals[index] += vector
        return totals.float()


def hub_answers() -> bool:
    """Whether the Hub can be reached: asked once, as loading would ask again and again for every file."""
    try:
        urllib.request.urlopen(ENDPOINT, timeout=5.0).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def windows(length: int, size: int, overlap: int) -> list[tuple[int, int]]:
    """Cover ``length`` residues by spans: one if they fit ``size``, else full ones that share ``overlap`` or more."""
    if length <= size:
        return [(0, length)]
    firsts = [*range(0, length - size, size - overlap), length - size]
    return [(first, first + size) for first in firsts]


def batches(items: Sequence, length_of, most_tokens: int) -> Iterator[list]:
    """Cut ``items`` (longest first) into batches of at most ``most_tokens`` once padded, one item at the least."""
    batch: list = []
    for item in items:
        if batch and (len(batch) + 1) * (length_of(batch[0]) + 2) > most_tokens:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def embed_proteins(sequences: Sequence[str], encoder: ProteinEncoder, cache: Path) -> dict[str, torch.Tensor]:
    """Compute the vector (D,) of each distinct sequence; what the folder ``cache`` has of this encoder is not computed
    again.

    Batches are cut from all sequences, whatever the cache has, and are written whole. So after a kill at any moment
    the rest is computed in the same batches, and the vectors have the same bits.
    """
    unique = sorted(set(sequences), key=lambda sequence: (-len(sequence), sequence))
    for sequence in unique:
        unknown = sorted(set(sequence) - encoder.residue_ids.keys())
        if unknown:
            raise ValueError(
                f"the sequence {sequence[:20]}... has {unknown}; expected residues "
                f"{''.join(sorted(encoder.residue_ids))}: repair the FASTA file"
            )
    folder = cache / encoder.fingerprint()[:16]
    keys = {sequence: hashlib.sha256(sequence.encode()).hexdigest() for sequence in unique}
    known = _read_cache(folder, set(keys.values()))
    logger.info("proteins: %d, %d of them in %s", len(unique), len(known), folder)
    with tqdm(total=len(unique), desc="embedding proteins", unit="protein", delay=1, disable=None) as bar:
        for batch in batches(unique, len, encoder.batch_tokens):
            new = [sequence for sequence in batch if keys[sequence] not in known]
            if new:
                vectors = {keys[sequence]: vector for sequence, vector in zip(new, encoder.vectors(new).unbind())}
                name = hashlib.sha256("".join(vectors).encode()).hexdigest()[:32]
                with written_aside(folder / f"{name}.safetensors") as aside:
                    save_file(vectors, aside)
                known |= vectors
            bar.update(len(batch))
    return {sequence: known[key] for sequence, key in keys.items()}


def _read_cache(folder: Path, wanted: set[str]) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                found |= {key: file.get_tensor(key) for key in file.keys() if key in wanted}  # noqa: SIM118
        except SafetensorError as error:
            logger.warning("%s is damaged (%s): its proteins are computed again", path, error)
    return found
