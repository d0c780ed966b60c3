"""Read files in COCO's format as Detectron2's records."""

import logging
import os
from collections import defaultdict
from collections.abc import Set
from typing import Any

from detectron2.structures import BoxMode

from instseg.data.consistency import coco_instances, likely_mistakes, sample_step
from instseg.data.findings import Level, Report
from instseg.data.readers.coco_check import check_coco, usable_polygons
from instseg.data.readers.coco_forms import to_standard
from instseg.data.readers.json_files import file_of, read_json
from instseg.data.synthetic.files import is_elsewhere
from instseg.errors import DatasetError
from instseg.masks import to_rle

logger = logging.getLogger(__name__)

PREFIX = "coco:"
_CHECK = "`instseg check-data`"
_FIELDS = ("iscrowd", "bbox", "category_id", "id", "area", "num_keypoints")


def load(
    name: str, json_file: str, image_root: str
) -> tuple[list[dict[str, Any]], dict[int, str], bool]:
    """Read a data set in COCO's format.

    Args:
        name: of the data set, for messages.
        json_file: images, annotations (may be missing, as in sets for testing), categories.
        image_root: folder that the names of the images are relative to.
    Returns:
        records as :func:`coco_records` gives them; id → name of the classes, in the order of the
        ids; whether the file has a list of annotations, even an empty one.
    Raises:
        DatasetError: a file is missing, or no model can be trained on the content.
    """
    if not os.path.isfile(json_file):
        hint = (
            ""
            if name.startswith(PREFIX)
            else "; set DETECTRON2_DATASETS to the folder that holds it"
        )
        raise DatasetError(f"data set {name}: there is no file {json_file}{hint}")
    if not (os.path.isdir(image_root) or is_elsewhere(image_root)):
        raise DatasetError(f"data set {name}: the image folder {image_root} does not exist")
    where = file_of(name, json_file)
    content = read_coco(where, json_file, image_root)
    report = Report(check_coco(content, masks=False))
    error = next(report.lines(Level.ERROR), None)
    if error is not None:
        raise DatasetError(f"{where}: {error}; {_CHECK} shows all of it")
    step = sample_step(len(content.get("annotations", ())))
    mistakes = likely_mistakes(coco_instances(content, report, step))
    for line in (*report.warnings(), *mistakes):
        logger.warning("%s: %s", where, line)
    categories = sorted(content["categories"], key=lambda entry: entry["id"])
    classes = {entry["id"]: entry["name"] for entry in categories}
    records = coco_records(content, classes, image_root, report.left_out())
    return records, classes, "annotations" in content


def read_coco(where: str, json_file: str, image_root: str) -> Any:
    """Content of a file in COCO's format, in the form that everything reads; not checked.

    Args:
        where: beginning of messages.
    Raises:
        DatasetError: the file cannot be read, or is no JSON.
    """
    content = read_json(json_file, where)
    to_standard(content, image_root)
    return content


def coco_records(
    content: dict[str, Any], classes: dict[int, str], image_root: str, left_out: Set[Any]
) -> list[dict[str, Any]]:
    """Records in the order of the image ids, as Detectron2's ``load_coco_json`` gives them.

    Annotations also have the ``id``, ``area`` and ``num_keypoints`` of the file, and images its
    ``group`` (:mod:`instseg.data.sampling`).

    Args:
        content: without errors, see :func:`~instseg.data.readers.coco_check.check_coco`.
        classes: id → name, in the order of the class numbers.
        left_out: ids of annotations that are not used.
    """
    numbers = {category_id: number for number, category_id in enumerate(classes)}
    by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for annotation in content.get("annotations", ()):
        if annotation["id"] not in left_out:
            by_image[annotation["image_id"]].append(_annotation(annotation, numbers))
    return [
        {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": by_image[image["id"]],
            **({"group": image["group"]} if "group" in image else {}),
        }
        for image in sorted(content["images"], key=lambda entry: entry["id"])
    ]


def _annotation(given: dict[str, Any], numbers: dict[Any, int]) -> dict[str, Any]:
    annotation = {key: given[key] for key in _FIELDS if key in given}
    annotation["bbox_mode"] = BoxMode.XYWH_ABS
    annotation["category_id"] = numbers[given["category_id"]]
    mask = given.get("segmentation")
    if isinstance(mask, dict) and mask:
        annotation["segmentation"] = to_rle(mask, *mask["size"])
    elif mask:
        annotation["segmentation"] = usable_polygons(mask)
    if given.get("keypoints"):
        # COCO counts pixels, Detectron2 measures to their centres.  Every third is a visibility.
        annotation["keypoints"] = [
            value if index % 3 == 2 else value + 0.5
            for index, value in enumerate(given["keypoints"])
        ]
    return annotation
