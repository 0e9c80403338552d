"""Print the parameter counts of the paper's three sizes, as the README has them.

python tests/count_parameters.py
"""

import sys

import torch

from modeling_dcm import SIZES, DCMConfig, DCMForDenoising

REPLOGLE = {"num_genes": 2_000, "num_perturbations": 2_000, "perturbation_dim": 1280}
DATA = {"5m": {"num_genes": 17_002}, "10m": {**REPLOGLE, "num_cell_types": 1}, "20m": {**REPLOGLE, "num_cell_types": 4}}


def count_parameters(size: str) -> int:
    """Parameters of one size with the paper's parts only, counts to 1,000."""
    config = DCMConfig(
        **SIZES[size], **DATA[size], max_count=1000, backbone="dit", cell_summary=False, gene_output_bias=0
    )
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in DCMForDenoising(config).parameters())


if __name__ == "__main__":
    for name in SIZES:
        sys.stdout.write(f"{name}: {count_parameters(name) / 1e6:.1f}M parameters\n")
