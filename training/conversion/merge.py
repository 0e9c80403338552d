"""Merge the shards of several conversions, of several machines perhaps, into one data set; no count is read or copied.

Files are linked. Vocabularies, statistics and what is known of the split are written anew; as each part numbered its
labels for itself, `merged.json` says what the numbers in its files mean.
"""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq

from tokenization import DCMTokenizer
from tokenization.labels_dcm import shortened
from training.conversion.write import dataset_card
from training.data.files import write_json, write_text
from training.data.loader import open_cells
from training.data.shards import MERGED, PANEL, SPLITS, MergedLabels, Panels, find_panels, measured_of
from training.data.statistics import STATISTICS, merged_statistics, read_statistics, vocabulary_of, write_statistics

logger = logging.getLogger(__name__)

LISTS = ("cell_types", "perturbations")
SAME = ("format", "split", "held_out", "held_out_cell_type", "conditions", "control", "separator")


@dataclass(frozen=True)
class Part:
    """What one conversion wrote."""

    folder: Path

    @cached_property
    def description(self) -> dict[str, object]:
        """Its ``split.json``, with numbers of cells in the place of their names, which are many."""
        path = self.folder / "split.json"
        if not path.is_file():
            raise FileNotFoundError(f"no split.json in {str(self.folder)!r}; expected a folder that dcm-convert wrote")
        said = json.loads(path.read_text(encoding="utf-8"))
        if "cells" not in said:
            raise ValueError(f"{str(self.folder)!r} is merged already: give its parts")
        return {**said, "cells": {split: len(names) for split, names in said["cells"].items()}}

    @cached_property
    def tokenizer(self) -> DCMTokenizer:
        return DCMTokenizer.from_pretrained(self.folder / "tokenizer")

    @cached_property
    def files(self) -> dict[str, list[Path]]:
        """Of each split that has cells."""
        found = {split: sorted((self.folder / split).glob("*.parquet")) for split in SPLITS}
        return {split: files for split, files in found.items() if files}

    @cached_property
    def features(self) -> datasets.Features:
        """Columns of its shards."""
        return datasets.Features.from_arrow_schema(pq.read_schema(next(iter(self.files.values()))[0]))

    @cached_property
    def measured(self) -> dict[str, np.ndarray]:
        """Name of each panel of its cells, in their order, to the genes that were measured (G,)."""
        genes = self.tokenizer.genes
        if PANEL not in self.features:
            return {"": np.ones(len(genes), dtype=bool)}
        names = self.features[PANEL].names
        return dict(zip(names, measured_of(self.folder, genes, names)))


def merge_shards(folders: Sequence[Path], out: Path) -> None:
    """Write the data set of all ``folders`` to the empty folder ``out``."""
    parts = [Part(folder) for folder in folders]
    _check_alike(parts)
    genes = parts[0].tokenizer.genes
    rows = [f"{part.folder.name}/{name}".strip("/") for part in parts for name in part.measured]
    panels = find_panels(np.stack([row for part in parts for row in part.measured.values()]), rows, genes)
    labels = _merged_labels(parts, panels)
    for number, part in zip(labels.parts, parts):
        for split, files in part.files.items():
            (out / split).mkdir(exist_ok=True)
            for file in files:
                place = out / split / f"{number}-{file.name}"
                try:
                    os.link(file.resolve(), place)
                except OSError:  # another file system: a hard link cannot be
                    place.symlink_to(file.resolve())
    tokenizer = _merged_tokenizer(parts)
    tokenizer.save_pretrained(out / "tokenizer")
    write_json(out / MERGED, asdict(labels))
    if panels is not None:
        write_json(out / "panels.json", panels.missing)
    cells = open_cells(out, "train", tokenizer, streaming=True)
    conditions = {name: ids.numpy() for name, ids in cells.conditions.items()}
    told = {"conditions": conditions, "panel": cells.panel, "measured": cells.measured}
    of_parts = [read_statistics(part.folder) for part in parts]
    statistics = merged_statistics(of_parts, tokenizer, cells.library_size.numpy(), **told)
    write_statistics(out / STATISTICS, statistics, vocabulary_of(tokenizer))
    numbers = {split: [part.description["cells"][split] for part in parts] for split in SPLITS}
    description = {
        **{name: parts[0].description[name] for name in SAME if name in parts[0].description},
        "max_count": tokenizer.max_count,
        "sources": [source for part in parts for source in part.description["sources"]],
        "genes": parts[0].description["genes"],
        "parts": {
            number: {"folder": part.folder.name, "cells": {split: numbers[split][i] for split in SPLITS}}
            for i, (number, part) in enumerate(zip(labels.parts, parts))
        },
    }
    write_json(out / "split.json", description)
    write_text(out / "README.md", dataset_card(description))
    for split in SPLITS:
        logger.info("%s %s cells of %d parts", f"{sum(numbers[split]):,}", split, len(parts))


def _check_alike(parts: Sequence[Part]) -> None:
    first, descriptions = parts[0], [part.description for part in parts]
    for part, description in zip(parts[1:], descriptions[1:]):
        both = f"{str(first.folder)!r} and {str(part.folder)!r}"
        genes = [one.tokenizer.genes for one in (first, part)]
        if genes[0] != genes[1]:
            raise ValueError(
                f"{both} have other genes, or in another order ({shortened(genes[0], 3)}; {shortened(genes[1], 3)}): "
                "convert every part with the same --genes FILE, and --join union where some lack genes"
            )
        for name in SAME:
            here, there = descriptions[0].get(name), description.get(name)
            if here != there:
                raise ValueError(f"{both} differ in {name} ({here!r}, {there!r}): convert them with the same options")


def _merged_labels(parts: Sequence[Part], panels: Panels | None) -> MergedLabels:
    own = [
        {name: feature.names for name, feature in part.features.items() if isinstance(feature, datasets.ClassLabel)}
        for part in parts
    ]
    rows = iter([] if panels is None else panels.of_file)
    for part, labels in zip(parts, own):
        labels.pop(PANEL, None)
        if panels is not None:
            labels[PANEL] = [f"panel{next(rows)}" for _ in part.measured]
    joined = {name: sorted({label for labels in own for label in labels[name]}) for name in own[0]}
    widest = max(np.iinfo(part.features["expressions"].feature.dtype).max for part in parts)
    numbers = [f"part{number:05d}" for number in range(len(parts))]
    return MergedLabels(joined, min(int(widest), 2**31 - 1), dict(zip(numbers, own)))


def _merged_tokenizer(parts: Sequence[Part]) -> DCMTokenizer:
    tokenizers = [part.tokenizer for part in parts]
    first = tokenizers[0]
    labels = {name: [label for one in tokenizers for label in getattr(one, name)] or None for name in LISTS}
    return DCMTokenizer.from_labels(
        genes=first.genes,
        max_count=max(tokenizer.max_count for tokenizer in tokenizers),
        **labels,
        control=first.control,
        covariates={name: [label for one in tokenizers for label in one.covariates[name]] for name in first.covariates},
        separator=first.separator,
    )
