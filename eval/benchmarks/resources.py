"""What a piece of work costs: time, peak memory and floating-point operations.

Knows nothing of what the work is.
"""

import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

MIB = 2**20

# Dense peaks in TFLOP/s (bfloat16 with tensor cores, float32 without) as the makers' data sheets give them, by a part
# of the device's name; the first that fits is taken.
PEAK_TFLOPS = {
    "B200": (2250.0, 75.0),
    "H200": (989.0, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "L4": (121.0, 30.3),
    "A10G": (70.0, 35.0),
    "A10": (125.0, 31.2),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
}


class Timer:
    """Context that can be entered again and again; keeps the seconds of the clock and of the processor of each time."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    def __enter__(self) -> "Timer":
        self.start, self.cpu_start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        self.cpu_seconds.append(time.process_time() - self.cpu_start)

    @property
    def median(self) -> float:
        """Seconds of the clock."""
        return statistics.median(self.seconds)

    @property
    def cpu_share(self) -> float:
        """Seconds of the processor, all threads together, over those of the clock."""
        return sum(self.cpu_seconds) / sum(self.seconds)


class PeakMemory:
    """Context that measures the largest amount of memory in use within it.

    Attributes:
        mib: on a GPU what PyTorch had allocated there at most, weights included. On a CPU the growth of the process's
            resident memory, so without the weights; None where the system does not tell (it needs Linux and glibc).
    """

    ON_GPU = "largest allocation of PyTorch on the GPU, weights included"
    ON_CPU = "growth of the process's resident memory while drawing, without weights and code"

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self.mib: float | None = None

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.before = _resident_mib() if _forget_peak() else None
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            self.mib = torch.cuda.max_memory_allocated(self.device) / MIB
        elif self.before is not None:
            self.mib = max(0.0, _resident_mib("VmHWM") - self.before)


def count_flops(work: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and attentions in ``work()``; a multiply-add counts two."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def known_peak(device_name: str, dtype: torch.dtype) -> float | None:
    """The device's peak in TFLOP/s for ``dtype``, None for a device that is not in the table."""
    for name, (bfloat16, float32) in PEAK_TFLOPS.items():
        if name in device_name:
            return float32 if dtype == torch.float32 else bfloat16
    return None


def _forget_peak() -> bool:
    """Hand freed memory back to the system and set the process's peak to what is in use; False where that fails."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError, TypeError):
        return False
    return True


def _resident_mib(field: str = "VmRSS") -> float:
    """Resident memory of this process, or with ``VmHWM`` its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))
