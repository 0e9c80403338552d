"""Properties of model cards: every fact or an error, front matter that huggingface_hub reads, numbers beside floors."""

import dataclasses
import inspect
import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from eval.evaluate import main as evaluate
from eval.sample import main as sample
from model_cards.render_card import FACTS, main, read_facts, render
from tests.tiny_checkpoint import write_tiny_checkpoint
from training.config import TrainConfig
from training.convert_h5ad import main as convert
from training.embed_perturbations import main as embed

ROOT = Path(__file__).parents[2]
CARDS = ROOT / "model_cards"
PLANNED = ("dcm-dentate-gyrus", "dcm-replogle", "dcm-replogle-k562")
SMALL = ("checkpoints/dcm-norman-mcfaline/card", "checkpoints/dcm-pbmc3k/card")
RESULTS = [
    path
    for path in sorted((ROOT / "eval" / "results").glob("*.json"))
    if any(row["model"] == "dcm" for row in json.loads(path.read_text()).get("rows", ()))
]


@pytest.fixture(scope="module")
def facts() -> dict[str, object]:
    return read_facts(CARDS / "dcm-demo.yaml")


@pytest.mark.parametrize("name", PLANNED)
def test_a_card_of_an_untrained_checkpoint_says_plainly_what_is_missing(name, tmp_path):
    main(CARDS / f"{name}.yaml", out=tmp_path / "README.md", repo_id=f"org/{name}")
    text = (tmp_path / "README.md").read_text()
    card = ModelCard(text)
    said = ("No weights yet", "No results yet", "accelerate launch -m training.train", f'model="org/{name}"')
    assert all(words in text for words in said)
    assert card.data.eval_results is None
    assert "widget" not in card.data.to_dict()


@pytest.mark.parametrize("name", (*PLANNED, *SMALL))
def test_options_of_a_cards_commands_exist(name):
    mains = {"dcm-convert": convert, "dcm-embed": embed, "dcm-sample": sample, "dcm-evaluate": evaluate}
    known = {command: set(inspect.signature(main).parameters) for command, main in mains.items()}
    known["dcm-train"] = known["accelerate launch -m training.train"] = {
        field.name for field in dataclasses.fields(TrainConfig)
    }
    for line in read_facts(CARDS / f"{name}.yaml")["train"].splitlines():
        command = next(command for command in known if line.startswith(f"{command} "))
        options = {option.replace("-", "_") for option in re.findall(r" --(?:no-)?([\w-]+)", line)}
        assert options <= known[command], line


@pytest.mark.parametrize("results", RESULTS, ids=lambda path: path.stem)
def test_numbers_of_the_model_index_are_those_of_the_results_each_with_its_floor(results, tiny_checkpoint, facts):
    known = {"checkpoint": tiny_checkpoint, "results": results, "example_output": "100 cells", "figures": ["f.png"]}
    text = render(facts, repo_id="org/dcm-x", **known)
    rows = {
        (row["model"], row["protocol"], row["grouping"], row["metric"]): row["mean"]
        for row in json.loads(results.read_text())["rows"]
        if row["grouping"] != "condition"
    }
    index = ModelCard(text).data.eval_results
    assert len(index) == sum(key[0] == "dcm" and mean is not None for key, mean in rows.items())
    for result in index:
        _, protocol, grouping = result.metric_name.rsplit(", ", 2)
        place = (protocol.removeprefix("protocol "), grouping.replace(" ", "_"), result.metric_type)
        assert (result.metric_value, result.metric_args["floor"]) == (rows["dcm", *place], rows["floor", *place])
        assert result.dataset_split == "test"
    for said in ("| floor, n = ", "independent marginals, n = ", "![evaluation](f.png)"):
        assert said in text


def test_a_trained_card_has_the_front_matter_of_the_hub_python_that_runs_and_what_the_checkpoint_says_of_itself(
    tiny_checkpoint, facts
):
    text = render(facts, repo_id="org/dcm-x", checkpoint=tiny_checkpoint, example_output="100 cells")
    data = yaml.safe_load(text.split("---\n")[1])
    assert (data["license"], data["library_name"], data["pipeline_tag"]) == ("mit", "transformers", "other")
    assert {"single-cell", "cell-generation", "custom_code"} <= set(data["tags"])
    assert json.loads(data["widget"][0]["text"]) == facts["example"]
    assert data["widget"][0]["output"] == {"text": "100 cells"}
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert len([line for line in code.splitlines() if line]) <= 6
    assert '"org/dcm-x"' in code
    labels = "`cell_type` (3 labels), `perturbation` (4 labels), `donor` (2 labels)"
    for said in (
        "Genes in the panel: 7.",
        labels,
        "| backbone | latent |",
        "| learning_rate | 0.002 |",
        "Not evaluated",
    ):
        assert said in text
    for unsaid in ("No weights yet", "has no code", "$"):
        assert unsaid not in text


@pytest.mark.parametrize("name", FACTS)
def test_a_missing_or_unknown_fact_is_an_error_that_names_it(name, facts, tmp_path):
    (tmp_path / "facts.yaml").write_text(yaml.safe_dump({key: value for key, value in facts.items() if key != name}))
    with pytest.raises(ValueError, match=f"lacks facts for the card: {name}$"):
        read_facts(tmp_path / "facts.yaml")
    (tmp_path / "facts.yaml").write_text(yaml.safe_dump({**facts, "licence": "mit"}))
    with pytest.raises(ValueError, match="unknown facts licence"):
        read_facts(tmp_path / "facts.yaml")


@pytest.mark.parametrize(("file", "key"), [("config.json", "backbone"), ("training_options.json", "learning_rate")])
def test_a_checkpoint_that_lacks_a_fact_is_an_error_that_names_it(file, key, make_model, facts, tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "checkpoint", make_model("dit", conditioned=True))
    known = json.loads((folder / file).read_text())
    del known[key]
    (folder / file).write_text(json.dumps(known))
    with pytest.raises(ValueError, match=f"lacks facts for the card: {key}"):
        render(facts, repo_id="org/x", checkpoint=folder, example_output="cells")


def test_a_card_without_an_answer_or_a_plan_and_results_without_a_floor_or_the_model_are_errors(
    tiny_checkpoint, facts, tmp_path
):
    with pytest.raises(ValueError, match="example_output is missing"):
        render(facts, repo_id="org/x", checkpoint=tiny_checkpoint)
    with pytest.raises(ValueError, match="facts missing under 'plan': num_genes, conditions"):
        render(facts, repo_id="org/x")
    measured = json.loads(RESULTS[0].read_text())
    known = {"checkpoint": tiny_checkpoint, "results": tmp_path / "results.json", "example_output": "cells"}
    for model, message in (("floor", "no floor for"), ("dcm", "no rows of the model 'dcm'")):
        rows = [row for row in measured["rows"] if row["model"] != model]
        (tmp_path / "results.json").write_text(json.dumps({**measured, "rows": rows}))
        with pytest.raises(ValueError, match=message):
            render(facts, repo_id="org/x", **known)
