"""Read protein sequences from FASTA, and find the one protein that a perturbation's name means.

Knows headers of UniProt and Ensembl, and plain ones.
"""

import gzip
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenization.gene_names_dcm import without_version
from tokenization.labels_dcm import shortened

# first fields of headers such as >sp|P12345|NAME_HUMAN: they say where a record is from, and name nothing
DATABASES = frozenset({"sp", "tr", "lcl", "gnl", "ref", "gb", "emb", "dbj", "pdb", "gi"})
SYMBOL = re.compile(r"(?:\bGN=|\bgene_symbol:)([^\s|]+)")
ENSEMBL_ID = re.compile(r"\b(?:gene|transcript):([^\s|]+)")
VERSION = re.compile(r"\.\d+$")
ISOFORM = re.compile(r"^[A-Z0-9]{6,10}-\d+$")  # UniProt's accession of an isoform


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
    """Read every record of a FASTA file (``.gz`` too), in order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not FASTA, or a record without a sequence.
    """
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
        found[name] = min(candidates, key=_preference)
        sequences = {protein.sequence for protein in candidates}
        if len(sequences) > 1:
            ambiguous[name] = len(sequences)
    return found, ambiguous


def _preference(protein: Protein) -> tuple[bool, bool, int, str]:
    return protein.is_unreviewed, protein.is_isoform, -len(protein.sequence), protein.record
