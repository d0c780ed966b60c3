"""Masks of boxes come into an image with the numbers of Detectron2, in the boxes alone."""

import copy
from typing import Any

import pytest
import torch
from detectron2.layers.mask_ops import paste_masks_in_image
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from instseg.masks import CroppedMasks, encode
from instseg.modeling import masks_of, pasting
from instseg.modeling.pasting import pasted
from instseg.modeling.rcnn import postprocess_rcnn

SIZE = (90, 120)


def boxes_of(count: int, seed: int, size: tuple[int, int] = SIZE) -> Tensor:
    """Boxes of every size inside the image, some as large as it, some thinner than a pixel."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, 2, generator=generator) * 1.4 - 0.2
    corners = corners.sort(dim=1).values.clamp(0, 1) * torch.tensor([size[1], size[0]])
    boxes = corners.flatten(1)
    boxes[::7, 2] = boxes[::7, 0] + 0.3
    boxes[::5] = boxes[::5].round()
    chosen = Boxes(boxes)
    chosen.clip(size)
    return chosen.tensor[chosen.nonempty()]


def dense(masks: Tensor, boxes: Tensor, size: tuple[int, int] = SIZE) -> Tensor:
    placed = pasted(masks, boxes, size)
    return masks_of(placed, len(masks), size, cropped=False, device="cpu")


@given(st.integers(0, 10**6), st.sampled_from([1, 3, 14, 28]))
def test_pixels_are_those_of_detectron2(seed: int, side: int) -> None:
    """Also where a mask has exactly the threshold."""
    boxes = boxes_of(20, seed)
    masks = torch.rand(len(boxes), side, side, generator=torch.Generator().manual_seed(seed))
    masks[::3] = masks[::3].round()
    masks[1::3] = 0.5
    expected = paste_masks_in_image(masks, boxes, SIZE)
    assert torch.equal(dense(masks, boxes), expected.bool())


def test_boxes_that_are_computed_in_parts_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = boxes_of(60, 0)
    masks = torch.rand(len(boxes), 7, 7)
    whole = dense(masks, boxes)
    monkeypatch.setattr(pasting, "_PIXELS", 300)
    assert torch.equal(dense(masks, boxes), whole) and whole.any()


def test_every_mask_comes_once_and_in_its_place() -> None:
    boxes = boxes_of(60, 1)
    rows = [mask.row for mask in pasted(torch.rand(len(boxes), 7, 7), boxes, SIZE)]
    assert sorted(rows) == list(range(len(boxes)))


@pytest.mark.parametrize("form", ["dense", "cropped"])
def test_the_rest_of_the_result_is_detectron2s(form: str) -> None:
    boxes = boxes_of(30, 2, (45, 60))
    boxes[3] = 0
    item: dict[str, Any] = {"image": torch.zeros(3, 45, 60), "height": 90, "width": 120}
    instances = Instances((45, 60), pred_boxes=Boxes(boxes), scores=torch.rand(len(boxes)))
    instances.pred_masks = torch.rand(len(boxes), 1, 14, 14)
    instances.pred_keypoints = torch.rand(len(boxes), 2, 3)
    expected = detector_postprocess(copy.deepcopy(instances), *SIZE)
    result = postprocess_rcnn(instances, item | {"masks": form})
    assert result.image_size == SIZE and 0 < len(result) == len(boxes) - 1
    assert set(result.get_fields()) == set(expected.get_fields())
    assert torch.equal(result.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(result.pred_keypoints, expected.pred_keypoints)
    if form == "dense":
        assert torch.equal(result.pred_masks, expected.pred_masks)
    else:
        assert isinstance(result.pred_masks, CroppedMasks)
        assert result.pred_masks.to_rle() == [encode(mask) for mask in expected.pred_masks]


def test_no_instance_has_masks_of_the_right_shape() -> None:
    item: dict[str, Any] = {"image": torch.zeros(3, 45, 60)}
    none = Instances((45, 60), pred_boxes=Boxes(torch.zeros(0, 4)))
    none.pred_masks = torch.zeros(0, 1, 14, 14)
    assert postprocess_rcnn(none[:], item).pred_masks.shape == (0, 45, 60)
    assert len(postprocess_rcnn(none[:], item | {"masks": "cropped"}).pred_masks) == 0
