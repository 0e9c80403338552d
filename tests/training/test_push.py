"""Properties of ``dcm-push``: what is sent, what never is, how it ends when the Hub says no, and how it comes back."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import anndata
import pytest
import yaml

from eval.simulate import main as simulate
from model_cards.render_card import read_facts
from modeling_dcm import DCMForDenoising
from tests.fresh_python import fresh_python
from tests.hub_server import LoopbackHub
from tests.tiny_checkpoint import write_tiny_checkpoint
from tokenization import DCMTokenizer
from training.push_to_hub import _facts_of, answer_of, main, stage

ROOT = Path(__file__).parents[2]
TOKEN, READ_TOKEN = "hf_writes" + "x" * 25, "hf_reads" + "x" * 26


@pytest.fixture(scope="module")
def checkpoint(make_model, tmp_path_factory) -> Path:
    """A checkpoint as training leaves it, with a state, a log and other things that are nobody's business."""
    folder = tmp_path_factory.mktemp("push") / "checkpoint"
    write_tiny_checkpoint(folder, make_model("latent", conditioned=True))
    (folder / "checkpoints" / "step-3").mkdir(parents=True)
    (folder / "checkpoints" / "step-3" / "state.safetensors").write_bytes(b"optimiser")
    for name in ("training.jsonl", ".env", "optimizer.safetensors", "notes.txt", "id_rsa"):
        (folder / name).write_text("secret")
    facts = (ROOT / "model_cards" / "dcm-demo.yaml").read_text().replace("type0", "k562")
    (folder / "card.yaml").write_text(facts)
    return folder


@pytest.fixture
def hub():
    with LoopbackHub({TOKEN: "write", READ_TOKEN: "read"}) as server:
        yield server


def push(hub: LoopbackHub, checkpoint: Path, *options: object, home: Path, token: str | None = TOKEN):
    """``dcm-push`` as a command."""
    return client(hub, ["-m", "training.push_to_hub", checkpoint, *options], home=home, token=token)


def client(hub: LoopbackHub, arguments: list[object], *, home: Path, token: str | None = TOKEN):
    """Python in a process of its own: the Hub's client reads its environment when it is imported."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(ROOT), **({"HF_TOKEN": token} if token else {})}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=home, check=False)
    for secret in (TOKEN, READ_TOKEN, "Traceback"):
        assert secret not in done.stdout + done.stderr, done.stderr
    return done


def test_only_listed_files_are_built_aside(checkpoint, tmp_path):
    before = {path.name: path.stat().st_mtime for path in checkpoint.iterdir()}
    stage(checkpoint, tmp_path / "aside")
    names = {path.name for path in (tmp_path / "aside").iterdir()}
    assert {"config.json", "model.safetensors", "genes.txt", "conditions.json"} <= names
    assert {"handler.py", "pipeline_dcm.py"} <= names
    assert not names & {"checkpoints", "training.jsonl", ".env", "optimizer.safetensors", "notes.txt", "id_rsa"}
    assert before == {path.name: path.stat().st_mtime for path in checkpoint.iterdir()}
    options = json.loads((tmp_path / "aside" / "training_options.json").read_text())
    assert (options["data"], options["out"]) == ("shards", "checkpoint")  # not where they lay


@pytest.mark.parametrize("missing", ["config.json", "genes.txt", "model.safetensors"])
def test_an_incomplete_checkpoint_says_what_it_lacks(missing, checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / missing).unlink()
    with pytest.raises(FileNotFoundError, match=rf"no complete checkpoint: it has no .*{missing}"):
        stage(copy, tmp_path / "aside")


@pytest.mark.parametrize("repo_id", ["name", "org/name/more", "org/na me"])
def test_a_repository_that_cannot_be_or_has_no_facts_is_refused_first(repo_id, tmp_path):
    with pytest.raises(ValueError, match=r"expected org/name|Repo id"):
        main(tmp_path / "nothing", repo_id)
    with pytest.raises(
        FileNotFoundError, match=r"no facts for the model card of .*: let --draft-card card\.yaml write"
    ):
        main(tmp_path, "org/dcm-demo")


def test_a_prepared_card_is_that_of_the_data_it_describes_whatever_the_repository_is_called(checkpoint, tmp_path):
    simulate(tmp_path / "cells.h5ad", num_cells=5000, num_genes=100)  # as `make demo` does
    cells = anndata.read_h5ad(tmp_path / "cells.h5ad")
    labels = {"cell_types": sorted(set(cells.obs["cell_type"])), "control": "control"}
    names = {name for label in cells.obs["perturbation"] for name in label.split("+")}
    tokenizer = DCMTokenizer(genes=list(cells.var_names), max_count=9, perturbations=sorted(names), **labels)
    tokenizer.save_pretrained(tmp_path / "demo")
    assert _facts_of(tmp_path / "demo").name == "dcm-demo.yaml"
    (tmp_path / "demo" / "genes.txt").write_text("\n".join([*cells.var_names[:-1], "another"]) + "\n")
    with pytest.raises(FileNotFoundError, match="no facts"):
        _facts_of(tmp_path / "demo")


@pytest.mark.slow
def test_a_drafted_card_has_what_is_known_and_is_refused_until_the_rest_is_answered(checkpoint, tmp_path):
    card, out = tmp_path / "card.yaml", tmp_path / "folder"
    main(checkpoint, "org/x", draft_card=card)
    facts = yaml.safe_load(card.read_text())
    asked = [name for name, value in facts.items() if str(value).startswith("ASK: ")]
    assert asked == ["dataset_name", "license", "intended_use", "data", "split", "citation"]
    assert "7 genes by cell type (3 labels), perturbation (4 labels)" in facts["summary"]
    with pytest.raises(ValueError, match=f"still asks for {', '.join(asked)}: write them there"):
        main(checkpoint, "org/x", card=card, dry_run=True)
    with pytest.raises(ValueError, match="exists already"):
        main(checkpoint, "org/x", draft_card=card)
    card.write_text(yaml.safe_dump({**facts, **dict.fromkeys(asked, "answered"), "license": "mit"}))
    main(checkpoint, "org/x", card=card, dry_run=True, out=out)
    assert {"README.md", "model.safetensors", "handler.py"} <= {path.name for path in out.iterdir()}
    with pytest.raises(ValueError, match="is a new folder for --dry-run that exists already"):
        main(checkpoint, "org/x", card=card, dry_run=True, out=out)


@pytest.mark.slow
def test_a_checkpoint_that_a_fresh_process_cannot_load_is_not_pushed(checkpoint, tmp_path):
    stage(checkpoint, tmp_path / "aside")
    facts = read_facts(checkpoint / "card.yaml")
    assert answer_of(tmp_path / "aside", facts["example"]).startswith("100 cells x 7 genes of integer counts; ")
    (tmp_path / "aside" / "sampling_dcm.py").write_text("import no_such_package\n")
    with pytest.raises(ValueError, match=r"a fresh process cannot use this checkpoint .*no_such_package"):
        answer_of(tmp_path / "aside", facts["example"])


@pytest.mark.slow
def test_a_dry_run_lists_everything_and_sends_nothing(hub, checkpoint, tmp_path):
    done = push(hub, checkpoint, "org/dcm-x", "--dry-run", home=tmp_path, token=None)
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in done.stderr
    assert "nothing was sent" in done.stderr
    assert hub.requests == []


@pytest.mark.slow
def test_the_command_pushes_what_it_checked_and_prints_the_address(hub, checkpoint, tmp_path):
    results = ROOT / "eval" / "results" / "pbmc3k.json"
    done = push(hub, checkpoint, "org/dcm-x", "--results", results, home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.url}/org/dcm-x"
    files = hub.files("org/dcm-x")
    assert files["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
    assert b"model-index" in files["README.md"]
    assert {"results.json", "handler.py", "pipeline_dcm.py", "modeling_dcm.py"} <= set(files)
    assert not set(files) & {"training.jsonl", ".env", "optimizer.safetensors", "notes.txt", "id_rsa", "card.yaml"}
    assert len(hub.repositories["org/dcm-x"].commits) == 2  # the empty one, and ours


PUSHES = """
import json, os, sys
from pathlib import Path
from training import push_to_hub
push_to_hub.PAUSE = 0.01
said = []
for folder, repo_id, private, token in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = token
    try:
        said.append(push_to_hub.push(Path(folder), repo_id, private=private))
    except (ValueError, OSError) as error:
        said.append(str(error))
print(json.dumps(said))
"""


def pushes(hub: LoopbackHub, home: Path, *wanted: tuple) -> list[str]:
    """What each push of a process says, in turn: the address, or the error."""
    done = client(hub, ["-c", PUSHES, json.dumps(wanted, default=str)], home=home)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def folder_of(home: Path, name: str, **files: str) -> Path:
    folder = home / name
    folder.mkdir()
    for file, text in {"model.safetensors": "weights", "config.json": "{}", **files}.items():
        (folder / file.replace("_json", ".json")).write_text(text)
    return folder


@pytest.mark.slow
def test_a_rerun_commits_nothing_and_a_change_removes_what_an_earlier_push_left(hub, tmp_path):
    repo = "org/dcm-x"
    hub.drop = {"org/dropped/commit/": 2, "org/unreachable/commit/": 99}
    first, second = folder_of(tmp_path, "first", results_json="{}"), folder_of(tmp_path, "second", genes_json="1")
    said = pushes(
        hub,
        tmp_path,
        (first, repo, False, TOKEN),
        (first, repo, False, TOKEN),
        (second, repo, False, TOKEN),
        (second, repo, True, TOKEN),
        (first, "org/hidden", True, TOKEN),
        (first, "org/dropped", False, TOKEN),
        (first, "org/unreachable", False, TOKEN),
        (first, "org/refused", False, READ_TOKEN),
        (first, "org/refused", False, "hf_nobody"),
        (first, "org/refused", False, ""),
    )
    assert said[:3] == [f"{hub.url}/{repo}"] * 3
    commits = [set(commit.files) - {".gitattributes"} for commit in hub.repositories[repo].commits]
    assert commits == [
        set(),
        {"config.json", "model.safetensors", "results.json"},
        {"config.json", "model.safetensors", "genes.json"},
    ]
    assert f"{repo} exists and is public" in said[3]
    assert hub.repositories["org/hidden"].private
    assert said[5] == f"{hub.url}/org/dropped"
    assert len(hub.repositories["org/dropped"].commits) == 2
    assert "the Hub cannot be reached" in said[6]
    assert "refused the token for org/refused (403)" in said[7]
    assert "refused the token for org/refused (401)" in said[8]
    assert "no token of the Hub" in said[9]
    assert "org/refused" not in hub.repositories


TINY = "hidden_size: 16\nnum_hidden_layers: 1\nnum_latents: 4\nmax_steps: 3\nbatch_size: 8\nvalidation_cells: 8\n"

# All that is put in place of the README's words: a small network, and what is installed here instead of a download.
INSTEAD = {
    "--config demo": "--config tiny.yaml",
    "elsewhere/bin/pip install torch transformers": f"{sys.executable} -m tests.fresh_python elsewhere",
}


def console_scripts(folder: Path) -> Path:
    """The commands that pyproject.toml promises, as installing the package writes them."""
    folder.mkdir()
    for name, target in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"].items():
        module, function = target.split(":")
        (folder / name).write_text(f"#!{sys.executable}\nfrom {module} import {function}\n\n{function}()\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.slow
def test_the_readmes_story_of_the_hub_holds_word_for_word(hub, shards, tmp_path):
    section = (ROOT / "README.md").read_text().split("\n## The Hub\n")[1].split("\n## ")[0]
    here, elsewhere, python = re.findall(r"^```(?:python)?\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "shards").symlink_to(shards)
    (tmp_path / "tiny.yaml").write_text(TINY)
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

    train, *others = here.splitlines()
    shell(train)
    shutil.copyfile(ROOT / "model_cards" / "dcm-demo.yaml", tmp_path / "my-model" / "card.yaml")  # of other shards
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
