"""The whole way of a checkpoint: train, save, push, delete, and use by its id where this package is not installed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_dcm import DCMForDenoising
from tests.fresh_python import fresh_python, link_site_packages
from tests.hub_server import LoopbackHub
from tokenization import DCMTokenizer
from training.config import TrainConfig
from training.train import main as train

ROOT = Path(__file__).parent.parent
TOKEN = "hf_" + "w" * 34
ASKED = {"cell_type": "type0", "perturbation": "control", "num_cells": 8}

STRANGER = """
import json, sys
from transformers import AutoModel, pipeline
repo_id, revision, asked = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
pipe = pipeline("cell-generation", model=repo_id, revision=revision, trust_remote_code=True, device="cpu")
print(json.dumps(pipe(asked, seed=3)["counts"].tolist()))
"""


@pytest.mark.slow
def test_cells_of_a_pushed_checkpoint_are_the_originals_for_a_stranger(shards, tmp_path):
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_latents": 4}
    folder = tmp_path / "dcm-demo"
    train(TrainConfig(data=shards, out=folder, max_steps=3, batch_size=8, validation_cells=8, **tiny))
    tokenizer, model = DCMTokenizer.from_pretrained(folder), DCMForDenoising.from_pretrained(folder)
    ours = model.generate(**tokenizer.conditions(**ASKED), seed=3).tolist()

    with LoopbackHub({TOKEN: "write"}) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "own"), "HF_TOKEN": TOKEN}
        environment |= {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "training.push_to_hub", folder, "org/dcm-demo", "--private"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr
        assert TOKEN not in done.stdout + done.stderr
        shutil.rmtree(folder)

        site = link_site_packages(tmp_path / "site")
        online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}

        def stranger(revision: str, **environment: str) -> subprocess.CompletedProcess:
            home = tmp_path / f"stranger-{len(list(tmp_path.iterdir()))}"
            arguments = ["org/dcm-demo", revision, json.dumps(ASKED)]
            return fresh_python(site, STRANGER, *arguments, home=home, **online, **environment)

        pinned = hub.repositories["org/dcm-demo"].commits[-1].oid
        hub.repositories["org/dcm-demo"].commits.append(type(hub.repositories["org/dcm-demo"].commits[-1])({}))
        done = stranger(pinned, HF_TOKEN=TOKEN)  # what is pinned stays, whatever came after it
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == ours
        refused = stranger(pinned, HF_TOKEN="hf_nobody")
        assert refused.returncode != 0
        assert "401" in refused.stderr or "not a valid model identifier" in refused.stderr
