"""Discrete Cell Models: configuration, network, diffusion and sampler. Every file here ships with each checkpoint."""

from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from .configuration_dcm import SIZES, DCMConfig
from .modeling_dcm import DCMForDenoising

# `save_pretrained` then writes this code beside the weights, so that a checkpoint needs no installed package
DCMConfig.register_for_auto_class()
DCMForDenoising.register_for_auto_class("AutoModel")

# with this package imported, the Auto classes know checkpoints without `trust_remote_code`
AutoConfig.register(DCMConfig.model_type, DCMConfig, exist_ok=True)
AutoModel.register(DCMConfig, DCMForDenoising, exist_ok=True)
AutoModelForMaskedLM.register(DCMConfig, DCMForDenoising, exist_ok=True)

__all__ = ["SIZES", "DCMConfig", "DCMForDenoising"]
