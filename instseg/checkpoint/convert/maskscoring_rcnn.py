"""Checkpoints of Mask Scoring R-CNN's authors (zjhuang22/maskscoring_rcnn, a PyTorch ``.pth``).

Their code is a fork of maskrcnn-benchmark.  Against Detectron2 the names differ, the background is
class 0 instead of the last one, and the frozen batch normalisation adds no epsilon to the variance.
"""

import re
from collections.abc import Callable

from torch import Tensor

from instseg.checkpoint.convert.common import (
    Conversion,
    Options,
    Report,
    background_last,
    class_override,
)
from instseg.checkpoint.reading import read_released

_EXAMPLE = "backbone.body.stem.conv1.weight"
_DEPTH_OF_LAYER3 = {2: 18, 6: 50, 23: 101}
_FROZEN_EPS = 1e-5
"""What Detectron2's FrozenBatchNorm2d adds to the variance."""

_RULES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^backbone\.body\.stem\.", "backbone.bottom_up.stem."),
    (r"^backbone\.body\.layer(\d)\.", lambda m: f"backbone.bottom_up.res{int(m[1]) + 1}."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"^backbone\.fpn\.fpn_inner(\d)\.", lambda m: f"backbone.fpn_lateral{int(m[1]) + 1}."),
    (r"^backbone\.fpn\.fpn_layer(\d)\.", lambda m: f"backbone.fpn_output{int(m[1]) + 1}."),
    (r"^rpn\.head\.conv\.", "proposal_generator.rpn_head.conv."),
    (r"^rpn\.head\.cls_logits\.", "proposal_generator.rpn_head.objectness_logits."),
    (r"^rpn\.head\.bbox_pred\.", "proposal_generator.rpn_head.anchor_deltas."),
    (r"^roi_heads\.box\.feature_extractor\.fc6\.", "roi_heads.box_head.fc1."),
    (r"^roi_heads\.box\.feature_extractor\.fc7\.", "roi_heads.box_head.fc2."),
    (r"^roi_heads\.box\.predictor\.", "roi_heads.box_predictor."),
    (r"^roi_heads\.mask\.feature_extractor\.", "roi_heads.mask_head."),
    (r"^roi_heads\.mask\.predictor\.conv5_mask\.", "roi_heads.mask_head.deconv."),
    (r"^roi_heads\.mask\.predictor\.mask_fcn_logits\.", "roi_heads.mask_head.predictor."),
    (r"^roi_heads\.maskiou\.feature_extractor\.", "roi_heads.maskiou_head."),
    (r"^roi_heads\.maskiou\.predictor\.", "roi_heads.maskiou_head."),
)
_BACKGROUND_ROWS = {
    "roi_heads.box_predictor.bbox_pred": 4,
    "roi_heads.mask_head.predictor": 1,
    "roi_heads.maskiou_head.maskiou": 1,
}
"""Layer → rows of the background class, which come first and have no place with us."""


def convert(path: str, options: Options) -> tuple[dict[str, Tensor], Report]:
    """Convert a released checkpoint; see :class:`~instseg.checkpoint.convert.common.Converter`.

    Backbone depth (18, 50, 101) and number of classes are found out from the file; optimizer and
    scheduler in it are ignored.
    """
    weights = read_released(path)
    blocks = {match[1] for name in weights if (match := re.search(r"\.layer3\.(\d+)\.", name))}
    depth = _DEPTH_OF_LAYER3.get(len(blocks), 50)
    classifier = weights.get("roi_heads.box.predictor.cls_score.bias")
    conversion = Conversion(
        path,
        f"mask_scoring_rcnn/mask_scoring_rcnn_R_{depth}_FPN_coco.yaml",
        class_override(path, None if classifier is None else classifier.numel()),
    )
    for name, value in weights.items():
        if name.startswith("rpn.anchor_generator.cell_anchors."):
            conversion.ignore(name, "anchors follow from the configuration")
            continue
        target = _our_name(name)
        if target in conversion.expected and target != name and value.is_floating_point():
            shape = conversion.expected[target]
            background = _BACKGROUND_ROWS.get(target.rpartition(".")[0], 0)
            conversion.check_shape(name, value.shape, (shape[0] + background, *shape[1:]))
            conversion.put(target, _our_value(target, value[background:]), name)
    return conversion.finish(weights, _EXAMPLE, options)


def _our_name(name: str) -> str:
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name


def _our_value(name: str, value: Tensor) -> Tensor:
    if name.endswith(".norm.running_var"):
        return value - _FROZEN_EPS
    if name.startswith("roi_heads.box_predictor.cls_score."):
        return background_last(value)
    return value
