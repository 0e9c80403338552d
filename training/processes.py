"""The processes of a run, as `accelerate` and `torchrun` started them, and the trackers that it reports to.

Knows nothing of data and networks.
"""

from dataclasses import asdict

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, ProjectConfiguration

from training.config import TrainConfig

WHOLE_COPIES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def build_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator of this process.

    Raises:
        ValueError: a tracker is not installed, or accelerate was told to split the network over the processes.
    """
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        cpu=not torch.cuda.is_available(),
        log_with=tracker_names(config.trackers) or None,
        project_config=ProjectConfiguration(logging_dir=str(config.out / "trackers")),
    )
    if accelerator.distributed_type not in WHOLE_COPIES:
        raise ValueError(
            f"accelerate was configured for {accelerator.distributed_type.value}, expected plain data parallelism: "
            "these networks fit on one device, and averages and states need all of their weights"
        )
    return accelerator


def tracker_names(wanted: str) -> list[str]:
    """Accelerate's names of the trackers ``wanted``, separated by commas; ``auto`` is tensorboard where there is one.

    Raises:
        ValueError: one is not installed, or accelerate does not know it.
    """
    installed = [tracker.value for tracker in get_available_trackers()]
    if wanted == "auto":
        return [name for name in installed if name == "tensorboard"]
    names = [] if wanted == "none" else [name.strip() for name in wanted.split(",")]
    missing = [name for name in names if name not in installed]
    if missing:
        raise ValueError(
            f"trackers={wanted!r}: {missing[0]!r} is not installed or not known to accelerate; installed are: "
            f"{', '.join(installed) or 'none'} (pip install {missing[0]}, or trackers='none')"
        )
    return names


def start_trackers(accelerator: Accelerator, config: TrainConfig) -> None:
    """Begin a run with each tracker, with the options of training."""
    if accelerator.log_with:
        options = {name: v if isinstance(v, bool | int | float) else str(v) for name, v in asdict(config).items()}
        accelerator.init_trackers(config.out.name or "training", config=options)
