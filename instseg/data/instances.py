"""Transform the instances of a training image, all of them together."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances
from scipy.ndimage import find_objects
from torch import Tensor

from instseg.masks import CroppedMasks

_LABELS = 255
"""Masks in a label image of 8 bits: Pillow, with which Detectron2 resizes masks, takes no more."""
_THINNEST = 1e-5
"""Pixels; Detectron2 drops thinner boxes."""


class InstanceMapper(DatasetMapper):
    """Detectron2's mapper, many times faster where masks are RLEs: the samples are the same."""

    def _transform_annotations(
        self, record: dict[str, Any], transforms: T.TransformList, size: tuple[int, int]
    ) -> None:
        """Replace ``annotations`` by ``instances``."""
        annotations = without_crowds(record["annotations"])
        are_rles = all(isinstance(x.get("segmentation"), dict) for x in annotations)
        as_pixels = self.use_instance_mask and self.instance_mask_format == "bitmask"
        if not annotations or not are_rles or not as_pixels or self.use_keypoint:
            super()._transform_annotations(record, transforms, size)
            return
        del record["annotations"]
        record["instances"] = transformed_instances(
            annotations, transforms, size, tight=self.recompute_boxes
        )


def without_crowds(annotations: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The annotations of single instances."""
    return [annotation for annotation in annotations if not annotation.get("iscrowd", 0)]


def transformed_instances(
    annotations: Sequence[dict[str, Any]],
    transforms: T.TransformList,
    size: tuple[int, int],
    *,
    tight: bool,
    thinnest: float = _THINNEST,
) -> Instances:
    """The instances that ``transforms`` leave in an image.

    Args:
        annotations: Detectron2's, with RLEs of the image before ``transforms``; not modified.
        size: height and width of the image after them.
        tight: take boxes around the transformed masks, not the transformed boxes.
        thinnest: pixels; an instance with a narrower or lower box is left out.
    Returns:
        ``gt_boxes``, ``gt_classes``, and ``gt_masks`` (``BitMasks``) if there are annotations.
    """
    instances = Instances(size)
    boxes = np.minimum(
        transforms.apply_box(corners_of(annotations)).clip(min=0), [*size[::-1], *size[::-1]]
    )
    classes = torch.tensor([int(x["category_id"]) for x in annotations], dtype=torch.int64)
    if not annotations:
        instances.gt_boxes, instances.gt_classes = Boxes(boxes), classes
        return instances
    rles = [x["segmentation"] for x in annotations]
    height, width = rles[0]["size"]
    filled, masks, mask_boxes = transformed_masks(
        CroppedMasks.from_rles(rles, (height, width)), transforms, size
    )
    instances.gt_boxes = Boxes(mask_boxes if tight else boxes[filled])
    instances.gt_classes = classes[filled]
    instances.gt_masks = BitMasks(masks)
    thick = instances.gt_boxes.nonempty(thinnest)
    return instances if thick.all() else instances[thick]


def transformed_masks(
    masks: CroppedMasks, transforms: T.TransformList, size: tuple[int, int]
) -> tuple[npt.NDArray[np.int64], Tensor, npt.NDArray[np.int64]]:
    """Masks after ``transforms``, as each of them alone would be transformed.

    Transforms of masks move or drop pixels and never mix them.  So masks that do not overlap are
    transformed together, as one image of their numbers; those that do take several images.

    Args:
        size: height and width of the image after ``transforms``.
    Returns:
        The numbers (K,) of the masks that keep a pixel in ascending order, these masks
        (K, height, width) bool, and the tight boxes (K, 4) around them.
    """
    parts: dict[int, tuple[tuple[slice, slice], npt.NDArray[np.bool_]]] = {}
    waiting = np.arange(len(masks))
    while len(waiting):
        numbers = waiting[:_LABELS]
        layer = masks[numbers]
        labels = layer.to_label_image().astype(np.uint8)
        areas = layer.areas()
        whole = np.ones(len(numbers), dtype=np.bool_)
        if np.count_nonzero(labels) < areas.sum():  # some overlap
            whole = np.bincount(labels.ravel(), minlength=len(numbers) + 1)[1:] == areas
        moved = transforms.apply_segmentation(labels)
        slices = find_objects(moved, max_label=len(numbers))
        for label in np.flatnonzero(whole).tolist():
            if slices_yx := slices[label]:
                parts[int(numbers[label])] = slices_yx, moved[slices_yx] == label + 1
        waiting = np.concatenate([numbers[~whole], waiting[_LABELS:]])
    dense = np.zeros((len(parts), *size), dtype=np.bool_)
    boxes = np.zeros((len(parts), 4), dtype=np.int64)
    kept = sorted(parts)
    for row, number in enumerate(kept):
        (rows, columns), pixels = parts[number]
        dense[row, rows, columns] = pixels
        boxes[row] = columns.start, rows.start, columns.stop, rows.stop
    return np.array(kept, dtype=np.int64), torch.from_numpy(dense), boxes


def corners_of(annotations: Sequence[dict[str, Any]]) -> npt.NDArray[np.float64]:
    """(N, 4) corners of the boxes in pixels, rounded to float32 as Detectron2 does."""
    corners = np.zeros((len(annotations), 4))
    modes = [x["bbox_mode"] for x in annotations]
    for mode in set(modes):
        rows = [row for row, other in enumerate(modes) if other == mode]
        boxes = np.array([annotations[row]["bbox"] for row in rows], dtype=np.float32)
        if mode == BoxMode.XYWH_ABS:
            boxes[:, 2:] += boxes[:, :2]
        elif mode != BoxMode.XYXY_ABS:
            boxes = BoxMode.convert(torch.from_numpy(boxes), mode, BoxMode.XYXY_ABS).numpy()
        corners[rows] = boxes
    return corners
