"""Render a model card from what is known: a file of facts, the checkpoint's own files, and results.json.

    python -m model_cards.render_card model_cards/dcm-replogle.yaml --out README.md
    python -m model_cards.render_card facts.yaml --checkpoint checkpoint/ --results results.json --out README.md

A fact that is missing is an error, never a blank. Without ``--checkpoint`` the card says plainly that the weights are
still to be trained, without ``--results`` that nothing was evaluated. Numbers come from results.json alone.
"""

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from string import Template
from typing import Annotated

import tyro
import yaml

from model_cards.draft_card import is_asked
from tokenization.labels_dcm import read_text
from training.data.command_line import run
from training.data.files import write_text

TEMPLATE = Path(__file__).with_name("card_template.md")
FRONT_MATTER = ("license", "datasets", "tags", "dataset_name")
FACTS = ("title", "summary", "data", "split", "intended_use", "limits", "train", "example", "citation", *FRONT_MATTER)
PLAN = ("num_genes", "conditions", "example_gene", "hyperparameters")  # what a checkpoint would say by itself
SHAPE_ROWS = ("backbone", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_count")
CONFIG_ROWS = (*SHAPE_ROWS, "noise_schedule", "loss_weighting", "label_dropout")
OPTION_ROWS = ("batch_size", "max_steps", "learning_rate", "ema_decay", "mixed_precision", "seed")
GROUPINGS = {"pooled": "all cells pooled", "per_condition": "mean over conditions"}

Row = Mapping[str, object]


def main(
    facts: Annotated[Path, tyro.conf.Positional],
    *,
    out: Path,
    repo_id: str = "org/name",
    checkpoint: Path | None = None,
    results: Path | None = None,
    example_output: str | None = None,
) -> Path:
    """Write a model card.

    Args:
        facts: YAML file of facts; those in model_cards/ are examples.
        out: The Markdown file to write.
        repo_id: The model's id on the Hub, as in org/name.
        checkpoint: Folder of the trained checkpoint; without it the card announces weights that are to be trained.
        results: results.json of dcm-evaluate.
        example_output: What the checkpoint answered to the facts' example; needed with a checkpoint.
    """
    text = render(
        read_facts(facts), repo_id=repo_id, checkpoint=checkpoint, results=results, example_output=example_output
    )
    write_text(out, text)
    return out


def render(
    facts: Mapping[str, object],
    *,
    repo_id: str,
    checkpoint: Path | None = None,
    results: Path | None = None,
    example_output: str | None = None,
    figures: Sequence[str] = (),
) -> str:
    """Return the card as Markdown with YAML front matter that huggingface_hub reads back as it was meant.

    Args:
        facts: from :func:`read_facts`.
        repo_id, checkpoint, results, example_output: as :func:`main` takes them.
        figures: paths of pictures inside the repository, which stand under the evaluation.

    Raises:
        ValueError: a fact is missing; the message names all that are.
    """
    from huggingface_hub import ModelCard, ModelCardData

    own = _planned(facts) if checkpoint is None else _of_checkpoint(checkpoint)
    if checkpoint is not None and not example_output:
        raise ValueError("the card of a trained checkpoint shows its answer to the example: example_output is missing")
    measured = None if results is None else _read_results(results)
    example = json.dumps(facts["example"], ensure_ascii=False)
    widget = {"text": example, "example_title": "cells on request", "output": {"text": example_output}}
    values = {
        **{name: str(facts[name]).strip() for name in FACTS},
        **{name: str(value) for name, value in own.items()},
        "data": "\n\n".join([str(facts["data"]).strip(), *_numbers(facts), *own.get("kept_states", [])]),
        "usage": _usage(repo_id, example),
        "status": "\n\n".join([_status(facts, checkpoint, measured), *_without_code(checkpoint, repo_id)]),
        "evaluation": _evaluation(measured, figures),
    }
    data = ModelCardData(
        license=facts["license"],
        library_name="transformers",
        pipeline_tag="other",
        tags=["single-cell", "gene-expression", "discrete-diffusion", "cell-generation", "custom_code", *facts["tags"]],
        datasets=facts["datasets"] or None,
        model_name=repo_id.split("/")[-1],
        eval_results=_eval_results(measured, str(facts["dataset_name"])) if measured else None,
        **({} if checkpoint is None else {"widget": [widget]}),
    )
    body = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(values)
    text = f"---\n{data.to_yaml()}\n---\n\n{body}"
    ModelCard(text, ignore_metadata_errors=False)  # raises where the front matter does not read back
    return text


def read_facts(path: Path) -> dict[str, object]:
    """Read facts from a YAML file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a mapping, or facts that are missing, empty or unknown; the message names them all.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file of facts {str(path)!r} for the card; it needs {', '.join(FACTS)}")
    try:
        facts = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{str(path)!r} is not YAML ({error})") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{str(path)!r} holds {type(facts).__name__}, expected a mapping of facts")
    may_be_empty = ("datasets", "tags", "example")
    asked = [name for name, value in facts.items() if is_asked(value)]
    if asked:
        raise ValueError(f"{str(path)!r} still asks for {', '.join(asked)}: write them there")
    missing = [name for name in FACTS if name not in facts or (not facts[name] and name not in may_be_empty)]
    if missing:
        raise ValueError(f"{str(path)!r} lacks facts for the card: {', '.join(missing)}")
    unknown = sorted(set(facts) - {*FACTS, "plan", "panel_sha256", "numbers"})
    if unknown:
        raise ValueError(f"{str(path)!r} has unknown facts {', '.join(unknown)}; expected {', '.join(FACTS)}, plan")
    if not isinstance(facts["example"], dict):
        raise ValueError(f"{str(path)!r}: example is {facts['example']!r}, expected a request of the pipeline")
    return facts


def numbers_of(cells: Path) -> dict[str, object]:
    """Return numbers for a card about its training cells, an h5ad that dcm-convert wrote: how many they are, their mean
    library size, and the mean counts of the ten genes that are counted most."""
    import numpy as np
    import pandas as pd

    from training.data.formats import read_counts

    adata = read_counts(cells)
    means = pd.Series(np.asarray(adata.X.mean(axis=0)).ravel(), adata.var_names).nlargest(10)
    library_size = round(float(adata.X.sum() / adata.n_obs), 1)
    return {"cells": adata.n_obs, "library_size": library_size, "mean_counts": means.round(3).to_dict()}


def _numbers(facts: Mapping[str, object]) -> list[str]:
    """Numbers about the training cells, by which anybody can check what the checkpoint draws, where they are given."""
    numbers = facts.get("numbers")
    if not numbers:
        return []
    said = f"{numbers['cells']:,} training cells, with {numbers['library_size']:,.0f} counts in the mean. Mean counts:"
    return [said, _table(["gene", "mean count"], list(numbers["mean_counts"].items()))]


def _planned(facts: Mapping[str, object]) -> dict[str, object]:
    """Return what stands in for a checkpoint's own files before it is trained."""
    plan = facts.get("plan") or {}
    missing = [name for name in PLAN if not plan.get(name)]
    if missing:
        raise ValueError(f"a card without a checkpoint needs a plan; facts missing under 'plan': {', '.join(missing)}")
    return plan | {"hyperparameters": _table(["planned", "value"], list(plan["hyperparameters"].items()))}


def _of_checkpoint(folder: Path) -> dict[str, object]:
    """Return what a trained checkpoint says of itself."""
    config, options = (_read_json(folder / name) for name in ("config.json", "training_options.json"))
    labels = _read_json(folder / "conditions.json")
    genes = read_text(folder / "genes.txt").split("\n")
    missing = [name for name in CONFIG_ROWS if name not in config] + [n for n in OPTION_ROWS if n not in options]
    if missing:
        raise ValueError(f"{str(folder)!r} lacks facts for the card: {', '.join(missing)}")
    known = {"cell_type": labels["cell_types"], "perturbation": labels["perturbations"], **labels["covariates"]}
    names = [f"`{name}` ({len(values):,} labels)" for name, values in known.items() if values]
    names += ["library size"] * bool(config["library_size_conditioning"])
    rows = [(name, {**options, **config}[name]) for name in (*CONFIG_ROWS, *OPTION_ROWS)]
    kept = f"The checkpoint keeps states of {config.get('state_bank', 0):,} training cells, from which it draws: "
    kept += f"{config.get('state_dim')} numbers and the total count of each, no genes."
    return {
        "kept_states": [kept] * bool(config.get("state_bank")),
        "num_genes": f"{config['num_genes']:,}",
        "conditions": ", ".join(names) or "none",
        "example_gene": genes[0],
        "hyperparameters": _table(["option", "value"], rows),
    }


def _usage(repo_id: str, example: str) -> str:
    return f"""from transformers import pipeline

pipe = pipeline("cell-generation", model="{repo_id}", trust_remote_code=True)
drawn = pipe({example}, seed=0)
print(drawn["counts"].shape, drawn["genes"][:5])
print(drawn["counts"].sum(axis=1).mean())  # counts per cell"""


def _status(facts: Mapping[str, object], checkpoint: Path | None, measured: object) -> str:
    if checkpoint is None:
        return (
            "> **No weights yet.** This card was prepared before training: the weights are to be trained with the "
            "command under *Training*, and nothing here was measured. The data must be fetched as *Training data and "
            "split* says."
        )
    if measured is None:
        return "> **Not evaluated.** Weights are here, but no results were given when they were pushed."
    return f"Evaluated on {facts['dataset_name']}; every number below stands beside its real-against-real floor."


def _without_code(checkpoint: Path | None, repo_id: str) -> list[str]:
    """Say of a folder without code, as those in this repository, how to get one that loads by itself."""
    if checkpoint is None or (checkpoint / "modeling_dcm.py").exists():
        return []
    name = checkpoint.name
    return [
        f"> This folder, `{name}`, has no code: it loads where the package is installed, by `DCMForDenoising` and "
        f"`DCMTokenizer`. `dcm-push {name} {repo_id} --results {name}/results.json --dry-run --out complete` writes a "
        'folder that `pipeline("cell-generation", model="complete", trust_remote_code=True)` loads anywhere.'
    ]


def _evaluation(measured: Mapping | None, figures: Sequence[str]) -> str:
    if measured is None:
        return (
            "No results yet. They will come from `dcm-evaluate`, beside the floor (real training cells against real "
            "test cells) and the independent marginals, with mean and standard deviation over seeds."
        )
    parts = [
        f"`{measured['split']}` cells of `{measured['dataset']}`, by `{measured['command']}`. *floor*: real training "
        "cells against the real test cells, as many in each condition; no generator can be expected to do better. "
        "Mean ± standard deviation over seeds or draws; n: cells on each side.",
        evaluation_table(measured["rows"]),
        *(f"![evaluation]({figure})" for figure in figures),
    ]
    return "\n\n".join(parts)


def evaluation_table(rows: Sequence[Row]) -> str:
    """Return one Markdown table for each protocol and grouping; single conditions are left to results.json."""
    parts = []
    for protocol in dict.fromkeys(row["protocol"] for row in rows):
        for grouping, title in GROUPINGS.items():
            ours = [row for row in rows if (row["protocol"], row["grouping"]) == (protocol, grouping)]
            if ours:
                parts.append(f"Protocol `{protocol}`, {title}:\n\n{_scores(ours)}")
    return "\n\n".join(parts)


def _scores(rows: Sequence[Row]) -> str:
    """Return a table, metrics down and models across, the floor first."""
    from eval.metrics.by_name import metric_label, model_label  # with scipy, which takes a moment

    number = {row["model"]: row["n"] for row in rows}
    models = sorted(number, key=lambda model: (model != "floor", model != "dcm"))
    found = {(row["metric"], row["model"]): row for row in rows}
    lines = [
        [" ".join(metric_label(metric)), *(_score(found.get((metric, model))) for model in models)]
        for metric in dict.fromkeys(row["metric"] for row in rows)
    ]
    return _table(["metric (better)", *(f"{model_label(model)}, n = {number[model]:,}" for model in models)], lines)


def _score(row: Row | None) -> str:
    if row is None or not _is_measured(row):
        return "not measured"
    return f"{row['mean']:.4g}" + (f" ± {row['std']:.2g}" if row["std"] is not None else "")


def _is_measured(row: Row) -> bool:
    return isinstance(row["mean"], int | float) and math.isfinite(row["mean"])


def _place(row: Row) -> tuple[object, ...]:
    return row["protocol"], row["grouping"], row["metric"]


def _eval_results(measured: Mapping, dataset_name: str) -> list:
    """Return the model's pooled and averaged rows as a model index; the floor stands beside each number."""
    from huggingface_hub import EvalResult

    from eval.metrics.by_name import metric_label

    floors = {_place(row): row["mean"] for row in measured["rows"] if row["model"] == "floor"}
    ours = [row for row in measured["rows"] if row["model"] == "dcm" and row["grouping"] != "condition"]
    ours = [row for row in ours if _is_measured(row)]
    if not ours:
        models = sorted({str(row["model"]) for row in measured["rows"]})
        raise ValueError(f"the results have no rows of the model 'dcm', only of {', '.join(models)}")
    return [
        EvalResult(
            task_type="cell-generation",
            task_name="Cell generation",
            dataset_type=str(measured["dataset"]),
            dataset_name=dataset_name,
            dataset_split=str(measured["split"]),
            metric_type=row["metric"],
            metric_name=f"{metric_label(row['metric'])[0]}, protocol {row['protocol']}, "
            f"{row['grouping'].replace('_', ' ')}",
            metric_value=row["mean"],
            metric_args={name: row[name] for name in ("std", "n", "seeds")} | {"floor": floors[_place(row)]},
        )
        for row in ours
    ]


def _read_results(path: Path) -> dict:
    """Read results.json, and check what a card says of it."""
    measured = _read_json(path)
    missing = [name for name in ("dataset", "split", "command", "rows") if not measured.get(name)]
    if missing:
        raise ValueError(f"{str(path)!r} lacks facts for the card: {', '.join(missing)}; expected dcm-evaluate's file")
    floors, ours = ({_place(row) for row in measured["rows"] if row["model"] == model} for model in ("floor", "dcm"))
    if ours - floors:
        raise ValueError(f"{str(path)!r} has no floor for {min(ours - floors)}: a number without it says nothing")
    return measured


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}, which the card takes facts from")
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error})") from error


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


cli = partial(run, main)

if __name__ == "__main__":
    cli()
