"""When to stop before the last step: a signal to end (Slurm's pre-emption), or the end of the time given.

All processes stop after the same step. Knows nothing of what is saved then.
"""

import signal
import threading
import time
from types import FrameType

import torch
from accelerate import Accelerator

SAVED_AFTER_SIGNAL = 75  # exit code, EX_TEMPFAIL of sysexits.h: the state is saved, start again with --resume
AGREE_EVERY = 5  # steps between agreements of several processes


class Stopping:
    """``with Stopping(accelerator, minutes) as stopping:``, then ``stopping.reason(step)`` after each step."""

    def __init__(self, accelerator: Accelerator, max_time: float | None):
        self.accelerator = accelerator
        self.until = float("inf") if max_time is None else time.monotonic() + 60 * max_time
        self.signalled = False
        self.before = None

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is threading.main_thread():  # Python sets handlers nowhere else
            self.before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signalled = True

    def reason(self, step: int) -> str | None:
        """``"signal"``, ``"time"`` or None after step number ``step``, the same in every process."""
        asked = [self.signalled, time.monotonic() > self.until]
        if self.accelerator.num_processes > 1:
            if step % AGREE_EVERY:
                return None
            device = self.accelerator.device
            asked = self.accelerator.reduce(torch.tensor(asked, dtype=torch.float32, device=device), "sum").tolist()
        return "signal" if asked[0] else "time" if asked[1] else None
