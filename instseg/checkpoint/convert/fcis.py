"""Checkpoints of FCIS's authors (msracver/FCIS, MXNet ``.params``).

Against ours, the names differ, pictures are RGB instead of BGR, the RPN has two scores per anchor,
and the score maps stand in the order class, part, cell.
"""

import logging
import re

from torch import Tensor

from instseg.checkpoint.convert.common import Conversion, Options, Report, class_override
from instseg.checkpoint.convert.mxnet_params import read_params
from instseg.ops.fcis_head import to_fcis_head_order

logger = logging.getLogger(__name__)

_EXAMPLE = "arg:res4b22_branch2a_weight"
_GROUP_SIZE = 7
_VOC_ANCHORS = 9
_VOC_CLASSES = 20
_DEPTH_OF_RES4 = {6: 50, 23: 101}
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
_BLOCK = re.compile(r"(res|bn)(\d)([a-z])(\d*)_branch(1|2a|2b|2c)_(.+)")
_SCALED = ("arg:fcis_bbox_weight_test", "arg:fcis_bbox_bias_test")


def convert(path: str, options: Options) -> tuple[dict[str, Tensor], Report]:
    """Convert a released checkpoint; see :class:`~instseg.checkpoint.convert.common.Converter`.

    The trunk's depth, the number of classes and the setting (COCO with 12 anchors, VOC with 9) are
    found out from the file.  The copies ``fcis_bbox_*_test`` that training leaves in a checkpoint,
    the box layer times the standard deviations of its targets, are ignored: the model multiplies by
    these itself.
    """
    weights = read_params(path)
    conversion = _conversion(path, weights)
    for name, value in weights.items():
        if name in _SCALED:
            logger.warning(f"{path}: {name} is ignored, the plain box layer is used")
            conversion.ignore(name, "the plain box layer is used, its outputs are scaled later")
            continue
        target = _our_name(name)
        if target in conversion.expected and value.is_floating_point():
            conversion.put(target, _our_value(conversion, target, name, value), name)
    return conversion.finish(weights, _EXAMPLE, options)


def _conversion(path: str, weights: dict[str, Tensor]) -> Conversion:
    """For the configuration that the file was trained with."""
    blocks = {
        (match[3], match[4]) for name in weights if (match := _match(name)) and match[2] == "4"
    }
    depth = _DEPTH_OF_RES4.get(len(blocks), 101)
    deltas = weights.get("arg:rpn_bbox_pred_bias")
    classifier = weights.get("arg:fcis_cls_seg_bias")
    rows = None if classifier is None else classifier.numel() // (2 * _GROUP_SIZE * _GROUP_SIZE)
    if depth == 101 and deltas is not None and deltas.numel() == 4 * _VOC_ANCHORS:
        own_classes = rows == _VOC_CLASSES + 1
        overrides = [] if own_classes else class_override(path, rows)
        return Conversion(path, "fcis/fcis_R_101_voc.yaml", overrides)
    return Conversion(path, f"fcis/fcis_R_{depth}_coco.yaml", class_override(path, rows))


def _match(name: str) -> re.Match[str] | None:
    return _BLOCK.fullmatch(name.partition(":")[2])


def _our_name(name: str) -> str:
    """Our name of ``arg:...`` or ``aux:...``; of no tensor where there is none."""
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
