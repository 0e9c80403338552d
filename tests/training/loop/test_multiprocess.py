"""Properties of training in processes of their own: killed and resumed, ended by SIGTERM, two that equal one.

A server process imports the package once; each run is forked from it, so that a run does not cost a start of Python.
"""

import faulthandler
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from safetensors.torch import load_file

import training.loop.accelerator
import training.loop.resume
import training.loop.step
import training.train
from tests.tiny_training import TINY_TRAINING, shards_of_two_panels, tiny_training
from training.config import TrainConfig
from training.loop.run import SAVED_AFTER_SIGNAL, Stopping

ROOT = Path(__file__).resolve().parents[3]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["training.loop.run", "training.train"])


@pytest.fixture
def config(shards, tmp_path) -> TrainConfig:
    return tiny_training(shards, tmp_path / "checkpoint", max_steps=16, log_every=1)


def killed_at(event: int) -> None:
    """Kill this process at the n-th time that it averages weights or makes a file of a state safe."""
    left = event

    def counted(function):
        def call(*arguments):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return call

    training.loop.step.update_average = counted(training.loop.step.update_average)
    training.loop.resume.os.fsync = counted(os.fsync)


class Split(Accelerator):
    """With FSDP2 on CPUs, where PyTorch has it and accelerate asks for it on other devices only."""

    def __init__(self, **options):
        super().__init__(**options)
        self.state.distributed_type = DistributedType.FSDP
        how = {"fsdp_version": 2, "auto_wrap_policy": "transformer_based_wrap"}
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(**how)


def work(config: TrainConfig, cache: str, environment: dict[str, str], kill_at: int | None, is_split: bool) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = cache
    if kill_at is not None:
        killed_at(kill_at)
    if is_split:
        training.loop.accelerator.Accelerator = Split
    faulthandler.dump_traceback_later(90)  # where it waits, should it wait for ever
    training.train.main(config)
    sys.stderr.flush()
    os._exit(0)  # threads of the server are not in its forks: at their end nobody waits for them


def start(
    config: TrainConfig, processes: int, kill_at: int | None = None, *, is_split: bool = False
) -> list[multiprocessing.Process]:
    """Processes of one run; the first is killed at event ``kill_at``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = []
    for rank in range(processes):
        environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}  # OpenMP and forks do not go together
        if processes > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        cache = str(datasets.config.HF_DATASETS_CACHE)
        kill_first_at = kill_at if rank == 0 else None
        worker = SERVER.Process(target=work, args=(config, cache, environment, kill_first_at, is_split))
        worker.start()
        workers.append(worker)
    return workers


def finish(workers: list[multiprocessing.Process], seconds: float = 120) -> list[int]:
    """Exit codes; when one has failed the others are killed, as torchrun does."""
    until = time.monotonic() + seconds
    while any(worker.exitcode is None for worker in workers):
        failed = any(worker.exitcode not in (None, 0, SAVED_AFTER_SIGNAL) for worker in workers)
        if failed or time.monotonic() > until:
            for worker in workers:
                worker.kill()
        time.sleep(0.02)
    return [worker.exitcode for worker in workers]


def losses(config: TrainConfig) -> dict[int, float]:
    lines = [json.loads(line) for line in (config.out / "training.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    return load_file(config.out / "model.safetensors")


@pytest.mark.slow
def test_a_run_of_two_processes_killed_three_times_ends_bit_for_bit_as_an_undisturbed_one(config, tmp_path):
    processes = 2
    whole, killed = (replace(config, out=tmp_path / name, dropout=0.1) for name in ("whole", "killed"))
    assert finish(start(whole, processes)) == [0] * processes
    chance = random.Random(processes)
    for _ in range(3):
        codes = finish(start(replace(killed, resume=True), processes, kill_at=chance.randint(3, 14)))
        assert codes[0] == -signal.SIGKILL
    assert finish(start(replace(killed, resume=True), processes)) == [0] * processes
    expected = weights(whole)
    for name, value in weights(killed).items():
        assert torch.equal(value, expected[name]), name
    assert losses(killed) == losses(whole)
    assert not list(killed.out.rglob(".*"))


@pytest.mark.slow
def test_a_network_split_by_fsdp2_learns_what_a_whole_one_does_and_resumes_bit_for_bit(config):
    config = replace(config, max_steps=7, save_every=3, score_every=None, dropout=0.1)
    whole, split, stopped = (replace(config, out=config.out / name) for name in ("whole", "split", "stopped"))
    assert finish(start(whole, 2)) == [0, 0]
    assert finish(start(split, 2, is_split=True)) == [0, 0]
    assert losses(split) == pytest.approx(losses(whole), abs=1e-5)
    files = len(list(training.loop.resume.all_states(split.out)[0].iterdir()))
    assert finish(start(stopped, 2, kill_at=3 + files + 3, is_split=True))[0] == -signal.SIGKILL
    state = training.loop.resume.all_states(stopped.out)[-1]
    parts = {f"state-of-process-0000{rank}.safetensors" for rank in (0, 1)}
    assert {path.name for path in state.glob("state*.safetensors")} == parts
    assert state.name == "step-3"
    assert finish(start(replace(stopped, resume=True), 2, is_split=True)) == [0, 0]
    assert losses(stopped) == losses(split)
    expected = weights(split)
    for name, value in weights(stopped).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["latent", "of several panels"])
def test_two_processes_that_share_a_global_batch_do_what_one_does(config, cells_h5ad, tmp_path, backbone):
    """Whatever was measured in each one's cells."""
    if backbone == "of several panels":
        config, backbone = replace(config, data=shards_of_two_panels(cells_h5ad, tmp_path)), "latent"
    one = replace(config, out=tmp_path / "one", batch_size=16, backbone=backbone)
    two = replace(config, out=tmp_path / "two", batch_size=8, backbone=backbone)
    assert finish(start(one, 1)) == [0]
    assert finish(start(two, 2)) == [0, 0]
    expected = losses(one)
    assert len(expected) == config.max_steps
    for step, loss in losses(two).items():
        assert loss == pytest.approx(expected[step], abs=1e-5), step
    expected = weights(one)
    for name, value in weights(two).items():
        torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_saves_a_state_and_exits_with_a_code_of_its_own(config):
    endless = replace(config, max_steps=100_000, learning_rate_schedule="constant", save_every=100_000)
    workers = start(endless, 2)
    log = endless.out / "training.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 7:
        assert all(worker.exitcode is None for worker in workers)
        time.sleep(0.02)
    workers[-1].terminate()  # one of them is enough
    assert finish(workers) == [SAVED_AFTER_SIGNAL] * 2
    state = training.loop.resume.all_states(endless.out)[-1]
    step = int(state.name.removeprefix("step-"))
    assert step >= 7
    assert not (endless.out / "model.safetensors").exists()
    assert finish(start(replace(endless, resume=True, max_steps=step + 2), 2)) == [0, 0]
    assert max(losses(endless)) == step + 2


def command(config: TrainConfig, *launcher: str, **options: object) -> subprocess.Popen:
    """``dcm-train`` in a process of its own."""
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in (TINY_TRAINING | options).items()]
    run = [sys.executable, *launcher, "-m", "training.train", "--data", config.data, "--out", config.out, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["HF_DATASETS_CACHE"] = str(datasets.config.HF_DATASETS_CACHE)
    return subprocess.Popen(run, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_ctrl_c_saves_a_state_with_one_line_that_says_how_to_go_on(config):
    run = command(config, max_steps=100_000, log_every=1)
    log = config.out / "training.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 2:
        assert run.poll() is None
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    said = run.communicate(timeout=60)[1]
    assert run.returncode == SAVED_AFTER_SIGNAL
    assert [line for line in said.splitlines() if "--resume" in line] == [
        f"stopped: the state of step {len(losses(config))} is saved; go on with --resume"
    ]
    assert "Traceback" not in said
    assert training.loop.resume.all_states(config.out)[-1].name == f"step-{len(losses(config))}"


def test_ctrl_c_twice_ends_at_once_unless_a_launcher_passed_the_same_one_on(monkeypatch):
    ended, press = [], signal.raise_signal
    before = signal.getsignal(signal.SIGINT)
    process = SimpleNamespace(num_processes=1, is_main_process=True)
    monkeypatch.setattr(signal, "raise_signal", ended.append)
    with Stopping(process, None) as stopping:
        assert stopping.reason(1) is None
        press(signal.SIGINT)
        press(signal.SIGINT)
        assert (stopping.reason(2), ended) == ("signal", [])
        stopping.signalled -= 2
        press(signal.SIGINT)
        assert ended == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_torchrun_starts_processes_that_work_together(config):
    run = command(config, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", max_steps=3)
    said = run.communicate(timeout=120)[1]
    assert run.returncode == 0, said
    state = json.loads((config.out / "checkpoints" / "step-3" / "state.json").read_text())
    assert state["num_processes"] == 2
    assert said.count("model: ") == 1  # one process speaks
