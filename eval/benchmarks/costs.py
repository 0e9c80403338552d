"""Measure what a piece of work costs: time, peak memory and number of operations."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch.utils._python_dispatch import TorchDispatchMode

MIB = 2**20


class Operations(TorchDispatchMode):
    """Context that counts the operations of PyTorch that compute or copy something: no views."""

    number = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.number += not operation.is_view
        return operation(*args, **(kwargs or {}))


class Cost:
    """Context that can be entered again and again; keeps the seconds and the growth of a GPU's memory of each time."""

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self.seconds: list[float] = []
        self.mib: list[float] = []

    def __enter__(self) -> "Cost":
        wait_for(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        self.start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        wait_for(self.device)
        self.seconds.append(time.perf_counter() - self.start)
        if self.device.type == "cuda":
            self.mib.append((torch.cuda.max_memory_allocated(self.device) - self.before) / MIB)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def most_mib(self) -> float | None:
        return max(self.mib, default=None)


def interleaved(works: Mapping[str, Callable[[], object]], device: torch.device, *, rounds: int) -> dict[str, Cost]:
    """Costs of each work: they take turns (A B C A B C), so that a busy machine slows all alike."""
    costs = {name: Cost(device) for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            with costs[name]:
                work()
    return costs


def wait_for(device: torch.device) -> None:
    """Return when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def product_rate(device: torch.device, *, size: int = 1024, times: int = 30) -> float:
    """FLOP/s of the fastest of some float32 products of square matrices: what this device can do at all."""
    left, right = torch.randn(2, size, size, device=device).unbind()
    return 2 * size**3 / min(interleaved({"": lambda: left @ right}, device, rounds=times)[""].seconds)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the number of threads of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, threads: {torch.get_num_threads()}"
