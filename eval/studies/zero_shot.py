"""Hold perturbations out, train with several kinds of vectors, and score the held-out cells: one command, one table.

    python -m eval.studies.zero_shot cells.h5ad --out study --perturbation-key perturbation \\
        --control control --vectors coexpression --config laptop --max-steps 2000

Models of a split differ in their vectors and in nothing else. What is finished is not done again: the same command goes
on after an interruption.
"""

from __future__ import annotations

import itertools
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from eval.sample import main as sample
from training.config import parse, read_config
from training.convert_h5ad import main as convert
from training.data.command_line import command_of, run, versions_of
from training.data.files import sha256_of, write_text
from training.embed_perturbations import main as embed
from training.embed_perturbations import seen_in_training
from training.train import main as train

if TYPE_CHECKING:
    import torch

    from eval.reports.tables import Row

logger = logging.getLogger(__name__)

VECTORS, SHUFFLED, LEARNED = "vectors", "shuffled", "learned"
PACKAGES = ("discrete-cell-models", "anndata", "numpy", "POT", "scipy", "torch")


def main(
    source: Annotated[Path, tyro.conf.Positional],
    *,
    out: Path,
    perturbation_key: str,
    control: str | None = None,
    cell_type_key: str | None = None,
    covariate_keys: str = "",
    split: Literal["held-out-perturbations", "held-out-combinations", "few-shot"] = "held-out-perturbations",
    held_out: tuple[str, ...] = (),
    held_out_cell_type: str | None = None,
    num_splits: int = 3,
    test_fraction: float = 0.2,
    vectors: str | None = None,
    models: tuple[Literal["vectors", "shuffled", "learned"], ...] = (),
    config: Path | None = None,
    max_steps: int | None = None,
    trainings: int = 3,
    dataset: str | None = None,
) -> Path:
    """Hold perturbations out, train with each kind of vectors, and score the held-out cells.

    Models: "vectors" (those of --vectors), "shuffled" (the same, each given to another name) and "learned" (a free
    vector for each training perturbation; one that was never seen is told the mean effect). Writes zero_shot.json,
    zero_shot.md.

    Args:
        source: h5ad file with raw counts.
        out: Folder of the study; what an interrupted study left there is gone on with.
        perturbation_key: Column of obs of perturbations.
        control: Label of unperturbed cells.
        cell_type_key: Column of obs of cell types.
        covariate_keys: Columns of obs with other conditions, separated by commas.
        split: What is held out, as in dcm-convert.
        held_out: Labels of each split, separated by commas, as in --held-out A,B C,D for two splits; default a random
            share --test-fraction of the labels in each of --num-splits splits.
        held_out_cell_type: Cell type in which few-shot holds them out; the others are seen with them.
        num_splits: Number of random splits, unless --held-out names them.
        test_fraction: Share of the labels in a random split.
        vectors: Where vectors come from: coexpression, or a file with vectors by name.
        models: Which of the models to train; default all, or without --vectors only "learned".
        config: YAML file with options of training.
        max_steps: Steps of each training; default what --config says.
        trainings: How often each model is trained in a split, from seeds 0, 1, ...; each draws test cells once.
        dataset: The data set's name; default that of the file.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: options that contradict each other or an earlier study in --out, or held-out perturbations without a
            vector.
    """
    command = command_of("python -m eval.studies.zero_shot", main, locals())
    if not source.is_file():
        raise FileNotFoundError(f"no file {str(source)!r}; expected an h5ad file")
    for name, value in {"num-splits": num_splits, "trainings": trainings}.items():
        if value < 1:
            raise ValueError(f"--{name} {value}: expected at least 1")
    models = models or ((LEARNED,) if vectors is None else (VECTORS, SHUFFLED, LEARNED))
    if vectors is None and models != (LEARNED,):
        raise ValueError(f"--models {' '.join(models)} without --vectors: expected learned alone; or pass --vectors")
    conversion = {"perturbation_key": perturbation_key, "control": control, "cell_type_key": cell_type_key}
    conversion |= {"covariate_keys": covariate_keys, "split": split, "held_out_cell_type": held_out_cell_type}
    chosen = [{"held_out": labels} for labels in held_out] or [{"test_fraction": test_fraction}] * num_splits
    splits = [{**of_split, "split_seed": seed} for seed, of_split in enumerate(chosen)]
    facts = {
        "source_sha256": sha256_of(source),
        "conversion": conversion,
        "splits": splits,
        "vectors": [vectors, sha256_of(Path(vectors)) if vectors and Path(vectors).is_file() else None],
        "models": models,
        "training": [read_config(config) if config else None, max_steps],
        "trainings": trainings,
    }
    _check_same_study(out, facts)
    training = ["--config", str(config)] if config else []
    training += [] if max_steps is None else ["--max-steps", str(max_steps)]
    rows: list[Row] = []
    held: list[list[str]] = []
    # every stage writes its result aside and renames it: what is there is whole, and not done again
    for number, of_split in enumerate(splits):
        logger.info("split %d of %d", number + 1, len(splits))
        folder = out / f"split_{number}"
        shards = folder / "shards"
        if not shards.exists():
            convert(source, out=shards, **conversion, **of_split)
        tables = _tables(folder / "tables", shards, vectors, models=models, seed=number)
        for (model, table), seed in itertools.product(tables.items(), range(trainings)):
            _train(folder / f"{model}_{seed}", shards, table, [*training, "--seed", str(seed)])
        found = _scores(folder, list(tables), trainings)
        rows += [{"split": number, **row} for row in found]
        held.append(sorted({row["condition"] for row in found if row["condition"] is not None}))
    header = {"dataset": dataset or source.stem, "kind": split, "vectors": vectors, "held_out": held}
    header |= {"models": list(tables), "trainings": trainings, "command": command}
    _write(out, header | {"versions": versions_of(PACKAGES)}, rows)
    return out / "zero_shot.json"


def shuffled(vectors: Mapping[str, torch.Tensor], *, seed: int) -> dict[str, torch.Tensor]:
    """Return the same vectors, each given to another name: a random cycle through all names."""
    if len(vectors) < 2:
        raise ValueError(f"{len(vectors)} vector cannot be given to another name; expected two or more")
    import numpy as np

    names = np.random.default_rng(seed).permutation(sorted(vectors)).tolist()
    return {name: vectors[other] for name, other in zip(names, [*names[1:], names[0]])}


def _check_same_study(out: Path, facts: dict[str, object]) -> None:
    """Note what decides the numbers in ``out``, or refuse to go on with a study of other options."""
    path = out / "study.json"
    text = json.dumps(facts, indent=1, sort_keys=True, default=str)
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in facts if before.get(name) != json.loads(text)[name]]
        if changed:
            differs = f"holds a study that differs in {', '.join(changed)}"
            raise ValueError(f"--out {str(out)!r} {differs}; name another folder, or remove it")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {str(out)!r} exists and holds no study; expected a new or empty folder")
    write_text(path, text + "\n")


def _tables(
    folder: Path, shards: Path, vectors: str | None, *, models: Sequence[str], seed: int
) -> dict[str, Path | None]:
    """Return each model's table of vectors; None where every name learns its own.

    Raises:
        ValueError: held-out perturbations without a vector.
    """
    from training.perturbations.vectors import read_table, write_table

    table, other = folder / "source.safetensors", folder / f"{SHUFFLED}.safetensors"
    if vectors is not None and not table.exists():
        embed(shards, table, source=vectors, allow_missing=True)
    if vectors is not None and not other.exists():
        found = read_table(table, control=None)
        lacking = sorted(set(found.without_vector) - seen_in_training(shards))
        if lacking:
            raise ValueError(f"held-out perturbations without a vector: {', '.join(lacking)}; hold out others")
        about = {"from": vectors, "model": SHUFFLED}
        write_table(shuffled(found.vectors, seed=seed), other, about, without_vector=found.without_vector)
    return {model: {VECTORS: table, SHUFFLED: other, LEARNED: None}[model] for model in models}


def _train(checkpoint: Path, shards: Path, table: Path | None, options: list[str]) -> None:
    """Train one model, or go on with it; ``model.safetensors`` is the last thing that training writes."""
    if (checkpoint / "model.safetensors").exists():
        return
    logger.info("training %s", checkpoint)
    embeddings = [] if table is None else ["--perturbation-embeddings", str(table)]
    train(parse([*options, "--data", str(shards), "--out", str(checkpoint), "--resume", *embeddings]))


def _scores(folder: Path, models: list[str], trainings: int) -> list[Row]:
    """Draw the test cells' conditions from every model of a split, and score what was drawn."""
    from eval.comparison.baselines import FROM_VECTORS
    from eval.comparison.cells import read_comparison
    from eval.comparison.floor import FLOOR
    from eval.studies.tables import BASELINES, score_held_out
    from training.perturbations.vectors import read_vectors

    table = folder / "tables" / "source.safetensors"
    path, real, train_cells = folder / "scores.json", folder / "shards" / "test.h5ad", folder / "shards" / "train.h5ad"
    samples: dict[Path, str] = {}
    for model, seed in itertools.product(models, range(trainings)):
        drawn = folder / "samples" / f"{model}_{seed}.h5ad"
        if not drawn.exists():
            sample(str(folder / f"{model}_{seed}"), out=drawn, like=real, seed=seed)
        samples[drawn] = model
    if not path.exists():
        reserved = (FLOOR, *(fit.__name__ for fit in BASELINES), *FROM_VECTORS)
        comparison = read_comparison(samples, real, train_cells, reserved_names=reserved)
        rows = score_held_out(comparison, vectors=read_vectors(table) if table.exists() else None)
        write_text(path, json.dumps(rows, indent=1, allow_nan=False))
    return json.loads(path.read_text(encoding="utf-8"))


def _write(out: Path, study: dict[str, object], rows: list[Row]) -> None:
    """Write numbers and tables, and print the tables."""
    from eval.reports.tables import results_json
    from eval.studies.tables import study_markdown, study_tables

    for name, text in (("zero_shot.json", results_json(study, rows)), ("zero_shot.md", study_markdown(study, rows))):
        write_text(out / name, text)
    sys.stdout.write(study_tables(study, rows) + "\n")
    logger.info("numbers: %s\ntables:  %s", *(out / f"zero_shot.{kind}" for kind in ("json", "md")))


cli = partial(run, main)

if __name__ == "__main__":
    cli()
