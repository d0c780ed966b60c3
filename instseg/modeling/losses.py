"""Losses that several papers share."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from instseg.modeling.dense_targets import IGNORED

NEITHER = -1
"""Label of an anchor, region or bin that counts in no loss; Detectron2's ``Matcher`` gives it."""


def attached_zero(tensors: Iterable[Tensor]) -> Tensor:
    """A zero that gives each of ``tensors`` (one or more) a gradient of 0.

    A loss that has nothing to count adds it, so that every parameter has a gradient in every step.
    """
    return torch.stack([x.sum() for x in tensors]).sum() * 0


def semantic_loss(logits: Tensor, semantic: Tensor) -> Tensor:
    """Mean cross entropy over the cells of images; 0 if there is none.

    Args:
        logits: (B, C + 1, h, w), background first.
        semantic: (B, h, w), see :class:`DenseTargets`.
    """
    counted = (semantic != IGNORED).sum().clamp(min=1)
    return F.cross_entropy(logits, semantic, ignore_index=IGNORED, reduction="sum") / counted


def dice_loss(logits: Tensor, semantic: Tensor, *, background: bool = False) -> Tensor:
    """One minus Dice's coefficient of the probabilities, mean over images and classes.

    Smoothing 1, squares in the denominator (``Wizaron/instance-segmentation-pytorch``).

    Args:
        logits: (B, C + 1, h, w), background first.
        semantic: (B, h, w), see :class:`DenseTargets`.
        background: whether the background is a class too.
    """
    counted = (semantic != IGNORED)[:, None]
    probabilities = logits.softmax(dim=1) * counted
    labels = torch.where(semantic == IGNORED, 0, semantic)
    gt_probabilities = F.one_hot(labels, logits.shape[1]).movedim(-1, 1) * counted
    if not background:
        probabilities, gt_probabilities = probabilities[:, 1:], gt_probabilities[:, 1:]
    shared = (probabilities * gt_probabilities).sum(dim=(2, 3))
    total = probabilities.square().sum(dim=(2, 3)) + gt_probabilities.sum(dim=(2, 3))
    return (1 - (2 * shared + 1) / (total + 1)).mean()
