"""What a piece of work costs: seconds, memory, and which operations they go to.

Knows nothing of what the work is. All of it is asked on one device, CPU or GPU.
"""

import os
import time
from collections.abc import Callable, Mapping

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_flop_count

MIB = 2**20

MEMORY = (
    "largest sum of bytes that PyTorch's allocator had handed out: on a GPU torch.cuda.max_memory_allocated, on a CPU "
    "the same from the profiler's record of every allocation, so without the interpreter, code, and what libraries "
    "allocate themselves"
)

KINDS = {  # kinds of operations by parts of their names; the first that fits counts
    "attention": ("attention", "flash", "fmha"),
    "optimiser and averages": ("adam", "lerp", "foreach", "multi_tensor"),
    "matrix products": ("addmm", "mm", "bmm", "linear", "gemm", "cutlass", "nvjet"),
    "softmax and cross-entropy": ("softmax", "nll_loss", "logsumexp"),
    "GELU": ("gelu",),
    "layer norm": ("layer_norm",),
    "sorting for the noise": ("sort", "topk"),
    "embeddings and gathers": ("embedding", "gather", "scatter", "index", "nonzero"),
    "copies and fills": ("copy", "cat", "memcpy", "memset", "fill", "zero", "clone"),
    "sums and products": ("add", "mul", "sum", "div", "sub", "exp", "log", "reduce", "elementwise"),
}
OTHER = "other"

_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
if _CPU_ATTENTION not in flop_registry:  # PyTorch counts the kernels of GPUs only

    @register_flop_formula(_CPU_ATTENTION)
    def _cpu_attention_flops(query_shape, key_shape, value_shape, *args, out_shape=None, **kwargs) -> int:
        return sdpa_flop_count(query_shape, key_shape, value_shape)


def interleaved(
    works: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    seconds: float,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each work, once for each round: they take turns (A B C A B C), so that a busy machine slows all alike.

    Args:
        works: what to do, by name; each has run before.
        device: where, waited for at the end of each turn.
        rounds: turns of each work.
        seconds: a turn repeats its work until this time is over, at least once.
        progress: called after each turn.
    """
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            taken[name].append(_turn(work, device, seconds))
            progress()
    return taken


def _turn(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of one repetition."""
    wait_for(device)
    start, times = time.perf_counter(), 0
    while not times or time.perf_counter() - start < seconds:
        work()
        times += 1
    wait_for(device)
    return (time.perf_counter() - start) / times


def wait_for(device: torch.device) -> None:
    """Return when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_growth(work: Callable[[], object], device: torch.device) -> float:
    """By how many MiB the memory in use grows within ``work()`` at most; see :data:`MEMORY`."""
    if device.type == "cuda":
        wait_for(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        wait_for(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    with _quiet_profile(profile_memory=True) as profiled:
        work()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()  # negative where memory is handed back
        most = max(most, now)
    return most / MIB


def product_rate(device: torch.device, *, size: int = 1024, times: int = 30) -> float:
    """FLOP/s of the fastest of some float32 products of square matrices: what this device can do at all."""
    left, right = torch.randn(2, size, size, device=device).unbind()
    fastest = float("inf")
    for _ in range(times):
        fastest = min(fastest, _turn(lambda: left @ right, device, 0.0))
    return 2 * size**3 / fastest


def shares_of_operations(work: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Share of the device's time within ``work()`` of each of :data:`KINDS`, largest first."""
    on_gpu = device.type == "cuda"
    with _quiet_profile(*([ProfilerActivity.CUDA] if on_gpu else [])) as profiled:
        work()
        wait_for(device)
    totals: dict[str, float] = {}
    for operation in profiled.key_averages():
        taken = operation.self_device_time_total if on_gpu else operation.self_cpu_time_total
        kind = _kind(operation.key.lower())
        totals[kind] = totals.get(kind, 0.0) + taken
    whole = sum(totals.values()) or 1.0
    return dict(sorted(((kind, taken / whole) for kind, taken in totals.items()), key=lambda item: -item[1]))


def _quiet_profile(*activities: ProfilerActivity, profile_memory: bool = False) -> profile:
    """PyTorch's profiler, whose library else says on stderr when it begins and ends."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")
    return profile(activities=[ProfilerActivity.CPU, *activities], profile_memory=profile_memory)


def _kind(operation: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in operation for part in parts)), OTHER)
