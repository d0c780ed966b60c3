"""Mask R-CNN under our configs is Detectron2's network: same parameters, same numbers.

``golden/mask_rcnn`` was computed by Detectron2's own ``mask_rcnn_R_50_FPN_1x``; see the README
there. The tolerances are a few times the differences its README saw between thread counts.
"""

import json
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import nn

import instseg
from tests.conftest import GOLDEN, load_module

FOLDER = GOLDEN / "mask_rcnn"
LEVELS = {"p2": 8, "p3": 4, "p4": 2, "p5": 1, "p6": 1}


@pytest.fixture(scope="module")
def golden() -> Any:
    return np.load(FOLDER / "golden.npz")


@pytest.fixture(scope="module")
def model(golden_weights: ModuleType, golden: Any) -> nn.Module:
    """The network of our config, filled as the golden one was."""
    cfg = instseg.load_cfg(
        "configs/mask_rcnn/mask_rcnn_R_50_FPN_coco.yaml", ["MODEL.DEVICE", "cpu"]
    )
    model = build_model(cfg).eval()
    scale = load_module(FOLDER / "inputs.py").SCALE
    state = {
        name: torch.from_numpy(
            golden_weights.fill(name, value.shape) * np.float32(scale.get(name, 1))
        )
        for name, value in model.state_dict().items()
    }
    state["roi_heads.box_predictor.cls_score.bias"] = _tensor(golden["override_cls_score_bias"])
    state["roi_heads.mask_head.predictor.bias"] = _tensor(golden["override_mask_predictor_bias"])
    model.load_state_dict(state)
    return model


@pytest.fixture(scope="module")
def image(golden_weights: ModuleType) -> torch.Tensor:
    return torch.from_numpy(golden_weights.image(480, 640)).permute(2, 0, 1)


@pytest.fixture(scope="module")
def stages(model: nn.Module, image: torch.Tensor) -> dict[str, Any]:
    """Everything between image and detections, computed once."""
    with torch.no_grad():
        images = model.preprocess_image([{"image": image}])
        features = model.backbone(images.tensor)
        levels = [features[name] for name in LEVELS]
        objectness, deltas = model.proposal_generator.rpn_head(levels)
        proposals, _ = model.proposal_generator(images, features)
        return {
            "images": images,
            "features": features,
            "objectness": dict(zip(LEVELS, objectness, strict=True)),
            "deltas": dict(zip(LEVELS, deltas, strict=True)),
            "proposals": proposals[0],
        }


@pytest.fixture(scope="module")
def detections(model: nn.Module, image: torch.Tensor) -> Instances:
    with torch.no_grad():
        return model([{"image": image, "height": 480, "width": 640}])[0]["instances"]


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float32))


def _close(actual: torch.Tensor, expected: np.ndarray, tolerance: float) -> None:
    torch.testing.assert_close(
        actual, torch.from_numpy(expected).to(actual.dtype), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize(
    ("config", "keys"),
    [
        ("mask_rcnn_R_50_FPN_coco", "keys.json"),
        ("mask_rcnn_R_101_FPN_coco", "keys_mask_rcnn_R_101_FPN_3x.json"),
        ("mask_rcnn_R_50_C4_coco", "keys_mask_rcnn_R_50_C4_1x.json"),
    ],
)
def test_a_config_builds_the_parameters_of_the_released_network(config: str, keys: str) -> None:
    cfg = instseg.load_cfg(f"configs/mask_rcnn/{config}.yaml", ["MODEL.DEVICE", "cpu"])
    released = json.loads((FOLDER / keys).read_text())
    built = {name: list(value.shape) for name, value in build_model(cfg).state_dict().items()}
    assert built == {name: entry["shape"] for name, entry in released.items()}


@pytest.mark.parametrize("level", LEVELS)
def test_pyramid_and_rpn_equal_detectron2(stages: dict[str, Any], golden: Any, level: str) -> None:
    step = LEVELS[level]
    feature = stages["features"][level][0]
    _close(feature[::16, ::step, ::step], golden[level], 2e-5)
    summary = torch.stack([feature.mean(), feature.abs().mean(), feature.max()])
    _close(summary, golden[f"{level}_mean_absmean_max"], 2e-5)
    _close(
        stages["objectness"][level][0, :, ::step, ::step], golden[f"rpn_objectness_{level}"], 2e-5
    )
    _close(stages["deltas"][level][0, :, ::step, ::step], golden[f"rpn_deltas_{level}"], 2e-5)


def test_proposals_equal_detectron2_in_order(stages: dict[str, Any], golden: Any) -> None:
    _close(stages["proposals"].proposal_boxes.tensor, golden["proposal_boxes"], 3e-4)
    _close(stages["proposals"].objectness_logits, golden["proposal_logits"], 6e-5)


def test_box_and_mask_heads_equal_detectron2(
    model: nn.Module, stages: dict[str, Any], golden: Any
) -> None:
    heads = model.roi_heads
    features = [stages["features"][name] for name in heads.in_features]
    boxes = _tensor(golden["proposal_boxes"])
    count, few = len(golden["box_cls_logits"]), len(golden["mask_logits_first4"])
    with torch.no_grad():
        logits, deltas = heads.box_predictor(
            heads.box_head(heads.box_pooler(features, [Boxes(boxes[:count])]))
        )
        masks = heads.mask_head.layers(heads.mask_pooler(features, [Boxes(boxes[:few])]))
    _close(logits, golden["box_cls_logits"], 1e-4)
    _close(deltas[: len(golden["box_deltas"])], golden["box_deltas"], 1e-4)
    _close(masks[:, ::4], golden["mask_logits_first4"], 1e-4)


def test_detections_equal_detectron2(detections: Instances, golden: Any) -> None:
    _close(detections.pred_boxes.tensor, golden["inst_boxes"], 3e-4)
    _close(detections.scores, golden["inst_scores"], 3e-5)
    assert detections.pred_classes.tolist() == golden["inst_classes"].tolist()


def test_masks_equal_detectron2_up_to_a_border_pixel(detections: Instances, golden: Any) -> None:
    areas = detections.pred_masks.flatten(1).sum(1).numpy()
    assert np.abs(areas - golden["inst_mask_area"]).max() <= 1
    first = np.unpackbits(golden["inst_masks_packed"], axis=1).reshape(-1, 480, 640).astype(bool)
    assert (detections.pred_masks[: len(first)].numpy() != first).sum(axis=(1, 2)).max() <= 1


def test_another_output_size_is_honoured_as_by_detectron2(
    model: nn.Module, stages: dict[str, Any], golden: Any
) -> None:
    images, features, proposals = (stages[name] for name in ("images", "features", "proposals"))
    with torch.no_grad():
        results, _ = model.roi_heads(images, features, [proposals])
        sizes = [{"height": 360, "width": 480}]
        resized = model._postprocess(results, sizes, images.image_sizes)[0]["instances"]
    _close(resized.pred_boxes.tensor, golden["resized_boxes"], 3e-4)
    areas = resized.pred_masks.flatten(1).sum(1).numpy()
    assert np.abs(areas - golden["resized_mask_area"]).max() <= 1
