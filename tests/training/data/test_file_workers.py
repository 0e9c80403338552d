"""Properties of work in several processes: results, errors and bytes do not depend on how many there are."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tests.training.test_convert_h5ad import KEYS, files_of, log_normalise, made_up
from training.convert_h5ad import main
from training.data.files import remove_leftovers
from training.data.workers import file_workers

BAR = {"desc": "working", "total": 6, "unit": " jobs"}


def square(number: int, *, report) -> int:
    time.sleep(0.02 * (5 - number))  # the first is the last to be done
    report(1)
    return number**2


def fail(number: int, *, report) -> None:
    time.sleep(0.1 * (5 - number))
    raise ValueError(f"job {number} is wrong")


def report_for_ever(*, report) -> None:
    while True:
        report(0)
        time.sleep(0.01)


def be_killed(*, report) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("processes", [1, 3])
def test_results_are_in_the_order_of_the_jobs(tmp_path, processes):
    with file_workers(processes, tmp_path) as workers:
        for _ in range(2):
            assert list(workers.run([partial(square, i) for i in range(6)], **BAR)) == [0, 1, 4, 9, 16, 25]


@pytest.mark.parametrize("processes", [1, 3])
def test_the_error_is_that_of_the_first_job_and_the_others_are_stopped(tmp_path, processes):
    jobs = [partial(square, 0), partial(fail, 1), partial(fail, 4), report_for_ever]
    with pytest.raises(ValueError, match=r"^job 1 is wrong$"), file_workers(processes, tmp_path) as workers:
        list(workers.run(jobs, **BAR))


def test_a_process_that_is_killed_is_an_error(tmp_path):
    with (
        pytest.raises(OSError, match=r"a process .* was killed, .*; pass a smaller --processes"),
        file_workers(2, tmp_path) as workers,
    ):
        list(workers.run([be_killed, partial(square, 1)], **BAR))


def test_fewer_than_one_process_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--processes is 0; expected 1 or more"), file_workers(0, tmp_path):
        pass


@pytest.fixture
def three(tmp_path) -> tuple[Path, ...]:
    """Three files of different cells: by cell, by gene, and with fewer genes."""
    cells = made_up(n=900)
    cells[:200].copy().write_h5ad(tmp_path / "one.h5ad")
    by_gene = cells[200:800].copy()
    by_gene.X = by_gene.X.tocsc()
    by_gene.write_h5ad(tmp_path / "two.h5ad")
    cells[800:, :28].copy().write_h5ad(tmp_path / "three.h5ad")
    return tuple(tmp_path / f"{name}.h5ad" for name in ("one", "two", "three"))


def test_a_conversion_has_the_same_bytes_whatever_the_number_of_processes(three, tmp_path):
    options = {"join": "union", "n_top_genes": 22, **KEYS}
    one, two, five = (
        files_of(main(three, out=tmp_path / f"{processes}", processes=processes, **options)) for processes in (1, 2, 5)
    )
    assert one == two == five
    assert "panels.json" in one


def test_of_several_wrong_files_the_first_is_named_and_nothing_is_left(three, tmp_path):
    cells = made_up(n=50)
    log_normalise(cells).write_h5ad(three[1])
    cells.write_h5ad(three[2])
    with pytest.raises(ValueError, match=r"^X of two.h5ad: .* looks log-normalised"):
        main(three, out=tmp_path / "shards", processes=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.h5ad", "three.h5ad", "two.h5ad"]


@pytest.mark.slow
def test_processes_end_when_the_conversion_is_killed(three, tmp_path):
    out = tmp_path / "out" / "shards"
    out.parent.mkdir()
    (tmp_path / "killed.py").write_text(KILLED)
    command = [sys.executable, tmp_path / "killed.py", *three, out]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "HF_HOME": str(tmp_path / "hf")}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        workers = [int(number) for number in process.stdout.readline().split()]
        process.kill()
    assert len(workers) == 2
    assert process.returncode == -signal.SIGKILL
    deadline = time.perf_counter() + 20
    while list(out.parent.iterdir()):
        assert time.perf_counter() < deadline, "a process outlived the conversion that started it"
        remove_leftovers(out)
        time.sleep(0.05)


# Says which processes it has started, once these are at work, and goes on until it is killed.
KILLED = """
import multiprocessing, sys
from pathlib import Path
from training import convert_h5ad
from training.conversion import genes

def say(cells, train, n_top_genes, workers):
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)  # both have opened files
    list(workers.run([work_for_ever] * 2, desc="", total=1, unit=""))

def work_for_ever(*, report):
    while True:
        pass

if __name__ == "__main__":
    genes.choose_panel = say
    convert_h5ad.main(tuple(map(Path, sys.argv[1:4])), out=Path(sys.argv[4]), processes=2)
"""
