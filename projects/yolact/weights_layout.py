"""Facts about the network of YOLACT, YOLACT++ or YolactEdge in a file, from the shapes in it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from torch import Tensor

from instseg.convert.configuration import (
    Fact,
    Layout,
    Options,
    anchor_shapes,
    are_numbers,
    resnet_depth,
    resnet_facts,
    size,
)
from instseg.errors import CheckpointError

Weights = Mapping[str, Tensor]

_NODE = "MODEL.YOLACT"
UNTOLD = (
    *(f"{_NODE}.ANCHOR_SCALES", f"{_NODE}.ANCHOR_RATIOS", f"{_NODE}.SQUARE_ANCHORS"),
    *("INPUT.SQUARE_SIZE", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"),
    *(f"{_NODE}.SCORE_THRESH_TEST", f"{_NODE}.NMS", f"{_NODE}.NMS_THRESH_TEST"),
)
# Files differ in their layers by backbone and by YOLACT or YOLACT++ alone.
_CONFIGS = {
    ("yolact", 50): ("yolact_resnet50", "yolact_resnet50_pascal"),
    ("yolact", 101): ("yolact_base", "yolact_im400", "yolact_im700"),
    ("yolact", 53): ("yolact_darknet53",),
    ("yolact_plus", 50): ("yolact_plus_resnet50",),
    ("yolact_plus", 101): ("yolact_plus_base",),
}
_LEVELS = 5
_STAGES = 4


def layout_of(path: str, weights: Weights, options: Options) -> Layout:
    """The layout of a file of YOLACT or YOLACT++.

    Files of one network for other anchors or image sizes hold the same tensors; these are told
    apart by the authors' file names (``yolact_im700_54_800000.pth``).
    """
    project = "yolact_plus" if any(deformable_of(weights)) else "yolact"
    depth = (resnet_depth(path, _blocks(weights), options) or 50) if not is_darknet(weights) else 53
    known = _CONFIGS[project, 101 if depth > 101 else depth]
    # Longest first: one name may begin like another.
    named = [x for x in sorted(known, key=len, reverse=True) if Path(path).name.startswith(x)]
    reason = ""
    if named:
        reason = "the name of the file, which begins as the authors' do"
    elif known[1:]:
        reason = (
            f"its layers, which {' and '.join(f'{x}.yaml' for x in known[1:])} would fit as well"
        )

    def facts(cfg: CfgNode) -> list[Fact]:
        return [
            *architecture_facts(weights, options, "YOLACTPlus", "YOLACT"),
            *backbone_facts(path, weights, options, cfg),
            *facts_of(path, weights, options, cfg),
        ]

    return Layout(f"{project}/{(named or known)[0]}.yaml", facts, UNTOLD, reason)


def architecture_facts(
    weights: Weights, options: Options, with_prefix: str, without: str, prefix: str = "maskiou_net."
) -> Iterator[Fact]:
    """The meta-architecture, by whether there are tensors of a part."""
    has_part = any(name.startswith(prefix) for name in weights)
    if has_part or not options.allow_partial:
        part = prefix.removesuffix(".")
        reason = f"tensors of {part}" if has_part else f"no tensors of {part}"
        yield Fact("MODEL.META_ARCHITECTURE", with_prefix if has_part else without, reason)


def is_darknet(weights: Weights) -> bool:
    """Whether the backbone is a DarkNet."""
    return any(name.startswith("backbone._preconv.") for name in weights)


def backbone_facts(path: str, weights: Weights, options: Options, cfg: CfgNode) -> Iterator[Fact]:
    """Kind and depth of the backbone, its normalisation, which blocks are deformable."""
    if is_darknet(weights):
        yield Fact("MODEL.BACKBONE.NAME", "build_darknet_backbone", "layers of a DarkNet")
        depths = [
            len(x) for x in _indices(weights, r"backbone\.layers\.(\d+)\.(\d+)\.conv1\.0\.w", 5)
        ]
        if all(depths):
            yield Fact("MODEL.DARKNET.DEPTHS", depths, f"stages of {_list(depths)} blocks")
        if stem := size(weights, "backbone._preconv.0.weight"):
            yield Fact("MODEL.DARKNET.STEM_CHANNELS", stem, f"{stem} channels of the first layer")
        return
    blocks = _blocks(weights)
    depth = resnet_depth(path, blocks, options)
    if depth is None:
        return
    block = "backbone.layers.0.0"
    widths = (
        size(weights, f"{x}.weight") for x in ("backbone.conv1", f"{block}.conv1", f"{block}.conv3")
    )
    yield from resnet_facts(depth, *widths)
    if not any(name.endswith("running_mean") for name in weights):
        yield Fact("MODEL.RESNETS.NORM", "GN", "normalisations without running means")
    elif cfg.MODEL.RESNETS.NORM == "GN":
        yield Fact("MODEL.RESNETS.NORM", "BN", "running means")
    yield from _deformable_facts(path, weights, cfg, blocks)


def facts_of(path: str, weights: Weights, options: Options, cfg: CfgNode) -> Iterator[Fact]:
    """Facts about the layers after the backbone."""
    yield from _pyramid_facts(path, weights, options)
    prototypes = None
    if ids := proto_ids(weights):
        plain = len(ids) - 2
        if list(ids) != [*range(0, 2 * plain, 2), 2 * plain + 2, 2 * plain + 4]:
            raise CheckpointError(
                f"{path}: its prototype network has layers at {_list(ids)}; expected 3x3 "
                "convolutions, bilinear upsampling, one 3x3 and one 1x1 convolution, as at "
                "0, 2, 4, 8, 10"
            )
        yield Fact(f"{_NODE}.PROTO_CONVS", plain, f"{len(ids)} layers for prototypes")
        prototypes = size(weights, f"proto_net.{ids[-1]}.weight")
    if prototypes is not None:
        yield Fact(f"{_NODE}.NUM_PROTOTYPES", prototypes, f"{prototypes} prototypes")
    yield from _head_facts(path, weights, options, cfg, prototypes)
    if not any(name.startswith("semantic_seg_conv.") for name in weights):
        if not options.allow_partial:
            yield Fact(f"{_NODE}.SEMANTIC_WEIGHT", 0.0, "no semantic layer (semantic_seg_conv)")
    elif not cfg.MODEL.YOLACT.SEMANTIC_WEIGHT:
        yield Fact(f"{_NODE}.SEMANTIC_WEIGHT", 1.0, "a semantic layer (semantic_seg_conv)")
    if len(layer_ids := maskiou_ids(weights)) > 1:
        sizes = [size(weights, f"maskiou_net.maskiou_net.{i}.weight") for i in layer_ids[:-1]]
        yield Fact(
            "MODEL.YOLACT_PLUS.MASKIOU_CHANNELS", sizes, f"re-scoring layers of {_list(sizes)}"
        )


def _pyramid_facts(path: str, weights: Weights, options: Options) -> Iterator[Fact]:
    laterals, extra = (
        {int(m[1]) for name in weights if (m := re.match(rf"fpn\.{kind}\.(\d+)\.weight", name))}
        for kind in ("lat_layers", "downsample_layers")
    )
    if not laterals:
        return
    if not options.allow_partial and (len(laterals) != 3 or len(extra) < 2):
        raise CheckpointError(
            f"{path}: its pyramid has {len(laterals)} levels of the backbone and {len(extra)} "
            "beyond; expected 3 and 2, P3..P7"
        )
    channels = size(weights, "fpn.lat_layers.0.weight")
    if channels is not None:
        yield Fact(f"{_NODE}.CHANNELS", channels, f"pyramid levels of {channels} channels")


def is_shared(weights: Weights) -> bool:
    """Whether one head serves all levels."""
    return not any(re.match(r"prediction_layers\.[1-9]", name) for name in weights)


def _head_facts(
    path: str, weights: Weights, options: Options, cfg: CfgNode, prototypes: int | None
) -> Iterator[Fact]:
    """Anchors, classes and whether levels share their head."""
    levels = sorted(
        {int(m[1]) for name in weights if (m := re.match(r"prediction_layers\.(\d+)\.", name))}
    )
    if not levels:
        return
    if levels not in ([0], list(range(_LEVELS))) and not options.allow_partial:
        raise CheckpointError(
            f"{path}: it has heads for the levels {_list(levels)}; expected one for all, or one "
            "for each of P3..P7 (0 to 4)"
        )
    if prototypes is None and not options.allow_partial:
        raise CheckpointError(
            f"{path}: it has no prototypes (proto_net), so its masks come from the head itself "
            "(mask_type direct); expected a network with prototypes"
        )
    outputs = [_outputs(path, weights, level) for level in levels]
    heads = [head for head in outputs if head is not None]
    if len(heads) != len(levels):
        return
    shared = is_shared(weights)
    yield Fact(f"{_NODE}.SHARE_HEAD", shared, "one head for all levels" if shared else "five heads")
    (classes, *others) = {classes for _, classes, _ in heads}
    if others:
        raise CheckpointError(f"{path}: its heads have {_list([classes, *others])} classes")
    yield Fact(f"{_NODE}.NUM_CLASSES", classes, f"{classes} classes")
    for _, _, coefficients in heads:
        if coefficients not in (None, prototypes) and prototypes is not None:
            raise CheckpointError(
                f"{path}: an anchor has {coefficients} mask coefficients for {prototypes} "
                "prototypes; expected as many (without mask_proto_bias)"
            )
    yield from _anchor_facts(path, [anchors for anchors, _, _ in heads], shared, cfg)


def _anchor_facts(path: str, counts: list[int], shared: bool, cfg: CfgNode) -> Iterator[Fact]:
    node = cfg.MODEL.YOLACT
    counts = counts * _LEVELS if shared else counts
    scales, ratios = node.ANCHOR_SCALES, node.ANCHOR_RATIOS
    nested = [x for x in ratios if isinstance(x, list | tuple)]
    level_ratios = nested or [ratios] * _LEVELS
    if len(scales) != _LEVELS or len(level_ratios) != _LEVELS:
        return  # refused in the project's words when the model is built
    if not all(map(are_numbers, [*scales, *level_ratios])):
        return
    shapes = [
        anchor_shapes(path, *level) for level in zip(counts, scales, level_ratios, strict=True)
    ]
    reason = f"{_list(sorted(set(counts)))} anchors a cell"
    yield Fact(f"{_NODE}.ANCHOR_SCALES", [sizes for sizes, _ in shapes], reason)
    anchor_ratios = [shape_ratios for _, shape_ratios in shapes]
    same_ratios = anchor_ratios.count(anchor_ratios[0]) == len(anchor_ratios) and not nested
    yield Fact(f"{_NODE}.ANCHOR_RATIOS", anchor_ratios[0] if same_ratios else anchor_ratios, reason)


def _outputs(path: str, weights: Weights, level: int) -> tuple[int, int, int | None] | None:
    """Anchors a cell, classes and coefficients of a head; None if it has not both layers."""
    prefix = f"prediction_layers.{level}"
    boxes, classes, masks = (
        size(weights, f"{prefix}.{kind}_layer.bias") for kind in ("bbox", "conf", "mask")
    )
    if boxes is None or classes is None:
        return None
    anchors, rest = divmod(boxes, 4)
    count, remainder = divmod(classes, max(anchors, 1))
    if rest or remainder or count < 2 or not anchors:
        raise CheckpointError(
            f"{path}: the head has {boxes} box and {classes} class outputs; expected 4 and at "
            "least 2 for each anchor"
        )
    if masks is not None and masks % anchors:
        raise CheckpointError(
            f"{path}: the head has {masks} mask coefficients for {anchors} anchors; expected as "
            "many for each"
        )
    return anchors, count - 1, None if masks is None else masks // anchors


def deformable_of(weights: Weights) -> list[set[int]]:
    """Deformable blocks of each stage."""
    return _indices(weights, r"backbone\.layers\.(\d+)\.(\d+)\.conv2\.conv_offset_mask\.w", _STAGES)


def _deformable_facts(
    path: str, weights: Weights, cfg: CfgNode, blocks: Sequence[int]
) -> Iterator[Fact]:
    deformable_blocks = deformable_of(weights)
    node = cfg.MODEL.YOLACT_PLUS
    name = "build_deformable_resnet_backbone"
    content = (
        f"deformable blocks {deformable_blocks}"
        if any(deformable_blocks)
        else "no deformable blocks"
    )

    def chosen(counts: Sequence[int], interval: int) -> list[set[int]]:
        """Deformable blocks of each stage, see ``MODEL.YOLACT_PLUS.DEFORMABLE_*``."""
        return [
            {i for i in range(max(number - count, 0), number) if i % max(interval, 1) == 0}
            for number, count in zip(blocks, counts, strict=False)
        ]

    configured = chosen(node.DEFORMABLE_BLOCKS, node.DEFORMABLE_INTERVAL)
    if not any(deformable_blocks):
        if cfg.MODEL.BACKBONE.NAME != name or any(configured):
            yield Fact("MODEL.BACKBONE.NAME", "build_resnet_backbone", content)
        return
    yield Fact("MODEL.BACKBONE.NAME", name, content)
    if configured == deformable_blocks:
        return
    counts = [n - min(x) if x else 0 for n, x in zip(blocks, deformable_blocks, strict=True)]
    intervals = [k for k in range(1, max(blocks) + 1) if chosen(counts, k) == deformable_blocks]
    if not intervals:
        raise CheckpointError(
            f"{path}: its {content} are not every so many of the last blocks of their stages, as "
            "MODEL.YOLACT_PLUS.DEFORMABLE_BLOCKS and DEFORMABLE_INTERVAL can say"
        )
    yield Fact("MODEL.YOLACT_PLUS.DEFORMABLE_BLOCKS", counts, content)
    yield Fact("MODEL.YOLACT_PLUS.DEFORMABLE_INTERVAL", intervals[0], content)


def proto_ids(weights: Weights) -> list[int]:
    """Numbers of the layers of the prototype network."""
    return _numbers(weights, r"proto_net\.(\d+)\.weight")


def maskiou_ids(weights: Weights) -> list[int]:
    """Numbers of the layers of the re-scoring network."""
    return _numbers(weights, r"maskiou_net\.maskiou_net\.(\d+)\.weight")


def _numbers(weights: Weights, pattern: str) -> list[int]:
    return sorted({int(m[1]) for name in weights if (m := re.fullmatch(pattern, name))})


def _blocks(weights: Weights) -> list[int]:
    pattern = r"backbone\.layers\.(\d+)\.(\d+)\.(?:conv|bn|downsample)"
    return [len(x) for x in _indices(weights, pattern, _STAGES)]


def _indices(weights: Weights, pattern: str, count: int) -> list[set[int]]:
    """For each of ``count`` stages, the second number of the names that match."""
    indices: list[set[int]] = [set() for _ in range(count)]
    for name in weights:
        match = re.match(pattern, name)
        if match and int(match[1]) < count:
            indices[int(match[1])].add(int(match[2]))
    return indices


def _list(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))
