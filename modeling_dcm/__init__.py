"""Discrete Cell Models: configuration, network, diffusion and sampler. Every file here ships with each checkpoint."""

from .configuration_dcm import SIZES, DCMConfig
from .modeling_dcm import DCMForDenoising

__all__ = ["SIZES", "DCMConfig", "DCMForDenoising"]
