"""Images of rectangles and settings of every stage, for tests of bottom-up methods."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from detectron2.structures import BitMasks, Instances

from instseg.projects.discriminative_loss import ClusterSettings, DiscriminativeSettings
from instseg.projects.sgn import LineSettings, MergeSettings

Rectangle = tuple[int, int, int, int, int]  # class, y1, x1, y2, x2

# 400 instances of one pixel in an image of 64 x 64.
PIXELS: list[Rectangle] = [
    (0, y, x, y + 1, x + 1) for y in range(0, 60, 3) for x in range(0, 60, 3)
]

# Batches as lists of (size, *rectangles); one pixel twice, as batch normalisation needs two values.
edge_batches = pytest.mark.parametrize(
    "batch",
    [
        [((64, 64),)],
        [((64, 64), (2, 5, 5, 40, 40))],
        [((64, 64), *PIXELS)],
        [((1, 1), (0, 0, 0, 1, 1))] * 2,
        [((64, 64),), ((32, 48), (1, 0, 0, 32, 48))],
    ],
    ids=["none", "one", "400", "one pixel", "none and one"],
)


def rectangles(size: tuple[int, int], *labelled_boxes: Rectangle) -> Instances:
    """The instances of an image as training takes them."""
    masks = torch.zeros(len(labelled_boxes), *size, dtype=torch.bool)
    for mask, (_, y1, x1, y2, x2) in zip(masks, labelled_boxes, strict=True):
        mask[y1:y2, x1:x2] = True
    instances = Instances(size)
    instances.gt_classes = torch.tensor([kind for kind, *_ in labelled_boxes], dtype=torch.int64)
    instances.gt_masks = BitMasks(masks)
    return instances


def cluster_settings(method: str = "mean_shift", **changes: Any) -> ClusterSettings:
    settings = ClusterSettings(method, bandwidth=1.5, min_pixels=11, max_instances=100)
    return replace(settings, **changes)


def discriminative_settings(**changes: Any) -> DiscriminativeSettings:
    return replace(DiscriminativeSettings(0.5, 1.5, "L2", "instance"), **changes)


def line_settings(**changes: Any) -> LineSettings:
    return replace(LineSettings(1, 0.5, 0.5, "rows"), **changes)


def merge_settings(**changes: Any) -> MergeSettings:
    settings = MergeSettings(
        min_area=50, max_components=1000, max_gap=0.5, partners=10, threshold=0.5
    )
    return replace(settings, **changes)
