"""Losses of the breakpoint network and of LineNet (sections 2 and 4); all are means."""

import torch
from torch import Tensor
from torch.nn import functional as F

from instseg.modeling import attached_zero

LEAST_WEIGHT, MOST_WEIGHT = 0.1, 10.0


def breakpoint_loss(logits: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """Cross entropy with labels weighted by inverse frequency in the batch.

    The weight of a label is N / (L N_l) for N_l of N pixels and L labels that occur, between 0.1
    and 10.

    Args:
        logits: (B, 4, H, W) of one direction.
        labels: (B, H, W) uint8.
        counts: (B, H, W) bool, pixels of instances.
    Returns:
        a scalar; 0 where no pixel counts.
    """
    target = labels[counts].long()
    if not len(target):
        return attached_zero([logits])
    numbers = target.bincount(minlength=logits.shape[1])
    weights = len(target) / (numbers.count_nonzero() * numbers.clamp(min=1))
    weights = weights.clamp(LEAST_WEIGHT, MOST_WEIGHT).to(logits.dtype)
    return F.cross_entropy(logits.movedim(1, -1)[counts], target, weights)


def link_loss(logits: Tensor, same: Tensor, counts: Tensor) -> Tensor:
    """Binary cross entropy; pairs that belong together weigh as much in total as the others.

    Args:
        logits: (B, 2, H, W), see :func:`link_targets`.
        same: (B, 2, H, W) bool, pairs that belong together.
        counts: (B, 2, H, W) bool, pairs of one class.
    Returns:
        a scalar; 0 where no pair counts.
    """
    kinds = [mask for mask in (counts & same, counts & ~same) if mask.any()]
    if not kinds:
        return attached_zero([logits])
    means = [
        F.binary_cross_entropy_with_logits(logits[kind], same[kind].to(logits.dtype))
        for kind in kinds
    ]
    return torch.stack(means).mean()
