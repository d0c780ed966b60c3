"""VGG against torchvision's, whose ImageNet weights it must take."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from torch import nn

import instseg
from instseg.checkpoint import Checkpointer
from instseg.config.rules import check_values
from instseg.errors import ConfigError
from instseg.modeling import VGG


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.vgg16(weights=None).features.eval()


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(1, 3, 64, 96)


def with_weights_of(theirs: nn.Module, **settings: Any) -> VGG:
    ours = VGG(**settings).eval()
    missing, _ = ours.features.load_state_dict(theirs.state_dict(), strict=False)
    assert not missing
    return ours


@pytest.mark.parametrize("depth", [11, 13, 16, 19])
def test_convolutions_are_named_and_shaped_as_in_torchvision(depth: int) -> None:
    with torch.device("meta"):
        theirs = getattr(torchvision.models, f"vgg{depth}")(weights=None).state_dict()
        ours = VGG(depth=depth).state_dict()
    expected = {name: value.shape for name, value in theirs.items() if "features" in name}
    assert {name: value.shape for name, value in ours.items()} == expected


def test_normalised_convolutions_are_named_as_in_torchvision() -> None:
    with torch.device("meta"):
        theirs = torchvision.models.vgg16_bn(weights=None).state_dict()
        ours = VGG(norm="BN").state_dict()
    assert ours.keys() == {name for name in theirs if "features" in name}


def test_stride_16_gives_the_features_of_torchvision(
    theirs: nn.Module, image: torch.Tensor
) -> None:
    features = with_weights_of(theirs, out_features=["conv4", "conv5"])(image)
    # The layers of each stage end in front of a pooling layer.
    assert torch.equal(features["conv4"], theirs[:23](image))
    assert torch.equal(features["conv5"], theirs[:30](image))


def test_holes_leave_the_stages_before_conv5_alone(theirs: nn.Module, image: torch.Tensor) -> None:
    features = with_weights_of(theirs, output_stride=8, out_features=["conv4", "conv5"])(image)
    assert torch.equal(features["conv4"], theirs[:23](image))
    assert features["conv5"].shape == (1, 512, 8, 12)


def test_every_second_cell_with_holes_is_conv5_of_every_second_pooled_cell(
    theirs: nn.Module, image: torch.Tensor
) -> None:
    features = with_weights_of(theirs, output_stride=8)(image)["conv5"]
    pooled = nn.functional.max_pool2d(theirs[:23](image), 3, stride=1, padding=1)
    for row, column in ((0, 0), (1, 0), (1, 1)):
        expected = theirs[24:30](pooled[..., row::2, column::2])
        torch.testing.assert_close(features[..., row::2, column::2], expected)


def test_a_mirrored_image_gives_mirrored_features_with_mirrored_weights() -> None:
    """A 2x2 pooling with stride 1 would shift them by half a cell."""
    ours, mirrored = VGG(output_stride=8).eval(), VGG(output_stride=8).eval()
    weights = {k: v.flip(-1) if v.ndim == 4 else v for k, v in ours.state_dict().items()}
    mirrored.load_state_dict(weights)
    image = torch.randn(1, 3, 32, 64)
    expected = ours(image)["conv5"].flip(-1)
    torch.testing.assert_close(mirrored(image.flip(-1))["conv5"], expected)


@pytest.mark.parametrize(
    ("settings", "stride", "channels"),
    [
        ({"output_stride": 16}, 16, 512),
        ({"output_stride": 8}, 8, 512),
        ({"out_features": ["conv3"]}, 4, 256),
    ],
)
def test_the_output_has_the_shape_that_is_announced(
    settings: dict[str, Any], stride: int, channels: int
) -> None:
    vgg = VGG(depth=11, **settings)
    ((name, shape),) = vgg.output_shape().items()
    assert (shape.stride, shape.channels, vgg.size_divisibility) == (stride, channels, stride)
    assert vgg(torch.zeros(2, 3, 32, 48))[name].shape == (2, channels, 32 // stride, 48 // stride)


def test_a_network_that_ends_early_has_no_later_layers() -> None:
    assert len(VGG(out_features=["conv2"]).features) == 9


def test_the_first_stages_are_frozen_and_the_others_trained() -> None:
    vgg = VGG(norm="BN", freeze_at=2)
    trained = {int(name.split(".")[1]) for name, p in vgg.named_parameters() if p.requires_grad}
    # conv1 and conv2 of vgg16_bn are the layers 0 to 12, a pooling layer follows.
    assert min(trained) == 14
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in vgg.features[:13])


def test_weights_of_torchvision_load_by_name_into_a_model(
    theirs: nn.Module, tmp_path: Path
) -> None:
    weights = {f"features.{name}": value for name, value in theirs.state_dict().items()}
    weights["classifier.0.weight"] = torch.zeros(8, 8)
    torch.save(weights, tmp_path / "vgg16.pth")
    model = nn.ModuleDict({"backbone": VGG(output_stride=8), "head": nn.Conv2d(512, 1, 1)})
    Checkpointer(model).load(f"{tmp_path / 'vgg16.pth'}?matching_heuristics=True")
    for name, value in model["backbone"].features.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name])


def test_a_configuration_builds_it() -> None:
    cfg = instseg.get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_vgg_backbone"
    cfg.MODEL.VGG.DEPTH = 11
    vgg = build_backbone(cfg, ShapeSpec(channels=3))
    assert isinstance(vgg, VGG)
    assert vgg.output_shape()["conv5"].stride == 16
    assert not vgg.features[0].weight.requires_grad  # MODEL.BACKBONE.FREEZE_AT is 2


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("VGG.DEPTH", 17, "MODEL.VGG.DEPTH is 17; expected 11, 13, 16 or 19"),
        ("VGG.OUTPUT_STRIDE", 4, "MODEL.VGG.OUTPUT_STRIDE is 4; expected 8 or 16"),
        ("VGG.OUT_FEATURES", [], "expected some of conv1, conv2"),
        ("VGG.OUT_FEATURES", ["res4"], "MODEL.VGG.OUT_FEATURES is ..res4..; expected"),
        ("BACKBONE.FREEZE_AT", 6, "MODEL.BACKBONE.FREEZE_AT is 6; expected 0 to 5"),
    ],
)
def test_settings_that_make_no_network_are_refused(key: str, value: Any, message: str) -> None:
    overrides = ["MODEL.BACKBONE.NAME", "build_vgg_backbone", f"MODEL.{key}", value]
    cfg = instseg.get_cfg()
    cfg.merge_from_list(overrides)
    with pytest.raises(ConfigError, match=message):
        check_values(cfg)
