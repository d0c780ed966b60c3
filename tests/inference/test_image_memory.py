"""Masks of a large image take no more memory than allowed, and are not copied."""

import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from instseg import Predictor, cli
from instseg.benchmark.rows import forget_peak, peak_resident
from instseg.data.videos import Frame, VideoWriter
from instseg.testing import PHOTO
from tests.support.predict_common import arguments_for_tiny_model
from tests.test_systems import SYSTEMS, build

IMAGE = np.random.default_rng(0).integers(0, 256, (25, 40, 3), dtype=np.uint8)
IMAGE = IMAGE.repeat(40, axis=0).repeat(40, axis=1)  # 1.6 megapixels


@pytest.mark.skipif(peak_resident() is None, reason="reads memory from /proc")
@pytest.mark.parametrize("name", SYSTEMS)
def test_two_hundred_objects_of_a_large_image_take_the_memory_of_fifty(name: str) -> None:
    """All masks would be 305 MiB, those allowed are 76; the rest is for networks and chunks."""
    predictor = build(
        *(name, "TEST.MASK_MEMORY", 50 * 1.6e-3, "TEST.DETECTIONS_PER_IMAGE", 200),
        *("MODEL.RPN.PRE_NMS_TOPK_TEST", 1000, "MODEL.RPN.POST_NMS_TOPK_TEST", 300),
        *("MODEL.YOLACT.NMS_TOP_K_TEST", 1000),
    )
    forget_peak()
    before = peak_resident()
    count = len(predictor(IMAGE)["instances"])
    assert peak_resident() - before < 280
    assert count == 50 or name.startswith("sgn/")  # an untrained SGN separates few instances


@pytest.mark.skipif(peak_resident() is None, reason="reads memory from /proc")
@pytest.mark.parametrize("name", ["mask_rcnn", "mask_scoring_rcnn"])
def test_five_thousand_instances_of_twelve_megapixels_take_less_than_a_gigabyte(name: str) -> None:
    """Dense masks of them would be 60 gigabytes, features and logits of their masks at once 3."""
    predictor = build(
        *(f"{name}/{name}_shapes.yaml", "TEST.DETECTIONS_PER_IMAGE", 5000),
        *("TEST.MASKS", "cropped", "MODEL.ANCHOR_GENERATOR.SIZES", [[2], [4], [8], [16], [32]]),
        *("MODEL.RPN.PRE_NMS_TOPK_TEST", 2000, "MODEL.RPN.POST_NMS_TOPK_TEST", 2000),
        *("MODEL.RPN.NMS_THRESH", 1.0, "MODEL.ROI_HEADS.NMS_THRESH_TEST", 1.0),
        *("INPUT.MIN_SIZE_TEST", 192),
    )
    image = np.tile(IMAGE, (3, 3, 1))[:3000, :4000]
    forget_peak()
    before = peak_resident()
    instances = predictor(image)["instances"]
    assert len(instances.pred_masks.to_rle()) == 5000
    assert peak_resident() - before < 950


@pytest.mark.skipif(peak_resident() is None, reason="reads memory from /proc")
@pytest.mark.parametrize("name", SYSTEMS)
def test_cropped_masks_of_a_large_image_take_less_than_fifty_dense_ones(name: str) -> None:
    """All two hundred, dense, would be 305 MiB, and there is no room for one."""
    predictor = build(
        *(name, "TEST.MASK_MEMORY", 1e-9, "TEST.DETECTIONS_PER_IMAGE", 200),
        *("MODEL.RPN.PRE_NMS_TOPK_TEST", 1000, "MODEL.RPN.POST_NMS_TOPK_TEST", 300),
        *("MODEL.YOLACT.NMS_TOP_K_TEST", 1000, "TEST.MASKS", "cropped"),
    )
    forget_peak()
    before = peak_resident()
    count = len(predictor(IMAGE)["instances"])
    assert peak_resident() - before < 280
    # Dense masks would be of one instance; an untrained SGN tells few apart.
    assert count > 50 or name.startswith("sgn/")


@pytest.mark.parametrize("kind", ["images", "video"])
def test_masks_are_gone_before_those_of_the_next_image_are_made(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Any]] = []

    def one_object(height: int, width: int) -> dict[str, Any]:
        masks = np.ones((1, height, width), bool)
        made.append(weakref.ref(masks))  # which lives as long as any tensor that shares its memory
        instances = Instances((height, width), pred_boxes=Boxes(torch.tensor([[0.0, 0, 9, 9]])))
        instances.scores, instances.pred_classes = torch.ones(1), torch.zeros(1, dtype=torch.int64)
        instances.pred_masks = torch.from_numpy(masks)
        return {"instances": instances}

    def stream(self: Predictor, images: Iterable[Any]) -> Iterator[dict[str, Any]]:
        for image in images:
            assert not any(reference() is not None for reference in made)
            yield one_object(*getattr(image, "pixels", image).shape[:2])

    monkeypatch.setattr(Predictor, "stream", stream)
    (tmp_path / "in").mkdir()
    if kind == "video":
        with VideoWriter(tmp_path / "in" / "clip.mp4", 25) as writer:
            for number in range(3):
                writer.write(Frame(PHOTO, number / 25))
    else:
        for number in range(3):
            Image.fromarray(PHOTO).save(tmp_path / "in" / f"{number}.png")
    arguments = arguments_for_tiny_model(tmp_path)
    arguments += ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    assert len(made) == 3
