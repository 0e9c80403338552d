"""How hard a device works: floating-point operations of a step, the device's peak, and memory.

Knows nothing of the loop. Model FLOPs are three forward passes: a backward pass costs two.
"""

import sys

import torch
from torch.utils.flop_counter import FlopCounterMode

try:
    import resource
except ImportError:  # Windows has no such module
    resource = None

# dense 16-bit matrix products, FLOP/s, from the makers' data sheets; the first name found in the device's name counts
PEAK_FLOPS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Peak FLOP/s of a device by its name, for dense 16-bit matrix products; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def training_flops(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Floating-point operations of forward and backward pass for one batch, counted in one forward pass."""
    with FlopCounterMode(display=False) as counter:
        model(**batch)
    return 3.0 * counter.get_total_flops()


def peak_memory(device: torch.device) -> float | None:
    """The most memory so far, GiB: tensors on a GPU, or the whole process on a CPU; None where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
