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
RESULTS = [
    path
    for path in sorted((ROOT / "eval" / "results").glob("*.json"))
    if any(row["model"] == "dcm" for row in json.loads(path.read_text()).get("rows", ()))
]


@pytest.fixture(scope="module")
def checkpoint(make_model, tmp_path_factory) -> Path:
    model = make_model("latent", conditioned=True)
    return write_tiny_checkpoint(tmp_path_factory.mktemp("card") / "checkpoint", model)


@pytest.fixture(scope="module")
def facts() -> dict[str, object]:
    return read_facts(CARDS / "dcm-demo.yaml")


@pytest.mark.parametrize("name", PLANNED)
def test_a_card_of_an_untrained_checkpoint_says_plainly_what_is_missing(name):
    text = render(read_facts(CARDS / f"{name}.yaml"), repo_id=f"org/{name}")
    card = ModelCard(text)
    assert "No weights yet" in text
    assert "No results yet" in text
    assert "accelerate launch training/train.py" in text
    assert card.data.eval_results is None
    assert "widget" not in card.data.to_dict()
    assert f'model="org/{name}"' in text


@pytest.mark.parametrize("name", PLANNED)
def test_options_of_a_cards_commands_exist(name):
    mains = {"dcm-convert": convert, "dcm-embed": embed, "dcm-sample": sample, "dcm-evaluate": evaluate}
    known = {command: set(inspect.signature(main).parameters) for command, main in mains.items()}
    known["accelerate launch training/train.py"] = {field.name for field in dataclasses.fields(TrainConfig)}
    for line in read_facts(CARDS / f"{name}.yaml")["train"].splitlines():
        command = next(command for command in known if line.startswith(f"{command} "))
        options = {option.replace("-", "_") for option in re.findall(r" --([\w-]+)", line)}
        assert options <= known[command], line


@pytest.mark.parametrize("name", ["dcm-replogle", "dcm-replogle-k562"])
def test_cards_of_perturbations_say_where_their_vectors_come_from_and_what_was_not_at_hand(name):
    text = render(read_facts(CARDS / f"{name}.yaml"), repo_id=f"org/{name}")
    assert "dcm-embed --perturbations shards/ --proteins proteins.fasta --model facebook/esm2_t33_650M_UR50D" in text
    assert "--perturbation-embeddings esm2.safetensors" in text
    assert "licence was not at hand" in text


@pytest.mark.parametrize("results", RESULTS, ids=lambda path: path.stem)
def test_numbers_of_the_model_index_are_those_of_the_results_each_with_its_floor(results, checkpoint, facts):
    text = render(
        facts,
        repo_id="org/dcm-x",
        checkpoint=checkpoint,
        results=results,
        example_output="100 cells",
        figures=["f.png"],
    )
    measured = json.loads(results.read_text())
    rows = {
        (row["model"], row["protocol"], row["grouping"], row["metric"]): row
        for row in measured["rows"]
        if row["grouping"] != "condition"
    }
    index = ModelCard(text).data.eval_results
    assert len(index) == sum(key[0] == "dcm" and row["mean"] is not None for key, row in rows.items())
    for result in index:
        _, protocol, grouping = result.metric_name.rsplit(", ", 2)
        place = (protocol.removeprefix("protocol "), grouping.replace(" ", "_"), result.metric_type)
        assert result.metric_value == rows["dcm", *place]["mean"]
        assert result.metric_args["floor"] == rows["floor", *place]["mean"]
        assert result.dataset_split == "test"
    assert "| floor, n = " in text
    assert "independent_marginals" in text
    assert "![evaluation](f.png)" in text


def test_front_matter_has_what_the_hub_asks_for_and_a_widget_with_its_output(checkpoint, facts):
    text = render(facts, repo_id="org/dcm-x", checkpoint=checkpoint, example_output="100 cells x 7 genes")
    data = yaml.safe_load(text.split("---\n")[1])
    assert data["license"] == "mit"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "other"
    assert {"single-cell", "cell-generation", "custom_code"} <= set(data["tags"])
    assert json.loads(data["widget"][0]["text"]) == facts["example"]
    assert data["widget"][0]["output"] == {"text": "100 cells x 7 genes"}


def test_how_to_use_is_six_lines_of_python_that_name_this_model(checkpoint, facts):
    text = render(facts, repo_id="org/dcm-x", checkpoint=checkpoint, example_output="100 cells")
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert len([line for line in code.splitlines() if line]) <= 6
    assert '"org/dcm-x"' in code


def test_a_trained_card_shows_what_the_checkpoint_says_of_itself(checkpoint, facts):
    text = render(facts, repo_id="org/dcm-x", checkpoint=checkpoint, example_output="100 cells")
    assert "Genes in the panel: 7." in text
    assert "`cell_type` (3 labels), `perturbation` (4 labels), `donor` (2 labels)" in text
    assert "| backbone | latent |" in text
    assert "| learning_rate | 0.002 |" in text
    assert "No weights yet" not in text
    assert "Not evaluated" in text
    assert "$" not in text


@pytest.mark.parametrize("name", FACTS)
def test_a_missing_fact_is_an_error_that_names_it(name, facts, tmp_path):
    (tmp_path / "facts.yaml").write_text(yaml.safe_dump({key: value for key, value in facts.items() if key != name}))
    with pytest.raises(ValueError, match=f"lacks facts for the card: {name}$"):
        read_facts(tmp_path / "facts.yaml")


def test_facts_that_nobody_asked_for_are_an_error(facts, tmp_path):
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


def test_a_trained_card_without_an_answer_and_a_planned_one_without_a_plan_are_errors(checkpoint, facts):
    with pytest.raises(ValueError, match="example_output is missing"):
        render(facts, repo_id="org/x", checkpoint=checkpoint)
    with pytest.raises(ValueError, match="facts missing under 'plan': num_genes, conditions"):
        render(facts, repo_id="org/x")


def test_results_without_a_floor_or_without_the_model_are_errors(checkpoint, facts, tmp_path):
    measured = json.loads(RESULTS[0].read_text())
    for model, message in (("floor", "no floor for"), ("dcm", "no rows of the model 'dcm'")):
        rows = [row for row in measured["rows"] if row["model"] != model]
        (tmp_path / "results.json").write_text(json.dumps({**measured, "rows": rows}))
        with pytest.raises(ValueError, match=message):
            render(
                facts, repo_id="org/x", checkpoint=checkpoint, results=tmp_path / "results.json", example_output="cells"
            )


def test_the_command_writes_the_card(tmp_path):
    main(CARDS / "dcm-replogle.yaml", out=tmp_path / "README.md", repo_id="org/dcm-replogle")
    assert ModelCard.load(tmp_path / "README.md").data.license == "mit"
