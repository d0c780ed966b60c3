"""Pictures into and maps out of a network that gives a value for every cell."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def padded_batch(images: Sequence[Tensor], divisor: int, least: int = 1) -> Tensor:
    """(C, h, w) each → (B, C, H, W), padded with 0 at their right and bottom.

    Args:
        images: at least one.
        divisor: H and W are multiples of it.
        least: and of no fewer pixels.
    """
    height, width = (
        -(-max(least, *(x.shape[axis] for x in images)) // divisor) * divisor for axis in (1, 2)
    )
    batch = images[0].new_zeros(len(images), images[0].shape[0], height, width)
    for place, image in zip(batch, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    return batch


def at_size(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, h, w) → (B, C, *size) in single precision, bilinear."""
    maps = maps.float()
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def resized_index(length: int, new_length: int, stride: int, device: torch.device) -> Tensor:
    """(new_length,) cell, in a map of this stride, of each pixel of a side that is resized.

    Args:
        length: of the side that the map shows.
        new_length: of the side after resizing; every pixel takes the nearest.
    """
    middles = (torch.arange(new_length, device=device) * 2 + 1) * length
    return middles // (2 * new_length) // stride
