"""Match detections to true instances, for the metrics that COCO's code does not compute."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from detectron2.structures import Instances

HIT, MISS, UNCOUNTED = 1, 0, -1
"""Outcomes of a detection: true positive, false positive, neither."""


def match(
    ious: npt.NDArray[np.float64], ignored: npt.NDArray[np.bool_], thresholds: Sequence[float]
) -> npt.NDArray[np.int8]:
    """Match the detections of one image (and class) to its true instances, as PASCAL VOC does.

    Each detection goes to the instance that it overlaps most, the first of equals.  If several
    detections reach the threshold with an instance, the first is a hit and the others are false
    positives: a detection never moves on to its second best instance.

    Args:
        ious: (D, G) overlap of detections, best score first, with instances.
        ignored: (G,) instances that neither count nor make a detection false.
        thresholds: T values; an IoU equal to a threshold reaches it.
    Returns:
        (T, D) of ``HIT``, ``MISS``, ``UNCOUNTED``.
    Source: VOC development kit (Everingham et al., IJCV 2010, section 4.2.2).
    """
    outcomes = np.full((len(thresholds), len(ious)), MISS, dtype=np.int8)
    if not ious.size:
        return outcomes
    best, overlaps = ious.argmax(axis=1), ious.max(axis=1)
    for row, threshold in zip(outcomes, thresholds, strict=True):
        reached = np.flatnonzero(overlaps >= threshold)
        _, first = np.unique(best[reached], return_index=True)
        row[reached[first]] = HIT
        row[reached[ignored[best[reached]]]] = UNCOUNTED
    return outcomes


def mask_ranking(instances: Instances) -> torch.Tensor:
    """(N,) scores that rank masks: ``mask_scores`` if the model gives them, else ``scores``."""
    scores: torch.Tensor = (
        instances.mask_scores if instances.has("mask_scores") else instances.scores
    )
    return scores.cpu()
