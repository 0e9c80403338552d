"""Every command: help with an example; a user's mistake is one line and exit code 2; options are read before slow
packages are.

    example of this module
"""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from training.data.command_line import parse

ROOT = Path(__file__).parents[1]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
MISTAKES = {
    "eval.simulate": "--out cells.h5ad --num-genes 1",
    "eval.sample": "./absent --out out/cells.h5ad",
    "eval.impute": "./absent absent.h5ad --out out/cells.h5ad",
    "eval.score": "./absent absent.h5ad --out out/cells.h5ad",
    "eval.evaluate": "absent.h5ad --real absent.h5ad --train absent.h5ad --out out",
    "eval.benchmarks.command": "entropy absent --data absent",
    "training.convert_h5ad": "absent.h5ad --out out",
    "training.embed_perturbations": "--perturbations absent --out table.safetensors --proteins absent.fasta",
    "training.train": "--data absent --out out",
    "training.push_to_hub": "absent org/unheard-of",
}


@pytest.mark.parametrize("module", MISTAKES)
def test_a_users_mistake_is_one_line_and_exit_code_2_and_writes_nothing(module, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [module, *MISTAKES[module].split()])
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(module).cli()
    said, errors = capsys.readouterr()
    assert said == ""
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_has_an_example_and_defaults_and_the_version_is_told(name, monkeypatch, capsys):
    module = importlib.import_module(SCRIPTS[name].partition(":")[0])

    def said(word: str) -> str:
        monkeypatch.setattr(sys, "argv", ["anything", word])
        with pytest.raises(SystemExit, match=r"^0?$"):
            module.cli()
        return capsys.readouterr().out

    helped = said("--help")
    assert helped.startswith(f"usage: {name} [-h] ")
    assert f"Example: {name} " in helped
    assert "None" not in helped
    assert said("--version").startswith("discrete-cell-models ")


def test_names_with_values_are_one_word_and_none_is_a_label_where_labels_are_wanted():
    def main(*, guidance: dict[str, float] | None = None, cells: int | None = 3, label: str | None = None):
        """Tell what was given.

        Args:
            guidance: A.
            cells: B.
            label: C.
        """
        return guidance, cells, label

    def given(line: str):
        return parse(main, arguments=line.split())

    assert given("") == (None, 3, None)
    assert given("--guidance a=2,b=0.5 --cells none --label none") == ({"a": 2.0, "b": 0.5}, None, "none")
    with pytest.raises(SystemExit, match="2"):
        given("--guidance a")


COMMANDS = [f"training.{name}" for name in ("convert_h5ad", "train", "embed_perturbations", "push_to_hub")]
COMMANDS += [f"eval.{name}" for name in ("sample", "impute", "score")]
HEAVY = {"torch", "transformers", "anndata", "accelerate"}


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        *((f"import {command}", HEAVY) for command in COMMANDS),
        ("from training import train, embed_perturbations, push_to_hub", {*HEAVY, "datasets", "scipy", "matplotlib"}),
        ("import modeling_dcm, tokenization", {"transformers", "torch", "anndata"}),
        ("from modeling_dcm.schedule_dcm import SCHEDULES", {"transformers", "torch"}),
        ("from tokenization.tokenization_dcm import DCMTokenizer", {"torch", "anndata", "scipy"}),
        ("from modeling_dcm import DCMForDenoising; from tokenization import DCMTokenizer", {"anndata"}),
    ],
)
def test_what_takes_seconds_to_import_is_imported_when_it_is_needed(statement, absent):
    command = [sys.executable, "-c", f"import sys; {statement}; print(*sys.modules)"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert not absent & set(done.stdout.split())
