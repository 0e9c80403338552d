"""Do pieces of work in several processes, with results, errors and progress as if one did them in turn.

Results come in the order of the jobs, and so does the first error. The processes start as fresh interpreters, so a job
is a picklable function with its arguments; they end within a moment when their parent does, in whatever way.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

from tqdm import tqdm

from training.data.files import hold

START = "forkserver"  # imports the packages once for all processes, and no thread or open file is inherited
PRELOADED = ["training.conversion.write"]
POLL_SECONDS = 0.1

Report = Callable[[float], object]  # is told of progress, in the unit of the bar
Job = Callable[..., Any]  # called with ``report=``


def available_cores() -> int:
    """Cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class FileWorkers:
    """What :func:`file_workers` yields.

    Attributes:
        processes: how many there are.
    """

    def __init__(self, processes: int, pool: ProcessPoolExecutor | None = None, done: Any = None, stopped: Any = None):
        self.processes = processes
        self._pool, self._done, self._stopped = pool, done, stopped

    def run(self, jobs: Sequence[Job], *, desc: str, total: float, unit: str) -> Iterator[Any]:
        """Do the jobs; yields their results in order.

        Args:
            jobs: each is called with ``report``, a function that moves the bar.
            desc: what the bar says.
            total: what all jobs report in sum.
            unit: of what they report.

        Raises:
            Exception: whatever the first of the jobs that fail raises; no job is running then.
            OSError: a process was killed.
        """
        with tqdm(total=total, desc=desc, unit=unit, unit_scale=True, delay=1, disable=None) as bar:
            if self._pool is None:
                for job in jobs:
                    yield job(report=bar.update)
                return
            done = self._done.get_obj()  # read without its lock, which a process that was killed may still hold
            before = done.value
            futures = [self._pool.submit(_reporting, job) for job in jobs][::-1]  # the last is the next
            try:
                while futures:
                    finished = wait(futures[-1:], timeout=POLL_SECONDS).done
                    bar.update(done.value - before - bar.n)
                    if finished:
                        yield _result(futures.pop())
            finally:
                self._stop(futures)

    def _stop(self, futures: list[Future]) -> None:
        """Wait until none is running."""
        if futures:
            self._stopped.value = True
            for future in futures:
                future.cancel()
            wait(futures)


@contextmanager
def file_workers(processes: int, folder: Path) -> Iterator[FileWorkers]:
    """Start processes for jobs, and end them with the block; with one, jobs run in this process.

    Args:
        processes: how many.
        folder: the working folder that they write to and therefore hold.

    Raises:
        ValueError: ``processes`` is below 1.
    """
    if processes < 1:
        raise ValueError(f"--processes is {processes}; expected 1 or more")
    if processes == 1:
        yield FileWorkers(1)
        return
    context = get_context(START)
    if START == "forkserver":
        context.set_forkserver_preload(PRELOADED)
    done, stopped = context.Value("d"), context.Value("b", lock=False)
    with ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(done, stopped, folder)) as pool:
        yield FileWorkers(processes, pool, done, stopped)


def _result(future: Future) -> Any:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise OSError(
            "a process that read or wrote cells was killed, perhaps for want of memory; pass a smaller --processes"
        ) from error


# --- in the processes -------------------------------------------------------------------------------------------------


def _begin(done: Any, stopped: Any, folder: Path) -> None:
    global _progress
    _progress = done, stopped
    hold(folder)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers it, and stops the jobs
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    connection.wait([parent_process().sentinel])
    os._exit(1)


def _reporting(job: Job) -> Any:
    return job(report=_report)


def _report(amount: float) -> None:
    done, stopped = _progress
    if stopped.value:
        raise InterruptedError("stopped, as another job failed")
    with done.get_lock():
        done.value += amount
