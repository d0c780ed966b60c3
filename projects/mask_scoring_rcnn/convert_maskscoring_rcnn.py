"""Checkpoints of Mask Scoring R-CNN's authors (zjhuang22/maskscoring_rcnn, a PyTorch ``.pth``).

Their code is a fork of maskrcnn-benchmark.  Differences from Detectron2: the names; the background
is class 0 instead of the last one; the frozen batch normalisation adds no epsilon to the variance.
"""

import re
from collections.abc import Callable, Iterator

from detectron2.config import CfgNode
from torch import Tensor

from instseg.checkpoint.reading import read_released
from instseg.convert.common import Conversion, Report, background_last
from instseg.convert.configuration import (
    RCNN_UNTOLD,
    Fact,
    Layout,
    Options,
    anchor_facts,
    classifier_classes,
    resnet_depth,
    resnet_facts,
    size,
)

_EXAMPLE = "backbone.body.stem.conv1.weight"
_FROZEN_EPS = 1e-5
"""The epsilon that Detectron2's FrozenBatchNorm2d adds to the variance."""

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
"""Layer → rows of the background class, which come first and which we do not have."""
_SIZES = {
    "backbone.fpn.fpn_inner1.bias": "MODEL.FPN.OUT_CHANNELS",
    "roi_heads.box.feature_extractor.fc6.bias": "MODEL.ROI_BOX_HEAD.FC_DIM",
    "roi_heads.mask.feature_extractor.mask_fcn1.bias": "MODEL.ROI_MASK_HEAD.CONV_DIM",
    "roi_heads.maskiou.feature_extractor.maskiou_fcn1.bias": "MODEL.ROI_MASKIOU_HEAD.CONV_DIM",
    "roi_heads.maskiou.feature_extractor.maskiou_fc1.bias": "MODEL.ROI_MASKIOU_HEAD.FC_DIM",
}
"""Layer → key that holds the number of its outputs."""
_CONVOLUTIONS = {
    "roi_heads.mask.feature_extractor.mask_fcn": "MODEL.ROI_MASK_HEAD.NUM_CONV",
    "roi_heads.maskiou.feature_extractor.maskiou_fcn": "MODEL.ROI_MASKIOU_HEAD.NUM_CONV",
}
"""Beginning of the names of layers → key that holds their number."""
_MASKIOU = "roi_heads.maskiou.predictor.maskiou.weight"


def convert(path: str, options: Options) -> tuple[dict[str, Tensor], Report]:
    """Convert a released checkpoint; see :class:`~instseg.convert.common.Converter`.

    Its optimizer and scheduler are ignored.
    """
    weights = read_released(path)
    conversion = Conversion(path, _layout(path, weights, options), options)
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
    return conversion.finish(weights, _EXAMPLE)


def _layout(path: str, weights: dict[str, Tensor], options: Options) -> Layout:
    blocks: list[set[str]] = [set(), set(), set(), set()]
    for name in weights:
        if match := re.match(r"backbone\.body\.layer([1-4])\.(\d+)\.", name):
            blocks[int(match[1]) - 1].add(match[2])
    # In a partial file, layers of any block tell; without any, assume bottlenecks.
    bottleneck = any(".conv3." in x for x in weights) or not any(".conv2." in x for x in weights)
    depth = resnet_depth(path, [len(x) for x in blocks], options, bottleneck=bottleneck)
    nearest = {18: 18, 34: 18, 101: 101, 152: 101}.get(depth or 50, 50)

    def facts(cfg: CfgNode) -> Iterator[Fact]:
        stem = size(weights, "backbone.body.stem.conv1.weight")
        last = size(weights, f"backbone.body.layer1.0.conv{3 if bottleneck else 2}.weight")
        yield from resnet_facts(depth, stem, None, last)
        classes = classifier_classes(path, size(weights, "roi_heads.box.predictor.cls_score.bias"))
        if classes is not None:
            yield Fact("MODEL.ROI_HEADS.NUM_CLASSES", classes, f"{classes} classes")
        for name, key in _SIZES.items():
            if count := size(weights, name):
                yield Fact(key, count, f"{count} outputs of {name}")
        for part, key in _CONVOLUTIONS.items():
            names = (x for x in weights if x.startswith(part) and x.endswith(".weight"))
            if count := len(list(names)):
                yield Fact(key, count, f"{count} layers {part}N")
        if _MASKIOU not in weights and not options.allow_partial:
            yield Fact("MODEL.MASKIOU_ON", False, f"no {_MASKIOU}")
        grouped = weights.get("backbone.body.layer1.0.conv2.weight")
        if bottleneck and grouped is not None and grouped.ndim == 4 and grouped.shape[1]:
            outputs, width = grouped.shape[:2]
            groups = f"{outputs // width} groups of {width} channels"
            yield Fact("MODEL.RESNETS.NUM_GROUPS", outputs // width, groups)
            yield Fact("MODEL.RESNETS.WIDTH_PER_GROUP", width, groups)
        anchors = size(weights, "rpn.head.cls_logits.bias")
        if anchors is not None:
            yield from anchor_facts(path, anchors, cfg)

    config = f"mask_scoring_rcnn/mask_scoring_rcnn_R_{nearest}_FPN_coco.yaml"
    return Layout(
        config, lambda cfg: list(facts(cfg)), (*RCNN_UNTOLD, "MODEL.RESNETS.STRIDE_IN_1X1")
    )


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
