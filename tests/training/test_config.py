"""Properties of training's options: who wins, and what is refused."""

import functools
import importlib
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import tyro
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from eval.simulate import main as simulate
from training.config import TrainConfig, parse, read_config
from training.convert_h5ad import main as convert
from training.loop.processes import build_accelerator, threads_per_process
from training.loop.run import prepare_run, take_step


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
        ("size: 7m", r"size='7m', expected \('5m', '10m', '20m'\) or null"),
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
    folder = Path(__file__).parents[2] / "training" / "configs"
    files = sorted(folder.glob("*.yaml"))
    assert files
    for file in files:
        parse(["--config", str(file), "--data", "d", "--out", "o"])


ROOT = Path(__file__).parents[2]


def commands_of(file: Path) -> list[str]:
    """The indented lines of a configuration's header; of a loop over seeds, the command for seed 0."""
    lines = [line.removeprefix("#   ") for line in file.read_text().splitlines() if line.startswith("#   ")]
    return [re.sub(r"^for s in [^;]*; do (.*); done$", r"\1", line).replace("$s", "0") for line in lines]


def parsed(main: Callable[..., object], arguments: list[str]) -> None:
    """Read a command line as the stage does, without its work; end the program on what it does not know."""

    @functools.wraps(main)
    def stage(*given, **options) -> None:
        pass

    tyro.cli(stage, args=arguments)


@pytest.mark.parametrize("file", sorted((ROOT / "training" / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_commands_in_the_header_of_a_configuration_go_from_data_to_card_and_can_be_read(file, monkeypatch):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    monkeypatch.chdir(ROOT)
    stages = []
    for command in commands_of(file):
        program, *arguments = shlex.split(command)
        if program == "python":
            compile(arguments[1], file.name, "exec")
        elif program == "accelerate":
            assert arguments[:2] == ["launch", "training/train.py"]
            assert parse(arguments[2:]).config == file.relative_to(ROOT)
            stages.append("dcm-train")
        elif program.startswith("dcm-"):
            stages.append(program)
            parsed(importlib.import_module(scripts[program].removesuffix(":cli")).main, arguments)
        else:
            assert program in ("hf", "curl")
    wanted = ["dcm-convert", "dcm-train", "dcm-sample", "dcm-evaluate", "dcm-push"]
    assert [stage for stage in stages if stage not in ("dcm-simulate", "dcm-embed")] == wanted


def test_a_command_with_an_option_that_does_not_exist_is_noticed(capsys):
    main = importlib.import_module("eval.sample").main
    parsed(main, ["checkpoint/", "--out", "generated.h5ad", "--num-cells", "3"])
    with pytest.raises(SystemExit):
        parsed(main, ["checkpoint/", "--out", "generated.h5ad", "--cells", "3"])
    assert "--num-cells" in capsys.readouterr().err


# --- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_a_network_split_over_processes_is_refused(kind, monkeypatch):
    told = SimpleNamespace(distributed_type=kind, gradient_accumulation_steps=1, num_processes=2)
    monkeypatch.setattr("training.loop.processes.Accelerator", lambda **options: told)
    with pytest.raises(
        ValueError, match=f"configured for {kind.value}, expected plain data parallelism: these networks"
    ):
        build_accelerator(TrainConfig(data=Path("d"), out=Path("o"), trackers="none"))


def test_another_number_of_accumulated_batches_in_accelerates_configuration_is_refused(monkeypatch):
    told = SimpleNamespace(distributed_type=DistributedType.NO, gradient_accumulation_steps=4, num_processes=1)
    monkeypatch.setattr("training.loop.processes.Accelerator", lambda **options: told)
    with pytest.raises(ValueError, match="gradient_accumulation_steps=4, training for 1: give --gradient-accumulation"):
        build_accelerator(TrainConfig(data=Path("d"), out=Path("o"), trackers="none"))


def test_processes_that_share_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr("training.loop.processes.available_cores", lambda: 8)
    assert threads_per_process(["a", "a", "b", "a"], "a") == 2
    assert threads_per_process(["a", "a", "b", "a"], "b") == 8
    assert threads_per_process(["a"] * 20, "a") == 1


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "10m", "hidden_size": 32}, "hidden_size=32 contradicts size='10m', which sets it: leave one out"),
        ({"hidden_size": 30}, "hidden_size=30, expected a multiple of num_attention_heads=4"),
        ({"size": "5m", "init_from": "org/dcm"}, "size='5m' contradicts init_from, which brings its own shape"),
        ({"masked_keys": False}, "masked_keys=False contradicts backbone='latent', in which nothing attends to masked"),
        ({"keep_last": 0}, "keep_last=0, expected at least 1"),
        ({"max_time": 0.0}, "max_time=0.0, expected minutes above 0, or none for no limit"),
        ({"label_dropout": 1.0}, r"label_dropout=1.0, expected in \[0, 1\)"),
    ],
)
def test_contradictions_and_new_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(data=Path("d"), out=Path("o"), **options)


def test_a_size_on_the_command_line_wins_over_the_shape_in_a_file(tmp_path):
    (tmp_path / "run.yaml").write_text("hidden_size: 48\nnum_hidden_layers: 2\n")
    arguments = ["--config", str(tmp_path / "run.yaml"), "--data", "d", "--out", "o", "--size"]
    config = parse([*arguments, "10m"])
    assert config.size == "10m"
    assert not config.is_set("hidden_size")
    assert parse([*arguments, "None"]).hidden_size == 48


def test_an_unknown_option_on_the_command_line_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as end:
        parse(["--data", "d", "--out", "o", "--learning-rat", "1"])
    assert end.value.code == 2
    assert "--learning-rate" in capsys.readouterr().err


FILES = sorted((Path(__file__).parents[2] / "training" / "configs").glob("*.yaml"))
OVERRIDES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_latents": 4, "batch_size": 2}


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """Shards with as many genes as a configuration is for, and their table of vectors; made once for each number."""
    made = {}

    def make(num_genes: int) -> Path:
        if num_genes not in made:
            folder = tmp_path_factory.mktemp(f"genes{num_genes}")
            sizes = {"num_cells": 60, "num_genes": num_genes, "num_cell_types": 2, "num_perturbations": 3}
            simulate(folder / "cells.h5ad", num_pairs=0, vector_dim=4, **sizes)
            keys = {"cell_type_key": "cell_type", "perturbation_key": "perturbation"}
            made[num_genes] = convert(folder / "cells.h5ad", out=folder / "shards", **keys)
        return made[num_genes]

    return make


@pytest.fixture
def other_precision():
    """Accelerate allows one precision in a process, and other tests train in another."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
@pytest.mark.usefixtures("other_precision")
@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_every_configuration_builds_and_takes_two_steps(file, simulated, tmp_path):
    """Width and numbers of layers and cells are small; genes, backbone, precision and all else are the file's."""
    num_genes = {"dentate-gyrus-5m": 17_002, "demo": 100}.get(file.stem, 2_000)
    shards = simulated(num_genes)
    vectors = shards.parent / "cells.perturbations.safetensors" if file.stem.startswith("replogle") else None
    options = {**read_config(file), **OVERRIDES, "size": None, "trackers": "none"}
    config = TrainConfig(data=shards, out=tmp_path / "out", perturbation_embeddings=vectors, **options)
    accelerator = build_accelerator(config)
    run, model, start = prepare_run(config, accelerator)
    batches = run.train_batches.starting_at(start)
    for _ in range(2):
        measured = take_step(model, run.optimizer, batches, accelerator, config)
        assert all(bool(value.isfinite()) for value in measured)
    assert run.network.config.num_genes == num_genes
