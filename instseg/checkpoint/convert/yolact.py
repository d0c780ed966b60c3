"""Weights of YOLACT and YOLACT++ (dbolya/yolact, a plain state dict in a ``.pth``).

Against ours the names differ.  The order of anchors and classes is the same: the background is
class 0 with us too.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from instseg.checkpoint.convert.common import Conversion, Options, Report
from instseg.checkpoint.reading import read_released
from instseg.errors import CheckpointError

_EXAMPLE = "prediction_layers.0.bbox_layer.weight"
_LEVELS = {"0": "5", "1": "4", "2": "3"}
"""Place in the authors' lists, which begin with the coarsest level → number of the level."""
_PROTONET = {"0": "convs.0", "2": "convs.1", "4": "convs.2", "8": "upsampled", "10": "predictor"}
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
    (r"^proto_net\.(0|2|4|8|10)\.", lambda m: f"protonet.{_PROTONET[m[1]]}."),
    (
        r"^prediction_layers\.0\.(upfeature\.0|bbox_layer|conf_layer|mask_layer)\.",
        lambda m: f"head.{_HEAD[m[1]]}.",
    ),
    (r"^semantic_seg_conv\.", "semantic."),
    (r"^maskiou_net\.maskiou_net\.10\.", "maskiou_net.predictor."),
    (
        r"^maskiou_net\.maskiou_net\.([02468])\.",
        lambda m: f"maskiou_net.convs.{int(m[1]) // 2}.",
    ),
)
# Files differ in their layers by backbone and by YOLACT or YOLACT++ alone.
_CONFIGS = {
    ("yolact", 50): ("yolact_resnet50", "yolact_resnet50_pascal"),
    ("yolact", 101): ("yolact_base", "yolact_im400", "yolact_im700"),
    ("yolact", 53): ("yolact_darknet53",),
    ("yolact_plus", 50): ("yolact_plus_resnet50",),
    ("yolact_plus", 101): ("yolact_plus_base",),
}
_COUNTER = ".num_batches_tracked"


def convert(path: str, options: Options) -> tuple[dict[str, Tensor], Report]:
    """Convert a released checkpoint; see :class:`~instseg.checkpoint.convert.common.Converter`.

    Backbone, YOLACT or YOLACT++ and the number of classes are found out from the file.  Files of
    one network for different picture sizes or anchors hold the same tensors; these are told apart
    by the authors' file names (``yolact_im700_54_800000.pth``), the first named below else.
    """
    weights = read_released(path)
    return renamed(path, weights, _config_of(path, weights), not_needed, our_name, options)


def renamed(
    path: str,
    weights: dict[str, Tensor],
    config: tuple[str, list[Any]],
    not_needed: Callable[[str], str],
    our_name: Callable[[str], str],
    options: Options,
) -> tuple[dict[str, Tensor], Report]:
    """Weights that differ from ours in their names alone.

    Args:
        path: of the file, for messages.
        weights: by their names in the file.
        config: configuration inside ``configs/`` and overrides for it.
        not_needed: name in the file → why it is not needed, "" if it is.
        our_name: name in the file → our name, or any that our model does not have.
        options: see there.
    """
    conversion = Conversion(path, *config)
    for name, value in weights.items():
        if reason := not_needed(name):
            conversion.ignore(name, reason)
            continue
        target = our_name(name)
        if target in conversion.expected and target != name:
            conversion.put(target, value, name)
    for name in conversion.expected:
        # Files older than PyTorch 0.4.1 do not count batches.
        if name.endswith(_COUNTER) and not any(old.endswith(_COUNTER) for old in weights):
            conversion.put(name, torch.zeros(()))
    return conversion.finish(weights, _EXAMPLE, options)


def not_needed(name: str) -> str:
    """Why the authors' loader drops a tensor, "" if it does not."""
    if re.match(r"backbone\.layer(?!s\.)", name):
        return "second copy of a stage, in old files"
    if re.match(r"fpn\.downsample_layers\.(?![01]\.)", name):
        return "level that is not used, in old files"
    return ""


def _config_of(path: str, weights: dict[str, Tensor]) -> tuple[str, list[Any]]:
    """Configuration inside ``configs/`` and overrides for it."""
    depth = 101 if "backbone.layers.2.22.conv1.weight" in weights else 50
    depth = 53 if any(name.startswith("backbone._preconv.") for name in weights) else depth
    project = "yolact"
    if any(name.startswith("maskiou_net.") for name in weights):
        project = "yolact_plus"
    known = _CONFIGS.get((project, depth))
    if known is None:
        raise CheckpointError(f"{path}: there is no YOLACT++ with DarkNet-53; unknown layout")
    classes = num_classes(path, weights)
    # Longest first: one name may begin like another.
    named = [x for x in sorted(known, key=len, reverse=True) if Path(path).name.startswith(x)]
    config = (named or ["yolact_resnet50_pascal" if classes == 20 and depth == 50 else known[0]])[0]
    if config not in known:
        config = known[0]
    own = 20 if config.endswith("pascal") else 80
    overrides: list[Any] = []
    if classes not in (None, own):
        overrides = ["MODEL.YOLACT.NUM_CLASSES", classes]
    return f"{project}/{config}.yaml", overrides


def num_classes(path: str, weights: dict[str, Tensor]) -> int | None:
    """Foreground classes, from the outputs per anchor; None if the file has not both layers."""
    boxes = weights.get("prediction_layers.0.bbox_layer.bias")
    classes = weights.get("prediction_layers.0.conf_layer.bias")
    if boxes is None or classes is None:
        return None
    anchors, rest = divmod(boxes.numel(), 4)
    count, remainder = divmod(classes.numel(), max(anchors, 1))
    if rest or remainder or count < 2:
        raise CheckpointError(
            f"{path}: the head has {boxes.numel()} box and {classes.numel()} class outputs; "
            "expected 4 and at least 2 for each anchor"
        )
    return count - 1


def our_name(name: str) -> str:
    """Our name of a tensor of YOLACT or YOLACT++; any other stays as it is."""
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name
