"""``MODEL.YOLACT.CROP_MASKS_TEST``, the authors' ``--no_crop``, against its formula spelled out."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import instseg
from instseg.inference.predictor import Predictor
from instseg.inference.video import VideoPredictor
from instseg.modeling import as_video
from tests.support.yolact_common import image
from tests.support.yolact_tiny import CONFIGS, PHOTO, TINY, decided

OFF = ("MODEL.YOLACT.CROP_MASKS_TEST", False)
EDGE = [
    *("MODEL.BACKBONE.NAME", "build_mobilenet_v2_backbone", "MODEL.MOBILENET.WIDTH", 0.25),
    *("MODEL.YOLACT_EDGE.FLOW_CHANNELS", 4, "MODEL.YOLACT_EDGE.KEYFRAME_INTERVAL", 2),
]
PAPERS = {
    **{paper: (config, []) for paper, config in CONFIGS.items()},
    "yolact_edge": ("yolact_edge/yolact_edge_shapes_video.yaml", EDGE),
}


def predictor_of(paper: str, *overrides: Any, **options: Any) -> Predictor:
    torch.manual_seed(0)
    config, keys = PAPERS[paper]
    predictor = Predictor(instseg.load_cfg(config, [*TINY, *keys, *overrides]), **options)
    decided(predictor.model)
    return predictor


def uncropped(model: Any, item: dict[str, Any], outputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks at the size of the image, and what the re-scoring looks at."""
    *predictions, prototypes = (x[0].float() for x in outputs)
    detections = model.detect(*predictions)
    size = item["height"], item["width"]
    detections = detections[model.pixel_boxes(detections, size).nonempty()]
    small = (prototypes @ detections.coefficients.T).sigmoid().permute(2, 0, 1)
    full = F.interpolate(small[None], size, mode="bilinear", align_corners=False)
    return full[0] > 0.5, small


@pytest.mark.parametrize("paper", PAPERS)
@torch.no_grad()
def test_masks_without_a_crop_equal_the_authors_formula(paper: str) -> None:
    model: Any = predictor_of(paper, *OFF).model
    item = image(48, 64, 0)
    outputs = model.raw(model.preprocess([item]))
    masks, small = uncropped(model, item, outputs)
    (result,) = model([item])
    instances = result["instances"]
    assert len(instances) == len(masks) > 0
    assert (instances.pred_masks != masks).float().mean() < 1e-4
    if instances.has("mask_scores"):
        ious = model.maskiou_net(small)[range(len(instances)), instances.pred_classes]
        torch.testing.assert_close(instances.mask_scores, instances.scores * ious)


@pytest.mark.parametrize("paper", PAPERS)
@torch.no_grad()
def test_the_crop_is_on_unless_it_is_switched_off(paper: str) -> None:
    item = image(48, 64, 0)
    (result,) = predictor_of(paper).model([item])
    (other,) = predictor_of(paper, *OFF).model([item])
    cropped, whole = result["instances"], other["instances"]
    assert torch.equal(cropped.pred_boxes.tensor, whole.pred_boxes.tensor)
    assert whole.pred_masks.sum() > cropped.pred_masks.sum()
    assert not (cropped.pred_masks & ~whole.pred_masks).any()


@torch.no_grad()
def test_frames_after_a_key_frame_are_not_cropped_either() -> None:
    predictor = predictor_of("yolact_edge", *OFF)
    model: Any = predictor.model
    video = VideoPredictor(predictor)
    for frame in (PHOTO, PHOTO[:, ::-1].copy()):
        instances = video(frame)["instances"]
    items = [
        {"image": torch.from_numpy(x[:, :, ::-1].transpose(2, 0, 1).copy()), "height": 48}
        | {"width": 64}
        for x in (PHOTO, PHOTO[:, ::-1])
    ]
    network: Any = as_video(model)
    _, state = network.keyframe(model.preprocess(items[:1]))
    outputs = network.between(model.preprocess(items[1:]), state)
    masks, _ = uncropped(model, items[1], outputs)
    assert len(instances) == len(masks) > 0
    assert (instances.pred_masks != masks).float().mean() < 1e-4
