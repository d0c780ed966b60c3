"""Records of a small set as a registered function gives them, and ways to change them."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.config import CfgNode
from detectron2.structures import BoxMode

import instseg
from tests.support.coco_data import HEIGHT, SQUARE, WIDTH, content, write_set

MASK = np.zeros((HEIGHT, WIDTH), bool)
MASK[5:15, 5:15] = True
RLE = mask_util.encode(np.asfortranarray(MASK, np.uint8))
NAME = "somebodys"

Records = list[dict[str, Any]]
Change = Callable[[Records], Any]


def plain(folder: Path) -> Records:
    """One instance in each of two images, as Detectron2 wants it."""
    write_set(folder, content())
    return [
        {
            "file_name": str(folder / f"images/{key}.png"),
            "image_id": key,
            "height": HEIGHT,
            "width": WIDTH,
            "annotations": [
                {
                    "bbox": [5.0, 5.0, 15.0, 15.0],
                    "bbox_mode": BoxMode.XYXY_ABS,
                    "segmentation": [[float(value) for value in SQUARE]],
                    "category_id": 0,
                    "iscrowd": 0,
                }
            ],
        }
        for key in (1, 2)
    ]


def changing(folder: Path, change: Change) -> Callable[[], Any]:
    """A function that gives the plain records after ``change``, or what that returns."""

    def function() -> Any:
        records = plain(folder)
        returned = change(records)
        return records if returned is None else returned

    return function


def config(output: Path, *overrides: Any, test: bool = False) -> CfgNode:
    words: list[Any] = ["DATASETS.TRAIN", (NAME,), "DATASETS.TEST", (NAME,) if test else ()]
    words += ["MODEL.ROI_HEADS.NUM_CLASSES", 2, "DATALOADER.NUM_WORKERS", 0]
    words += ["OUTPUT_DIR", str(output), "SOLVER.IMS_PER_BATCH", 2, *overrides]
    return instseg.load_cfg("mask_rcnn/mask_rcnn_shapes.yaml", words)


def each(**values: Any) -> Change:
    """Changes all annotations; KeyError removes a key."""

    def change(records: Records) -> None:
        for record in records:
            for annotation in record["annotations"]:
                update(annotation, values)

    return change


def image(**values: Any) -> Change:
    """Changes all records."""

    def change(records: Records) -> None:
        for record in records:
            update(record, values)

    return change


def update(entry: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        if value is KeyError:
            del entry[key]
        else:
            entry[key] = value(entry[key]) if callable(value) else copy.deepcopy(value)
