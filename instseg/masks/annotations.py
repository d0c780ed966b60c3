"""Annotations of instances, made from their masks."""

from typing import Any

from detectron2.structures import BoxMode
from torch import Tensor

from instseg.masks.rle import RLE, Pixels, as_text, encode, rle_area, rle_box


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
