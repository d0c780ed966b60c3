"""Masks: arrays, run-length encodings, polygons, boxes, and sets of masks that are cropped."""

from instseg.masks.annotations import annotation_of, coco_annotation_of
from instseg.masks.cropped import CroppedMasks
from instseg.masks.dense import gt_masks_of, instances_from_masks, tight_boxes
from instseg.masks.polygons import Polygon, Ring, polygons
from instseg.masks.rle import (
    RLE,
    Pixels,
    as_text,
    check_rle,
    decode,
    encode,
    ious,
    rle_area,
    rle_box,
    to_rle,
)

__all__ = [
    "RLE",
    "CroppedMasks",
    "Pixels",
    "Polygon",
    "Ring",
    "annotation_of",
    "as_text",
    "check_rle",
    "coco_annotation_of",
    "decode",
    "encode",
    "gt_masks_of",
    "instances_from_masks",
    "ious",
    "polygons",
    "rle_area",
    "rle_box",
    "tight_boxes",
    "to_rle",
]
