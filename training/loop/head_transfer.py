"""Take the head and the count features of one network over into another with more counts or other genes.

The old counts of known genes keep their law; new counts, and new genes, keep the marginals that the fresh head started
from. Knows nothing of names. Letters: G genes, K largest count, S small counts, R count features.
"""

import math

import numpy as np
import torch

from modeling_dcm import DCMForDenoising
from modeling_dcm.count_distribution_dcm import CategoricalHead
from modeling_dcm.layers_dcm import LOWEST_LEVEL, count_features, level_features

RIDGE = 1e-4  # keeps the weights of fitted features small where the data say nothing


@torch.no_grad()
def take_head(
    old: CategoricalHead,
    new: CategoricalHead,
    fresh: dict[str, torch.Tensor],
    old_genes: list[int],
    new_genes: list[int],
) -> None:
    """Biases of counts and genes; the weights that do not depend on either have been copied.

    Args:
        fresh: ``state_dict`` of the new head with the marginals of the new training cells.
        old_genes: rows of the known genes in the old panel.
        new_genes: rows of the same genes in the new panel.
    """
    shared = min(old.num_counts, new.num_small)  # counts that are small in the new head and exist in the old one
    bias, old_bias, fresh_bias = new.bias.weight[0], old.bias.weight[0], fresh["bias.weight"][0]
    bias.copy_(fresh_bias)
    if old.large is not None or old.gene_bias is None:  # a law over the same counts and more
        first = 0 if old.gene_bias is None else old.num_small
        known = old_bias[first:]
        bias[first : old.num_counts] = known
        bias[old.num_counts :] += known.logsumexp(0) - fresh_bias[first : old.num_counts].logsumexp(0)
    if old.gene_bias is None:
        return
    table = fresh["gene_bias.weight"].clone()  # (G, C)
    theirs = old.gene_bias.weight[old_genes]
    if old.large is not None:
        theirs = theirs.clone()
        # the last column is multiplied by the number of large counts, which may have grown
        theirs[:, -1] += math.log((old.num_counts - old.num_small) / (new.num_counts - new.num_small))
        table[new_genes] = theirs
    else:
        theirs = theirs[:, :shared] + old_bias[:shared]
        mine = table[new_genes]
        shift = theirs.logsumexp(1, keepdim=True) - mine[:, :shared].logsumexp(1, keepdim=True)
        table[new_genes] = torch.cat([theirs, mine[:, shared:] + shift], dim=1)
    new.gene_bias.weight.copy_(table)


@torch.no_grad()
def refit_counts(old: DCMForDenoising, new: DCMForDenoising) -> None:
    """Weights on the new counts' features that give old counts what they had; larger ones start like the largest.

    The features are bumps over the range of counts, which has grown: the fit is exact for the smallest counts, which
    have a feature each, and smooth above.
    """
    K = old.config.num_counts - 1
    counts = torch.arange(new.config.num_counts).clamp(max=K)
    device = torch.device("cpu")
    theirs = count_features(old.config.num_counts, device)[counts].double()
    mine = count_features(new.config.num_counts, device).double()
    for part in ("backbone.embedding.count", "head.counts"):
        layer, old_layer = new.get_submodule(part), old.get_submodule(part)
        layer.weight.copy_(_fitted(mine, theirs @ old_layer.weight.double().T).T)
    level = new.backbone.embedding.level
    if level is not None:
        top, old_top = new.config.max_count, old.config.max_count
        expected = torch.from_numpy(np.geomspace(LOWEST_LEVEL / 10, top, 400)).float()
        theirs = level_features(expected.clamp(max=old_top), old_top).double()
        values = theirs @ old.backbone.embedding.level.weight.double().T
        level.weight.copy_(_fitted(level_features(expected, top).double(), values).T)


def _fitted(features: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Weights (R, D) of ``features`` (N, R) for ``values`` (N, D), least squares with a small ridge."""
    R = features.shape[1]
    augmented = torch.cat([features, RIDGE**0.5 * torch.eye(R, dtype=features.dtype)])
    return torch.linalg.lstsq(augmented, torch.cat([values, values.new_zeros(R, values.shape[1])])).solution
