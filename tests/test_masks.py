"""Masks: every form says the same, and the odd ones neither crash nor read beyond their memory."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.structures import BitMasks, BoxMode, Instances, PolygonMasks
from hypothesis import given
from hypothesis.extra.numpy import array_shapes, arrays

from instseg.masks import (
    annotation_of,
    as_text,
    check_rle,
    coco_annotation_of,
    decode,
    encode,
    gt_masks_of,
    instances_from_masks,
    ious,
    rle_area,
    rle_box,
    tight_boxes,
    to_rle,
)

MASKS = arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=12))


@given(MASKS)
def test_every_form_of_a_mask_is_the_same_rle(mask: np.ndarray) -> None:
    rle = encode(mask)
    assert rle == mask_util.encode(np.asfortranarray(mask, np.uint8))
    wide = np.repeat(mask, 2, axis=1)
    for form in (
        mask.astype(np.uint8),
        np.asfortranarray(mask),
        wide[:, ::2],
        torch.from_numpy(mask),
        torch.from_numpy(wide)[:, ::2],
    ):
        assert encode(form) == rle
    runs = check_rle(as_text(rle), *mask.shape)
    for segmentation in (rle, as_text(rle), {"size": list(mask.shape), "counts": runs}):
        decoded = decode(segmentation, *mask.shape)
        assert decoded.dtype == bool
        np.testing.assert_array_equal(decoded, mask)


@given(MASKS)
def test_boxes_and_areas_of_an_rle_are_those_of_its_pixels(mask: np.ndarray) -> None:
    rle = encode(mask)
    assert rle_area(rle) == mask.sum()
    x1, y1, x2, y2 = tight_boxes(torch.from_numpy(mask)[None])[0].tolist()
    assert rle_box(rle) == [x1, y1, x2 - x1, y2 - y1]


def test_every_form_of_segmentation_is_read() -> None:
    mask = np.zeros((1, 20), dtype=bool)
    mask[:, 4:9] = True
    rle = encode(mask)
    polygons = [[4, 0, 6, 0, 6, 1, 4, 1], [5, 0, 9, 0, 9, 1, 5, 1]]
    for form in (rle, as_text(rle), {"size": [1, 20], "counts": [4, 5, 11]}, polygons):
        np.testing.assert_array_equal(decode(form, 1, 20), mask)


def test_overlaps_are_those_of_pixels_and_no_prediction_has_none() -> None:
    left, all_of_it = encode(np.eye(2, dtype=bool)[:1]), encode(np.ones((1, 2), dtype=bool))
    assert ious([left, all_of_it], [all_of_it]).tolist() == [[0.5], [1]]
    assert ious([left], [all_of_it], [1]).tolist() == [[1]]
    assert ious([[0, 0, 1, 2]], [[0, 0, 2, 2]]).tolist() == [[0.5]]
    shapes = [ious([], [left]).shape, ious([left], []).shape, ious([], []).shape]
    assert shapes == [(0, 1), (1, 0), (0, 0)]


def test_nothing_else_imports_the_masks_of_pycocotools() -> None:
    root = Path(__file__).parents[1]
    folders = ("instseg", "projects", "tools")
    files = [path for folder in folders for path in (root / folder).rglob("*.py")]
    pattern = re.compile(r"pycocotools(\.| import )mask")
    users = [path.name for path in files if pattern.search(path.read_text("utf-8"))]
    assert users == ["rle.py"]


def test_a_huge_mask_keeps_its_area_and_box() -> None:
    """More pixels than 32 bits with a sign count."""
    size = [50_000, 50_000]
    rle = to_rle({"size": size, "counts": [0, size[0] * size[1]]}, *size)
    assert rle_area(rle) == 2_500_000_000
    assert rle_box(rle) == [0, 0, *size]


def test_annotations_describe_a_mask() -> None:
    mask = np.zeros((5, 7), dtype=bool)
    mask[1:3, 2:6] = True
    rle = encode(mask)
    expected = {
        "bbox": [2, 1, 4, 2],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 3,
        "segmentation": rle,
        "iscrowd": 0,
    }
    assert annotation_of(mask, 3) == annotation_of(rle, 3) == expected
    assert annotation_of(rle, 3, iscrowd=1, track_id=4) == {
        **expected,
        "iscrowd": 1,
        "track_id": 4,
    }
    entry = coco_annotation_of(mask, 3)
    assert entry == coco_annotation_of(rle, 3)
    del expected["bbox_mode"]
    assert entry == {**expected, "area": 8, "segmentation": as_text(rle)}


def test_ground_truth_is_drawn_from_polygons_as_from_bit_masks() -> None:
    bits = torch.zeros(1, 40, 30, dtype=torch.bool)
    bits[0, 10:20, 5:20] = True
    image = Instances((40, 30))
    assert gt_masks_of(image).shape == (0, 40, 30)
    polygon = np.array([5.0, 10, 20, 10, 20, 20, 5, 20])
    for masks in (BitMasks(bits), PolygonMasks([[polygon]])):
        image = Instances((40, 30), gt_masks=masks)
        assert torch.equal(gt_masks_of(image), bits)
    image = Instances((40, 30), gt_masks=PolygonMasks([]))
    assert gt_masks_of(image).shape == (0, 40, 30)
    assert gt_masks_of(image).dtype == torch.bool


def test_boxes_are_tight_and_half_open() -> None:
    masks = torch.zeros(5, 6, 9, dtype=torch.bool)
    masks[0, 1:3, 4:7] = True
    masks[1, 5, 8] = True
    masks[3, 1:4, 2:9] = True
    masks[4, 0, 0] = masks[4, 5, 3] = True
    expected = [[4, 1, 7, 3], [8, 5, 9, 6], [0, 0, 0, 0], [2, 1, 9, 4], [0, 0, 4, 6]]
    assert tight_boxes(masks).tolist() == expected
    assert tight_boxes(masks.transpose(1, 2))[:, [1, 0, 3, 2]].tolist() == expected
    assert tight_boxes(masks[:0]).shape == (0, 4)


@pytest.mark.parametrize("filled", [[0, 1, 0, 1, 1], [0] * 5, [1] * 5, []])
def test_instances_have_pixels_and_their_masks_are_no_copy(filled: list[int]) -> None:
    rows = torch.tensor(filled, dtype=torch.bool)
    masks = torch.eye(5)[:, None, :][: len(rows)].bool() & rows[:, None, None]
    expected = masks[rows]
    instances = instances_from_masks(masks, torch.arange(len(rows)) / 8, torch.arange(len(rows)))
    assert instances.image_size == (1, 5)
    assert torch.equal(instances.pred_masks, expected)
    assert torch.equal(instances.pred_boxes.tensor, tight_boxes(expected))
    assert instances.pred_classes.tolist() == rows.nonzero()[:, 0].tolist()
    assert torch.equal(instances.scores, instances.pred_classes / 8)
    stored, given = (x.untyped_storage().data_ptr() for x in (instances.pred_masks, masks))
    assert stored == given


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (None, "no mask"),
        ([[0, 0, 1, 1, 1, 0]], "no mask"),
        ({"size": [2, 3]}, "no mask"),
        ({"size": [2, 3], "counts": [6.0]}, "no mask"),
        ({"size": [2, 3], "counts": [True, 5]}, "no mask"),
        ({"size": [2, 3], "counts": "é"}, "no mask"),
        ({"size": [2, 3], "counts": "P"}, "no mask"),  # ends where another character must follow
        ({"size": [2, 3], "counts": "o" * 20}, "no mask"),
        ({"counts": [6]}, "is of None"),
        ({"size": [3, 2], "counts": [6]}, r"is of \[3, 2\]"),
        ({"size": (2, 3), "counts": [6]}, "is of"),
        ({"size": [2.0, 3], "counts": [6]}, "is of"),
        ({"size": [2, 3], "counts": []}, "do not add up"),
        ({"size": [2, 3], "counts": [7]}, "do not add up"),
        ({"size": [2, 3], "counts": [-1, 7]}, "do not add up"),
        ({"size": [2, 3], "counts": ""}, "do not add up"),
    ],
)
def test_an_encoding_that_pycocotools_must_not_see_is_refused(mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_rle(mask, 2, 3)
