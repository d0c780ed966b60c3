"""Weights of YOLACT and YOLACT++ (dbolya/yolact, a plain state dict in a ``.pth``).

Only the names differ from ours.  The order of anchors and classes is the same: the background is
class 0 in both.
"""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from instseg.checkpoint.reading import read_released
from instseg.convert.common import Conversion, Report
from instseg.convert.configuration import Options
from instseg.projects.yolact.weights_layout import (
    is_shared,
    layout_of,
    maskiou_ids,
    proto_ids,
)

_EXAMPLE = "prediction_layers.0.bbox_layer.weight"
_LEVELS = {"0": "5", "1": "4", "2": "3"}
"""Place in the authors' lists, which begin with the coarsest level → number of the level."""
_HEAD = {
    "upfeature.0": "shared",
    "bbox_layer": "box_deltas",
    "conf_layer": "class_logits",
    "mask_layer": "mask_coefficients",
}
_RULES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^backbone\._preconv\.0\.", "backbone.stem."),
    (r"^backbone\._preconv\.1\.", "backbone.stem.norm."),
    (r"^backbone\.layers\.(\d)\.0\.0\.", lambda m: f"backbone.stage{int(m[1]) + 1}.0."),
    (r"^backbone\.layers\.(\d)\.0\.1\.", lambda m: f"backbone.stage{int(m[1]) + 1}.0.norm."),
    (
        r"^backbone\.layers\.(\d)\.(\d+)\.conv(\d)\.0\.",
        lambda m: f"backbone.stage{int(m[1]) + 1}.{m[2]}.conv{m[3]}.",
    ),
    (
        r"^backbone\.layers\.(\d)\.(\d+)\.conv(\d)\.1\.",
        lambda m: f"backbone.stage{int(m[1]) + 1}.{m[2]}.conv{m[3]}.norm.",
    ),
    (r"^backbone\.(conv1|bn1)\.", r"backbone.stem.\1."),
    (r"^backbone\.layers\.(\d)\.", lambda m: f"backbone.res{int(m[1]) + 2}."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"\.conv_offset_mask\.", ".offset_mask."),
    (r"^fpn\.lat_layers\.([012])\.", lambda m: f"fpn.lateral{_LEVELS[m[1]]}."),
    (r"^fpn\.pred_layers\.([012])\.", lambda m: f"fpn.output{_LEVELS[m[1]]}."),
    (r"^fpn\.downsample_layers\.([01])\.", lambda m: f"fpn.downsample{int(m[1]) + 6}."),
    (r"^semantic_seg_conv\.", "semantic."),
)
_HEAD_NAME = re.compile(
    r"prediction_layers\.(\d+)\.(upfeature\.0|bbox_layer|conf_layer|mask_layer)\."
)
_LIST_NAME = re.compile(r"(proto_net|maskiou_net\.maskiou_net)\.(\d+)\.")
_COUNTER = ".num_batches_tracked"


def convert(path: str, options: Options) -> tuple[dict[str, Tensor], Report]:
    """Convert a released checkpoint; see :class:`~instseg.convert.common.Converter`."""
    weights = read_released(path)
    conversion = Conversion(path, layout_of(path, weights, options), options)
    return renamed(conversion, weights, not_needed, naming(weights))


def renamed(
    conversion: Conversion,
    weights: dict[str, Tensor],
    not_needed: Callable[[str], str],
    our_name: Callable[[str], str],
) -> tuple[dict[str, Tensor], Report]:
    """Weights that differ from ours in their names alone.

    Args:
        conversion: for their network.
        weights: by their names in the file.
        not_needed: name in the file → why it is not needed, "" if it is.
        our_name: name in the file → our name, or any that our model does not have.
    """
    for name, value in weights.items():
        if reason := not_needed(name):
            conversion.ignore(name, reason)
            continue
        target = our_name(name)
        if target in conversion.expected and target != name:
            conversion.put(target, value, name)
        elif (
            target.endswith(_COUNTER)
            and f"{target.removesuffix(_COUNTER)}.running_mean" in conversion.expected
        ):
            conversion.ignore(name, "counter that a frozen normalisation does not have")
    for name in conversion.expected:
        # Files older than PyTorch 0.4.1 do not count batches.
        if name.endswith(_COUNTER) and not any(old.endswith(_COUNTER) for old in weights):
            conversion.put(name, torch.zeros(()))
    return conversion.finish(weights, _EXAMPLE)


def not_needed(name: str) -> str:
    """The reason why the authors' loader drops a tensor, "" if it keeps it."""
    if re.match(r"backbone\.layer(?!s\.)", name):
        return "second copy of a stage, in old files"
    if re.match(r"fpn\.downsample_layers\.(?![01]\.)", name):
        return "level beyond P7, which the authors' loader leaves out too"
    return ""


def naming(weights: Mapping[str, Tensor]) -> Callable[[str], str]:
    """A function from names of YOLACT or YOLACT++ to ours; any other stays as it is."""
    shared = is_shared(weights)
    lists: dict[str, dict[int, str]] = {"proto_net": {}, "maskiou_net.maskiou_net": {}}
    if ids := proto_ids(weights):
        *convs, upsampled, predictor = ids
        lists["proto_net"] = {i: f"protonet.convs.{n}" for n, i in enumerate(convs)}
        lists["proto_net"] |= {upsampled: "protonet.upsampled", predictor: "protonet.predictor"}
    if ids := maskiou_ids(weights):
        *convs, last = ids
        names = {i: f"maskiou_net.convs.{n}" for n, i in enumerate(convs)}
        lists["maskiou_net.maskiou_net"] = {**names, last: "maskiou_net.predictor"}

    def our_name(name: str) -> str:
        if match := _HEAD_NAME.match(name):
            level = "" if shared else f"{match[1]}."
            return f"head.{level}{_HEAD[match[2]]}.{name[match.end() :]}"
        if match := _LIST_NAME.match(name):
            layer = lists[match[1]].get(int(match[2]), name)
            return f"{layer}.{name[match.end() :]}"
        for pattern, replacement in _RULES:
            name = re.sub(pattern, replacement, name)
        return name

    return our_name
