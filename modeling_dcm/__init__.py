"""Discrete Cell Models: masked counts and conditions in, cells out. Every file here ships with each checkpoint.

Its classes are imported, and made known to transformers, when they are asked for: that takes seconds.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .configuration_dcm import SIZES, DCMConfig
    from .diffusion_dcm import DataCollatorForCountMasking
    from .modeling_dcm import DCMForDenoising

__all__ = ["SIZES", "DCMConfig", "DCMForDenoising", "DataCollatorForCountMasking"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

    from .configuration_dcm import SIZES, DCMConfig
    from .diffusion_dcm import DataCollatorForCountMasking
    from .modeling_dcm import DCMForDenoising

    # `save_pretrained` then writes this code beside the weights, so that a checkpoint needs no installed package
    DCMConfig.register_for_auto_class()
    DCMForDenoising.register_for_auto_class("AutoModel")
    # the Auto classes then know checkpoints without `trust_remote_code`
    AutoConfig.register(DCMConfig.model_type, DCMConfig, exist_ok=True)
    AutoModel.register(DCMConfig, DCMForDenoising, exist_ok=True)
    AutoModelForMaskedLM.register(DCMConfig, DCMForDenoising, exist_ok=True)
    globals().update(
        SIZES=SIZES,
        DCMConfig=DCMConfig,
        DCMForDenoising=DCMForDenoising,
        DataCollatorForCountMasking=DataCollatorForCountMasking,
    )
    return globals()[name]
