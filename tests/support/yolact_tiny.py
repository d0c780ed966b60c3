"""Predictors of YOLACT and YOLACT++ on a tiny DarkNet, quick to build and to trace."""

from typing import Any

import numpy as np
import torch
from torch import nn

import instseg
from instseg.inference.predictor import Predictor

TINY = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "INPUT.SQUARE_SIZE", 72),
    *("MODEL.BACKBONE.NAME", "build_darknet_backbone", "MODEL.DARKNET.STEM_CHANNELS", 4),
    *("MODEL.DARKNET.DEPTHS", [1, 1, 1, 1, 1], "MODEL.YOLACT.CHANNELS", 16),
    *("MODEL.YOLACT.NUM_CLASSES", 3, "MODEL.YOLACT.SCORE_THRESH_TEST", 0.0),
    *("MODEL.YOLACT.NORM", "BN", "MODEL.YOLACT.HEAD_NORM", ""),
    *("MODEL.YOLACT_PLUS.MASKIOU_CHANNELS", [4, 8], "TEST.DETECTIONS_PER_IMAGE", 50),
]
CONFIGS = {
    "yolact": "yolact/yolact_shapes.yaml",
    "yolact_plus": "yolact_plus/yolact_plus_shapes.yaml",
}
PHOTO = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def decided(model: nn.Module) -> None:
    """Give a model random weights and statistics whose scores differ by more than rounding."""
    generator = torch.Generator().manual_seed(1)
    for name, value in model.state_dict().items():
        if name.endswith("running_mean"):
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))
        elif name.endswith("running_var"):
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
        elif name.endswith(("class_logits.weight", "mask_coefficients.weight")):
            value.mul_(20)
        elif "offset_mask" in name:
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))


def tiny_predictor(paper: str, *overrides: Any, **options: Any) -> Predictor:
    """A predictor with the same weights in every call."""
    torch.manual_seed(0)
    return Predictor(tiny_cfg(paper, *overrides), **options)


def tiny_cfg(paper: str, *overrides: Any) -> Any:
    return instseg.load_cfg(CONFIGS[paper], [*TINY, *overrides])


def same_detections(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Detections are equal up to rounding."""
    one, other = ours["instances"], theirs["instances"]
    assert one.image_size == other.image_size
    assert torch.equal(one.pred_classes, other.pred_classes)
    torch.testing.assert_close(one.scores, other.scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.pred_boxes.tensor, other.pred_boxes.tensor, rtol=0, atol=1e-2)
    assert one.has("mask_scores") == other.has("mask_scores")
    if one.has("mask_scores"):
        torch.testing.assert_close(one.mask_scores, other.mask_scores, rtol=1e-3, atol=1e-4)
    assert one.pred_masks.shape == other.pred_masks.shape
    if len(one):
        assert (one.pred_masks != other.pred_masks).float().mean() < 1e-4
