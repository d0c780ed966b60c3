"""Finds the configuration of the model that a file of weights is for.

The shapes in a file tell the layers of a network.  They do not tell anchor sizes, thresholds, or
the size and normalisation of images: these come from the user, or else from the nearest of our
configurations, and then the report says so.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode
from torch import Tensor

from instseg.categories import Categories
from instseg.config.nodes import get_cfg, load_cfg
from instseg.errors import CheckpointError, ConfigError

_RESNETS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
"""Layers → blocks of the stages; from 50 on, blocks have three convolutions."""
_MAX_ANCHORS = 100
_MAX_CLASSES = 100_000
RCNN_UNTOLD = (
    *("MODEL.ANCHOR_GENERATOR.SIZES", "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"),
    *("INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "MODEL.ROI_HEADS.NMS_THRESH_TEST"),
)
"""Keys that change the results of an R-CNN and leave no trace in its weights."""
_SERIES = (1.0, 0.5, 2.0, 1 / 3, 3.0, 0.25, 4.0, 0.2, 5.0)
"""Ratios of anchors in the order in which SSD adds them."""


@dataclass(frozen=True)
class Options:
    """The user's options for any converter.

    Attributes:
        leave_out_classes: drop the layers whose size depends on the number of classes, for training
            on other classes.
        allow_partial: accept a file that holds only some layers of the model.
        classes: names of the classes; None for those of the file's data set.
        config: configuration of the training; None for the nearest of ours.
        overrides: ``(KEY, VALUE, ...)`` of the training.
    """

    leave_out_classes: bool = False
    allow_partial: bool = False
    classes: Categories | None = None
    config: str | None = None
    overrides: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Fact:
    """The value of a key that a file tells.

    Attributes:
        key: of the configuration.
        value: that the file needs.
        evidence: what tells the value, e.g. "20 classes".
    """

    key: str
    value: Any
    evidence: str


@dataclass(frozen=True)
class Layout:
    """The facts that names and shapes in a file tell.

    Attributes:
        config: the nearest of our configurations.
        facts: configuration → what the file tells, even where the configuration says the same.
        untold: keys that change results and leave no trace in the file.
        reason: why ``config`` was chosen, where others would fit as well.
    """

    config: str
    facts: Callable[[CfgNode], Sequence[Fact]]
    untold: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Choice:
    """The configuration that a file is converted for.

    Attributes:
        config: a file, or its name inside ``configs/``.
        overrides: ``(KEY, VALUE, ...)`` beside it, the user's and then the file's.
        cfg: both together.
        evidence: key of an override that comes from the file → what tells its value.
        untold: key that neither the file nor the user tells → value taken.
        reason: see :class:`Layout`.
    """

    config: str
    overrides: tuple[Any, ...]
    cfg: CfgNode
    evidence: Mapping[str, str]
    untold: Mapping[str, Any]
    reason: str

    def __str__(self) -> str:
        lines = [f"fits {' '.join(map(str, (self.config, *self.overrides)))}"]
        if self.reason:
            lines.append(f"{self.config} was chosen by {self.reason}")
        for key, value in self.untold.items():
            origin = f"for {self.evidence[key]}" if key in self.evidence else f"of {self.config}"
            lines.append(f"the file does not tell {key} (taken: {value}, {origin})")
        if self.untold:
            lines.append("if the training had other values, give KEY VALUE or --config-file")
        return "\n".join(lines)


def choose(path: str, layout: Layout, options: Options) -> Choice:
    """Combine what the file at ``path`` tells with what the user gave.

    Raises:
        ConfigError: the two contradict each other, or the user's keys cannot be used.
    """
    config = options.config or layout.config
    cfg = get_cfg()  # values are checked below, together with what the file tells
    cfg.merge_from_file(config)
    cfg.merge_from_list(options.overrides)
    given_keys = tuple(map(str, options.overrides[::2]))
    facts = [x for x in layout.facts(cfg) if _plain(_value(cfg, x.key)) != _plain(x.value)]
    wrong = [x for x in facts if options.config or x.key in given_keys]
    if wrong:
        differences = "; ".join(
            f"{x.evidence} need {x.key} {x.value}, "
            f"{'which was given as' if x.key in given_keys else f'{config} has'} "
            f"{_value(cfg, x.key)}"
            for x in wrong
        )
        raise ConfigError(f"{path}: {differences}")
    overrides = (*options.overrides, *(word for x in facts for word in (x.key, x.value)))
    cfg = load_cfg(config, overrides)
    untold = (
        {} if options.config else {k: _value(cfg, k) for k in layout.untold if k not in given_keys}
    )
    evidence = {x.key: x.evidence for x in facts}
    reason = "" if options.config else layout.reason
    return Choice(config, overrides, cfg, evidence, untold, reason)


def config_text(choice: Choice, weights: Path, source: str) -> bytes:
    """A YAML file that needs no other: every value that differs from the defaults.

    Args:
        choice: what to write.
        weights: becomes ``MODEL.WEIGHTS``.
        source: the file that was converted.
    """
    cfg = choice.cfg.clone()
    cfg.MODEL.WEIGHTS = str(weights)
    default = get_cfg()
    cfg.MODEL.DEVICE = default.MODEL.DEVICE  # the file may be used on another machine
    content = {"VERSION": cfg.VERSION, **_difference(cfg, default)}
    comments = [
        f"Written by `instseg convert` for {Path(source).name!r}.",
        *str(choice).split("\n"),
    ]
    text = yaml.safe_dump(content, default_flow_style=None, sort_keys=False, allow_unicode=True)
    return "".join([*(f"# {line}\n" for line in comments), text]).encode()


def resnet_depth(
    path: str, blocks: Sequence[int], options: Options, *, bottleneck: bool = True
) -> int | None:
    """Layers of a ResNet.

    Args:
        path: of the file, for messages.
        blocks: number in each stage; 0 for a stage that is not in the file.
        options: whether stages may lack blocks.
        bottleneck: whether its blocks have three convolutions.
    Returns:
        None if the stages in the file fit several depths.
    Raises:
        CheckpointError: there is no such ResNet.
    """
    known = {k: x for k, x in _RESNETS.items() if bottleneck == (k >= 50)}
    pairs = {k: list(zip(blocks, x, strict=True)) for k, x in known.items()}
    fitting = [k for k, stages in pairs.items() if all(count in (0, x) for count, x in stages)]
    if options.allow_partial and not fitting:
        fitting = [k for k, stages in pairs.items() if all(count <= x for count, x in stages)]
    if not fitting:
        raise CheckpointError(
            f"{path}: the stages of its ResNet have {', '.join(map(str, blocks))} blocks of "
            f"{3 if bottleneck else 2} convolutions; expected those of a ResNet of 18, 34, 50, 101 "
            "or 152 layers"
        )
    return fitting[0] if len(fitting) == 1 else None


def resnet_facts(
    depth: int | None, stem: int | None, hidden: int | None, outputs: int | None
) -> Iterator[Fact]:
    """Keys of Detectron2's ResNet.

    Args:
        depth: layers.
        stem: outputs of its first layer.
        hidden: outputs of the first layer of the blocks of the first stage; None without
            bottlenecks.
        outputs: outputs of the last layer of these blocks.
    """
    for key, value, evidence in (
        ("DEPTH", depth, f"the blocks of a ResNet-{depth}"),
        ("STEM_OUT_CHANNELS", stem, f"{stem} channels of the first layer"),
        ("WIDTH_PER_GROUP", hidden, f"{hidden} channels inside the first blocks"),
        ("RES2_OUT_CHANNELS", outputs, f"{outputs} channels of the first blocks"),
    ):
        if value is not None:
            yield Fact(f"MODEL.RESNETS.{key}", value, evidence)


def classifier_classes(path: str, rows: int | None) -> int | None:
    """Classes of a classifier with ``rows`` outputs, one of them background; None for None.

    Raises:
        CheckpointError: an impossible number.
    """
    if rows is None:
        return None
    if not 2 <= rows <= _MAX_CLASSES:
        raise CheckpointError(
            f"{path}: the classifier has {rows} outputs; expected background and at least one class"
        )
    return rows - 1


def anchor_shapes(
    path: str, count: int, scales: Sequence[float], ratios: Sequence[float]
) -> tuple[list[float], list[float]]:
    """Sizes and ratios of ``count`` anchors a cell, as near to the given ones as possible.

    If the number of ratios divides ``count``, the sizes change.  Otherwise the ratios change; if
    the number of sizes does not divide ``count`` either, one size is left.

    Raises:
        CheckpointError: an impossible number.
    """
    if not 1 <= count <= _MAX_ANCHORS:
        raise CheckpointError(f"{path}: {count} anchors a cell; expected 1 to {_MAX_ANCHORS}")
    sizes, shapes = list(scales), list(ratios)
    if count == len(sizes) * len(shapes):
        return sizes, shapes
    if count % len(shapes) == 0:
        number = count // len(shapes)
        return [round(sizes[0] * 2 ** (i / number), 4) for i in range(number)], shapes
    number, sizes = (count // len(sizes), sizes) if count % len(sizes) == 0 else (count, sizes[:1])
    extreme = [x for n in range(6, number) for x in (1 / n, float(n))]
    return sizes, [round(x, 4) for x in (*_SERIES, *extreme)[:number]]


def anchor_facts(path: str, count: int, cfg: CfgNode, *, largest: bool = False) -> Iterator[Fact]:
    """Keys of Detectron2's anchors for ``count`` of them a cell.

    Args:
        path: of the file, for messages.
        count: anchors a cell.
        cfg: configuration to change.
        largest: whether sizes that are a series of doubles keep their largest.
    """
    node = cfg.MODEL.ANCHOR_GENERATOR
    levels, ratios = node.SIZES, node.ASPECT_RATIOS
    if not (levels and ratios and all(map(are_numbers, (*levels, *ratios)))):
        return  # refused, in Detectron2's words, when the model is built
    evidence = f"{count} anchors a cell"
    shapes = [anchor_shapes(path, count, scales, ratios[0]) for scales in levels]
    if largest:  # a pyramid of one level
        shapes = [
            ([scales[-1] / 2**i for i in reversed(range(len(sizes)))], shape)
            if len(sizes) != len(scales)
            else (sizes, shape)
            for scales, (sizes, shape) in zip(levels, shapes, strict=True)
        ]
    yield Fact("MODEL.ANCHOR_GENERATOR.SIZES", [sizes for sizes, _ in shapes], evidence)
    if shapes[0][1] != list(ratios[0]):
        yield Fact("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [shapes[0][1]], evidence)


def are_numbers(values: Any) -> bool:
    """Whether ``values`` is a list of one or more numbers."""
    return (
        isinstance(values, list | tuple)
        and len(values) > 0
        and all(isinstance(x, int | float) for x in values)
    )


def size(weights: Mapping[str, Tensor], name: str) -> int | None:
    """Outputs of a layer, by its weight or bias; None if there is no such tensor."""
    value = weights.get(name)
    return value.shape[0] if value is not None and value.ndim else None


def _difference(cfg: CfgNode, default: CfgNode) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            if inside := _difference(value, default[key]):
                result[key] = inside
        elif _plain(value) != _plain(default[key]):
            result[key] = _plain(value)
    return result


def _value(cfg: CfgNode, key: str) -> Any:
    return reduce(getattr, key.split("."), cfg)


def _plain(value: Any) -> Any:
    """``value`` with lists for tuples, which configurations do not tell apart."""
    return [_plain(x) for x in value] if isinstance(value, list | tuple) else value
