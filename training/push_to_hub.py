"""Push a checkpoint to the Hugging Face Hub: code, weights, vocabularies, handler, model card, in one commit.

    dcm-push checkpoint/ org/name --card card.yaml --results results/results.json
    dcm-push checkpoint/ org/name --draft-card card.yaml
    dcm-push checkpoint/ org/name --card card.yaml --dry-run --out folder/

The folder that is pushed is built aside from a list of files, and loaded in a fresh process before anything is sent:
states of the optimiser, logs and whatever else lies in the checkpoint are never uploaded.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePath
from typing import Annotated, TypeVar

import tyro
import yaml
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

from model_cards.draft_card import drafted_facts, is_asked, panel_sha256
from model_cards.render_card import read_facts, render
from training.data.checkpoint import check_checkpoint
from training.data.command_line import run
from training.data.files import written_aside

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

CARDS = Path(__file__).resolve().parent.parent / "model_cards"
OF_TRAINING = ("tokenizer_config.json", "training_options.json")  # what a card and a pipeline need besides
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-?????-of-?????.safetensors")
LISTED = (
    "config.json",
    "genes.txt",
    "conditions.json",
    *OF_TRAINING,
    *WEIGHTS,
    "*_dcm.py",
    "handler.py",
    "special_tokens_map.json",
    "added_tokens.json",
)
OWN = (*LISTED, "README.md", "results.json", "figure.png")  # what a push may replace or remove on the Hub
# options that would tell where the files of a user lie
PATHS = ("data", "out", "config", "perturbation_embeddings", "init_from")
ATTEMPTS = 3  # when the connection drops
# what a stranger runs, with nothing but the folder: draw the cells of a request, and say what they are like
STRANGER = """
import json, sys, transformers
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
pipe = transformers.pipeline("cell-generation", model=sys.argv[1], trust_remote_code=True, device="cpu")
drawn = pipe(json.loads(sys.argv[2]), seed=0)
counts, means = drawn["counts"], drawn["counts"].mean(axis=0)
print(f"{counts.shape[0]:,} cells x {counts.shape[1]:,} genes of integer counts; {counts.sum(axis=1).mean():,.0f} "
      f"counts and {(counts > 0).sum(axis=1).mean():,.0f} expressed genes per cell; highest means:",
      ", ".join(f"{drawn['genes'][i]} {means[i]:.3g}" for i in means.argsort()[::-1][:5]))
"""
PAUSE = 2.0  # seconds, longer each time


def main(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    repo_id: Annotated[str, tyro.conf.Positional],
    *,
    private: bool = False,
    dry_run: bool = False,
    out: Path | None = None,
    results: Path | None = None,
    card: Path | None = None,
    draft_card: Path | None = None,
) -> str:
    """Push a checkpoint to the Hub and print its address.

    Args:
        checkpoint: Folder of a trained checkpoint.
        repo_id: Where to, as in org/name.
        private: Make the repository private; an existing public one is then refused.
        dry_run: Build, check and list what would be uploaded, and send nothing.
        out: With --dry-run, a folder to leave it in; made, and not there yet.
        results: results.json of dcm-evaluate for the card; the figure.png beside it is shown.
        card: YAML file of the card's facts; default: card.yaml in the checkpoint, or the card that comes with the
            package for a checkpoint of exactly these genes and labels.
        draft_card: Write such a file instead of pushing: it says what the checkpoint tells, and asks for the rest.
    """
    if repo_id.count("/") != 1:
        raise ValueError(f"repo_id={repo_id!r}, expected org/name")
    validate_repo_id(repo_id)
    if out is not None and (not dry_run or out.exists()):
        raise ValueError(f"--out {str(out)!r} is a new folder for --dry-run" + " that exists already" * out.exists())
    if draft_card is not None:
        return _draft(checkpoint, repo_id, draft_card)
    facts = read_facts(card or _facts_of(checkpoint))
    with tempfile.TemporaryDirectory(prefix="dcm-push-") as aside:
        folder = Path(aside) / "checkpoint"
        stage(checkpoint, folder)
        answer = answer_of(folder, facts["example"])
        figures = _add_results(results, folder)
        known = {"checkpoint": folder, "results": results, "example_output": answer, "figures": figures}
        (folder / "README.md").write_text(render(facts, repo_id=repo_id, **known), encoding="utf-8")
        files = sorted(folder.iterdir())
        for file in files:
            logger.info("%12s  %s", f"{file.stat().st_size:,}", file.name)
        if dry_run:
            if out is not None:
                shutil.copytree(folder, out)
            logger.info("dry run: %d files would be pushed to %s; nothing was sent", len(files), repo_id)
            return ""
        address = push(folder, repo_id, private=private)
    sys.stdout.write(address + "\n")
    return address


def stage(checkpoint: Path, folder: Path) -> None:
    """Copy the listed files of a checkpoint into ``folder`` and add what is shipped with them."""
    _check_complete(checkpoint)
    folder.mkdir()
    names = sorted(path.name for path in checkpoint.iterdir())
    listed = [name for name in filter_repo_objects(names, allow_patterns=list(LISTED)) if (checkpoint / name).is_file()]
    for name in listed:
        shutil.copyfile(checkpoint / name, folder / name)
    left = [name for name in names if name not in listed]
    if left:
        logger.info("not uploaded: %s", ", ".join(left))
    from training.loop.resume import add_shipped_files  # with torch, which takes seconds

    add_shipped_files(folder)
    options = json.loads((folder / "training_options.json").read_text())
    options |= {name: PurePath(options[name]).name for name in PATHS if options.get(name)}  # a Hub id loses its owner
    (folder / "training_options.json").write_text(json.dumps(options, indent=1))


def _check_complete(checkpoint: Path) -> None:
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"no checkpoint folder {str(checkpoint)!r}")
    check_checkpoint(str(checkpoint))
    missing = [name for name in OF_TRAINING if not (checkpoint / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{str(checkpoint)!r} is no complete checkpoint: it has no {', '.join(missing)}")


def answer_of(folder: Path, request: object) -> str:
    """Ask the folder in a fresh process that has neither our packages' path nor a token, and return its answer."""
    with tempfile.TemporaryDirectory(prefix="dcm-fresh-") as home:
        secrets = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
        environment = {name: value for name, value in os.environ.items() if name not in secrets}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": home, "HF_MODULES_CACHE": str(Path(home) / "modules")}
        command = [sys.executable, "-I", "-c", STRANGER, str(folder), json.dumps(request)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=home, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise ValueError(f"a fresh process cannot use this checkpoint ({lines[-1]}); nothing was uploaded")
    return done.stdout.strip()


def push(folder: Path, repo_id: str, *, private: bool) -> str:
    """Upload a folder in one commit, and return its address on the Hub. Files of an earlier push that are not in
    ``folder`` are removed in the same commit; files of other kinds stay."""
    token = get_token()
    if not token:
        raise ValueError("no token of the Hub: log in with 'hf auth login', or set HF_TOKEN to one that may write")
    api = HfApi(token=token)
    try:
        url = _again_when_dropped(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True))
        if private and not _again_when_dropped(lambda: api.model_info(repo_id)).private:
            raise ValueError(f"{repo_id} exists and is public: make it private on the Hub, or leave out --private")
        what = {"repo_id": repo_id, "folder_path": folder, "delete_patterns": list(OWN), "commit_message": "dcm-push"}
        _again_when_dropped(lambda: api.upload_folder(**what))
    except HTTPError as error:
        raise _explained(error, repo_id, token) from None
    return str(url)


def _again_when_dropped(call: Callable[[], Result]) -> Result:
    """Call, and call again after a pause when the connection drops; what was sent already is not sent twice."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except HTTPError as error:
            is_answer = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
            if is_answer or attempt == ATTEMPTS:
                raise
            logger.warning("the connection to the Hub failed (%s); trying again", type(error).__name__)
            time.sleep(PAUSE * attempt)


def _explained(error: HTTPError, repo_id: str, token: str) -> Exception:
    """What an error of the Hub means for a push, without the token."""
    said = str(error).replace(token, "***").strip()
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status in (401, 403):
        needs = f"it needs write access to {repo_id.split('/')[0]}; log in again with 'hf auth login'"
        return ValueError(f"the Hub refused the token for {repo_id} ({status}): {needs}")
    if status is not None and status < 500:
        return ValueError(f"the Hub refused the push to {repo_id}: {said}")
    return ConnectionError(f"the Hub cannot be reached ({type(error).__name__}: {said}); push again, nothing is lost")


def _add_results(results: Path | None, folder: Path) -> list[str]:
    """Copy results.json and the figure beside it; the figures' names."""
    if results is None:
        return []
    if not results.is_file():
        raise FileNotFoundError(f"no results {str(results)!r}; expected the results.json of dcm-evaluate")
    shutil.copyfile(results, folder / "results.json")
    figure = results.with_name("figure.png")
    if not figure.is_file():
        return []
    shutil.copyfile(figure, folder / "figure.png")
    return ["figure.png"]


def _draft(checkpoint: Path, repo_id: str, path: Path) -> str:
    """Write facts for the card as far as the checkpoint tells them, and return the file's name."""
    if path.exists():
        raise ValueError(f"--draft-card {str(path)!r} exists already")
    _check_complete(checkpoint)
    facts = drafted_facts(checkpoint, repo_id)
    asked = [name for name, value in facts.items() if is_asked(value)]
    with written_aside(path) as aside:
        aside.write_text(yaml.safe_dump(facts, sort_keys=False, allow_unicode=True, width=110), encoding="utf-8")
    logger.info("%s: answer what it asks for (%s), then push with --card %s", path, ", ".join(asked), path)
    return str(path)


def _facts_of(checkpoint: Path) -> Path:
    """The facts in the checkpoint, or those that were prepared for its data, whatever the repository is called."""
    own = checkpoint / "card.yaml"
    if own.is_file():
        return own
    if (checkpoint / "genes.txt").is_file() and (checkpoint / "conditions.json").is_file():
        panel = panel_sha256(checkpoint)
        for prepared in sorted(CARDS.glob("*.yaml")):
            if read_facts(prepared).get("panel_sha256") == panel:
                return prepared
    raise FileNotFoundError(
        f"no facts for the model card of {str(checkpoint)!r}: let --draft-card card.yaml write what the checkpoint "
        "tells, answer what it asks for, and push with --card card.yaml"
    )


cli = partial(run, main)

if __name__ == "__main__":
    cli()
