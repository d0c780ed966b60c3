"""The configuration of a converted file: read from its shapes, given, or taken with a line.

Layouts are those of the authors' files (``golden/*/*keys*.json``) with single layers changed.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from instseg.convert.configuration import Choice, Options, choose
from instseg.errors import CheckpointError, ConfigError
from instseg.projects.yolact.weights_layout import layout_of
from tests.support.yolact_common import keys

NODE = "MODEL.YOLACT"
PLUS = "MODEL.YOLACT_PLUS"
Shapes = dict[str, list[int] | None]
HEAD = "prediction_layers"


def choice_of(
    layout: str, changes: Shapes | None = None, name: str = "a.pth", **options: Any
) -> Choice:
    shapes: Shapes = {key: shape for key, (shape, _) in keys(layout).items()}
    shapes |= changes or {}
    weights = {
        key: torch.empty(shape, device="meta") for key, shape in shapes.items() if shape is not None
    }
    parsed_options = Options(**options)
    return choose(name, layout_of(name, weights, parsed_options), parsed_options)


def head(anchors: int, classes: int = 80, prototypes: int = 32, level: int = 0) -> Shapes:
    """The last layers of a head."""
    rows = {"bbox": 4, "conf": classes + 1, "mask": prototypes}
    return {
        f"{HEAD}.{level}.{kind}_layer.{part}": [anchors * count, *rest]
        for kind, count in rows.items()
        for part, rest in (("weight", [256, 3, 3]), ("bias", []))
    }


def semantic(classes: int) -> Shapes:
    return {"semantic_seg_conv.weight": [classes, 256, 1, 1], "semantic_seg_conv.bias": [classes]}


def prototypes(count: int) -> Shapes:
    return {"proto_net.10.weight": [count, 256, 1, 1], "proto_net.10.bias": [count]}


def without(layout: str, *beginnings: str) -> Shapes:
    return {key: None for key in keys(layout) if key.startswith(beginnings)}


def more_blocks(layout: str, stage: int, first: int, end: int) -> Shapes:
    """Further blocks of a ResNet, like the second one of the stage."""
    second_block = f"backbone.layers.{stage}.1."
    return {
        key.replace(second_block, f"backbone.layers.{stage}.{block}."): shape
        for key, (shape, _) in keys(layout).items()
        if key.startswith(second_block)
        for block in range(first, end)
    }


def heads_by_level(*anchors: int) -> Shapes:
    shared = {key: shape for key, (shape, _) in keys("yolact_base").items() if ".upfeature." in key}
    changes: Shapes = {}
    for level, count in enumerate(anchors):
        changes |= head(count, level=level)
        changes |= {key.replace("layers.0", f"layers.{level}"): x for key, x in shared.items()}
    return changes


RESNET152 = more_blocks("yolact_base", 1, 4, 8) | more_blocks("yolact_base", 2, 23, 36)
TOLD: dict[str, tuple[str, Callable[[], Shapes], dict[str, Any]]] = {
    "20 classes": (
        "yolact_base",
        lambda: head(3, classes=20) | semantic(20),
        {f"{NODE}.NUM_CLASSES": 20},
    ),
    "64 prototypes": (
        "yolact_base",
        lambda: head(3, prototypes=64) | prototypes(64),
        {f"{NODE}.NUM_PROTOTYPES": 64},
    ),
    "two scales a level": (
        "yolact_base",
        lambda: head(6),
        {f"{NODE}.ANCHOR_SCALES": [[x, round(x * 2**0.5, 4)] for x in (24, 48, 96, 192, 384)]},
    ),
    "five ratios": (
        "yolact_base",
        lambda: head(5),
        {f"{NODE}.ANCHOR_RATIOS": [1.0, 0.5, 2.0, 0.3333, 3.0]},
    ),
    "one anchor": ("yolact_base", lambda: head(1), {f"{NODE}.ANCHOR_RATIOS": [1.0]}),
    "one scale of YOLACT++": (
        "yolact_plus_base",
        lambda: head(3),
        {f"{NODE}.ANCHOR_SCALES": [[24], [48], [96], [192], [384]]},
    ),
    "ResNet-152": ("yolact_base", lambda: RESNET152, {"MODEL.RESNETS.DEPTH": 152}),
    "group normalisation": (
        "yolact_base",
        lambda: {k: None for k in keys("yolact_base") if ".running_" in k or ".num_" in k},
        {"MODEL.RESNETS.NORM": "GN"},
    ),
    "no semantic layer": (
        "yolact_base",
        lambda: without("yolact_base", "semantic_seg_conv."),
        {f"{NODE}.SEMANTIC_WEIGHT": 0.0},
    ),
    "two layers before the upsampling": (
        "yolact_base",
        lambda: (
            without("yolact_base", "proto_net.4.", "proto_net.10.")
            | {"proto_net.6.weight": [256, 256, 3, 3], "proto_net.6.bias": [256]}
            | {"proto_net.8.weight": [32, 256, 1, 1], "proto_net.8.bias": [32]}
        ),
        {f"{NODE}.PROTO_CONVS": 2},
    ),
    "re-scoring without deformable layers": (
        "yolact_base",
        lambda: {k: x for k, (x, _) in keys("yolact_plus_base").items() if "maskiou" in k},
        {"MODEL.META_ARCHITECTURE": "YOLACTPlus"},
    ),
    "deformable layers without re-scoring": (
        "yolact_plus_base",
        lambda: without("yolact_plus_base", "maskiou_net."),
        {"MODEL.META_ARCHITECTURE": "YOLACT"},
    ),
    "every block deformable": (
        "yolact_plus_base",
        lambda: {
            f"backbone.layers.{stage}.{block}.conv2.conv_offset_mask.{part}": shape
            for stage, count in ((1, 4), (2, 23), (3, 3))
            for block in range(count)
            for part, shape in (("weight", [27, 64, 3, 3]), ("bias", [27]))
        },
        {f"{PLUS}.DEFORMABLE_INTERVAL": 1},
    ),
    "a re-scoring network of three layers": (
        "yolact_plus_resnet50",
        lambda: (
            without(
                "yolact_plus_resnet50", "maskiou_net.maskiou_net.8.", "maskiou_net.maskiou_net.10."
            )
            | {"maskiou_net.maskiou_net.8.weight": [80, 64, 1, 1]}
            | {"maskiou_net.maskiou_net.8.bias": [80]}
        ),
        {f"{PLUS}.MASKIOU_CHANNELS": [8, 16, 32, 64]},
    ),
    "a head for each level": (
        "yolact_base",
        lambda: heads_by_level(3, 3, 3, 3, 3),
        {f"{NODE}.SHARE_HEAD": False},
    ),
    "other anchors for each level": (
        "yolact_base",
        lambda: heads_by_level(3, 3, 6, 1, 3),
        {
            f"{NODE}.SHARE_HEAD": False,
            f"{NODE}.ANCHOR_SCALES": [[24], [48], [96, 135.7645], [192], [384]],
            f"{NODE}.ANCHOR_RATIOS": [[1.0, 0.5, 2.0]] * 3 + [[1.0], [1.0, 0.5, 2.0]],
        },
    ),
    "a DarkNet of fewer blocks": (
        "yolact_darknet53",
        lambda: without("yolact_darknet53", "backbone.layers.4.4."),
        {"MODEL.DARKNET.DEPTHS": [1, 2, 8, 8, 3]},
    ),
}


@pytest.mark.parametrize("name", TOLD)
def test_what_shapes_tell_becomes_an_override(name: str) -> None:
    layout, changes, expected = TOLD[name]
    choice = choice_of(layout, changes())
    words = choice.overrides
    assert dict(zip(words[::2], words[1::2], strict=True)) == expected


REFUSED: dict[str, tuple[str, Shapes, str]] = {
    "masks from the head": (
        "yolact_base",
        without("yolact_base", "proto_net."),
        r"no prototypes \(proto_net\).*mask_type direct",
    ),
    "a coefficient too many": (
        "yolact_base",
        head(3, prototypes=33),
        "33 mask coefficients for 32",
    ),
    "coefficients for no whole number of anchors": (
        "yolact_base",
        head(3) | {f"{HEAD}.0.mask_layer.bias": [95]},
        "95 mask coefficients for 3 anchors; expected as many for each",
    ),
    "transposed convolutions": (
        "yolact_base",
        {"proto_net.6.weight": [256, 256, 2, 2], "proto_net.6.bias": [256]},
        "layers at 0, 2, 4, 6, 8, 10; expected",
    ),
    "four levels": (
        "yolact_base",
        without("yolact_base", "fpn.downsample_layers.1."),
        "3 levels of the backbone and 1 beyond; expected 3 and 2",
    ),
    "two heads": ("yolact_base", heads_by_level(3, 3), r"heads for the levels 0, 1; expected one"),
    "heads of different classes": (
        "yolact_base",
        heads_by_level(3, 3, 3, 3, 3) | head(3, classes=5, level=2),
        "its heads have .* classes",
    ),
    "an unknown ResNet": (
        "yolact_base",
        more_blocks("yolact_base", 1, 4, 5),
        "have 3, 5, 23, 3 blocks of 3 convolutions; expected those of a ResNet of 18",
    ),
    "deformable blocks by no rule": (
        "yolact_plus_base",
        without("yolact_plus_base", "backbone.layers.2.9.conv2.conv_offset_mask"),
        "are not every so many of the last blocks",
    ),
    "hundreds of anchors": ("yolact_base", head(101), "101 anchors a cell; expected 1 to 100"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_we_cannot_express_is_refused_with_what_the_file_has(name: str) -> None:
    layout, changes, message = REFUSED[name]
    with pytest.raises(CheckpointError, match=message) as caught:
        choice_of(layout, changes)
    assert "\n" not in str(caught.value)


def test_anchors_of_another_data_set_are_never_taken_in_silence() -> None:
    """Twenty classes could be Pascal's, whose anchors differ from COCO's, or anyone's."""
    choice = choice_of("yolact_resnet50_pascal")
    assert choice.config == "yolact/yolact_resnet50.yaml"
    assert choice.cfg.MODEL.YOLACT.ANCHOR_SCALES == [[24], [48], [96], [192], [384]]
    text = str(choice)
    assert "which yolact_resnet50_pascal.yaml would fit as well" in text
    for key in ("MODEL.YOLACT.ANCHOR_SCALES", "MODEL.YOLACT.SQUARE_ANCHORS", "INPUT.SQUARE_SIZE"):
        assert f"the file does not tell {key} (taken: " in text
    assert "give KEY VALUE or --config-file" in text


def test_the_name_of_a_file_tells_its_anchors_and_that_is_said() -> None:
    choice = choice_of("yolact_resnet50_pascal", name="x/yolact_resnet50_pascal_1_2.pth")
    assert choice.config == "yolact/yolact_resnet50_pascal.yaml" and not choice.overrides
    assert "chosen by the name of the file" in str(choice)


def test_what_the_user_tells_is_not_said_to_be_taken() -> None:
    scales = [[20], [40], [80], [160], [320]]
    given = (f"{NODE}.ANCHOR_SCALES", str(scales), "INPUT.SQUARE_SIZE", "500")
    choice = choice_of("yolact_base", head(5), overrides=given)
    assert choice.cfg.MODEL.YOLACT.ANCHOR_SCALES == scales and choice.cfg.INPUT.SQUARE_SIZE == 500
    assert not {f"{NODE}.ANCHOR_SCALES", "INPUT.SQUARE_SIZE"} & set(choice.untold)
    assert (
        f"does not tell {NODE}.ANCHOR_RATIOS (taken: [1.0, 0.5, 2.0, 0.3333, 3.0], for 5 anchors"
        in str(choice)
    )


def test_a_configuration_that_is_given_tells_everything() -> None:
    choice = choice_of("yolact_resnet50_pascal", config="yolact/yolact_resnet50_pascal.yaml")
    assert choice.config == "yolact/yolact_resnet50_pascal.yaml"
    assert not choice.overrides and not choice.untold
    assert str(choice) == "fits yolact/yolact_resnet50_pascal.yaml"


@pytest.mark.parametrize("value", ["[]", str([[]] * 5), str([["a"]] * 5), "[['a'], 1]"])
@pytest.mark.parametrize("key", ["ANCHOR_SCALES", "ANCHOR_RATIOS"])
def test_anchors_that_are_none_are_refused(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{NODE}.{key} is .*; expected"):
        choice_of("yolact_base", head(5), overrides=(f"{NODE}.{key}", value))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"overrides": (f"{NODE}.NUM_CLASSES", "80")},
            "20 classes need MODEL.YOLACT.NUM_CLASSES 20, which was given as 80",
        ),
        (
            {"config": "yolact/yolact_resnet50.yaml"},
            "20 classes need MODEL.YOLACT.NUM_CLASSES 20, yolact/yolact_resnet50.yaml has 80",
        ),
        (
            {"config": "yolact/yolact_base.yaml"},
            "need MODEL.RESNETS.DEPTH 50, .* has 101; 20 classes",
        ),
        (
            {
                "overrides": (
                    f"{NODE}.ANCHOR_SCALES",
                    "[[24, 30], [48, 60], [1, 2], [1, 2], [1, 2]]",
                )
            },
            "3 anchors a cell need MODEL.YOLACT.ANCHOR_SCALES .*, which was given as",
        ),
        (
            {"config": "mask_rcnn/mask_rcnn_shapes.yaml"},
            "need MODEL.META_ARCHITECTURE YOLACT, .* has GeneralizedRCNN",
        ),
        ({"overrides": ("MODEL.YOLACT.NUM_CLASES", "20")}, "did you mean MODEL.YOLACT.NUM_CLASSES"),
        ({"overrides": ("MODEL.YOLACT.NUM_CLASSES",)}, "must be pairs KEY VALUE"),
        ({"config": "yolact/yolact_bas.yaml"}, "did you mean yolact/yolact_base.yaml"),
    ],
)
def test_what_contradicts_the_file_is_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        choice_of("yolact_resnet50_pascal", **options)
    assert "\n" not in str(caught.value)


def test_a_part_of_a_network_tells_what_it_has() -> None:
    names = without("yolact_base", "fpn.", "proto_net.", "prediction_layers.", "semantic")
    choice = choice_of("yolact_base", names, allow_partial=True)
    assert choice.config == "yolact/yolact_base.yaml" and not choice.overrides


@pytest.mark.parametrize(
    ("kept", "config"),
    [("backbone.layers.0.0.", "yolact_resnet50"), ("backbone.layers.2.", "yolact_base")],
)
def test_a_part_of_a_backbone_is_no_other_backbone(kept: str, config: str) -> None:
    """One block fits every ResNet, as far as it goes; twenty-three are those of one alone."""
    others: Shapes = {key: None for key in keys("yolact_base") if not key.startswith(kept)}
    choice = choice_of("yolact_base", others, allow_partial=True)
    assert choice.config == f"yolact/{config}.yaml"
    if kept.endswith(".0.0."):
        with pytest.raises(CheckpointError, match="have 1, 0, 0, 0 blocks of 3 convolutions"):
            choice_of("yolact_base", others)
