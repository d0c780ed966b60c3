"""Anchors ("priors" in the authors' code) and the coding of boxes relative to them.

All coordinates are relative to the image: 0 is its left or upper edge, 1 the opposite one.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_CENTRE_VARIANCE = 0.1
_SIZE_VARIANCE = 0.2
"""Units of encoded boxes, those of SSD."""


def level_sizes(image_size: int, strides: Sequence[int]) -> list[int]:
    """Cells per side of the pyramid's levels when every halving rounds up.

    Args:
        image_size: side of the square image in pixels.
        strides: powers of two, one per level.
    """
    return [-(-image_size // stride) for stride in strides]


def make_priors(
    image_size: int,
    sizes: Sequence[int],
    scales: Sequence[Sequence[float]],
    ratios: Sequence[float] | Sequence[Sequence[float]],
    *,
    square: bool = False,
) -> Tensor:
    """Anchors of all levels in the order of the head's output (section 3.3, authors' code).

    They lie on a regular grid over the whole image, not at multiples of a stride, and are not
    clipped.

    Args:
        image_size: side of the square image in pixels.
        sizes: cells per side of every level.
        scales: sides in pixels, a list for every level.
        ratios: width / height, or a list of these for every level.
        square: make the height equal to the width, see ``MODEL.YOLACT.SQUARE_ANCHORS``.
    Returns:
        (P, 4) float32: centre x, centre y, width, height.  Levels, in them rows, columns, scales,
        ratios.
    """
    levels = []
    by_level = ratios_by_level(ratios, len(scales))
    for cells, level_scales, level_ratios in zip(sizes, scales, by_level, strict=True):
        widths, heights = [], []
        for scale in level_scales:
            for ratio in map(math.sqrt, level_ratios):
                widths.append(scale * ratio / image_size)
                heights.append(widths[-1] if square else scale / ratio / image_size)
        # In double precision until the end, as the authors' numbers are.
        shapes = torch.tensor([widths, heights], dtype=torch.float64).T
        centres = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        grid = torch.stack([x, y], dim=-1)[:, :, None].expand(-1, -1, len(shapes), -1)
        levels.append(torch.cat([grid, shapes.expand_as(grid)], dim=-1).reshape(-1, 4))
    return torch.cat(levels).float()


def ratios_by_level(
    ratios: Sequence[float] | Sequence[Sequence[float]], num_levels: int
) -> list[Sequence[float]]:
    """The ratios of every level: those given for each, or the same for all."""
    lists = [x for x in ratios if isinstance(x, Sequence)]
    plain = [x for x in ratios if not isinstance(x, Sequence)]
    return lists or [plain] * num_levels


def anchors_by_level(scales: Sequence[Any], ratios: Sequence[Any]) -> list[int]:
    """Anchors per cell of every level.

    Args:
        scales: ``MODEL.YOLACT.ANCHOR_SCALES``.
        ratios: ``MODEL.YOLACT.ANCHOR_RATIOS``.
    """
    pairs = zip(scales, ratios_by_level(ratios, len(scales)), strict=True)
    return [len(level_scales) * len(level_ratios) for level_scales, level_ratios in pairs]


def to_corners(priors: Tensor) -> Tensor:
    """(..., 4) centre x, centre y, width, height → x1, y1, x2, y2."""
    half = priors[..., 2:] / 2
    return torch.cat([priors[..., :2] - half, priors[..., :2] + half], dim=-1)


def encode(boxes: Tensor, priors: Tensor) -> Tensor:
    """Targets of the head's box outputs, for ``boxes`` (SSD, section 2.2).

    Args:
        boxes: (N, 4) corners.
        priors: (N, 4) centre and size.
    Returns:
        (N, 4).
    """
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2 - priors[:, :2]
    sizes = (boxes[:, 2:] - boxes[:, :2]) / priors[:, 2:]
    return torch.cat(
        [centres / (_CENTRE_VARIANCE * priors[:, 2:]), sizes.log() / _SIZE_VARIANCE], dim=1
    )


def decode(deltas: Tensor, priors: Tensor) -> Tensor:
    """The inverse of :func:`encode`.

    Args:
        deltas: (..., N, 4) output of the head.
        priors: (N, 4) centre and size.
    Returns:
        (..., N, 4) corners, not clipped.
    """
    centres = priors[:, :2] + deltas[..., :2] * _CENTRE_VARIANCE * priors[:, 2:]
    sizes = priors[:, 2:] * (deltas[..., 2:] * _SIZE_VARIANCE).exp()
    first = centres - sizes / 2
    return torch.cat([first, sizes + first], dim=-1)
