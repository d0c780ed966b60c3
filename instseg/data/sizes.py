"""How large the instances of a training are, which tiles of large images have to know."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from detectron2.structures import BoxMode

from instseg.data.dataset import DataSet


def largest_instance(datasets: Iterable[DataSet]) -> int | None:
    """The longest side of an annotated box, in pixels of its image as it lies in the data set.

    The user who predicts on a large image of the same kind can compare it with pixels of that
    image.  Pixels of the network would depend on resizing and on random augmentations.  Crowds do
    not count.

    Returns:
        None if there is no box.
    """
    sides = [
        side
        for dataset in datasets
        for record in dataset.records
        for annotation in record.get("annotations", ())
        if "bbox" in annotation and not annotation.get("iscrowd", 0)
        for side in _sides(annotation)
    ]
    return math.ceil(max(sides)) if sides else None


def _sides(annotation: Mapping[str, Any]) -> tuple[float, float]:
    x, y, width, height = map(float, annotation["bbox"][:4])
    if annotation["bbox_mode"] == BoxMode.XYXY_ABS:
        return width - x, height - y
    return width, height  # also of a rotated box


def saved_largest_instance(checkpoint: Mapping[str, Any]) -> int | None:
    """That of a checkpoint; None if the file does not say it, or no number of pixels."""
    value = checkpoint.get("largest_instance")
    return value if type(value) is int and 0 < value < 2**31 else None
