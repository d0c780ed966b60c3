"""The objects that predictions are compared with, as COCO's code needs them."""

import contextlib
import io

import pycocotools.mask as mask_util
from pycocotools.coco import COCO

from instseg.data.coco_check import Report, check_coco, usable_polygons
from instseg.data.images import MAX_PIXELS


def prepare_truth(coco: COCO) -> None:
    """Leave out of ``coco`` what training leaves out, and complete the rest, in place.

    pycocotools fails or reads beyond its memory where an object cannot be drawn, fails where one
    has no ``area`` or ``iscrowd``, ignores one with an impossible area, and counts the object whose
    id is 0 as never found: objects are numbered from 1.
    """
    if "annotations" not in coco.dataset:
        return
    left_out = Report(check_coco(coco.dataset, masks=False)).left_out()
    kept = [entry for entry in coco.dataset["annotations"] if entry["id"] not in left_out]
    for number, entry in enumerate(kept, start=1):
        entry["id"] = number
        entry.setdefault("iscrowd", 0)
        if isinstance(entry.get("segmentation"), list):
            entry["segmentation"] = usable_polygons(entry["segmentation"])
        area = entry.get("area")
        # pycocotools leaves objects of any other area out of every range, and so of the result.
        if type(area) not in (int, float) or not 0 <= area <= MAX_PIXELS:
            *_, width, height = entry.get("bbox") or (0, 0, 0, 0)
            mask = entry.get("segmentation")
            entry["area"] = (
                float(mask_util.area(coco.annToRLE(entry))) if mask else float(width * height)
            )
    coco.dataset["annotations"] = kept
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
