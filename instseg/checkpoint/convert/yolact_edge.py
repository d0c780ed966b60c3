"""Weights of YolactEdge (haotian-liu/yolact_edge, a plain state dict in a ``.pth``).

The network is that of YOLACT, under the same names but for the two halves of the pyramid; files of
the same network may carry YOLACT's names.  Beside it there are MobileNetV2 and what serves videos.
"""

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor

from instseg.checkpoint.convert import yolact
from instseg.checkpoint.convert.common import Options, Report
from instseg.checkpoint.reading import read_released
from instseg.errors import CheckpointError

_FIRST_BLOCKS = (0, 1, 2, 4, 7, 11, 14)
"""Where the stages of MobileNetV2 begin in torchvision's numbering; later ones are not used."""
_RULES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^fpn_phase_[12]\.", "fpn."),
    (r"^flow_net_pre_convs\.convs\.0\.0\.", "flow_net.reduce."),
    (r"^flow_net\.conv([123])\.(\d+)\.0\.", lambda m: f"flow_net.encoder.{int(m[1]) - 1}.{m[2]}."),
    (r"^flow_net\.pred([123])\.conv\.", lambda m: f"flow_net.predictors.{int(m[1]) - 1}.flow."),
    (
        r"^flow_net\.pred([123])\.(scale|bias)\.",
        lambda m: f"flow_net.predictors.{int(m[1]) - 1}.{m[2]}.",
    ),
    (r"^flow_net\.upfeat([23])\.", lambda m: f"flow_net.up_features.{int(m[1]) - 2}."),
    (r"^flow_net\.upflow([23])\.", lambda m: f"flow_net.up_flow.{int(m[1]) - 2}."),
    (r"^spa\.refine_convs\.(\d)\.0\.", r"refinement.convs.\1."),
)
_MOBILENET_RULES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^backbone\.layers\.0\.", "backbone.features.0."),
    (
        r"^backbone\.layers\.([1-6])\.(\d+)\.",
        lambda m: f"backbone.features.{_FIRST_BLOCKS[int(m[1])] + int(m[2])}.",
    ),
)
_MOBILENET_LAYER = "backbone.layers.1.0.conv.0.0.weight"
_CLASSES = {"coco": 80, "youtubevis": 40}


def convert(path: str, options: Options) -> tuple[dict[str, Tensor], Report]:
    """Convert a released checkpoint; see :class:`~instseg.checkpoint.convert.common.Converter`.

    Backbone, number of classes and whether the network is for videos are found out from the file.
    """
    weights = read_released(path)
    rules = (*_MOBILENET_RULES, *_RULES) if _MOBILENET_LAYER in weights else _RULES

    def our_name(name: str) -> str:
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        return yolact.our_name(name)

    def not_needed(name: str) -> str:
        if _MOBILENET_LAYER in weights and re.match(r"backbone\.layers\.[78]\.", name):
            return "the last blocks of MobileNetV2, which the authors' network does not use"
        return yolact.not_needed(name)

    config = _config_of(path, weights)
    return yolact.renamed(path, weights, config, not_needed, our_name, options)


def _config_of(path: str, weights: dict[str, Tensor]) -> tuple[str, list[Any]]:
    """Configuration inside ``configs/`` and overrides for it."""
    if any(name.startswith(("backbone._preconv.", "maskiou_net.")) for name in weights):
        raise CheckpointError(
            f"{path}: YolactEdge has neither DarkNet-53 nor mask re-scoring; convert it as yolact"
        )
    classes = yolact.num_classes(path, weights)
    if any(name.startswith("flow_net.") for name in weights):
        stem, known = "yolact_edge_vid", _CLASSES["youtubevis"]
    elif classes == _CLASSES["youtubevis"] and _MOBILENET_LAYER not in weights:
        stem, known = "yolact_edge_youtubevis", classes
    else:
        stem, known = "yolact_edge", _CLASSES["coco"]
    overrides: list[Any] = []
    large = "backbone.layers.2.22.conv1.weight" in weights
    if stem == "yolact_edge_vid" and not any(name.startswith("spa.") for name in weights):
        if large:
            stem = "yolact_edge_vid_minimal"
        else:
            overrides += ["MODEL.YOLACT_EDGE.REFINE", False]
    if _MOBILENET_LAYER in weights:
        stem += "_mobilenetv2"
    elif not large:
        stem += "_resnet50"
    if classes not in (None, known):
        overrides += ["MODEL.YOLACT.NUM_CLASSES", classes]
    return f"yolact_edge/{stem}.yaml", overrides
