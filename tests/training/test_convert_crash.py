"""A conversion that is killed leaves nothing that looks finished, and the next one has the same bytes and tidies up."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training.test_convert_h5ad import files_of, made_up
from training.data.files import folder_written_aside, remove_leftovers, scratch_folder

# Imports once, then forks a process for each conversion that it is told to start, and says how that ended.
STARTER = """
import os, sys
from pathlib import Path
from training.convert_h5ad import main
from training.data import h5ad as h5ad_blocks
from training.data import shards
h5ad_blocks.BLOCK_CELLS, shards.SHARD_CELLS = 100, 300
for _ in sys.stdin:
    child = os.fork()
    if not child:
        sources = tuple(sorted(Path().glob("*.h5ad")))
        main(sources, out=Path("out/shards"), cell_type_key="line", n_top_genes=20)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture
def starter(tmp_path) -> Iterator[subprocess.Popen]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "HF_HOME": str(tmp_path / "hf"),
        "OMP_NUM_THREADS": "1",
    }
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(
        [sys.executable, "-c", STARTER], cwd=tmp_path, env=environment, text=True, **pipes
    ) as process:
        yield process
        process.kill()


def convert(starter: subprocess.Popen, kill_after: float | None = None) -> float:
    """Convert in a process of its own and kill that after so many seconds; returns how long it ran."""
    starter.stdin.write("\n")
    starter.stdin.flush()
    child = int(starter.stdout.readline())
    start = time.perf_counter()
    if kill_after is not None:
        time.sleep(kill_after)
        with contextlib.suppress(ProcessLookupError):  # it was faster this time
            os.kill(child, signal.SIGKILL)
    status = int(starter.stdout.readline())
    assert kill_after is not None or status == 0
    return time.perf_counter() - start


@pytest.mark.slow
def test_killed_at_any_moment_nothing_looks_finished_and_a_rerun_has_identical_bytes(tmp_path, starter):
    cells = made_up(n=400)
    cells.X = cells.X.tocsc()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    out = tmp_path / "out" / "shards"
    out.parent.mkdir()
    convert(starter)
    expected, seconds = files_of(out), convert(starter)
    assert files_of(out) == expected
    unfinished = 0
    for moment in (0.05, 0.35, 0.65, 0.95):
        shutil.rmtree(out, ignore_errors=True)
        convert(starter, kill_after=moment * seconds)
        unfinished += not out.exists()
        assert not out.exists() or files_of(out) == expected
    assert unfinished > 1
    convert(starter)
    assert files_of(out) == expected
    for moment in (0.4, 0.8):  # the earlier conversion stays until it is replaced
        convert(starter, kill_after=moment * seconds)
        assert files_of(out) == expected
    convert(starter)
    assert [path.name for path in out.parent.iterdir()] == ["shards"]


def test_leftovers_are_removed_but_not_the_folders_of_living_processes(tmp_path):
    out = tmp_path / "shards"
    left = tmp_path / ".shards.0123abcd.part"
    left.mkdir()
    other = tmp_path / ".other.0123abcd.part"
    other.mkdir()
    with scratch_folder(out) as scratch, folder_written_aside(out) as folder:
        remove_leftovers(out)
        assert scratch.is_dir()
        assert folder.is_dir()
        assert not left.exists()
        assert other.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.0123abcd.part", "shards"]
