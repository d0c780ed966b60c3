"""Where windows lie: the pyramid of an image, and masks of windows pasted into it (section 5)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from instseg.modeling import PlacedMask

FILL = 127.5
"""Pixels outside an image: 0.5 of the range of values, before normalisation."""


@dataclass(frozen=True)
class Scale:
    """A level of the pyramid.

    Attributes:
        factor: resizes the image.
        height, width: pixels of the resized image.
    """

    factor: float
    height: int
    width: int


@dataclass(frozen=True)
class Windows:
    """N windows of one level, best first.

    Attributes:
        scale: their level.
        scores: (N,) probabilities that an instance is in the window.
        cells: (N, 2) int64, row and column of each on the grid.
        vectors: (N, E) of the embedding.
    """

    scale: Scale
    scores: Tensor
    cells: Tensor
    vectors: Tensor

    def __getitem__(self, index: Tensor) -> "Windows":
        return Windows(self.scale, self.scores[index], self.cells[index], self.vectors[index])


def pyramid(height: int, width: int, octaves: Sequence[float], max_size: int) -> list[Scale]:
    """The levels of an image, smallest first.

    Args:
        height, width: of the image.
        octaves: each e gives the level 2^e.
        max_size: largest longer side of a level in pixels; all larger levels become one level of
            this size.
    """
    limit = max_size / max(height, width)
    factors = sorted({min(2.0**octave, limit) for octave in octaves})
    return [Scale(f, _length(height, f), _length(width, f)) for f in factors]


def resize_padded(image: Tensor, scale: Scale, margin: int, multiple: int) -> Tensor:
    """The image at one level, with :data:`FILL` around it.

    Args:
        image: (3, h, w) float.
        scale: of the level.
        margin: pixels added on every side.
        multiple: more are added below and to the right, up to a multiple of this.
    Returns:
        (1, 3, H, W).
    """
    size = (scale.height, scale.width)
    resized = F.interpolate(image[None], size, mode="bilinear", align_corners=True)
    below, right = (-(length + 2 * margin) % multiple for length in size)
    return F.pad(resized, (margin, margin + right, margin, margin + below), value=FILL)


def best_windows(windows_by_scale: Sequence[Windows], limit: int) -> list[Windows]:
    """The ``limit`` best windows of all levels, in one list per level.

    Among equal scores the first wins, so the one of the smaller scale; nothing is suppressed.
    """
    scores = torch.cat([windows.scores for windows in windows_by_scale])
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[scores.argsort(descending=True, stable=True)[:limit]] = True
    parts = chosen.split([len(windows.scores) for windows in windows_by_scale])
    return [windows[part] for windows, part in zip(windows_by_scale, parts, strict=True)]


def paste(
    logits: Tensor,
    cells: Tensor,
    rows: Sequence[int],
    image_size: tuple[int, int],
    *,
    factors: tuple[float, float],
    patch_size: int,
    stride: int,
    threshold: float,
) -> Iterator[PlacedMask]:
    """The masks of windows of one level, at the size of an image.

    A mask becomes a square of floor(patch_size / factor) pixels whose top-left corner is at
    floor((stride * cell - patch_size / 2) / factor).  Logits are interpolated linearly, corner to
    corner, where the square is larger than the mask, and averaged where it is smaller.  Windows are
    computed one by one, and only their pixels inside the image.

    Args:
        logits: (N, S, S).
        cells: (N, 2) int64 rows and columns on the grid.
        rows: (N,) numbers of the instances.
        image_size: height and width of the image.
        factors: pixels of the level per pixel of the image, vertically and horizontally.
        patch_size: side of a window in pixels of the level.
        stride: pixels of the level per cell.
        threshold: logit above which a pixel belongs to the mask.
    """
    sides = [max(math.floor(patch_size / factor), 1) for factor in factors]
    weights = [_resampling(logits.shape[-1], side).to(logits) for side in sides]
    for row, logit, cell in zip(rows, logits, cells.tolist(), strict=True):
        corner, parts = [], []
        for index, factor, side, length in zip(cell, factors, sides, image_size, strict=True):
            start = math.floor((stride * index - patch_size / 2) / factor)
            first, last = max(start, 0), max(min(start + side, length), 0)
            corner.append(first)
            parts.append(slice(first - start, max(last - start, 0)))
        down, across = (weight[part] for weight, part in zip(weights, parts, strict=True))
        with torch.autocast(logits.device.type, enabled=False):
            pixels = down @ logit @ across.T > threshold
        yield PlacedMask(row, corner[1], corner[0], pixels)


def _length(length: int, factor: float) -> int:
    """Pixels of a side after resizing, at least one."""
    return max(math.floor(length * factor + 0.5), 1)


def _resampling(size: int, side: int) -> Tensor:
    """(side, size) weights that resize a row of ``size`` values to ``side``.

    Like Torch's image library, it interpolates linearly, corner to corner, when enlarging and
    averages over boxes when shrinking.
    """
    if side >= size:
        positions = torch.linspace(0, size - 1, side, dtype=torch.float64)
        steps = torch.arange(size)
        return (1 - (positions[:, None] - steps).abs()).clamp(min=0)
    edges = torch.arange(side + 1, dtype=torch.float64) * size / side
    starts = torch.arange(size)
    # How much of each value lies in each box.
    covered = torch.minimum(edges[1:, None], starts + 1.0) - torch.maximum(edges[:-1, None], starts)
    return covered.clamp(min=0) * side / size
