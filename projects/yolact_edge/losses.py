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
        target: (B, 2, H, W) in the same units at any resolution, not a number where it is not
            known; cells that touch such a place do not count.
    """
    total = target.new_zeros(())
    for flow in flows:
        wanted = F.interpolate(target, flow.shape[-2:], mode="bilinear", align_corners=False)
        known = wanted.isfinite().all(dim=1, keepdim=True)
        errors = torch.where(known, flow - wanted.nan_to_num(), 0).norm(dim=1)
        total = total + errors.sum() / known.sum().clamp(min=1)
    return total


def warp_loss(
    warped: Sequence[Tensor], computed: Sequence[Tensor], layers: Sequence[nn.Module]
) -> Tensor:
    """How far features taken over from a key frame are from those computed (authors' code).

    1 - cosine over the channels, mean over cells and levels, of the sums of the pyramid and of what
    its output layers make of them.  Trains what made ``warped`` alone.

    Args:
        warped: (B, C, h, w) of every level.
        computed: the same of the frame itself.
        layers: of every level the output layer.
    """
    distances = []
    for own, other, layer in zip(warped, computed, layers, strict=True):
        other = other.detach()
        # Clones, as a normalisation would count these maps among its statistics.
        values = {name: value.detach().clone() for name, value in layer.state_dict().items()}
        outputs = [functional_call(layer, values, x) for x in (own, other)]
        distances += [_distance(own, other), _distance(*outputs)]
    return torch.stack(distances).mean()


def _distance(first: Tensor, second: Tensor) -> Tensor:
    return (1 - F.cosine_similarity(first, second, dim=1)).mean()
