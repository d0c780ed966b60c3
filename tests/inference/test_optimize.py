"""Folded and compiled networks give the detections of the plain ones."""

import copy
from pathlib import Path

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn

from instseg.errors import ConfigError
from instseg.inference.optimize import optimize
from instseg.inference.predictor import Predictor
from instseg.modeling import Network, stage, stage_times
from instseg.projects.yolact_plus import DeformableConv2d
from tests.inference.test_predictor import tiny_cfg as mask_rcnn_cfg
from tests.support.yolact_tiny import PHOTO, decided, same_detections, tiny_cfg, tiny_predictor

NORMS = {
    "BatchNorm2d": nn.BatchNorm2d(6),
    "BatchNorm2d without weights": nn.BatchNorm2d(6, affine=False),
    "FrozenBatchNorm2d": FrozenBatchNorm2d(6),
}


def filled(module: nn.Module) -> nn.Module:
    """Random numbers in every parameter and statistic."""
    decided(module)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.eval()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("deformable", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_folded_convolution_computes_the_same(norm: str, deformable: bool, bias: bool) -> None:
    layer: nn.Module = Conv2d(4, 6, 3, padding=1, bias=bias, norm=copy.deepcopy(NORMS[norm]))
    if deformable:
        layer = DeformableConv2d(layer)
    x = torch.randn(2, 4, 9, 7)
    expected = filled(layer)(x)
    assert optimize(layer) is layer
    assert layer.norm is None
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 6), nn.BatchNorm2d(6, track_running_stats=False)])
def test_other_normalisations_stay(norm: nn.Module) -> None:
    layer = Conv2d(4, 6, 3, norm=norm).eval()
    assert optimize(layer).norm is norm


def test_modules_that_share_weights_are_folded_one_by_one() -> None:
    first, second = (filled(Conv2d(4, 6, 1, norm=nn.BatchNorm2d(6))) for _ in range(2))
    second.weight = first.weight
    nn.init.constant_(second.norm.weight, 3.0)
    model = nn.Sequential(first, nn.Conv2d(6, 4, 1), second).eval()
    x = torch.randn(1, 4, 3, 3)
    expected = model(x)
    torch.testing.assert_close(optimize(model)(x), expected, rtol=1e-4, atol=1e-4)


def test_a_model_in_training_is_refused() -> None:
    with pytest.raises(ValueError, match="call model.eval"):
        optimize(nn.BatchNorm2d(3))


@pytest.mark.parametrize("paper", ["yolact", "yolact_plus"])
def test_an_optimized_predictor_finds_the_same(paper: str, tmp_path: Path) -> None:
    plain = tiny_predictor(paper)
    decided(plain.model)
    torch.save({"model": plain.model.state_dict()}, tmp_path / "model.pth")
    fast = Predictor(tiny_cfg(paper), tmp_path / "model.pth", optimize=True)
    assert not any(isinstance(x, nn.BatchNorm2d) for x in fast.model.modules())
    assert fast.model.fpn.output3.weight.is_contiguous(memory_format=torch.channels_last)
    expected = plain(PHOTO)
    assert len(expected["instances"]) == 50
    same_detections(fast(PHOTO), expected)


def test_an_optimized_mask_rcnn_finds_the_same(tmp_path: Path) -> None:
    plain = Predictor(mask_rcnn_cfg())
    torch.save({"model": plain.model.state_dict()}, tmp_path / "model.pth")
    fast = Predictor(mask_rcnn_cfg(), tmp_path / "model.pth", optimize=True)
    same_detections(fast(PHOTO), plain(PHOTO))


@pytest.mark.parametrize("paper", ["yolact", "yolact_plus"])
def test_the_network_is_one_graph(paper: str) -> None:
    model = tiny_predictor(paper).model
    model.backbone.stage5[0] = DeformableConv2d(model.backbone.stage5[0])
    # fullgraph raises where the graph would break.
    network = torch.compile(Network(model), backend="eager", fullgraph=True)
    images = torch.randn(2, 3, 72, 72)
    with torch.no_grad():
        for ours, theirs in zip(network(images), model.raw(images), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_a_compiled_predictor_finds_the_same() -> None:
    plain = tiny_predictor("yolact")
    decided(plain.model)
    compiled = tiny_predictor("yolact", compile=True)
    decided(compiled.model)
    same_detections(compiled(PHOTO), plain(PHOTO))


def test_a_model_without_a_network_of_fixed_shape_is_not_compiled() -> None:
    with pytest.raises(ConfigError, match="GeneralizedRCNN cannot be compiled"):
        Predictor(mask_rcnn_cfg(), compile=True)


@pytest.mark.parametrize("options", [{}, {"compile": True}])
def test_yolact_names_its_stages(options: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)
    predictor = tiny_predictor("yolact_plus", **options)
    with stage_times() as times:
        predictor(PHOTO)
    assert list(times) == ["network", "post-processing", "mask assembly", "mask re-scoring"]


def test_nothing_is_timed_where_no_one_listens() -> None:
    with stage_times() as times:
        pass
    with stage("late"):
        pass
    assert times == {}
