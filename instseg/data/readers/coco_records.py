"""Content in COCO's format as Detectron2's records."""

import os
from collections import defaultdict
from collections.abc import Set
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode

from instseg.data.readers.coco_check import usable_polygons
from instseg.data.readers.coco_forms import to_standard
from instseg.data.readers.json_files import read_json
from instseg.masks import to_rle

_FIELDS = ("iscrowd", "bbox", "category_id", "id")


def read_coco(where: str, json_file: str, image_root: str) -> Any:
    """Content of a file in COCO's format, in the form that everything reads; not checked.

    Args:
        where: what messages begin with.
    Raises:
        DatasetError: it cannot be read, or is no JSON.
    """
    content = read_json(json_file, where)
    to_standard(content, image_root)
    return content


def coco_records(
    name: str, content: dict[str, Any], image_root: str, left_out: Set[Any]
) -> list[dict[str, Any]]:
    """Records, in the order of the ids of images, as ``load_coco_json`` of Detectron2 gives them.

    Beside its fields annotations have their ``id``.  Classes become those of the data set, in the
    order of their ids.

    Args:
        name: of the data set, for its metadata.
        content: without errors, see :func:`~instseg.data.readers.coco_check.check_coco`.
        left_out: ids of annotations that are not used.
    Raises:
        AssertionError: the data set has other classes already.
    """
    categories = sorted(content["categories"], key=lambda entry: entry["id"])
    numbers = {entry["id"]: number for number, entry in enumerate(categories)}
    MetadataCatalog.get(name).set(
        thing_classes=[entry["name"] for entry in categories],
        thing_dataset_id_to_contiguous_id=numbers,
    )
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
        # COCO counts pixels, Detectron2 measures to their centres; every third is no coordinate.
        annotation["keypoints"] = [
            value if index % 3 == 2 else value + 0.5
            for index, value in enumerate(given["keypoints"])
        ]
    return annotation
