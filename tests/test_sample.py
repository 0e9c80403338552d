"""Properties of the sampling stage: what is written, and how it ends when something is wrong."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pytest

from eval.sample import load_checkpoint, main
from tokenization import DCMTokenizer
from training.config import TrainConfig
from training.train import main as train


@pytest.fixture(scope="module")
def checkpoint(shards, tmp_path_factory) -> Path:
    """A model with cell types, perturbations and library sizes after two steps of training."""
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_latents": 4}
    out = tmp_path_factory.mktemp("sampled") / "checkpoint"
    return train(TrainConfig(data=shards, out=out, max_steps=2, batch_size=8, validation_cells=8, **tiny))


def test_cells_are_integer_counts_with_the_panels_genes_and_the_conditions_asked_for(checkpoint, tmp_path):
    tokenizer = DCMTokenizer.from_pretrained(checkpoint)
    pair = "+".join(name for name in tokenizer.perturbations if name != "control")
    pair = "+".join(pair.split("+")[:2])
    main(
        str(checkpoint),
        out=tmp_path / "cells.h5ad",
        num_cells=12,
        cell_type="type1",
        perturbation=pair,
        steps=3,
        seed=4,
    )
    cells = anndata.read_h5ad(tmp_path / "cells.h5ad")
    assert cells.shape == (12, 15)
    assert list(cells.var_names) == tokenizer.genes
    assert np.issubdtype(cells.X.dtype, np.integer)
    assert cells.X.min() >= 0
    assert cells.X.max() <= tokenizer.max_count
    assert set(cells.obs["cell_type"]) == {"type1"}
    assert {frozenset(label.split("+")) for label in cells.obs["perturbation"]} == {frozenset(pair.split("+"))}
    assert cells.uns["generator"] == "dcm"
    assert list(cells.uns["dcm_conditions"]) == ["cell_type", "perturbation"]
    assert cells.uns["dcm_control"] == "control"
    assert cells.uns["dcm_sampling"]["seed"] == 4


def test_the_same_seed_gives_the_same_cells(checkpoint, tmp_path):
    files = [tmp_path / name for name in ("a.h5ad", "b.h5ad", "c.h5ad")]
    for file, seed in zip(files, (0, 0, 1)):
        main(str(checkpoint), out=file, num_cells=20, steps=2, seed=seed)
    first, again, other = (anndata.read_h5ad(file).X.toarray() for file in files)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_like_draws_one_cell_for_each_cell_of_the_file_with_its_conditions(checkpoint, shards, tmp_path):
    main(str(checkpoint), out=tmp_path / "like.h5ad", like=shards / "test.h5ad", steps=2)
    drawn, real = (anndata.read_h5ad(file) for file in (tmp_path / "like.h5ad", shards / "test.h5ad"))
    assert len(drawn) == len(real)
    for condition in ("cell_type", "perturbation"):
        assert drawn.obs[condition].astype(str).tolist() == real.obs[condition].astype(str).tolist()


def test_like_looks_at_labels_only(checkpoint, shards, tmp_path):
    real = anndata.read_h5ad(shards / "test.h5ad")
    real.X = real.X * 7
    real.write_h5ad(tmp_path / "louder.h5ad")
    for name, like in (("a", shards / "test.h5ad"), ("b", tmp_path / "louder.h5ad")):
        main(str(checkpoint), out=tmp_path / f"{name}.h5ad", like=like, steps=2)
    first, second = (anndata.read_h5ad(tmp_path / f"{name}.h5ad").X.toarray() for name in "ab")
    assert np.array_equal(first, second)


def test_like_with_another_way_of_asking_is_refused(checkpoint, shards, tmp_path):
    with pytest.raises(ValueError, match="--like takes conditions and number of cells from its file"):
        main(str(checkpoint), out=tmp_path / "cells.h5ad", like=shards / "test.h5ad", cell_type="type0")


def test_like_a_file_without_a_condition_lists_its_columns(checkpoint, shards, tmp_path):
    real = anndata.read_h5ad(shards / "test.h5ad")
    real.obs = real.obs[["cell_type"]]
    real.write_h5ad(tmp_path / "real.h5ad")
    with pytest.raises(ValueError, match=r"has no obs column \['perturbation'\]; its columns: cell_type"):
        main(str(checkpoint), out=tmp_path / "cells.h5ad", like=tmp_path / "real.h5ad")
    assert not (tmp_path / "cells.h5ad").exists()


def test_a_held_out_label_without_vectors_is_an_error_that_says_why_and_lists_near_matches(checkpoint, tmp_path):
    known = next(name for name in DCMTokenizer.from_pretrained(checkpoint).perturbations if name != "control")
    reason = "learned a vector for each training perturbation: others need --perturbation-embeddings"
    with pytest.raises(ValueError, match=f"unknown perturbation '{known[:-1]}'; near matches: .*{known}.*{reason}"):
        main(str(checkpoint), out=tmp_path / "cells.h5ad", perturbation=known[:-1])
    assert not (tmp_path / "cells.h5ad").exists()


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("genes.txt", r"it has no the tokenizer \(genes.txt\)|no .*tokenizer"),
        ("model.safetensors", r"the weights \(model.safetensors\)"),
        ("config.json", r"the configuration \(config.json\)"),
    ],
)
def test_an_incomplete_checkpoint_says_what_is_missing(checkpoint, tmp_path, missing, message):
    copy = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, copy, ignore=shutil.ignore_patterns("checkpoints"))
    (copy / missing).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        main(str(copy), out=tmp_path / "cells.h5ad")


def test_a_folder_that_is_not_there_is_not_looked_up_on_the_hub(tmp_path):
    for name in (str(tmp_path / "nothing"), "./nothing", "nothing/"):
        with pytest.raises(FileNotFoundError, match="no checkpoint folder"):
            load_checkpoint(name)


@pytest.mark.slow
def test_a_users_mistake_on_the_command_line_is_one_line_exit_code_2_and_no_file(checkpoint, tmp_path):
    root = Path(__file__).parent.parent
    out = tmp_path / "new" / "cells.h5ad"
    command = [sys.executable, "-m", "eval.sample", str(checkpoint), "--out", str(out), "--cell-type", "type7"]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert lines[-1].startswith("error: ")
    assert "type7" in lines[-1]
    assert "type1" in lines[-1]  # a near match
    assert "Traceback" not in done.stderr
    assert not out.parent.exists()
