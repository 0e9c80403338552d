"""Discrete Cell Models: configuration, network, diffusion and sampler. Every file here ships with each checkpoint."""

from .configuration_dcm import SIZES, DCMConfig
from .modeling_dcm import DCMForDenoising

# `save_pretrained` then writes this code beside the weights, so that a checkpoint needs no installed package
DCMConfig.register_for_auto_class()
DCMForDenoising.register_for_auto_class("AutoModel")

__all__ = ["SIZES", "DCMConfig", "DCMForDenoising"]
