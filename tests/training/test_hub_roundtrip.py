"""The whole way of a checkpoint, as the README's section on the Hub tells it: the test runs that section word for word.

Train, push to a Hub on the loopback, delete, and use by its id in a fresh virtual environment without this package.
"""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from modeling_dcm import DCMForDenoising
from tests.fresh_python import fresh_python
from tests.hub_server import Commit, LoopbackHub
from tokenization import DCMTokenizer

ROOT = Path(__file__).parents[2]
TOKEN = "hf_" + "w" * 34
TINY = "hidden_size: 16\nnum_hidden_layers: 1\nnum_latents: 4\nmax_steps: 3\nbatch_size: 8\nvalidation_cells: 8\n"

# All that is put in place of the README's words: a small network, and what is installed here instead of a download.
INSTEAD = {
    "training/configs/demo.yaml": "tiny.yaml",
    "elsewhere/bin/pip install torch transformers": f"{sys.executable} -m tests.fresh_python elsewhere",
}
LATER = """
import json, sys
from transformers import AutoModel
asked, revision = json.loads(sys.argv[1]), sys.argv[2]
said = []
for token in ("hf_nobody", True):
    try:
        AutoModel.from_pretrained("org/dcm-demo", revision=revision, trust_remote_code=True, token=token)
        said.append("loaded")
    except OSError as error:
        said.append(str(error))
print(json.dumps(said))
"""


def hub_section() -> tuple[list[str], str, str]:
    """Commands here, commands elsewhere and Python elsewhere, of the README's section."""
    text = (ROOT / "README.md").read_text().split("\n## The Hub\n")[1].split("\n## ")[0]
    here, elsewhere, python = re.findall(r"^```(?:python)?\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return here.splitlines(), elsewhere, python


def console_scripts(folder: Path) -> Path:
    """The commands that pyproject.toml promises, as installing the package writes them."""
    folder.mkdir()
    for name, target in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"].items():
        module, function = target.split(":")
        (folder / name).write_text(f"#!{sys.executable}\nfrom {module} import {function}\n\n{function}()\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.slow
def test_the_readmes_story_of_the_hub_holds_word_for_word(shards, tmp_path):
    here, elsewhere, python = hub_section()
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "shards").symlink_to(shards)
    (tmp_path / "tiny.yaml").write_text(TINY)
    with LoopbackHub({TOKEN: "write"}) as hub:
        online = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}
        own = {"HF_HOME": str(tmp_path / "own"), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
        path = {"PATH": f"{console_scripts(tmp_path / 'bin')}:{Path(sys.executable).parent}:{os.environ['PATH']}"}

        def shell(command: str) -> None:
            for word, ours in INSTEAD.items():
                command = command.replace(word, ours)
            environment = os.environ | online | own | path
            ran = ["bash", "-e", "-c", command]
            done = subprocess.run(ran, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
            assert done.returncode == 0, f"{command}\n{done.stderr}"
            assert TOKEN not in done.stdout + done.stderr

        train, *others = here
        shell(train)
        asked = json.loads(re.search(r"pipe\((\{.*\})", python)[1])
        tokenizer = DCMTokenizer.from_pretrained(tmp_path / "my-model")
        model = DCMForDenoising.from_pretrained(tmp_path / "my-model")
        ours = model.generate(**tokenizer.conditions(**asked), seed=0).tolist()
        for command in others:
            shell(command)
        assert not (tmp_path / "my-model").exists()

        shell(elsewhere)
        stranger, home = tmp_path / "elsewhere" / "bin" / "python", tmp_path / "stranger"
        show = "import json\nprint(json.dumps(drawn['counts'].tolist()))\n"
        done = fresh_python(stranger, python + show, home=home, **online)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == ours

        commits = hub.repositories["org/dcm-demo"].commits
        pinned = commits[-1].oid
        commits.append(Commit({}))  # what is pinned stays, whatever came after it
        home = tmp_path / "later"
        done = fresh_python(stranger, LATER, json.dumps(asked), pinned, home=home, **online)
        assert done.returncode == 0, done.stderr
        refused, loaded = json.loads(done.stdout)
        assert loaded == "loaded"
        assert "401" in refused or "not a valid model identifier" in refused, refused
