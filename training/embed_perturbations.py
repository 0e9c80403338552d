"""Make the table of perturbation vectors that training freezes: one vector for each perturbation's name.

    dcm-embed --perturbations shards/ --proteins proteins.fasta --model facebook/esm2_t33_650M_UR50D \\
        --out table.safetensors
    dcm-embed --perturbations shards/ --from coexpression --out table.safetensors
    dcm-embed --perturbations shards/ --from genept.csv --from string.h5ad:X_pca --out table.safetensors

Decides which names need a vector and where it comes from; `perturbations/` makes vectors of proteins and genes. A name
without a vector is an error; with `--allow-missing` the table marks it, and training gives it a learned vector: none is
ever invented here. The control never has one.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from tokenization.conditions_dcm import PERTURBATION
from tokenization.gene_names_dcm import find_genes
from tokenization.labels_dcm import read_names, shortened, split_perturbation
from training.data.command_line import run

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

CACHE = "dcm-embed-cache"
EXPRESSED_GENE = "gene that is in the panel and expressed by training controls"


def main(
    perturbations: Path,
    out: Path,
    source: Annotated[tuple[str, ...], tyro.conf.arg(name="from"), tyro.conf.UseAppendAction] = (),
    proteins: Path | None = None,
    model: str = "facebook/esm2_t33_650M_UR50D",
    shards: Path | None = None,
    components: int = 32,
    allow_missing: bool = False,
    batch_tokens: int = 8192,
) -> Path:
    """Write one vector for each perturbation's name.

    Args:
        perturbations: Whose names: a folder of shards, a checkpoint, or a text file with one name per line.
        out: The safetensors file to write; the vectors of proteins are also kept in a cache beside it.
        source: Proteins (a language model's vectors of protein sequences; the default), coexpression (of the name's
            gene among training controls), or a file with vectors by name: safetensors, .npz, .json, .pt, .csv, .tsv,
            .parquet, or .h5ad, of which FILE.h5ad:KEY takes obsm[KEY] instead of X. Several, each after a --from of its
            own, are whitened and joined, and what one lacks is marked.
        proteins: FASTA file; a record belongs to a name by GN= or gene_symbol: in its header, else by its id.
        model: transformers' EsmModel: local folder, or name on the Hub.
        shards: Folder of shards with the controls of coexpression; default the one of --perturbations.
        components: Length of the vectors of coexpression.
        allow_missing: Pass over names that have no vector: they are listed and marked in the table, and training gives
            those of training cells a learned vector. Without it they are an error.
        batch_tokens: Residues of one batch, at most.

    Returns:
        The file written; with names or files that are not what they should be nothing has been.
    """
    if out.is_dir():
        raise ValueError(f"--out {str(out)!r} is a folder; expected the name of a safetensors file to write")
    sources = (source,) if isinstance(source, str) else source or ("proteins",)
    if (proteins is not None) != ("proteins" in sources):
        raise ValueError(
            f"--proteins is {proteins} with --from {' --from '.join(sources)}; expected a FASTA file with --from "
            "proteins, and only then (--from coexpression needs none)"
        )
    for option, path in (("proteins", proteins), ("shards", shards)):
        if path is not None and not path.exists():
            raise FileNotFoundError(f"--{option}: no file or folder {str(path)!r}")
    for name in sources:
        if name not in ("proteins", "coexpression") and not _file_and_key(name)[0].is_file():
            raise FileNotFoundError(f"no file {name!r}; --from expects proteins, coexpression, or a file with vectors")
    names = perturbation_names(perturbations)
    logger.info("perturbations: %d", len(names))
    seen = seen_in_training(perturbations)
    from training.perturbations.vectors import joined, read_vectors, write_table

    about: dict[str, object] = {"from": sources[0] if len(sources) == 1 else list(sources)}
    tables = {}
    for name in sources:
        if name == "proteins":
            tables[name], of_proteins = _of_proteins(names, proteins, model, batch_tokens, out.parent / CACHE)
            about |= of_proteins
        elif name == "coexpression":
            tables[name] = _by_name(names, _coexpression(shards or perturbations, components))
        else:
            tables[name] = _by_name(names, read_vectors(*_file_and_key(name)))
    what = {"proteins": f"protein in {str(proteins)!r}", "coexpression": EXPRESSED_GENE}
    missing_in = " or ".join(what.get(name, f"vector in {name!r}") for name in sources)
    found = {name: None for table in tables.values() for name in table}
    missing = _missing(names, found, missing_in, seen, allowed=allow_missing)
    table = next(iter(tables.values())) if len(tables) == 1 else joined(list(tables.values()))
    write_table(table, out, about, missing)
    if seen is not None:
        _log_what_they_tell(perturbations, tables | ({"all of them": table} if len(tables) > 1 else {}))
    return out


def _file_and_key(source: str) -> tuple[Path, str | None]:
    """File and key of obsm that ``FILE.h5ad:KEY`` names; None for another file."""
    file, colon, key = source.rpartition(".h5ad:")
    return (Path(f"{file}.h5ad"), key) if colon else (Path(source), None)


def _log_what_they_tell(folder: Path, tables: Mapping[str, Mapping[str, "torch.Tensor"]]) -> None:
    """Log how far the vectors of training perturbations tell each other's effects, leaving one out at a time."""
    from training.data.loader import Cells
    from training.loop.told_effects import leave_one_out

    cells = Cells(folder, "train")
    for name, table in tables.items():
        found = leave_one_out(cells, table)
        if found is not None:
            said = "%s: leaving one of %d training perturbations out, %.0f %% of what the mean effect leaves remains"
            logger.info(said, name, found[0], 100 * found[1])


def perturbation_names(source: Path) -> list[str]:
    """Return single names, sorted, without the control: of a folder's tokenizer, or a text file."""
    if source.is_file():
        names, control = set(read_names(source)), None
    else:
        folder = source / "tokenizer" if (source / "tokenizer").is_dir() else source
        if not (folder / "conditions.json").is_file():
            expected = "shards of dcm-convert, a checkpoint, or a file of names"
            raise FileNotFoundError(f"no tokenizer in {str(source)!r}; expected {expected}")
        from tokenization import DCMTokenizer

        tokenizer = DCMTokenizer.from_pretrained(folder)
        control, names = tokenizer.control, set(tokenizer.perturbations)
    names.discard(control)
    if not names:
        raise ValueError(f"{str(source)!r} names no perturbation; there is nothing to embed")
    return sorted(names)


def _of_proteins(
    names: list[str], fasta: Path, model: str, batch_tokens: int, cache: Path
) -> tuple[dict[str, "torch.Tensor"], dict[str, object]]:
    """Vectors of the proteins of names that have one, and what is said of them."""
    from training.perturbations.proteins import ProteinEncoder, embed_proteins, match_proteins, read_fasta

    found, ambiguous = match_proteins(names, read_fasta(fasta))
    if ambiguous:
        logger.info(
            "%d names match several sequences; taken: the reviewed, then the canonical, then the longest one: %s",
            len(ambiguous),
            ", ".join(f"{name}: {found[name].record} of {number}" for name, number in ambiguous.items()),
        )
    if not found:
        return {}, {}
    encoder = ProteinEncoder.load(model, batch_tokens=batch_tokens)
    by_sequence = embed_proteins([p.sequence for p in found.values()], encoder, cache)
    about = {"model": model, "fingerprint": encoder.fingerprint(), "proteins": fasta.name}
    about["records"] = {name: protein.record for name, protein in sorted(found.items())}
    return {name: by_sequence[protein.sequence] for name, protein in found.items()}, about


def _coexpression(folder: Path, components: int) -> dict[str, "torch.Tensor"]:
    if folder.is_file():
        raise ValueError(f"{str(folder)!r} is a file of names; coexpression needs --shards, a folder of shards")
    import torch

    from training.data.loader import Cells
    from training.perturbations.vectors import coexpression_vectors

    vectors = coexpression_vectors(Cells(folder, "train"), components)
    return {gene: torch.from_numpy(loadings) for gene, loadings in vectors.items()}


def _by_name(names: list[str], vectors: Mapping[str, "torch.Tensor"]) -> dict[str, "torch.Tensor"]:
    """The vectors of ``names``; Ensembl ids may have other versions."""
    given = list(vectors)
    return {name: vectors[given[i]] for name, i in zip(names, find_genes(names, given)[0]) if i >= 0}


def seen_in_training(source: Path) -> set[str] | None:
    """Names that some training cell of a folder of shards has; None for what is no such folder."""
    if not any(source.glob("train/*.parquet")):
        return None
    from training.data.loader import open_cells

    cells = open_cells(source, "train", streaming=True)  # which reads no count
    labels = cells.labels(PERTURBATION).dropna().unique()
    options = {"control": cells.tokenizer.control, "separator": cells.tokenizer.separator}
    return {name for label in labels for name in split_perturbation(label, **options)}


def _missing(
    names: list[str], found: Mapping[str, object], what: str, seen: set[str] | None, *, allowed: bool
) -> list[str]:
    """Names that were not found; an error unless they are allowed, and when nothing was found."""
    missing = [name for name in names if name not in found]
    if missing and (not allowed or len(missing) == len(names)):
        way_out = "--allow-missing leaves those of training cells to training" if len(missing) < len(names) else None
        raise ValueError(
            f"{len(missing):,} of {len(names):,} perturbations have no {what}: {shortened(missing, 20)}; "
            f"{way_out or 'are the names of the same kind?'}"
        )
    learned = [name for name in missing if seen is None or name in seen]
    never_seen = [name for name in missing if name not in learned]
    if learned:
        promised = "and get a learned vector in training" + ", if a training cell has them" * (seen is None)
        said = "%d of %d perturbations have no %s, %s: %s"
        logger.warning(said, len(learned), len(names), what, promised, ", ".join(learned))
    if never_seen:
        said = "%d of %d perturbations have no %s and no training cell: the model will not know them: %s"
        logger.warning(said, len(never_seen), len(names), what, ", ".join(never_seen))
    return missing


def cli() -> None:
    """Entry point of ``dcm-embed``."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    run(main)


if __name__ == "__main__":
    cli()
