"""What is read rather than run: the tutorial executes as it stands; pages of the API are built from docstrings."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "model_cards" / "notebooks" / "tutorial.ipynb"


def outputs(notebook) -> list[set[str]]:
    """Kinds of what each cell shows, but for progress."""
    shown = [[out for out in cell.get("outputs", ()) if out.get("name") != "stderr"] for cell in notebook.cells]
    return [{kind for out in each for kind in (out.get("data") or {"text/plain": ""})} for each in shown]


@pytest.mark.slow
def test_the_tutorial_runs_as_it_stands_and_shows_what_it_did(tmp_path, monkeypatch):
    nbclient, nbformat = (pytest.importorskip(name, reason="extra 'dev'") for name in ("nbclient", "nbformat"))
    assert TUTORIAL.stat().st_size < 2**20
    committed = nbformat.read(TUTORIAL, 4)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    again = nbformat.read(TUTORIAL, 4)
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(again, timeout=600, kernel_name="python3", resources=where).execute()
    assert outputs(again) == outputs(committed)
    assert sum("image/png" in kinds for kinds in outputs(again)) == 2
    unchanged = next(cell for cell in again.cells if "genes that were known are unchanged" in cell.source)
    assert "unchanged: True" in unchanged.outputs[0].text


def test_pages_of_the_api_are_built_from_the_docstrings(tmp_path):
    pytest.importorskip("pdoc", reason="pdoc is not installed (extra 'dev')")
    words = re.search(r"^pdoc (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)[1].split()
    command = [sys.executable, "-m", "pdoc", *words, "--output-directory", tmp_path]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    for page, name in (
        ("training/in_memory", "fit"),
        ("eval/in_memory", "compare"),
        ("modeling_dcm/generation_dcm", "CellGenerationMixin.generate"),
        ("tokenization/tokenization_dcm", "DCMTokenizer.decode"),
    ):
        assert f'id="{name}"' in (tmp_path / f"{page}.html").read_text(encoding="utf-8")


def test_the_entry_of_the_ecosystem_list_says_what_the_package_says():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    entry = yaml.safe_load((ROOT / "model_cards" / "scverse" / "meta.yaml").read_text())
    assert {name: entry[name] for name in ("name", "version", "license")} == {
        name: project[name] for name in ("name", "version", "license")
    }
    assert entry["tags"] == project["keywords"]
    readme = (ROOT / "README.md").read_text()
    assert all(doi in readme for doi in entry["publications"])
