"""What a run computes by, as `accelerate` and `torchrun` started it: processes, devices, kernels."""

import logging
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration
from transformers.modeling_flash_attention_utils import FLASH_ATTN_KERNEL_FALLBACK, lazy_import_flash_attention
from transformers.utils import is_flash_attn_2_available, is_kernels_available

from modeling_dcm import DCMForDenoising
from modeling_dcm.layers_dcm import Block
from training.config import TrainConfig

logger = logging.getLogger(__name__)

WHOLE_COPIES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
# the others wait while the first process validates, scores and saves; their libraries give up after 10 minutes
PATIENCE = timedelta(hours=2)
KINDS_OF_CALLS = 4  # of a network's blocks in training: among tokens, at queried genes alone, into latents and back


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Return the accelerator of this process; what accelerate was told must fit the options."""
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # TF32 for what bf16 leaves in float32
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        cpu=not torch.cuda.is_available(),
        log_with=tracker_names(config.trackers) or None,
        project_config=ProjectConfiguration(logging_dir=str(config.out / "trackers")),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if accelerator.distributed_type not in WHOLE_COPIES and not accelerator.is_fsdp2:
        raise ValueError(
            f"accelerate was configured for {accelerator.distributed_type.value}, expected plain data parallelism, or "
            "for networks that outgrow a device FSDP2 (fsdp_version: 2)"
        )
    accumulate = accelerator.gradient_accumulation_steps
    if accumulate != config.gradient_accumulation_steps:
        raise ValueError(
            f"accelerate was configured for gradient_accumulation_steps={accumulate}, training for "
            f"{config.gradient_accumulation_steps}: give --gradient-accumulation-steps {accumulate}, or leave it out "
            "of accelerate's configuration"
        )
    return accelerator


def tracker_names(wanted: str) -> list[str]:
    """Return the trackers ``wanted``, which commas separate; ``auto`` is tensorboard where it is installed."""
    installed = [tracker.value for tracker in get_available_trackers()]
    if wanted == "auto":
        return [name for name in installed if name == "tensorboard"]
    names = [] if wanted == "none" else [name.strip() for name in wanted.split(",")]
    for name in names:
        if name not in installed:
            there = ", ".join(["auto", "none", *installed])
            raise ValueError(f"tracker {name!r} is not installed, or none that accelerate knows; there are: {there}")
    return names


def start_trackers(accelerator: Accelerator, config: TrainConfig) -> None:
    """Begin a run with each tracker, with the options of training."""
    if accelerator.log_with:
        options = {name: v if isinstance(v, bool | int | float) else str(v) for name, v in config.options().items()}
        accelerator.init_trackers(config.out.name or "training", config=options)


def attention_implementation(config: TrainConfig, device: torch.device, mixed_precision: str) -> str:
    """What ``attn`` says, or for ``auto`` the fastest implementation that is there and fits."""
    fits = device.type == "cuda" and mixed_precision in ("bf16", "fp16")
    if config.attn in ("sdpa", "eager") or (config.attn == "auto" and not fits):
        return config.attn.replace("auto", "sdpa")
    reason = None if is_flash_attn_2_available() else _why_no_kernel()
    if reason is None:
        return "flash_attention_2"
    if config.attn == "flash_attention_2":
        raise ValueError(f"attn='flash_attention_2', but {reason}, or take attn='sdpa'")
    logger.info("attention is PyTorch's own: %s", reason)
    return "sdpa"


def _why_no_kernel() -> str | None:
    """Why flash attention's built kernel, which transformers takes from the Hub, can't be had here, in one line."""
    if not is_kernels_available():
        return "there is no flash attention: pip install 'transformers[kernels]' (or flash-attn, which has to be built)"
    try:
        lazy_import_flash_attention(FLASH_ATTN_KERNEL_FALLBACK["flash_attention_2"])
    except Exception as error:  # of whatever kind: no network, or no kernel for this machine
        why = (str(error).splitlines() or [type(error).__name__])[0]
        return f"its kernel can't be had from the Hub ({why}): run once with a network"
    return None


def compiles(config: TrainConfig, device: torch.device) -> bool:
    """Whether blocks are compiled: as ``compile`` says, or by default on a GPU, if torch.compile works there."""
    if config.compile is not None or device.type != "cuda":
        return bool(config.compile)
    try:
        torch.compile(torch.nn.functional.gelu)(torch.ones(8, device=device))
    except Exception as error:  # of whatever kind: a compiler is missing, or the device is too old
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        logger.warning("torch.compile does not work here (%s): blocks run as they are written", reason)
        return False
    return True


def compile_blocks(model: DCMForDenoising, backend: str = "inductor") -> None:
    """Compile each block in place, for static shapes; the rest of the network depends on the data (rare counts).

    All networks of a process share what is compiled of a block, and torch's limit to it: each one adds its own shapes.
    """
    torch._dynamo.config.recompile_limit += KINDS_OF_CALLS
    for block in model.modules():
        if isinstance(block, Block):
            block.compile(backend=backend, dynamic=False)
