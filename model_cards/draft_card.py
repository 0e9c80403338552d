"""Draft the facts of a model card from a checkpoint: what it tells is filled in, the rest asked for, never guessed."""

import hashlib
import json
from pathlib import Path

from tokenization.labels_dcm import read_text

ASK = "ASK: "  # begins a value that a person has to write
LICENCE = (
    "the licence of the weights, as the Hub spells it (mit, apache-2.0, cc-by-4.0, ...); see that of the data first"
)


def is_asked(value: object) -> bool:
    """Whether a fact still waits for its answer."""
    return isinstance(value, str) and value.startswith(ASK)


def panel_sha256(folder: Path) -> str:
    """Return a hash of a checkpoint's genes and labels, by which a prepared card knows the data that it describes."""
    names = [read_text(folder / "genes.txt"), json.loads(read_text(folder / "conditions.json"))]
    return hashlib.sha256(json.dumps(names, sort_keys=True).encode()).hexdigest()


def drafted_facts(folder: Path, repo_id: str) -> dict[str, object]:
    """Return the facts of ``folder``'s card; those that only its maker knows begin with :data:`ASK`."""
    labels, config, options = (
        json.loads(read_text(folder / name)) for name in ("conditions.json", "config.json", "training_options.json")
    )
    genes = f"{config['num_genes']:,} genes"
    names = {"cell type": labels["cell_types"], "perturbation": labels["perturbations"], **labels["covariates"]}
    conditions = [f"{name} ({len(values):,} labels)" for name, values in names.items() if values]
    told = f" by {', '.join(conditions)}" if conditions else ", without any condition"
    example = {name: known[0] for name, known in (("cell_type", labels["cell_types"]),) if known}
    if labels["perturbations"]:
        example["perturbation"] = labels["control"] or labels["perturbations"][0]
    unknown = " Perturbations other than those it was trained on cannot be asked for." * bool(labels["perturbations"])
    steps = f"--max-steps {options['max_steps']} --batch-size {options['batch_size']} --seed {options['seed']}"
    return {
        "title": f"Discrete Cell Model, {repo_id.split('/')[-1]}",
        "dataset_name": f"{ASK}the name of the data set",
        "summary": f"Generates single cells as raw counts of {genes}{told}.",
        "license": ASK + LICENCE,
        "datasets": [],
        "tags": ["perturb-seq"] if labels["perturbations"] else [],
        "example": {**example, "num_cells": 100},
        "intended_use": f"{ASK}what these cells may be used for, and what not",
        "limits": f"- It knows {genes} of one data set. A count above {config['max_count']:,} is never generated."
        + (unknown if config["perturbation_dim"] is None else ""),
        "data": f"{ASK}where the cells come from (source, accession, tissue, assay, how many), and their licence",
        "split": f"{ASK}which cells were kept for testing, and how they were chosen",
        "train": f"dcm-train --data {Path(options['data']).name}/ --out checkpoint/ {steps}",
        "citation": f"{ASK}the publication of the data",
    }
