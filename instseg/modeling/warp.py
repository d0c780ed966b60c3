"""Moves the features of one frame to their positions in another."""

import torch
from torch import Tensor
from torch.nn import functional as F


def warp(features: Tensor, flow: Tensor) -> Tensor:
    """Bilinear samples of ``features`` where ``flow`` points, zero outside.

    Args:
        features: (B, C, h, w).
        flow: (B, 2, h, w) x then y in halves of the map: 2 leads from the centre of its first
            column (row) to the centre of the last.  Zero gives ``features`` up to rounding.
    """
    rows, columns = (
        torch.linspace(-1, 1, size, dtype=flow.dtype, device=flow.device)
        for size in features.shape[-2:]
    )
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    positions = flow.permute(0, 2, 3, 1) + torch.stack([x, y], dim=-1)
    return F.grid_sample(features, positions, "bilinear", "zeros", align_corners=True)
