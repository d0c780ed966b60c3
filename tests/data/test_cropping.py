"""``INPUT.CROP`` of polygons, and of images without instances."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.structures import BoxMode
from PIL import Image

import instseg
from instseg.data.mappers import build_train_mapper


def crop(folder: Path, *annotations: dict[str, Any]) -> dict[str, Any]:
    """A sample of 60 x 60 pixels of an image of 80 x 100."""
    Image.fromarray(np.zeros((80, 100, 3), np.uint8)).save(folder / "a.png")
    cfg = instseg.load_cfg("mask_rcnn/mask_rcnn_nuclei.yaml", ["INPUT.CROP.SIZE", [60, 60]])
    record = {"file_name": str(folder / "a.png"), "annotations": list(annotations)}
    return build_train_mapper(cfg, augment=True)(record)


def square(**changes: Any) -> dict[str, Any]:
    """A polygon that every crop contains a part of."""
    annotation = {
        "bbox": [30, 15, 70, 65],
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": 0,
        "segmentation": [[30.0, 15, 70, 15, 70, 65, 30, 65]],
    }
    return annotation | changes


def test_polygons_are_cropped_to_bit_masks_without_shapely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("shapely", "shapely.geometry"):
        monkeypatch.setitem(sys.modules, name, None)
    sample = crop(tmp_path, square())
    masks = sample["instances"].gt_masks
    assert masks.tensor.any()
    assert (masks.get_bounding_boxes().tensor == sample["instances"].gt_boxes.tensor).all()


@pytest.mark.parametrize("annotations", [[], [square(iscrowd=1)]])
def test_an_image_without_instances_may_be_cropped(
    tmp_path: Path, annotations: list[dict[str, Any]]
) -> None:
    assert len(crop(tmp_path, *annotations)["instances"]) == 0
