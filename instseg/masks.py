"""Convert masks between arrays, COCO's run-length encodings (RLE), polygons and boxes.

An RLE is ``{"size": [height, width], "counts": ...}``.  Its runs go down the columns, alternating
between background and instance.  ``counts`` are compressed bytes as pycocotools makes them, the
same as text in JSON, or a list of the lengths.  If the runs do not fit the size, pycocotools reads
and writes beyond its memory, so an RLE from outside first passes :func:`check_rle`.
"""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pycocotools.mask as mask_util
import torch
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances
from torch import Tensor

RLE = dict[str, Any]
Pixels = npt.NDArray[Any]


def encode(mask: Tensor | Pixels) -> RLE:
    """Compressed RLE, with bytes as ``counts``, of an (H, W) mask: bool, or numbers 0 and 1."""
    pixels = mask.cpu().numpy() if isinstance(mask, Tensor) else mask
    rle: RLE = mask_util.encode(np.asfortranarray(pixels, dtype=np.uint8))
    return rle


def decode(segmentation: Any, height: int, width: int) -> npt.NDArray[np.bool_]:
    """(H, W) mask from the input of :func:`to_rle`; an RLE gives a mask of its own size."""
    pixels: npt.NDArray[np.uint8] = mask_util.decode(to_rle(segmentation, height, width))
    return pixels.view(np.bool_)


def to_rle(segmentation: Any, height: int, width: int) -> RLE:
    """Compressed RLE of an instance's segmentation in COCO's format.

    Args:
        segmentation: a list of one or more polygons ``[x, y, x, y, ...]``, or an RLE.  A compressed
            RLE is returned unchanged.
        height, width: of the image.
    """
    rle: RLE = segmentation
    if isinstance(segmentation, list):
        rle = mask_util.merge(mask_util.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        rle = mask_util.frPyObjects(segmentation, height, width)
    return rle


def as_text(rle: RLE) -> RLE:
    """A compressed RLE with text as ``counts`` for JSON, from one with bytes."""
    return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}


def rle_area(rle: RLE) -> int:
    """Number of pixels of a compressed RLE."""
    return int(mask_util.area(rle))


def rle_box(rle: RLE) -> list[float]:
    """The smallest box around a compressed RLE: x, y, width, height; zeros if it is empty."""
    box: list[float] = mask_util.toBbox(rle).tolist()
    return box


def ious(
    predicted: list[Any] | Pixels, truth: list[Any] | Pixels, crowds: Sequence[int] = ()
) -> npt.NDArray[np.float64]:
    """Intersection over union of each prediction with each instance of the ground truth.

    Args:
        predicted, truth: P and T compressed RLEs of one size, or boxes x, y, width, height.
        crowds: (T,) 1 divides by the area of the prediction only; empty means all 0.
    Returns:
        (P, T).
    """
    overlaps = mask_util.iou(predicted, truth, crowds or [0] * len(truth))
    return np.asarray(overlaps, dtype=np.float64).reshape(len(predicted), len(truth))


def annotation_of(mask: Tensor | Pixels | RLE, category: int, **more: Any) -> dict[str, Any]:
    """Annotation of an instance that is no crowd, in Detectron2's format.

    Args:
        mask: as for :func:`encode`, or a compressed RLE.
        category: contiguous class, from 0.
        more: further entries, or replacements of the usual ones.
    """
    rle = mask if isinstance(mask, dict) else encode(mask)
    return {
        "bbox": rle_box(rle),
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": category,
        "segmentation": rle,
        "iscrowd": 0,
        **more,
    }


def coco_annotation_of(mask: Tensor | Pixels | RLE, category_id: int) -> dict[str, Any]:
    """:func:`annotation_of` in COCO's format, for JSON; the caller adds ``id`` and ``image_id``."""
    rle = mask if isinstance(mask, dict) else encode(mask)
    return {
        "category_id": category_id,
        "segmentation": as_text(rle),
        "area": rle_area(rle),
        "bbox": rle_box(rle),
        "iscrowd": 0,
    }


def outlines(mask: Pixels) -> list[list[float]]:
    """The outer edges of a mask as polygons, one for each part.

    Polygons cannot express holes, so holes are filled.  For a mask without holes pycocotools draws
    exactly the same mask from the polygons.

    Args:
        mask: (H, W), 1 inside the instance and 0 elsewhere.
    Returns:
        ``[[x, y, x, y, ...], ...]`` in pixels, each with three points or more; (0, 0) is the upper
        left corner of the image, (0.5, 0.5) the centre of its first pixel.  Empty if the mask is.
    """
    x, y, width, height = cv2.boundingRect(np.asarray(mask, dtype=np.uint8))
    # Twice as fine, so that the grid has points at the corners and centres of pixels.
    grid = np.zeros((2 * height + 1, 2 * width + 1), dtype=np.uint8)
    grid[1::2, 1::2] = mask[y : y + height, x : x + width]
    filled = cv2.dilate(grid, np.ones((3, 3), dtype=np.uint8))
    contours, _ = cv2.findContours(filled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return [(edge[:, 0] / 2 + (x, y)).ravel().tolist() for edge in contours if len(edge) > 2]


def gt_masks_of(instances: Instances) -> Tensor:
    """Masks of the instances of a training image; draws polygons.

    Args:
        instances: with ``gt_masks`` (``BitMasks`` or ``PolygonMasks``); Detectron2 leaves the field
            out if there is no instance.
    Returns:
        (N, H, W) bool at the size of the image.
    """
    size = instances.image_size
    if not instances.has("gt_masks"):
        return torch.zeros(0, *size, dtype=torch.bool)
    masks = instances.gt_masks
    if not isinstance(masks, BitMasks):
        masks = BitMasks.from_polygon_masks(masks, *size)
    pixels: Tensor = masks.tensor
    return pixels


def tight_boxes(masks: Tensor) -> Tensor:
    """The smallest boxes around masks.

    Args:
        masks: (N, H, W) bool.
    Returns:
        (N, 4) float32 xyxy, half-open; zeros for an empty mask.
    """
    count, height, width = masks.shape
    if not masks.numel():
        return torch.zeros(count, 4, device=masks.device)
    sides = []
    for hit, length in ((masks.any(dim=1), width), (masks.any(dim=2), height)):
        filled = hit.any(dim=1)
        first = hit.int().argmax(dim=1)
        last = length - hit.flip(1).int().argmax(dim=1)
        sides += [torch.where(filled, first, 0), torch.where(filled, last, 0)]
    x1, x2, y1, y2 = sides
    return torch.stack([x1, y1, x2, y2], dim=1).float()


def instances_from_masks(masks: Tensor, scores: Tensor, classes: Tensor) -> Instances:
    """The instances of an image that have a pixel.

    Hundreds of masks of a large image take gigabytes, so they are not copied: the masks with pixels
    move to the front of ``masks``.

    Args:
        masks: (N, H, W) bool, written to.
        scores, classes: (N,).
    Returns:
        ``pred_boxes`` (tight), ``scores``, ``pred_classes`` and ``pred_masks``, a view of
        ``masks``.
    """
    boxes = tight_boxes(masks)
    filled = boxes[:, 2] > boxes[:, 0]
    rows = filled.nonzero()[:, 0].tolist()
    for target, row in enumerate(rows):
        if target != row:
            masks[target] = masks[row]
    height, width = masks.shape[1:]
    instances = Instances((height, width))
    instances.pred_boxes = Boxes(boxes[filled])
    instances.scores = scores[filled]
    instances.pred_classes = classes[filled]
    instances.pred_masks = masks[: len(rows)]
    return instances


def check_rle(mask: Any, height: int, width: int) -> list[int]:
    """Lengths of the runs of an RLE, down the columns, alternating background and instance.

    Args:
        mask: ``{"size": [height, width], "counts": list or compressed text}``.
        height, width: of the image it belongs to.
    Raises:
        ValueError: it is no RLE, has another size, or its runs do not fill the image.
    """
    counts = mask.get("counts") if isinstance(mask, dict) else None
    if isinstance(counts, str):
        counts = _runs(counts)
    if not isinstance(counts, list) or not all(type(count) is int for count in counts):
        raise ValueError("no mask can be read from it; expected an RLE with counts and size")
    size = mask.get("size")
    if size != [height, width] or any(type(side) is not int for side in size):
        raise ValueError(f"the mask is of {size}, its image of {[height, width]} (height, width)")
    if min(counts, default=-1) < 0 or sum(counts) != height * width:
        raise ValueError(f"the runs do not add up to {height} x {width} pixels")
    return counts


def _runs(text: str) -> list[int] | None:
    """Lengths of the runs in COCO's compressed text; None if the text is malformed.

    Each character, counted from "0", holds five bits of a number, the lowest first.  The bit 32
    says that another character follows, and the bit 16 of a number's last character is its sign.
    From the fourth number on, each is the difference from the last but one.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - ord("0")
        if not 0 <= bits < 64 or shift > 60:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << shift - 4
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return None if shift else counts
