"""Make the table of perturbation vectors that training freezes: one vector for each perturbation's name.

    dcm-embed --perturbations shards/ --proteins proteins.fasta --model facebook/esm2_t33_650M_UR50D \\
        --out table.safetensors
    dcm-embed --perturbations shards/ --from coexpression --out table.safetensors
    dcm-embed --perturbations shards/ --from vectors.pt --out table.safetensors

Decides which names need a vector and where it comes from. Knows nothing of the network that reads the table; how
proteins and genes become vectors is in `protein_vectors.py` and `coexpression.py`. A name without a vector is an error,
or is left out of the table: no vector is ever invented. The control never has one.
"""

import json
import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import datasets
import pyarrow.parquet as pq
import torch
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tokenization import DCMTokenizer
from tokenization.command_line import run
from tokenization.conditions_dcm import PERTURBATION
from tokenization.files import written_aside
from tokenization.labels_dcm import split_perturbation
from training.cells import Cells
from training.coexpression import coexpression_vectors
from training.protein_vectors import ProteinEncoder, embed_proteins
from training.proteins import match_proteins, read_fasta

logger = logging.getLogger(__name__)

CACHE = "dcm-embed-cache"
SHOWN = 20


def main(
    perturbations: Path,
    out: Path,
    source: Annotated[str, tyro.conf.arg(name="from")] = "proteins",
    proteins: Path | None = None,
    model: str = "facebook/esm2_t33_650M_UR50D",
    shards: Path | None = None,
    components: int = 32,
    missing: Literal["error", "skip"] = "error",
    window: int = 1022,
    overlap: int = 256,
    batch_tokens: int = 8192,
) -> Path:
    """Write one vector for each perturbation's name.

    Args:
        perturbations: whose names: a folder of shards, a checkpoint, or a text file with one name per line.
        out: the safetensors file to write; the vectors of proteins are also kept in a cache beside it.
        source: proteins (a language model's vectors of protein sequences), coexpression (of the name's gene among
            training controls), or a file with vectors by name: safetensors, or a .pt dictionary.
        proteins: FASTA file; a record belongs to a name by GN= or gene_symbol: in its header, else by its id.
        model: transformers' EsmModel: local folder, or name on the Hub.
        shards: folder of shards with the controls of coexpression; default the one of --perturbations.
        components: length of the vectors of coexpression.
        missing: what to do with names that have no vector: error, or skip, which leaves them out of the table (training
            refuses to start while one of its perturbations is left out).
        window: residues that the language model sees at once; longer proteins are cut into overlapping windows.
        overlap: residues that neighbouring windows share, at least.
        batch_tokens: residues of one batch, at most.

    Returns:
        The file written.

    Raises:
        FileNotFoundError: a file or folder is not there.
        ValueError: names without a vector, or a file that is not what it should be; nothing has been written then.
        OSError: there is no such model.
    """
    if out.is_dir():
        raise ValueError(f"--out {str(out)!r} is a folder; expected the name of a safetensors file to write")
    if (proteins is not None) != (source == "proteins"):
        raise ValueError(
            f"--proteins is {proteins} with --from {source}; expected a FASTA file with --from proteins, and only then"
        )
    names = perturbation_names(perturbations)
    logger.info("perturbations: %d", len(names))
    about: dict[str, object] = {"from": source}
    if source == "proteins":
        match = match_proteins(names, read_fasta(proteins))
        _check_missing(names, match.found, missing, f"protein in {str(proteins)!r}")
        if match.ambiguous:
            chosen = ", ".join(f"{name}: {match.found[name].record} of {n}" for name, n in match.ambiguous.items())
            logger.info(
                "%d names match several sequences; taken: the reviewed, then the canonical, then the longest one: %s",
                len(match.ambiguous),
                chosen,
            )
        encoder = ProteinEncoder.load(model, window=window, overlap=overlap, batch_tokens=batch_tokens)
        by_sequence = embed_proteins([p.sequence for p in match.found.values()], encoder, out.parent / CACHE)
        table = {name: by_sequence[protein.sequence] for name, protein in match.found.items()}
        about |= {"model": model, "fingerprint": encoder.fingerprint(), "proteins": proteins.name}
        about["records"] = {name: protein.record for name, protein in sorted(match.found.items())}
    elif source == "coexpression":
        found = coexpression_vectors(_training_cells(shards or perturbations), components)
        table = {name: torch.from_numpy(found[name]) for name in names if name in found}
        _check_missing(names, table, missing, "gene that is in the panel and expressed by training controls")
    else:
        found = read_vectors(Path(source))
        table = {name: found[name] for name in names if name in found}
        _check_missing(names, table, missing, f"vector in {source!r}")
    write_table(table, out, about)
    return out


def perturbation_names(source: Path) -> list[str]:
    """Single names, sorted, without the control: of a folder's tokenizer and all its splits, or of a text file.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it names no perturbation.
    """
    if source.is_file():
        names, control = {line.strip() for line in source.read_text(encoding="utf-8").splitlines()} - {""}, None
    else:
        folder = source / "tokenizer" if (source / "tokenizer").is_dir() else source
        if not (folder / "conditions.json").is_file():
            raise FileNotFoundError(
                f"no tokenizer in {str(source)!r}; expected shards of dcm-convert, a checkpoint, or a file of names"
            )
        tokenizer = DCMTokenizer.from_pretrained(folder)
        control, names = tokenizer.control, set(tokenizer.perturbations)
        for file in source.glob("*/*.parquet"):  # labels that are held out of training may be here only
            column = datasets.Features.from_arrow_schema(pq.read_schema(file)).get(PERTURBATION)
            for label in column.names if column is not None else []:
                names.update(split_perturbation(label, control=control, separator=tokenizer.separator))
    names.discard(control)
    if not names:
        raise ValueError(f"{str(source)!r} names no perturbation; there is nothing to embed")
    return sorted(names)


def read_vectors(path: Path) -> dict[str, torch.Tensor]:
    """Vectors by name of a safetensors file, or of a ``.pt`` dictionary (read without running any code in it).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}; --from expects proteins, coexpression, or a file with vectors")
    try:
        if path.suffix in (".pt", ".pth"):
            table = torch.load(path, map_location="cpu", weights_only=True)
        else:
            table = load_file(path)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"{str(path)!r} cannot be read ({first}); expected safetensors, or a .pt dictionary of tensors"
        ) from error
    if not isinstance(table, Mapping) or not all(
        isinstance(name, str) and isinstance(vector, torch.Tensor) for name, vector in table.items()
    ):
        raise ValueError(f"{str(path)!r} holds {type(table).__name__}; expected a dictionary of names and tensors")
    return {name: vector.flatten() for name, vector in table.items()}


def write_table(table: Mapping[str, torch.Tensor], out: Path, about: Mapping[str, object]) -> None:
    """Write vectors (D,) by name as float32, with ``about`` as JSON in the file's metadata.

    Raises:
        ValueError: vectors of different lengths, not finite, or all zero.
    """
    vectors = {name: vector.detach().float().clone() for name, vector in sorted(table.items())}
    lengths = sorted({len(vector) for vector in vectors.values()})
    if len(lengths) != 1:
        raise ValueError(f"the vectors have lengths {lengths}; expected one length")
    broken = [name for name, vector in vectors.items() if not vector.isfinite().all() or not vector.any()]
    if broken:
        raise ValueError(f"{len(broken)} vectors are not finite, or all zero: {', '.join(broken[:SHOWN])}")
    with written_aside(out) as aside:
        # one key of metadata: safetensors writes several in an arbitrary order
        save_file(vectors, aside, metadata={"dcm_embed": json.dumps(dict(about), sort_keys=True)})
    logger.info("%s: %d vectors of length %d", out, len(vectors), lengths[0])


def _training_cells(folder: Path) -> Cells:
    if folder.is_file():
        raise ValueError(f"{str(folder)!r} is a file of names; coexpression needs --shards, a folder of shards")
    return Cells(folder, "train")


def _check_missing(names: list[str], found: Mapping[str, object], missing: str, what: str) -> None:
    """List names that were not found; raise unless they may be skipped, and when nothing is left."""
    lost = [name for name in names if name not in found]
    if not lost:
        return
    shown = lost if missing == "skip" else lost[:SHOWN]
    listed = ", ".join(shown) + (", ..." if len(lost) > len(shown) else "")
    if missing == "error" or len(lost) == len(names):
        way_out = "--missing skip leaves them out" if len(lost) < len(names) else "are the names of the same kind?"
        raise ValueError(f"{len(lost):,} of {len(names):,} perturbations have no {what}: {listed}; {way_out}")
    logger.warning("%d of %d perturbations have no %s and are left out: %s", len(lost), len(names), what, listed)


def cli() -> None:
    """Command line of ``dcm-embed``."""
    datasets.disable_progress_bars()
    run(main)


if __name__ == "__main__":
    cli()
