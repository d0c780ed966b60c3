"""Checkpoints of FCIS's authors (msracver/FCIS, MXNet ``.params``).

Differences from ours: the names; images are RGB instead of BGR; the RPN has two scores per anchor;
score maps are in the order class, part, cell.
"""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

from detectron2.config import CfgNode
from torch import Tensor

from instseg.checkpoint.mxnet_params import read_params
from instseg.convert.common import Conversion, Report
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
from instseg.ops.fcis_head import to_fcis_head_order

logger = logging.getLogger(__name__)

_EXAMPLE = "arg:res4b22_branch2a_weight"
_GROUP_SIZE = 7
_LAYERS = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}
_NORM = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_var": "running_var",
}
_HEADS = {
    "rpn_conv_3x3": "proposal_generator.rpn_head.conv",
    "rpn_cls_score": "proposal_generator.rpn_head.objectness_logits",
    "rpn_bbox_pred": "proposal_generator.rpn_head.anchor_deltas",
    "conv_new_1": "roi_heads.conv_new_1",
    "fcis_cls_seg": "roi_heads.cls_seg",
    "fcis_bbox": "roi_heads.bbox",
}
_BLOCK = re.compile(r"(res|bn)([2-5])([a-z])(\d*)_branch(1|2a|2b|2c)_(.+)")
_SCALED = ("arg:fcis_bbox_weight_test", "arg:fcis_bbox_bias_test")


def convert(path: str, options: Options) -> tuple[dict[str, Tensor], Report]:
    """Convert a released checkpoint; see :class:`~instseg.convert.common.Converter`.

    Training leaves copies ``fcis_bbox_*_test`` in a checkpoint: the box layer times the standard
    deviations of its targets.  They are ignored, because the model multiplies by these itself.
    """
    weights = read_params(path)
    conversion = Conversion(path, _layout(path, weights, options), options)
    for name, value in weights.items():
        if name in _SCALED:
            logger.warning(f"{path}: {name} is ignored, the plain box layer is used")
            conversion.ignore(name, "the plain box layer is used, its outputs are scaled later")
            continue
        target = _our_name(name)
        if target in conversion.expected and value.is_floating_point():
            conversion.put(target, _our_value(conversion, target, name, value), name)
    return conversion.finish(weights, _EXAMPLE)


def _layout(path: str, weights: dict[str, Tensor], options: Options) -> Layout:
    blocks: list[set[str]] = [set(), set(), set(), set()]
    for name in weights:
        if match := _match(name):
            blocks[int(match[2]) - 2].add(match[3] + match[4])
    depth = resnet_depth(path, [len(x) for x in blocks], options)

    def facts(cfg: CfgNode) -> Iterator[Fact]:
        layers = "conv1", "res2a_branch2a", "res2a_branch2c"
        yield from resnet_facts(depth, *(size(weights, f"arg:{x}_weight") for x in layers))
        maps = size(weights, "arg:fcis_cls_seg_bias")
        rows = None if maps is None else maps // (2 * _GROUP_SIZE**2)
        classes = classifier_classes(path, rows)
        if classes is not None:
            yield Fact("MODEL.ROI_HEADS.NUM_CLASSES", classes, f"{classes} classes")
        if hidden := size(weights, "arg:conv_new_1_bias"):
            yield Fact("MODEL.FCIS.CONV_DIM", hidden, f"{hidden} outputs of conv_new_1")
        if hidden := size(weights, "arg:rpn_conv_3x3_bias"):
            yield Fact("MODEL.RPN.CONV_DIMS", [hidden], f"{hidden} outputs of rpn_conv_3x3")
        deltas = size(weights, "arg:rpn_bbox_pred_bias")
        if deltas is not None and deltas % 4 == 0:
            yield from anchor_facts(path, deltas // 4, cfg, largest=True)

    config = f"fcis/fcis_R_{50 if depth == 50 else 101}_coco.yaml"
    reason = ""
    if "voc" in Path(path).name.lower() and depth in (None, 101):
        config = "fcis/fcis_R_101_voc.yaml"
        reason = "the name of the file, which has 'voc' in it"
    untold = (*RCNN_UNTOLD, "MODEL.PROPOSAL_GENERATOR.MIN_SIZE")
    return Layout(config, lambda cfg: list(facts(cfg)), untold, reason)


def _match(name: str) -> re.Match[str] | None:
    return _BLOCK.fullmatch(name.partition(":")[2])


def _our_name(name: str) -> str:
    """Our name of ``arg:...`` or ``aux:...``; an unknown one becomes the name of no tensor."""
    kind, _, rest = name.partition(":")
    if kind not in ("arg", "aux"):
        return ""
    stem = re.fullmatch(r"(bn_)?conv1_(.+)", rest)
    if stem:
        part = f"norm.{_NORM.get(stem[2], '')}" if stem[1] else stem[2]
        return f"backbone.stem.conv1.{part}"
    match = _match(name)
    if match:
        # Blocks are a, b, c or, in longer stages, a, b1, b2, ...
        block = int(match[4]) if match[4] else ord(match[3]) - ord("a")
        part = match[6] if match[1] == "res" else f"norm.{_NORM.get(match[6], '')}"
        return f"backbone.res{match[2]}.{block}.{_LAYERS[match[5]]}.{part}"
    layer, _, part = rest.rpartition("_")
    return f"{_HEADS.get(layer, '')}.{part}"


def _our_value(conversion: Conversion, target: str, name: str, value: Tensor) -> Tensor:
    shape = conversion.expected[target]
    if target == "backbone.stem.conv1.weight":
        return value.flip(1)  # RGB → BGR
    if target.startswith("proposal_generator.rpn_head.objectness_logits."):
        anchors = shape[0]
        conversion.check_shape(name, value.shape, (2 * anchors, *shape[1:]))
        # The softmax of a pair is the sigmoid of its difference; the background comes first.
        return value[anchors:] - value[:anchors]
    if target.startswith("roi_heads.cls_seg."):
        conversion.check_shape(name, value.shape, shape)
        return to_fcis_head_order(value, shape[0] // (2 * _GROUP_SIZE**2), _GROUP_SIZE)
    return value
