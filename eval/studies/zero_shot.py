"""Whole studies, from an h5ad file to a table: what a line of results says, one command repeats.

    python -m eval.studies.zero_shot cells.h5ad --out study --perturbation-key perturbation \\
        --control control --vectors coexpression --config training/configs/laptop.yaml --max-steps 2000

zero-shot holds perturbations (or combinations) out, several times; trains one model for each kind of vectors, with
everything else equal; draws the held-out cells and scores them beside the floor and baselines. What is finished is not
done again: the same command goes on after an interruption. Knows the stages, and nothing of what happens inside them.
"""

import importlib.metadata
import json
import logging
import platform
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import anndata
import datasets
import numpy as np
import torch
import transformers
import tyro
from safetensors.torch import load_file

from eval.comparison.baselines import FLOOR_DRAWS
from eval.comparison.cells import read_comparison
from eval.reports.tables import FLOOR, Row
from eval.sample import main as sample
from eval.studies.scores import BASELINES, score_held_out
from eval.studies.tables import Study, dot_plot, study_json, study_markdown, study_tables
from tokenization import DCMTokenizer
from training.config import parse, read_config
from training.convert_h5ad import main as convert
from training.data.command_line import command_of, user_errors
from training.data.files import sha256_of, written_aside
from training.data.h5ad import open_h5ad
from training.embed_perturbations import main as embed
from training.embed_perturbations import perturbation_names
from training.perturbations.table import write_table
from training.train import main as train

logger = logging.getLogger(__name__)

Vectors = dict[str, torch.Tensor]
VECTORS, SHUFFLED, LEARNED = "vectors", "shuffled", "learned"
RESERVED_NAMES = (FLOOR, *(fit.__name__ for fit in BASELINES))
PACKAGES = ("discrete-cell-models", "anndata", "numpy", "POT", "scipy", "torch")


@dataclass(frozen=True)
class _Plan:
    """What is the same for every split of a study."""

    source: Path
    conversion: dict[str, object]
    vectors: str | None
    learned: bool
    training: list[str]
    sampling_seeds: int
    draws: int


def main(
    source: Annotated[Path, tyro.conf.Positional],
    *,
    out: Path,
    perturbation_key: str,
    control: str | None = None,
    cell_type_key: str | None = None,
    covariate_keys: str = "",
    split: Literal["held-out-perturbations", "held-out-combinations", "from-file"] = "held-out-perturbations",
    held_out: tuple[str, ...] = (),
    split_files: tuple[Path, ...] = (),
    num_splits: int = 3,
    test_fraction: float = 0.2,
    vectors: str | None = None,
    learned: bool = True,
    config: Path | None = None,
    max_steps: int | None = None,
    sampling_seeds: int = 3,
    draws: int = FLOOR_DRAWS,
    dataset: str | None = None,
) -> Path:
    """Hold perturbations out, train with each kind of vectors, and score the held-out cells.

    Models: "vectors" (those of --vectors), "shuffled" (the same, each given to another name) and "learned" (a free
    vector for each training perturbation; one that was never seen gets the mean of them). Writes zero_shot.json,
    zero_shot.md and zero_shot.png.

    Args:
        source: h5ad file with raw counts.
        out: folder of the study; what an interrupted study left there is gone on with.
        perturbation_key: obs column of perturbations.
        control: label of unperturbed cells.
        cell_type_key: obs column of cell types.
        covariate_keys: obs columns of other conditions, separated by commas.
        split: what is held out, as in dcm-convert.
        held_out: labels of each split, separated by commas, as in --held-out A,B C,D for two splits; default a random
            share --test-fraction of the labels in each of --num-splits splits.
        split_files: for from-file: the JSON file of each split.
        num_splits: number of random splits, unless --held-out or --split-files names them.
        test_fraction: share of the labels in a random split.
        vectors: where vectors come from: coexpression, or a file with vectors by name; default none, and only the
            learned vectors are looked at.
        learned: Train a model with learned vectors, too.
        config: YAML file with options of training.
        max_steps: steps of each training; default what --config says.
        sampling_seeds: how often each model draws the test cells' conditions.
        draws: how often the real cells are halved, into those to compare with and the floor.
        dataset: the data set's name; default that of the file.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: options that contradict each other or an earlier study in --out, or held-out perturbations without a
            vector.
    """
    command = command_of("python -m eval.studies.zero_shot", main, locals())
    open_h5ad(source).close()
    splits = _split_options(split, held_out, split_files, num_splits, test_fraction)
    for name, value in {"sampling-seeds": sampling_seeds, "draws": draws}.items():
        if value < 1:
            raise ValueError(f"--{name} {value}: expected at least 1")
    if vectors is None and not learned:
        raise ValueError("--no-learned without --vectors leaves no model to train; pass --vectors")
    conversion = {"perturbation_key": perturbation_key, "control": control, "cell_type_key": cell_type_key}
    conversion |= {"covariate_keys": covariate_keys, "split": split}
    training = ["--config", str(config)] if config else []
    training += [] if max_steps is None else ["--max-steps", str(max_steps)]
    facts = {
        "source_sha256": sha256_of(source),
        "conversion": conversion,
        "splits": [{name: str(value) for name, value in one.items()} for one in splits],
        "split_files_sha256": [sha256_of(path) for path in split_files],
        "vectors": [vectors, sha256_of(Path(vectors)) if vectors and Path(vectors).is_file() else None],
        "learned": learned,
        "training": [read_config(config) if config else None, max_steps],
        "scores": [sampling_seeds, draws],
    }
    _check_same_study(out, facts)
    plan = _Plan(source, conversion, vectors, learned, training, sampling_seeds, draws)
    rows: list[Row] = []
    held: list[list[str]] = []
    for number, of_split in enumerate(splits):
        logger.info("split %d of %d", number + 1, len(splits))
        models, found = _one_split(plan, out / f"split_{number}", of_split, seed=number)
        rows += [{"split": number, **row} for row in found]
        held.append(sorted({row["condition"] for row in found if row["condition"] is not None}))
    study = Study(
        dataset=dataset or source.stem,
        kind=split,
        vectors=vectors,
        held_out=held,
        models=models,
        sampling_seeds=sampling_seeds,
        draws=draws,
        versions={"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES},
        command=command,
    )
    _write(out, study, rows)
    sys.stdout.write(study_tables(study, rows) + "\n")
    logger.info("numbers: %s\ntables:  %s\nfigure:  %s", *(out / f"zero_shot.{kind}" for kind in ("json", "md", "png")))
    return out / "zero_shot.json"


def shuffled(vectors: Mapping[str, torch.Tensor], *, seed: int) -> Vectors:
    """The same vectors, each given to another name: a random cycle through all names."""
    if len(vectors) < 2:
        raise ValueError(f"{len(vectors)} vector cannot be given to another name; expected two or more")
    names = np.random.default_rng(seed).permutation(sorted(vectors)).tolist()
    return {name: vectors[other] for name, other in zip(names, [*names[1:], names[0]])}


def completed(vectors: Mapping[str, torch.Tensor], names: Iterable[str], trained: Iterable[str]) -> Vectors:
    """A vector for every name: those given, and for trained names without one a column of their own.

    A frozen vector that is zero but in a column of its own makes the network's linear map learn one vector for this
    name alone; so models differ in their table and in nothing else. Its length is the root mean square length of the
    given vectors; where none are given, all names are learned (the entries' root mean square is then 1), and a name
    that is not trained gets the mean of them.

    Raises:
        ValueError: some vectors are given, but none for a name that is not trained.
    """
    trained = set(trained)
    own = sorted(name for name in set(names) & trained if name not in vectors)
    unseen = sorted(name for name in set(names) - trained if name not in vectors)
    if vectors and unseen:
        raise ValueError(f"held-out perturbations without a vector: {', '.join(unseen)}; hold out others")
    given = torch.stack(list(vectors.values())) if vectors else torch.zeros(0, 0)
    length = given.square().sum(dim=1).mean().sqrt() if vectors else len(own) ** 0.5
    width = given.shape[1]
    table = {name: torch.cat([vector, torch.zeros(len(own))]) for name, vector in vectors.items()}
    learned = torch.cat([torch.zeros(len(own), width), length * torch.eye(len(own))], dim=1)
    return table | dict(zip(own, learned)) | {name: learned.mean(dim=0) for name in unseen}


def _split_options(
    split: str, held_out: tuple[str, ...], files: tuple[Path, ...], num_splits: int, test_fraction: float
) -> list[dict[str, object]]:
    """What dcm-convert is told of each split."""
    if (split == "from-file") != bool(files) or (files and held_out):
        raise ValueError(
            "--split from-file needs --split-files, and no other split takes them; --held-out excludes both"
        )
    if num_splits < 1:
        raise ValueError(f"--num-splits {num_splits}: expected at least 1")
    if files:
        return [{"split_file": path, "split_seed": seed} for seed, path in enumerate(files)]
    if held_out:
        return [{"held_out": labels, "split_seed": seed} for seed, labels in enumerate(held_out)]
    return [{"test_fraction": test_fraction, "split_seed": seed} for seed in range(num_splits)]


def _check_same_study(out: Path, facts: dict[str, object]) -> None:
    """Note what decides the numbers in ``out``, or refuse to go on with a study of other options."""
    path = out / "study.json"
    text = json.dumps(facts, indent=1, sort_keys=True, default=str)
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in facts if before.get(name) != json.loads(text)[name]]
        if changed:
            raise ValueError(
                f"--out {str(out)!r} holds a study that differs in {', '.join(changed)}; name another folder, or "
                "remove it"
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {str(out)!r} exists and holds no study; expected a new or empty folder")
    with written_aside(path) as aside:
        aside.write_text(text + "\n", encoding="utf-8")


def _one_split(plan: _Plan, folder: Path, of_split: dict[str, object], *, seed: int) -> tuple[list[str], list[Row]]:
    """Names of the trained models and the rows of one split; every stage is left out whose result is there.

    Each stage writes its result aside and renames it, so what is there is whole.
    """
    shards, path = folder / "shards", folder / "scores.json"
    if not shards.exists():
        convert(plan.source, out=shards, **plan.conversion, **of_split)
    tables = _tables(folder / "tables", shards, plan.vectors, learned=plan.learned, seed=seed)
    samples = {}
    for model, table in tables.items():
        _train(folder / model, shards, table, [*plan.training, "--seed", str(seed)])
        for number in range(plan.sampling_seeds):
            drawn = folder / "samples" / f"{model}_{number}.h5ad"
            if not drawn.exists():
                sample(str(folder / model), out=drawn, like=shards / "test.h5ad", seed=number)
            samples[drawn] = model
    if not path.exists():
        names = list(samples.values())
        cells = read_comparison(
            list(samples), shards / "test.h5ad", shards / "train.h5ad", names=names, reserved_names=RESERVED_NAMES
        )
        rows = score_held_out(cells.train, cells.real, cells.generated, draws=plan.draws)
        with written_aside(path) as aside:
            aside.write_text(json.dumps(rows, indent=1, allow_nan=False), encoding="utf-8")
    return list(tables), json.loads(path.read_text(encoding="utf-8"))


def _tables(folder: Path, shards: Path, vectors: str | None, *, learned: bool, seed: int) -> dict[str, Path | None]:
    """Name of each model -> its table of vectors; None where every name is seen in training and learns its own."""
    names = perturbation_names(shards)
    trained = _trained_perturbations(shards)
    given: dict[str, Vectors] = {}
    if vectors is not None:
        raw = folder / "source.safetensors"
        if not raw.exists():
            embed(shards, raw, source=vectors, allow_missing=True)
        given[VECTORS] = load_file(raw)
        given[SHUFFLED] = shuffled(given[VECTORS], seed=seed)
    if learned:
        given[LEARNED] = {}
    tables: dict[str, Path | None] = {}
    for model, found in given.items():
        is_needed = found or set(names) - trained
        tables[model] = folder / f"{model}.safetensors" if is_needed else None
        if is_needed and not tables[model].exists():
            write_table(completed(found, names, trained), tables[model], {"from": vectors, "model": model})
    return tables


def _trained_perturbations(shards: Path) -> set[str]:
    """Perturbations of training cells, without the control; the tokenizer of the shards knows held-out ones, too."""
    tokenizer = DCMTokenizer.from_pretrained(shards / "tokenizer")
    with open_h5ad(shards / "train.h5ad") as file:
        labels = anndata.io.read_elem(file["obs"])["perturbation"].dropna().unique()
    ids = tokenizer.perturbation_ids(labels)
    return {tokenizer.perturbations[id_] for id_ in ids[ids >= 0].unique().tolist()} - {tokenizer.control}


def _train(checkpoint: Path, shards: Path, table: Path | None, options: list[str]) -> None:
    """Train one model, or go on with it; ``model.safetensors`` is the last thing that training writes."""
    if (checkpoint / "model.safetensors").exists():
        return
    logger.info("training %s", checkpoint)
    embeddings = [] if table is None else ["--perturbation-embeddings", str(table)]
    train(parse([*options, "--data", str(shards), "--out", str(checkpoint), "--resume", *embeddings]))


def _write(out: Path, study: Study, rows: list[Row]) -> None:
    with written_aside(out / "zero_shot.json") as aside:
        aside.write_text(study_json(study, rows), encoding="utf-8")
    with written_aside(out / "zero_shot.md") as aside:
        aside.write_text(study_markdown(study, rows), encoding="utf-8")
    with written_aside(out / "zero_shot.png") as aside:
        dot_plot(study, rows).savefig(aside, format="png")


def cli() -> None:
    """Entry point of ``python -m eval.studies.zero_shot``."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    with user_errors():
        tyro.cli(main)


if __name__ == "__main__":
    cli()
