"""Which protein of a FASTA file a name means."""

import pytest

from tests.tiny_esm import write_fasta
from training.perturbations.proteins import match_proteins, read_fasta

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
