"""Properties of training's options: who wins, and what is refused."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

from training.config import CONFIGS, TrainConfig, parse, read_config
from training.loop.accelerator import build_accelerator

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "training" / "configs").glob("*.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_size: many", "batch_size='many', expected int"),
        ("resume: 1", "resume=1, expected bool"),
        ("backbone: unet", r"backbone='unet', expected \('dit', 'latent'\)"),
        ("size: 7m", r"size='7m', expected \('5m', '10m', '20m'\) or null"),
        ("query_genes: all", "query_genes='all', expected int or null"),
        ("batch_size: [", "is not YAML"),
        ("learning_rat: 0.001", "unknown option 'learning_rat'; near matches: 'learning_rate'"),
        ("given: [seed]", "unknown option 'given'"),
        ("- 1", "holds list, expected a mapping of options"),
    ],
)
def test_options_of_a_file_that_are_unknown_or_of_another_type_are_refused(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path / "run.yaml")
    with pytest.raises(FileNotFoundError, match=r"no config file .*run\.yaml"):
        read_config(tmp_path / "other.yaml")


def test_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 2e-3\nmlp_ratio: 2\nquery_genes: null\n")  # YAML takes the first for text
    assert read_config(file) == {"learning_rate": 2e-3, "mlp_ratio": 2.0, "query_genes": None}
    file.write_text("batch_size: 3\nmax_steps: 7\nperturbation_embeddings: table.safetensors\n")
    config = parse(["--config", str(file), "--data", "d", "--out", "o", "--max-steps", "9"])
    assert (config.batch_size, config.max_steps, config.learning_rate) == (3, 9, TrainConfig("d", "o").learning_rate)
    assert config.perturbation_embeddings == Path("table.safetensors")
    assert (config.data, config.out) == (Path("d"), Path("o"))


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_configurations_of_the_repository_are_valid(file):
    assert parse(["--config", str(file), "--data", "d", "--out", "o"]).config == file


@pytest.mark.parametrize(
    ("kind", "accumulated", "message"),
    [
        (DistributedType.FSDP, 1, "configured for FSDP, expected plain data parallelism, or .* FSDP2"),
        (DistributedType.MEGATRON_LM, 1, "configured for MEGATRON_LM, expected plain data parallelism, or"),
        (DistributedType.NO, 4, "gradient_accumulation_steps=4, training for 1: give --gradient-accumulation"),
    ],
)
def test_what_accelerate_was_told_otherwise_is_refused(kind, accumulated, message, monkeypatch):
    told = SimpleNamespace(distributed_type=kind, gradient_accumulation_steps=accumulated, num_processes=2)
    told.is_fsdp2 = False
    monkeypatch.setattr("training.loop.accelerator.Accelerator", lambda **options: told)
    with pytest.raises(ValueError, match=message):
        build_accelerator(TrainConfig(data=Path("d"), out=Path("o"), trackers="none"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--batch-size 0", "batch_size=0, expected at least 1"),
        ("--query-genes 0", "query_genes=0, expected at least 1, or none"),
        ("--learning-rate 0", "learning_rate=0.0, expected above 0"),
        ("--ema-decay 1", r"ema_decay=1.0, expected in \[0, 1\)"),
        ("--hidden-size 30 --num-attention-heads 4", "hidden_size=30, expected a multiple of num_attention_heads=4"),
        ("--size 5m --init-from org/dcm", "size='5m' contradicts init_from, which brings its own shape"),
        ("--no-masked-keys", "masked_keys=False contradicts backbone='latent', in which nothing attends to masked"),
        ("--max-time 0", "max_time=0.0, expected minutes above 0, or none for no limit"),
        # a contradiction is one even where the value is the default
        ("--size 10m --hidden-size 64", "hidden_size=64 contradicts size='10m', which sets it: leave one out"),
        ("--num_hidden_layers=3 --size=10m", "num_hidden_layers=3 contradicts size='10m', which sets it"),
        ("size: 10m\nhidden_size: 64", "hidden_size=64 contradicts size='10m', which sets it"),
        ("--paper --state-dim 16", "state_dim=16 contradicts paper, which is 0: leave"),
        ("{paper: true, state_dim: 16}", "state_dim=16 contradicts paper, which is 0: leave"),
    ],
)
def test_bad_and_contradictory_options_are_refused_with_the_value_and_what_was_expected(
    tmp_path, words, message, capsys
):
    """Of the command line or of a file."""
    in_file = "" if words.startswith("--") else words
    (tmp_path / "run.yaml").write_text(in_file)
    arguments = ["--config", str(tmp_path / "run.yaml"), "--data", "d", "--out", "o"]
    with pytest.raises((ValueError, SystemExit)) as error:
        parse([*arguments, *([] if in_file else words.split())])
    assert re.search(message, str(error.value) + " ".join(capsys.readouterr().err.replace("│", "").split()))


def test_a_config_that_comes_with_the_package_is_found_by_name_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--data", "d", "--out", "o", "--config", "laptop"]
    assert parse(arguments).query_genes == 150
    (tmp_path / "laptop").write_text("query_genes: 3")  # a file of that name is meant first
    assert parse(arguments).query_genes == 3
    with pytest.raises(FileNotFoundError, match="no config file 'labtop'; there are: demo, dentate-gyrus-5m, laptop"):
        read_config(Path("labtop"))
    with pytest.raises(SystemExit):
        parse(["--help"])
    helped = capsys.readouterr().out
    assert all(f"{file.stem}," in helped or f"{file.stem}." in helped for file in CONFIGS.glob("*.yaml"))


def test_a_size_on_the_command_line_wins_over_the_shape_in_a_file(tmp_path):
    (tmp_path / "run.yaml").write_text("hidden_size: 48\nnum_hidden_layers: 2\n")
    arguments = ["--config", str(tmp_path / "run.yaml"), "--data", "d", "--out", "o", "--size"]
    config = parse([*arguments, "10m"])
    assert config.size == "10m"
    assert not config.is_set("hidden_size")
    assert config.is_set("size")
    assert parse([*arguments, "None"]).hidden_size == 48


def test_what_was_given_is_known_whatever_its_value(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("backbone: latent\n")
    config = parse(
        ["--config", str(tmp_path / "run.yaml"), "--data", "d", "--out=o", "--no-cell-summary", "--seed", "0"]
    )
    assert config.given == {"config", "data", "out", "backbone", "cell_summary", "seed"}
    assert replace(config, attn="sdpa").is_set("backbone")
    assert "given" not in config.options()
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert "--given" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        parse(["--data", "d", "--out", "o", "--learning-rat", "1"])
    assert "--learning-rate" in capsys.readouterr().err  # the nearest


PAPER = {"backbone": "dit", "count_distribution": "categorical", "state_dim": 0, "cell_summary": False}


@pytest.mark.parametrize(("file", "words"), [("", ["--paper"]), ("paper: true", []), ("backbone: latent", ["--paper"])])
def test_the_papers_model_is_one_option_away(tmp_path, file, words):
    (tmp_path / "run.yaml").write_text(file)
    config = parse(["--config", str(tmp_path / "run.yaml"), "--data", "d", "--out", "o", *words])
    assert {name: getattr(config, name) for name in PAPER} == PAPER
    assert parse(["--data", "d", "--out", "o"]).count_distribution == "nb"
