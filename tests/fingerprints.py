"""Print what must not change when code is moved: hashes of weights, of drawn cells and of an evaluation's rows.

    python tests/fingerprints.py

Runs the stages as commands, so it knows nothing of how the code is arranged: simulated cells, shards, 20 seeded steps
of `demo.yaml` with both backbones, 64 seeded cells of each and one evaluation. One thread, on the CPU.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import anndata
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parent.parent


def run(module: str, *arguments: object) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")


def weights_hash(folder: Path) -> str:
    """Of the tensors by content, whatever their names."""
    tensors = load_file(folder / "model.safetensors").values()
    kinds = (f"{t.shape}{t.dtype}".encode() + t.tobytes() for t in tensors)
    return short("".join(sorted(map(short, kinds))))


def short(text: str | bytes) -> str:
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()[:16]


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        cells, shards = folder / "cells.h5ad", folder / "shards"
        run("eval.simulate", "--out", cells, "--num-cells", 2000, "--num-genes", 100)
        keys = ("--cell-type-key", "cell_type", "--perturbation-key", "perturbation", "--control", "control")
        run("training.convert_h5ad", cells, "--out", shards, *keys)
        for backbone in ("latent", "dit"):
            checkpoint, drawn = folder / backbone, folder / f"{backbone}.h5ad"
            options = ("--config", ROOT / "training/configs/demo.yaml", "--backbone", backbone, "--max-steps", 20)
            run("training.train", *options, "--data", shards, "--out", checkpoint)
            print(f"{backbone:8} weights {weights_hash(checkpoint)}", flush=True)  # noqa: T201
            run("eval.sample", checkpoint, "--out", drawn, "--num-cells", 64, "--cell-type", "type0", "--seed", 0)
            counts = anndata.read_h5ad(drawn).X.toarray().astype("int64")
            print(f"{backbone:8} cells   {short(counts.tobytes())}", flush=True)  # noqa: T201
        like = folder / "like.h5ad"
        run("eval.sample", folder / "latent", "--out", like, "--like", shards / "test.h5ad")
        real = ("--real", shards / "test.h5ad", "--train", shards / "train.h5ad")
        run("eval.evaluate", like, *real, "--out", folder / "results")
        rows = json.loads((folder / "results" / "results.json").read_text())["rows"]
        print(f"evaluation: {len(rows)} rows {short(json.dumps(rows, sort_keys=True))}")  # noqa: T201


if __name__ == "__main__":
    main()
