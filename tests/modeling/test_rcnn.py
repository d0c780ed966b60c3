"""Heads that look at some boxes at a time give what they give for all at once."""

from typing import Any

import numpy as np
import pytest
import torch

from instseg.modeling import rcnn
from instseg.testing import PHOTO
from tests.test_systems import build

IMAGES = [PHOTO, np.ascontiguousarray(PHOTO[:40, 8:])]


def results(name: str, *overrides: Any) -> list[dict[str, Any]]:
    words = ["TEST.DETECTIONS_PER_IMAGE", 30, "TEST.AUG.MIN_SIZES", (48,), *overrides]
    # One image has fewer instances than the other.
    predictor = build(name, *words, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.27)
    predictions = predictor.stream(IMAGES)
    return [result["instances"].get_fields() for result in predictions]


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("mask_rcnn/mask_rcnn_shapes.yaml", ()),
        ("mask_scoring_rcnn/mask_scoring_rcnn_shapes.yaml", ()),
        ("mask_scoring_rcnn/mask_scoring_rcnn_shapes.yaml", ("TEST.AUG.ENABLED", True)),
    ],
)
@pytest.mark.parametrize("size", [1, 7])
def test_masks_do_not_depend_on_how_many_are_computed_together(
    name: str, overrides: tuple[Any, ...], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = results(name, *overrides)
    counts = [len(fields["scores"]) for fields in expected]
    assert counts[0] != counts[1] and min(counts) > 0 and max(counts) > 7
    monkeypatch.setattr(rcnn, "_BOXES", size)
    for fields, fields_expected in zip(results(name, *overrides), expected, strict=True):
        assert fields.keys() == fields_expected.keys()
        for key, value in fields.items():
            wanted = fields_expected[key]
            same = torch.allclose if key == "mask_scores" else torch.equal
            assert same(getattr(value, "tensor", value), getattr(wanted, "tensor", wanted)), key


@pytest.mark.parametrize("count", [0, 5])
def test_no_part_has_more_boxes_than_allowed(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rcnn, "_BOXES", 2)
    predictor = build("mask_rcnn/mask_rcnn_shapes.yaml", "TEST.DETECTIONS_PER_IMAGE", count)
    sizes: list[int] = []
    predictor.model.roi_heads.mask_head.register_forward_hook(
        lambda _head, inputs, _outputs: sizes.append(len(inputs[0]))
    )
    assert len(predictor(PHOTO)["instances"]) == count
    assert sizes == ([2, 2, 1] if count else [0])
    assert "forward_with_given_boxes" not in vars(predictor.model.roi_heads)
