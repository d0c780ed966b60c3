"""Targets of the three networks, from a map of the instance at each pixel (sections 2 and 4)."""

import torch
from torch import Tensor

from instseg.ops.sgn_lines import BACKGROUND, END, INTERIOR, START

DROPPED, ADDED = 0.05, 0.01
"""Shares of breakpoints that :func:`degrade` removes, and of pixels that it makes breakpoints."""


def breakpoint_labels(owners: Tensor, widening: int) -> tuple[Tensor, Tensor]:
    """Where instances begin and end along rows and along columns.

    A run is a stretch of one instance in a row.  Its first ``widening + 1`` pixels, but at most
    half of it, are START; the last ``widening + 1`` of the others are END, the rest INTERIOR.  A
    run of one pixel is START.  The border of the image begins and ends runs.

    Args:
        owners: (..., H, W) int64, the instance at each pixel, less than 0 for none.
        widening: pixels by which a breakpoint is wider than one.
    Returns:
        two (..., H, W) uint8 maps, from left to right and from top to bottom.
    """
    return _along_rows(owners, widening), _along_rows(owners.mT, widening).mT


def _along_rows(owners: Tensor, widening: int) -> Tensor:
    x = torch.arange(owners.shape[-1], device=owners.device).expand_as(owners)
    after = torch.ones_like(owners, dtype=torch.bool)  # a run begins at this pixel
    after[..., 1:] = owners[..., 1:] != owners[..., :-1]
    before = torch.ones_like(after)  # a run ends with this pixel
    before[..., :-1] = after[..., 1:]
    first = torch.where(after, x, 0).cummax(dim=-1).values
    last = torch.where(before, x, owners.shape[-1]).flip(-1).cummin(dim=-1).values.flip(-1)
    half = (last - first + 2) // 2
    labels = torch.full_like(owners, INTERIOR, dtype=torch.uint8)
    labels[last - x <= widening] = END
    labels[x - first < half.clamp(max=widening + 1)] = START
    labels[owners < 0] = BACKGROUND
    return labels


def link_targets(owners: Tensor, semantic: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbours that belong together, and pairs that count.

    Args:
        owners: (B, H, W) int64, the instance at each pixel, less than 0 for none.
        semantic: (B, H, W) int64, class + 1, 0 for background.
    Returns:
        two (B, 2, H, W) bool maps: channel 0 is about a pixel and the one below it, channel 1 about
        a pixel and the one to its right; pairs count where both are of one class.
    """
    same = torch.zeros(len(owners), 2, *owners.shape[1:], dtype=torch.bool, device=owners.device)
    counts = torch.zeros_like(same)
    inside = owners >= 0
    same[:, 0, :-1] = (owners[:, :-1] == owners[:, 1:]) & inside[:, 1:]
    same[:, 1, :, :-1] = (owners[:, :, :-1] == owners[:, :, 1:]) & inside[:, :, 1:]
    has_class = inside & (semantic > 0)
    counts[:, 0, :-1] = (semantic[:, :-1] == semantic[:, 1:]) & has_class[:, :-1] & has_class[:, 1:]
    counts[:, 1, :, :-1] = (
        (semantic[:, :, :-1] == semantic[:, :, 1:]) & has_class[:, :, :-1] & has_class[:, :, 1:]
    )
    return same, counts


def degrade(labels: Tensor) -> Tensor:
    """Ground-truth breakpoints as a poor network would draw them, to train LineNet (section 7).

    Each image's map is shifted by up to a pixel along rows and columns; then some breakpoints are
    removed and others added at random.

    Args:
        labels: (B, H, W) uint8.
    """
    shifted = torch.empty_like(labels)
    for image_labels, result in zip(labels, shifted, strict=True):
        rows, columns = torch.randint(-1, 2, (2,)).tolist()
        result.copy_(image_labels.roll((rows, columns), dims=(0, 1)))
    chance = torch.rand(labels.shape, device=labels.device)
    lost = (shifted >= START) & (chance < DROPPED)
    shifted[lost] = INTERIOR
    added = (shifted == INTERIOR) & (chance > 1 - ADDED)
    shifted[added] = torch.where(chance[added] > 1 - ADDED / 2, START, END).to(labels.dtype)
    return shifted


def majority_owners(components: Tensor, owners: Tensor, count: int) -> Tensor:
    """The instance that covers most of each component (section 5).

    Args:
        components: (H, W) int64, 0 ... count - 1, less than 0 for none.
        owners: (H, W) int64, less than 0 for none.
    Returns:
        (count,) int64; -1 where no instance covers half of the component.
    """
    inside = components >= 0
    area = components[inside].bincount(minlength=count)
    in_both = inside & (owners >= 0)
    width = int(owners.max()) + 1 if in_both.any() else 1
    keys, shared = (components[in_both] * width + owners[in_both]).unique(return_counts=True)
    # The instance is the last digit of the overlap; no instance has an overlap of 0.
    best = area.new_zeros(count)
    best.scatter_reduce_(0, keys // width, shared * width + keys % width, "amax")
    return torch.where((best > 0) & (2 * (best // width) >= area), best % width, -1)
