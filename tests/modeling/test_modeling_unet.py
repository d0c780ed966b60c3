"""The contracting path of U-Net as a backbone: sizes, skipped parts, configuration."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from torch import nn
from torch.nn import functional as F

from instseg.config.nodes import get_cfg
from instseg.config.rules import check_values
from instseg.errors import ConfigError
from instseg.modeling import UNetEncoder


def test_every_level_has_half_the_size_of_the_one_before() -> None:
    backbone = UNetEncoder((4, 6, 8), in_channels=2).eval()
    levels = backbone(torch.randn(1, 2, 16, 24))
    assert {name: tuple(x.shape[1:]) for name, x in levels.items()} == {
        "level1": (4, 16, 24),
        "level2": (6, 8, 12),
        "level3": (8, 4, 6),
    }
    shapes = backbone.output_shape()
    assert {name: (x.channels, x.stride) for name, x in shapes.items()} == {
        "level1": (4, 1),
        "level2": (6, 2),
        "level3": (8, 4),
    }
    assert backbone.size_divisibility == 4


def test_a_level_is_two_convolutions_beside_a_shortcut() -> None:
    level = UNetEncoder((3, 5), in_channels=2, norm="").levels["level1"]
    x = torch.randn(1, 2, 8, 8)

    def convolved(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, layer.weight, layer.bias, padding=layer.padding)

    inner = convolved(level.first, x).relu()
    expected = (convolved(level.second, inner) + convolved(level.shortcut, x)).relu()
    torch.testing.assert_close(level(x), expected)


def test_it_is_built_from_the_configuration() -> None:
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_unet_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.UNET.CHANNELS = (4, 8)
    backbone = build_backbone(cfg, ShapeSpec(channels=1))
    assert list(backbone(torch.zeros(1, 1, 4, 4))) == ["level1", "level2"]
    check_values(cfg)


@pytest.mark.parametrize(
    ("key", "value"), [("UNET.CHANNELS", ()), ("UNET.CHANNELS", (4, 0)), ("BACKBONE.FREEZE_AT", 2)]
)
def test_a_value_that_cannot_be_is_named(key: str, value: object) -> None:
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_unet_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.merge_from_list([f"MODEL.{key}", value])
    with pytest.raises(ConfigError, match=key):
        check_values(cfg)
