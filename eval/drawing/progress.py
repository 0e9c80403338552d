"""Say how far a long task is: a bar on a terminal, one line per half minute elsewhere.

Knows nothing of the task.
"""

import logging
import sys
import time
from types import TracebackType

from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30


class ProgressReport:
    """Counts the units of a task that are done; used as a context.

    Args:
        total: units in all.
        task: what is done, in the words of the user.
        unit: what is counted, such as ``"cells"``.
    """

    def __init__(self, total: int, *, task: str, unit: str):
        self.total, self.task, self.unit = total, task, unit
        self.done = 0
        self.start = self.last_line = time.monotonic()
        self.is_terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, desc=task, unit=f" {unit}", unit_scale=True, disable=not self.is_terminal)

    def __enter__(self) -> "ProgressReport":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()

    @property
    def rate(self) -> float:
        """Units per second so far."""
        return self.done / max(time.monotonic() - self.start, 1e-9)

    def update(self, units: int) -> None:
        """Note that ``units`` more are done."""
        self.done += units
        self.bar.update(units)
        now = time.monotonic()
        if self.is_terminal or now - self.last_line < SECONDS_BETWEEN_LINES:
            return
        self.last_line, rate = now, self.done / (now - self.start)
        left = (self.total - self.done) / max(rate, 1e-9)
        line = "%s: %d of %d %s, %.3g per second, %.0f s left"
        logger.info(line, self.task, self.done, self.total, self.unit, rate, left)
