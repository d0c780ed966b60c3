"""Prepare the ground truth of a data set for COCO's code."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

from detectron2.structures import BoxMode, PolygonMasks
from pycocotools.coco import COCO

from instseg.data.findings import Report
from instseg.data.image_headers import MAX_PIXELS
from instseg.data.readers.coco_check import check_coco, usable_polygons
from instseg.data.readers.coco_records import read_coco
from instseg.data.readers.json_files import file_of
from instseg.masks import as_text, rle_area


def of_file(name: str, json_file: str, image_root: str) -> COCO:
    """The ground truth in a file in COCO's format, which belongs to a registered function.

    Raises:
        DatasetError: the file cannot be read.
    """
    coco = COCO()
    coco.dataset = read_coco(file_of(name, json_file), json_file, image_root)
    return _indexed(coco)


def of_records(
    records: Sequence[dict[str, Any]],
    categories: list[dict[str, Any]],
    *,
    annotated: bool,
    exact: bool,
) -> COCO:
    """The ground truth in records in Detectron2's standard format.

    Args:
        records: not modified.
        categories: ``{"id": ..., "name": ...}`` in the order of the class numbers.
        annotated: whether there is a ground truth, possibly one without instances.
        exact: keep boxes and areas, which come from a file in COCO's format.  Otherwise compute the
            areas and round the boxes, as Detectron2 does when it converts records.
    """
    coco = COCO()
    coco.dataset = {
        "images": [
            {
                "id": record["image_id"],
                "width": int(record["width"]),
                "height": int(record["height"]),
                "file_name": str(record["file_name"]),
            }
            for record in records
        ],
        "categories": categories,
    }
    if annotated:
        annotations: list[dict[str, Any]] = []
        for record in records:
            for given in record.get("annotations", ()):
                annotation = _annotation(given, exact)
                annotation["id"] = len(annotations) + 1
                annotation["image_id"] = record["image_id"]
                annotation["category_id"] = categories[given["category_id"]]["id"]
                annotations.append(annotation)
        coco.dataset["annotations"] = annotations
    return _indexed(coco)


def _annotation(given: dict[str, Any], exact: bool) -> dict[str, Any]:
    """An annotation of a record in COCO's format, without its ids."""
    box = [float(value) for value in given["bbox"]]
    mask = given.get("segmentation")
    box = BoxMode.convert(box, given["bbox_mode"], BoxMode.XYWH_ABS)
    annotation: dict[str, Any] = {"bbox": box, "iscrowd": int(given.get("iscrowd", 0))}
    if not exact:
        annotation["bbox"] = [round(value, 3) for value in box]
        annotation["area"] = _area(box, mask)
    elif "area" in given:
        annotation["area"] = given["area"]
    if "keypoints" in given:
        # Detectron2 measures to the centres of pixels, COCO counts them.
        points = [v if i % 3 == 2 else v - 0.5 for i, v in enumerate(given["keypoints"])]
        annotation["keypoints"] = points
        num_labelled = sum(value > 0 for value in points[2::3])
        annotation["num_keypoints"] = given.get("num_keypoints", num_labelled)
    if isinstance(mask, dict):
        is_text = isinstance(mask["counts"], str)
        annotation["segmentation"] = mask if is_text else as_text(mask)
    elif mask:
        annotation["segmentation"] = mask
    return annotation


def _area(box: list[float], mask: Any) -> float:
    if isinstance(mask, dict):
        return float(rle_area(mask))
    return float(PolygonMasks([mask]).area()[0]) if mask else box[2] * box[3]


def _indexed(coco: COCO) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        coco.createIndex()
    prepare_ground_truth(coco)
    return coco


def prepare_ground_truth(coco: COCO) -> None:
    """Remove the annotations that training leaves out, and complete the others, in place.

    Otherwise pycocotools would fail, or read beyond its memory, on an instance that cannot be
    drawn.  It would fail on one without ``area`` or ``iscrowd``, ignore one with an impossible
    area, and count one with the id 0 as never found, so instances are numbered from 1.
    """
    if "annotations" not in coco.dataset:
        return
    left_out = Report(check_coco(coco.dataset, masks=False)).left_out()
    used_annotations = [
        entry for entry in coco.dataset["annotations"] if entry["id"] not in left_out
    ]
    for number, entry in enumerate(used_annotations, start=1):
        entry["id"] = number
        entry.setdefault("iscrowd", 0)
        if isinstance(entry.get("segmentation"), list):
            entry["segmentation"] = usable_polygons(entry["segmentation"])
        area = entry.get("area")
        # Instances of any other area are in none of pycocotools' ranges, so results ignore them.
        if type(area) not in (int, float) or not 0 < area <= MAX_PIXELS:
            *_, width, height = entry.get("bbox") or (0, 0, 0, 0)
            mask = entry.get("segmentation")
            entry["area"] = float(rle_area(coco.annToRLE(entry))) if mask else float(width * height)
    coco.dataset["annotations"] = used_annotations
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
