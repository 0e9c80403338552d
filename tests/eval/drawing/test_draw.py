"""Properties of runs that are cut, killed, or shared by processes: the cells are those of a run left alone."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eval.drawing.draw import ChunkFiles
from eval.sample import main
from modeling_dcm import generation_dcm
from tests.tiny_training import assert_same_file
from training.data.checkpoint import load_checkpoint


def interrupted_run(monkeypatch, trained: Path, out: Path, options: dict) -> None:
    """Draw the first three chunks, and no more."""
    take = ChunkFiles.take

    def interrupted(self, chunk):
        if chunk == 3:
            raise KeyboardInterrupt
        return take(self, chunk)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ChunkFiles, "take", interrupted)
        main(str(trained), out=out, **options)


def environment(**more: str) -> dict[str, str]:
    root = Path(__file__).parents[3]
    return {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **more}


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(trained, tmp_path, caplog):
    out = tmp_path / "cells.h5ad"
    parts = tmp_path / ".cells.h5ad.parts"
    command = [sys.executable, "-m", "eval.sample", str(trained), "--out", str(out), "--num-cells", "80"]
    command += ["--batch-size", "4", "--cell-type", "type1"]
    process = subprocess.Popen(command, env=environment(), cwd=tmp_path, stderr=subprocess.DEVNULL)
    while len(list(parts.glob("*.safetensors"))) < 3:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(list(parts.glob("*.safetensors")))
    assert not out.exists()
    options = {"num_cells": 80, "cell_type": "type1", "batch_size": 4}
    with caplog.at_level(logging.INFO):
        main(str(trained), out=out, **options)
    assert f"{kept} of 20 chunks are there already and are not drawn again" in caplog.text
    assert f"drew {80 - 4 * kept} cells" in caplog.text
    assert not parts.exists()
    main(str(trained), out=tmp_path / "whole.h5ad", **options)
    assert_same_file(out, tmp_path / "whole.h5ad")


@pytest.mark.parametrize("change", [{"seed": 1}, {"num_cells": 21}, {"perturbation": "control"}, {"library_size": 9}])
def test_chunks_of_another_request_are_refused_and_kept(trained, tmp_path, monkeypatch, change):
    out, options = tmp_path / "cells.h5ad", {"num_cells": 20, "batch_size": 4, "steps": 2}
    interrupted_run(monkeypatch, trained, out, options)
    with pytest.raises(ValueError, match=r"3 drawn chunks of another request \(.* then, .* now\).* remove the folder"):
        main(str(trained), out=out, **options | change)
    assert not out.exists()
    model, tokenizer = load_checkpoint(str(trained))
    torch.nn.init.normal_(next(model.parameters()))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "other" / "checkpoint")
    with pytest.raises(ValueError, match=r"another request \(.*checkpoint_sha256: \w+ then, \w+ now"):
        main(str(tmp_path / "other" / "checkpoint"), out=out, **options)
    main(str(trained), out=out, **options)
    main(str(trained), out=tmp_path / "whole.h5ad", **options)
    assert_same_file(out, tmp_path / "whole.h5ad")


class Touched(TorchDispatchMode):
    """Counts the elements of all tensors that operations return."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        self.elements += sum(value.numel() for value in tree_leaves(out) if isinstance(value, torch.Tensor))
        return out


def test_a_chunk_costs_the_same_whether_there_are_10_100_or_1000(trained, tmp_path, monkeypatch):
    """In elements of tensors and in listings of a folder, with a network that says nothing."""
    monkeypatch.setattr(generation_dcm, "sample_counts", lambda denoise, x, **options: torch.zeros_like(x))
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(generation_dcm, "denoiser", lambda *arguments, **options: None)
    monkeypatch.setattr(ChunkFiles, "merge", lambda files, annotations: None)
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    elements, listings = {}, {}
    for chunks in (10, 100, 1000):
        listed.clear()
        with Touched() as touched:
            main(str(trained), out=tmp_path / f"{chunks}.h5ad", num_cells=2 * chunks, batch_size=2)
        elements[chunks], listings[chunks] = touched.elements, len(listed)
    assert listings[10] == listings[100] == listings[1000] > 0
    assert (elements[1000] - elements[100]) / 900 == pytest.approx((elements[100] - elements[10]) / 90, rel=0.01)


@pytest.mark.slow
def test_two_processes_draw_what_one_draws(trained, tmp_path):
    out = tmp_path / "two.h5ad"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    command += ["-m", "eval.sample", str(trained), "--out", str(out), "--num-cells", "50", "--batch-size", "8"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("two.h5ad: 50 cells x 15 genes") == 1
    main(str(trained), out=tmp_path / "one.h5ad", num_cells=50, batch_size=8)
    assert_same_file(tmp_path / "one.h5ad", out)


DIES = """
import os, signal, time
from eval.drawing.draw import ChunkFiles
from eval.sample import cli

take = ChunkFiles.take

def take_and_die(self, chunk):
    is_taken = take(self, chunk)
    if os.environ["RANK"] == "1" and is_taken:
        os.kill(os.getpid(), signal.SIGKILL)
    while os.environ["RANK"] == "0" and is_taken and len(list(self.folder.glob("*.taken"))) < 2:
        time.sleep(0.01)
    return is_taken

ChunkFiles.take = take_and_die
cli()
"""


@pytest.mark.slow
def test_a_process_that_dies_neither_hangs_the_others_nor_leaves_an_output_and_its_chunks_can_be_drawn_later(
    trained, tmp_path
):
    out, port = tmp_path / "cells.h5ad", free_port()
    command = [sys.executable, "-c", DIES, str(trained), "--out", str(out), "--num-cells", "40"]
    command += ["--batch-size", "8"]
    processes = []
    for rank in ("0", "1"):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        env = environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **own)
        processes.append(subprocess.Popen(command, env=env, cwd=tmp_path, stderr=subprocess.PIPE, text=True))
    try:
        messages = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [2, -signal.SIGKILL], messages
    assert "error: another process failed, so there is no output yet" in messages[0]
    assert not out.exists()
    main(str(trained), out=out, num_cells=40, batch_size=8)
    assert len(anndata.read_h5ad(out)) == 40


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@pytest.fixture
def files(tmp_path) -> ChunkFiles:
    """Seven cells in chunks of three, nothing drawn yet."""
    files = ChunkFiles(tmp_path / "new" / "cells.h5ad", {"seed": 0}, num_cells=7, batch_size=3)
    assert not files.folder.parent.exists()
    assert files.prepare() == [0, 1, 2]
    return files


def annotations(num_cells: int, num_genes: int) -> anndata.AnnData:
    obs, var = (pd.DataFrame(index=np.arange(n).astype(str)) for n in (num_cells, num_genes))
    return anndata.AnnData(obs=obs, var=var, uns={"generator": "test"})


@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_merged_chunks_are_the_matrix_in_order_and_leave_nothing_behind(files, density):
    counts = sparse.random(7, 4, density, format="csr", random_state=0, data_rvs=lambda n: np.arange(1, n + 1))
    counts = counts.astype(np.int32)
    for chunk in (2, 0, 1):
        files.write(chunk, counts[files.rows[chunk]])
    files.merge(annotations(7, 4))
    cells = anndata.read_h5ad(files.out)
    assert (counts != cells.X).nnz == 0
    assert cells.X.dtype == np.int32
    assert cells.X.indptr.dtype == cells.X.indices.dtype == np.int32
    assert cells.uns["generator"] == "test"
    assert (counts[4:] != anndata.read_h5ad(files.out, backed="r")[4:].to_memory().X).nnz == 0
    assert list(files.out.parent.iterdir()) == [files.out]


def test_what_was_taken_but_not_written_is_to_be_drawn_again(files):
    other = ChunkFiles(files.out, {"seed": 1}, num_cells=9, batch_size=3)
    assert other.prepare() == [0, 1, 2]  # another request meets no resistance where nothing was drawn
    assert files.prepare() == [0, 1, 2]
    assert [files.take(chunk) for chunk in (0, 1, 1)] == [True, True, False]  # a chunk is taken once
    files.write(0, sparse.csr_matrix((3, 4), dtype=np.int32))
    assert files.prepare() == [1, 2]
    assert files.take(1)


def test_an_output_is_not_written_while_a_chunk_is_missing_or_damaged(files):
    for chunk in (0, 2):
        files.write(chunk, sparse.csr_matrix((len(range(7)[files.rows[chunk]]), 4), dtype=np.int32))
    with pytest.raises(FileNotFoundError, match=r"1\.safetensors"):
        files.merge(annotations(7, 4))
    files.write(1, sparse.csr_matrix((3, 4), dtype=np.int32))
    damaged = files.folder / "1.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"1\.safetensors' is damaged \(.*\): remove it and run again"):
        files.merge(annotations(7, 4))
    assert not files.out.exists()
    damaged.unlink()
    assert files.prepare() == [1]
