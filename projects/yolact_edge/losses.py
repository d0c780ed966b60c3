"""Losses of YolactEdge beside those of YOLACT."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F


def flow_loss(flows: Sequence[Tensor], target: Tensor) -> Tensor:
    """End-point error of the flow, mean over the cells of a level, sum over the levels.

    Args:
        flows: (B, 2, h, w) of every level.
        target: (B, 2, H, W) in the same units at any resolution, NaN where it is not known; cells
            that touch such a pixel do not count.
    """
    total = target.new_zeros(())
    for flow in flows:
        level_target = F.interpolate(target, flow.shape[-2:], mode="bilinear", align_corners=False)
        known = level_target.isfinite().all(dim=1, keepdim=True)
        errors = torch.where(known, flow - level_target.nan_to_num(), 0).norm(dim=1)
        total = total + errors.sum() / known.sum().clamp(min=1)
    return total


def warp_loss(
    warped: Sequence[Tensor], computed: Sequence[Tensor], layers: Sequence[nn.Module]
) -> Tensor:
    """Distance of the features taken from a key frame from the computed ones (authors' code).

    It is 1 - cosine over the channels, as a mean over cells and levels, of the sums of the pyramid
    and of the outputs of its output layers.  It trains only the modules that made ``warped``.

    Args:
        warped: (B, C, h, w) of every level.
        computed: the same of the frame itself.
        layers: the output layer of every level.
    """
    distances = []
    for moved, target, layer in zip(warped, computed, layers, strict=True):
        target = target.detach()
        # Clones, as a normalisation would count these maps among its statistics.
        values = {name: value.detach().clone() for name, value in layer.state_dict().items()}
        outputs = [functional_call(layer, values, x) for x in (moved, target)]
        distances += [_distance(moved, target), _distance(*outputs)]
    return torch.stack(distances).mean()


def _distance(first: Tensor, second: Tensor) -> Tensor:
    return (1 - F.cosine_similarity(first, second, dim=1)).mean()
