"""Soft masks of boxes, pasted into an image: only where the boxes are, many at a time."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from instseg.modeling.results import PlacedMask

_PIXELS = 2**20
"""Pixels of the boxes that are computed together, unless one box has more."""
_STEP = 1.25
"""Largest factor between the sides of such boxes."""


def pasted(
    masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5
) -> Iterator[PlacedMask]:
    """The masks of an image, with the numbers of Detectron2's ``paste_masks_in_image``.

    Detectron2 computes one box after the other.  Here boxes of about one size are computed
    together; each pixel goes through the same operations.

    Args:
        masks: (N, M, M) probabilities.
        boxes: (N, 4) xyxy in pixels of the result, inside it.
        size: height and width of the result.
        threshold: least probability inside a mask, at least 0.5; with less, a mask could reach
            beyond the pixels next to its box.
    Yields:
        each mask once, in another order.
    """
    first = (boxes[:, :2].floor() - 1).clamp(min=0).long()
    limit = torch.tensor([size[1], size[0]], device=boxes.device)
    sides = torch.minimum((boxes[:, 2:].ceil() + 1).long(), limit) - first
    corners, lengths = first.tolist(), sides.tolist()
    for rows in _groups(sides):
        chosen = torch.tensor(rows, device=boxes.device)
        largest = sides[chosen].amax(dim=0).tolist()
        values = _values(masks[chosen], boxes[chosen], first[chosen], largest)
        for row, pixels in zip(rows, values >= threshold, strict=True):
            (x, y), (width, height) = corners[row], lengths[row]
            yield PlacedMask(row, x, y, pixels[:height, :width])


def _groups(sides: Tensor) -> Iterator[list[int]]:
    """Numbers of boxes with similar widths and heights (N, 2)."""
    kinds = (sides.double().log() / math.log(_STEP)).floor().tolist()
    rows_of_kind: dict[tuple[float, ...], list[int]] = defaultdict(list)
    for row, kind in enumerate(kinds):
        rows_of_kind[tuple(kind)].append(row)
    for kind, rows in sorted(rows_of_kind.items()):
        count = max(int(_PIXELS / _STEP ** (sum(kind) + 2)), 1)
        yield from (rows[start : start + count] for start in range(0, len(rows), count))


def _values(masks: Tensor, boxes: Tensor, first: Tensor, lengths: Sequence[int]) -> Tensor:
    """(n, h, w) probabilities of pixels, from the first one of each box on.

    Args:
        masks: (n, M, M).
        boxes: (n, 4).
        first: (n, 2) x and y.
        lengths: w and h.
    """
    axes = []
    for axis, length in enumerate(lengths):
        low, high = boxes[:, axis, None], boxes[:, axis + 2, None]
        pixels = first[:, axis, None] + torch.arange(length, device=boxes.device)
        axes.append((pixels.float() + 0.5 - low) / (high - low) * 2 - 1)
    x, y = axes
    shape = (len(masks), y.shape[1], x.shape[1])
    grid = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], dim=3)
    values = F.grid_sample(masks[:, None], grid.to(masks.dtype), align_corners=False)
    return values[:, 0]
