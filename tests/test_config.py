"""Properties of training's options: who wins, and what is refused."""

from pathlib import Path

import pytest

from training.config import TrainConfig, read_config
from training.train import parse


def test_an_unknown_option_in_a_file_names_the_nearest(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("learning_rat: 0.001\n")
    with pytest.raises(ValueError, match="unknown option 'learning_rat'; did you mean 'learning_rate'"):
        read_config(file)


def test_a_file_that_is_no_mapping_or_not_there_is_refused(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="holds list, expected a mapping of options"):
        read_config(tmp_path / "list.yaml")
    with pytest.raises(FileNotFoundError, match=r"no config file .*list\.yaml"):
        read_config(tmp_path / "other.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_size: many", "batch_size='many', expected int"),
        ("batch_size: 2.5", "batch_size=2.5, expected int"),
        ("learning_rate: fast", "learning_rate='fast', expected float"),
        ("resume: 1", "resume=1, expected bool"),
        ("backbone: unet", r"backbone='unet', expected \('dit', 'latent'\)"),
        ("query_genes: all", "query_genes='all', expected int or null"),
        ("batch_size: [", "is not YAML"),
    ],
)
def test_a_value_of_another_type_in_a_file_is_refused(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path / "run.yaml")


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path):
    (tmp_path / "run.yaml").write_text("learning_rate: 2e-3\nmlp_ratio: 2\nquery_genes: null\n")
    assert read_config(tmp_path / "run.yaml") == {"learning_rate": 2e-3, "mlp_ratio": 2.0, "query_genes": None}


def test_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("batch_size: 3\nmax_steps: 7\nperturbation_embeddings: table.safetensors\n")
    config = parse(["--config", str(file), "--data", "d", "--out", "o", "--max-steps", "9"])
    assert (config.batch_size, config.max_steps, config.learning_rate) == (3, 9, TrainConfig("d", "o").learning_rate)
    assert config.perturbation_embeddings == Path("table.safetensors")
    assert (config.data, config.out) == (Path("d"), Path("o"))


def test_configurations_of_the_repository_are_valid():
    folder = Path(__file__).parent.parent / "training" / "configs"
    files = sorted(folder.glob("*.yaml"))
    assert files
    for file in files:
        parse(["--config", str(file), "--data", "d", "--out", "o"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0, expected at least 1"),
        ({"max_steps": 0}, "max_steps=0, expected at least 1"),
        ({"save_every": 0}, "save_every=0, expected at least 1"),
        ({"query_genes": 0}, "query_genes=0, expected at least 1, or none"),
        ({"learning_rate": 0.0}, "learning_rate=0.0, expected above 0"),
        ({"ema_decay": 1.0}, r"ema_decay=1.0, expected in \[0, 1\)"),
    ],
)
def test_bad_options_are_refused_with_the_value_and_what_was_expected(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(data=Path("d"), out=Path("o"), **options)
