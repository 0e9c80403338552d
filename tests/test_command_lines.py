"""Every command: a user's mistake is one line and exit code 2, and options are read before slow packages are."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

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
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True)
    assert not absent & set(done.stdout.split())
