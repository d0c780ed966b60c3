"""Training windows, the targets of their masks, and the losses (section 3.3).

Lengths are pixels of the network's input unless cells are mentioned; coordinates are continuous, a
pixel's centre lies at +0.5.  A window covers whole cells: cell (y, x) of a map with stride s is the
square from (s y, s x) to (s y + s, s x + s).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from instseg.ops.assemble_instances import assemble_instances

UNDECIDED = -1
"""In :func:`match_cells`: the window is neither positive nor negative."""


@dataclass(frozen=True)
class WindowRule:
    """When a window shows an instance and when it shows none (DeepMask, section 3.1).

    Attributes:
        size: side of a window in cells.
        stride: side of a cell in pixels.
        canonical_size: longer side of the instance that fits best, in pixels.
        positive_offset: largest distance of the centres in either direction, in pixels.
        positive_octaves: largest ``|log2(longer side / canonical_size)|``.
        negative_offset: least distance in one direction of a negative window.
        negative_octaves: least ``|log2(longer side / canonical_size)|`` of a negative window.
    """

    size: int
    stride: int
    canonical_size: float
    positive_offset: float
    positive_octaves: float
    negative_offset: float
    negative_octaves: float


def match_cells(boxes: Tensor, grid: tuple[int, int], rule: WindowRule) -> Tensor:
    """The instance that the window centred at each cell shows.

    Args:
        boxes: (G, 4) xyxy of the instances.
        grid: rows and columns of the map.
        rule: see :class:`WindowRule`.
    Returns:
        (rows * columns,) int64 index of the instance, the nearest if there are several; G for a
        negative window, ``UNDECIDED`` for one in between.
    """
    rows, columns = grid
    count = len(boxes)
    if not count:
        return torch.zeros(rows * columns, dtype=torch.int64, device=boxes.device)
    # The middle of an even window is a corner of its cell.
    middle = 0.5 if rule.size % 2 else 0.0
    y = (torch.arange(rows, device=boxes.device) + middle) * rule.stride
    x = (torch.arange(columns, device=boxes.device) + middle) * rule.stride
    low, high = boxes[:, :2], boxes[:, 2:]
    centres = (low + high) / 2
    dy = (y[:, None] - centres[:, 1]).abs()
    dx = (x[:, None] - centres[:, 0]).abs()
    offsets = torch.maximum(dy[:, None], dx).flatten(0, 1)
    octaves = ((high - low).amax(dim=1) / rule.canonical_size).log2().abs()
    shown = (offsets <= rule.positive_offset) & (octaves <= rule.positive_octaves)
    absent = (offsets >= rule.negative_offset) | (octaves >= rule.negative_octaves)
    nearest = torch.where(shown, offsets, torch.inf).argmin(dim=1)
    others = torch.where(absent.all(dim=1), count, UNDECIDED)
    return torch.where(shown.any(dim=1), nearest, others)


def top_left(cells: Tensor, columns: int, size: int) -> Tensor:
    """Top-left cells of the windows centred at ``cells``.

    Args:
        cells: (N,) int64 row-major indices into a map.
        columns: columns of the map.
        size: side of a window in cells; an even window has one more cell before its centre.
    Returns:
        (N, 2) int64 rows and columns, possibly outside the map.
    """
    rows = cells.div(columns, rounding_mode="floor")
    return torch.stack([rows, cells - rows * columns], dim=1) - size // 2


def mask_targets(
    masks: Tensor, owners: Tensor, corners: Tensor, grid: tuple[int, int], rule: WindowRule
) -> Tensor:
    """Targets of the masks of positive windows.

    Windows cover whole cells, so a cell of the target is 1 if the instance covers half of it.

    Args:
        masks: (G, h, w) bool, instances in the network's input.
        owners: (P,) int64, the instance that each window shows.
        corners: (P, 2) int64 top-left cells.
        grid: rows and columns of the map.
        rule: its ``size`` m and ``stride`` are used.
    Returns:
        (P, m, m) float32, 1 on the instance, 0 on other instances and outside the map.
    """
    used_owners, index = owners.unique(return_inverse=True)
    height, width = masks.shape[-2:]
    padding = (0, grid[1] * rule.stride - width, 0, grid[0] * rule.stride - height)
    padded = F.pad(masks[used_owners].float(), padding)
    covered = F.avg_pool2d(padded[:, None], rule.stride) >= 0.5
    windows = torch.cat([index[:, None], corners], dim=1)
    return assemble_instances(covered.float(), windows, 1, rule.size, fill=0.0)


def inside(corners: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """(P, size, size) bool: which cells of the windows at ``corners`` (P, 2) lie on the map."""
    steps = torch.arange(size, device=corners.device)
    rows = corners[:, 0, None] + steps
    columns = corners[:, 1, None] + steps
    rows = (rows >= 0) & (rows < grid[0])
    columns = (columns >= 0) & (columns < grid[1])
    return rows[:, :, None] & columns[:, None]


def mask_loss(logits: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    """Logistic loss of the masks of positive windows, averaged over their cells on the map.

    Args:
        logits: (P, m, m) assembled masks.
        targets: (P, m, m), 0 or 1.
        counted: (P, m, m) bool.
    Returns:
        scalar, 0 without windows.
    """
    losses = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none")
    return (losses * counted).sum() / counted.sum().clamp(min=1)


def score_loss(logits: Tensor, positive: Tensor) -> Tensor:
    """Logistic loss of the scores of sampled windows, averaged.

    Args:
        logits: (N,).
        positive: (N,) bool.
    Returns:
        scalar, 0 without windows.
    """
    losses = F.binary_cross_entropy_with_logits(logits.float(), positive.float(), reduction="sum")
    return losses / max(len(logits), 1)
