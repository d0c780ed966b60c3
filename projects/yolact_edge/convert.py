"""Weights of YolactEdge (haotian-liu/yolact_edge, a plain state dict in a ``.pth``).

The network is that of YOLACT, under the same names but for the two halves of the pyramid; files of
the same network may carry YOLACT's names.  Beside it there are MobileNetV2 and what serves videos.
"""

import itertools
import re
from collections.abc import Callable, Iterator

from detectron2.config import CfgNode
from torch import Tensor

from instseg.checkpoint.reading import read_released
from instseg.convert.common import Conversion, Report
from instseg.convert.configuration import Fact, Layout, Options, size
from instseg.errors import CheckpointError
from instseg.projects.yolact import convert as yolact
from instseg.projects.yolact.weights_layout import (
    UNTOLD,
    architecture_facts,
    backbone_facts,
    facts_of,
)

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
_BACKBONE = "MODEL.BACKBONE.NAME"
_NODE = "MODEL.YOLACT_EDGE"


def convert(path: str, options: Options) -> tuple[dict[str, Tensor], Report]:
    """Convert a released checkpoint; see :class:`~instseg.convert.common.Converter`."""
    weights = read_released(path)
    mobile = _MOBILENET_LAYER in weights
    rules = (*_MOBILENET_RULES, *_RULES) if mobile else _RULES
    conversion = Conversion(path, _layout(path, weights, options), options)
    rest = yolact.naming(weights)

    def our_name(name: str) -> str:
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        return rest(name)

    def not_needed(name: str) -> str:
        if mobile and re.match(r"backbone\.layers\.[78]\.", name):
            return "the last blocks of MobileNetV2, which the authors' network does not use"
        return yolact.not_needed(name)

    return yolact.renamed(conversion, weights, not_needed, our_name)


def _layout(path: str, weights: dict[str, Tensor], options: Options) -> Layout:
    if any(name.startswith(("backbone._preconv.", "maskiou_net.")) for name in weights):
        raise CheckpointError(
            f"{path}: YolactEdge has neither DarkNet-53 nor mask re-scoring; convert it as yolact"
        )
    plain = {re.sub(r"^fpn_phase_[12]\.", "fpn.", name): x for name, x in weights.items()}
    mobile = _MOBILENET_LAYER in weights

    def facts(cfg: CfgNode) -> list[Fact]:
        backbone = [Fact(_BACKBONE, "build_mobilenet_v2_backbone", "layers of MobileNetV2")]
        architecture = architecture_facts(plain, options, "YolactEdge", "YOLACT", "flow_net.")
        return [
            *architecture,
            *(backbone if mobile else backbone_facts(path, plain, options, cfg)),
            *_video_facts(plain, options),
            *facts_of(path, plain, options, cfg),
        ]

    untold = list(UNTOLD)
    if any(name.startswith("flow_net.") for name in weights):
        untold.append(f"{_NODE}.KEYFRAME_INTERVAL")
        if not any(name.startswith("spa.") for name in weights):
            untold.append(f"{_NODE}.WARPED")
    return Layout(f"yolact_edge/{_config_of(plain, mobile)}.yaml", facts, tuple(untold))


def _config_of(weights: dict[str, Tensor], mobile: bool) -> str:
    classes = weights.get("prediction_layers.0.conf_layer.bias")
    boxes = weights.get("prediction_layers.0.bbox_layer.bias")
    youtube = (
        classes is not None and boxes is not None and 4 * classes.numel() == 41 * boxes.numel()
    )
    large = "backbone.layers.2.22.conv1.weight" in weights
    stem = "yolact_edge"
    if any(name.startswith("flow_net.") for name in weights):
        refined = any(name.startswith("spa.") for name in weights)
        stem += "_vid" if refined or not large else "_vid_minimal"
    elif youtube and not mobile:
        stem += "_youtubevis"
    return stem + ("_mobilenetv2" if mobile else "" if large else "_resnet50")


def _video_facts(weights: dict[str, Tensor], options: Options) -> Iterator[Fact]:
    """Refinement and layers of the flow network."""
    if not any(name.startswith("flow_net.") for name in weights):
        return
    refined = {m[1] for name in weights if (m := re.match(r"spa\.refine_convs\.(\d+)\.", name))}
    if refined or not options.allow_partial:
        content = f"{len(refined)} refined levels" if refined else "no layers of refinement (spa)"
        yield Fact(f"{_NODE}.REFINE", bool(refined), content)
    if 1 <= len(refined) <= 3:
        yield Fact(f"{_NODE}.WARPED", ["p3", "p4", "p5"][-len(refined) :], content)
    width = size(weights, "flow_net_pre_convs.convs.0.0.weight")
    stages = []
    for stage in (1, 2, 3):
        names = (f"flow_net.conv{stage}.{i}.0.weight" for i in range(len(weights)))
        widths = [size(weights, name) for name in itertools.takewhile(weights.__contains__, names)]
        stages.append([x for x in widths if x is not None])
    if not width or not all(stages):
        return
    yield Fact(f"{_NODE}.FLOW_CHANNELS", width, f"{width} channels of the flow network")
    inside = [[x // width for x in widths[:-1]] for widths in stages]
    yield Fact(f"{_NODE}.FLOW_LAYERS", inside, f"layers of the flow network {stages}")
