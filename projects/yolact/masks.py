"""Masks from prototypes and coefficients (section 3.2)."""

import torch
from torch import Tensor
from torch.nn import functional as F

_CHUNK_PIXELS = 2**24
"""Probabilities held at full size at once: 64 MiB."""


def assemble_masks(
    prototypes: Tensor, coefficients: Tensor, boxes: Tensor, size: tuple[int, int]
) -> Tensor:
    """Masks of the size of a picture.

    The sigmoid of prototypes times coefficients is cropped with the box at the prototypes'
    resolution, then resized (bilinear, corners not aligned), and counts as object above 0.5.  As
    the crop comes first, a mask may reach a few pixels out of its box.

    Args:
        prototypes: (h, w, K).
        coefficients: (N, K).
        boxes: (N, 4) corners in pixels of the result, in any order and not clipped.
        size: height H and width W of the result.
    Returns:
        (N, H, W) bool.
    """
    height, width = size
    relative = boxes / boxes.new_tensor([width, height, width, height])
    masks = torch.zeros(
        len(coefficients), height, width, dtype=torch.bool, device=prototypes.device
    )
    step = max(_CHUNK_PIXELS // (height * width), 1)
    for i in range(0, len(masks), step):
        rows = slice(i, i + step)
        small = mask_probabilities(prototypes, coefficients[rows], relative[rows])
        full = F.interpolate(small[None], size, mode="bilinear", align_corners=False)[0]
        torch.gt(full, 0.5, out=masks[rows])
    return masks


def mask_probabilities(prototypes: Tensor, coefficients: Tensor, boxes: Tensor) -> Tensor:
    """Cropped probabilities at the resolution of the prototypes.

    Args:
        prototypes: (h, w, K).
        coefficients: (N, K).
        boxes: (N, 4) corners relative to the picture, in any order and not clipped.
    Returns:
        (N, h, w), 0 outside the boxes.
    """
    probabilities = (prototypes @ coefficients.T).sigmoid().permute(2, 0, 1)
    return crop(probabilities, boxes)


def crop(masks: Tensor, boxes: Tensor, padding: float = 1.0) -> Tensor:
    """Set what lies outside the boxes to zero (authors' code).

    Args:
        masks: (N, h, w).
        boxes: (N, 4) corners relative to the masks, in any order.
        padding: cells by which the boxes are enlarged.
    Returns:
        (N, h, w); cell j stays if ``x1 - padding <= j < x2 + padding``, nothing is rounded.
    """
    height, width = masks.shape[1:]
    left, right = _extent(boxes[:, 0], boxes[:, 2], width, padding)
    top, bottom = _extent(boxes[:, 1], boxes[:, 3], height, padding)
    x = torch.arange(width, device=masks.device, dtype=boxes.dtype)
    y = torch.arange(height, device=masks.device, dtype=boxes.dtype)
    columns = (x >= left) & (x < right)
    rows = (y >= top) & (y < bottom)
    return masks * (rows[:, :, None] & columns[:, None, :])


def _extent(first: Tensor, second: Tensor, size: int, padding: float) -> tuple[Tensor, Tensor]:
    """(N,) relative coordinates → (N, 1) lower and upper end in cells, inside the mask."""
    first, second = first[:, None] * size, second[:, None] * size
    low = (torch.minimum(first, second) - padding).clamp(min=0)
    high = (torch.maximum(first, second) + padding).clamp(max=size)
    return low, high
