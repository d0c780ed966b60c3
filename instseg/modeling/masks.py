"""Masks of whole pictures, of which there should never be two copies."""

import torch
from torch import Tensor


def keep_masks(masks: Tensor, kept: Tensor) -> Tensor:
    """``masks[kept]`` without a copy: hundreds of masks of a large picture take gigabytes.

    Args:
        masks: (N, H, W); those that are kept move to the front in place.
        kept: (N,) bool.
    Returns:
        (M, H, W), a view of ``masks``.
    """
    rows = kept.nonzero()[:, 0].tolist()
    for place, row in enumerate(rows):
        if place != row:
            masks[place] = masks[row]
    return masks[: len(rows)]


def tight_boxes(masks: Tensor) -> Tensor:
    """The smallest boxes around masks.

    Args:
        masks: (N, H, W) bool.
    Returns:
        (N, 4) float32 xyxy, half-open; zeros for an empty mask.
    """
    count, height, width = masks.shape
    if not masks.numel():
        return torch.zeros(count, 4, device=masks.device)
    sides = []
    for hit, length in ((masks.any(dim=1), width), (masks.any(dim=2), height)):
        filled = hit.any(dim=1)
        first = hit.int().argmax(dim=1)
        last = length - hit.flip(1).int().argmax(dim=1)
        sides += [torch.where(filled, first, 0), torch.where(filled, last, 0)]
    x1, x2, y1, y2 = sides
    return torch.stack([x1, y1, x2, y2], dim=1).float()
