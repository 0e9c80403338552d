"""Checkpoints in the repository draw cells like those that the numbers on their cards describe, and need no package."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard

from model_cards.render_card import numbers_of, read_facts, render
from tests.fresh_python import fresh_python, make_environment
from training.data.checkpoint import load_checkpoint
from training.push_to_hub import STRANGER
from training.push_to_hub import main as push

ROOT = Path(__file__).parents[2]
FOLDERS = sorted(path.parent for path in (ROOT / "model_cards" / "checkpoints").glob("*/model.safetensors"))
COUNTS = 10**6  # to draw: fewer cells where each has more genes


def differences(model, tokenizer, numbers: dict[str, object]) -> tuple[float, float]:
    """Generated cells beside the numbers: |log ratio| of library sizes, and the largest one of genes' means."""
    labels = model.draw_labels(min(2000, COUNTS // len(tokenizer.genes)), seed=0)
    adata = tokenizer.decode(model.generate(**labels, seed=0), conditions=labels)
    means = dict(zip(tokenizer.genes, np.asarray(adata.X.mean(axis=0)).ravel()))
    genes = [abs(np.log((means[name] + 0.1) / (mean + 0.1))) for name, mean in numbers["mean_counts"].items()]
    return abs(np.log(adata.X.sum(axis=1).mean() / numbers["library_size"])), max(genes)


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_checkpoint_of_the_repository_draws_what_its_card_says(folder):
    assert sum(path.stat().st_size for path in folder.iterdir()) < 5 * 2**20
    facts = read_facts(folder / "card.yaml")
    size, genes = differences(*load_checkpoint(str(folder)), facts["numbers"])
    assert size < 0.1
    assert genes < 0.5  # a gene of few loud cells has a mean as uncertain
    card = ModelCard.load(folder / "README.md")
    known = {"checkpoint": folder, "results": folder / "results.json", "figures": ["figure.png"]}
    answer = card.data.widget[0]["output"]["text"]
    assert render(facts, repo_id=f"org/{folder.name}", example_output=answer, **known) == str(card)
    assert all(name in str(card) for name in facts["numbers"]["mean_counts"])
    assert f"keeps states of {facts['numbers']['cells']:,} training cells" in str(card)


@pytest.mark.slow
def test_checkpoints_of_the_repository_are_completed_to_load_where_the_package_is_not(tmp_path):
    python = make_environment(tmp_path / "environment")
    for folder in FOLDERS:
        assert "has no code" in (folder / "README.md").read_text()
        complete = tmp_path / folder.name
        push(folder, f"org/{folder.name}", results=folder / "results.json", dry_run=True, out=complete)
        card = ModelCard.load(complete / "README.md")
        assert "has no code" not in str(card)
        widget = card.data.widget[0]
        done = fresh_python(python, STRANGER, complete, widget["text"], home=tmp_path / "home")
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == widget["output"]["text"]


def test_numbers_on_a_card_are_those_of_the_cells_and_a_model_of_other_cells_is_found_out(trained, shards, tmp_path):
    numbers = numbers_of(shards / "train.h5ad")
    model, tokenizer = load_checkpoint(str(trained))
    assert set(numbers["mean_counts"]) <= set(tokenizer.genes)
    size, genes = differences(model, tokenizer, numbers)
    assert size < 0.2
    assert genes < 0.5  # after two steps of training
    wrong = {**numbers, "library_size": numbers["library_size"] * 2}
    assert differences(model, tokenizer, wrong)[0] > 0.5
    facts = yaml.safe_load((ROOT / "model_cards" / "dcm-replogle.yaml").read_text())
    text = render({**facts, "numbers": numbers}, repo_id="org/x")
    assert f"{numbers['library_size']:,.0f} counts" in text
