"""Regions of FCIS: its output for them, their targets, and its detections."""

from typing import NamedTuple

from torch import Tensor


class Maps(NamedTuple):
    """Position-sensitive maps of a batch, at the stride of the features.

    Attributes:
        scores: (B, 2 G² C, H, W) in channels-last memory, in the order of ``fcis_head``.
        boxes: (B, 8 G², H, W).
    """

    scores: Tensor
    boxes: Tensor


class Regions(NamedTuple):
    """Output of the head for R regions.

    Attributes:
        scores: (R, C) class logits, background first.
        mask_logits: (R, 2, P, P) outside and inside logits of the class in ``classes``.
        classes: (R,) int64, the asked class or the best one of the foreground (1 .. C - 1).
        deltas: (R, 8) box deltas over their standard deviations; the last four are foreground.
    """

    scores: Tensor
    mask_logits: Tensor
    classes: Tensor
    deltas: Tensor

    def at(self, rows: Tensor) -> "Regions":
        """The same for the given rows."""
        return Regions(*(x[rows] for x in self))


class Samples(NamedTuple):
    """R training regions and their targets.

    Attributes:
        images: (R,) int64 index of the image of each.
        boxes: (R, 4) continuous corners in pixels of the network input.
        labels: (R,) int64 class + 1, 0 for the background.
        masks: (R, P, P) int64, 1 inside, 0 outside, ``NEITHER`` in all bins of background regions.
        deltas: (R, 4) normalised deltas; those of background regions are ignored.
    """

    images: Tensor
    boxes: Tensor
    labels: Tensor
    masks: Tensor
    deltas: Tensor

    def at(self, rows: Tensor) -> "Samples":
        """The same for the given rows."""
        return Samples(*(x[rows] for x in self))


class Detections(NamedTuple):
    """All regions of one image at test time.

    Attributes:
        boxes: (R, 4) continuous corners in pixels of the network input.
        probabilities: (R, C), background first.
        masks: (R, P, P) foreground probability for the region's own best class.
    """

    boxes: Tensor
    probabilities: Tensor
    masks: Tensor
