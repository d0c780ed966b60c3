"""YOLACT++'s parts against numbers of its authors' code and against sums done by hand.

The stages of the whole network are compared in ``tests/convert/test_convert_yolact.py``.
"""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.layers import Conv2d
from detectron2.modeling import build_model
from torch import nn

import instseg
from instseg.config.classes import num_classes_key
from instseg.errors import ConfigError
from instseg.projects.yolact import (
    MaskSamples,
    level_sizes,
    make_priors,
    yolact_losses,
)
from instseg.projects.yolact_plus import (
    DeformableConv2d,
    FastMaskIoUNet,
    YOLACTPlus,
    deformable_blocks,
    mask_ious,
)
from instseg.training.trainer import Trainer
from tests.conftest import GOLDEN, close
from tests.support.meta_models import meta_model
from tests.support.yolact_common import (
    SMALL,
    filled,
    gradients_agree,
    ground_truths,
    image,
    load,
    loss_settings,
    matching_agrees,
    synthetic,
    terms_agree,
    with_instances,
)

CONFIG = "yolact_plus/yolact_plus_resnet50.yaml"
CHANNELS = (8, 16, 32, 64, 128)
SMALL_PLUS = [*SMALL, "MODEL.YOLACT_PLUS.MASKIOU_CHANNELS", [4, 8]]


@pytest.fixture(scope="module")
def golden() -> Any:
    return load("loss_yolact_plus_resnet50")


@pytest.fixture(scope="module")
def priors() -> torch.Tensor:
    node = instseg.load_cfg(CONFIG).MODEL.YOLACT
    sizes = level_sizes(550, (8, 16, 32, 64, 128))
    return make_priors(550, sizes, node.ANCHOR_SCALES, node.ANCHOR_RATIOS)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return build_model(instseg.load_cfg(CONFIG, SMALL_PLUS)).eval()


@pytest.mark.parametrize("image", [0, 1])
def test_matching_of_nine_anchors_a_cell_equals_the_authors(
    golden: Any, priors: torch.Tensor, image: int
) -> None:
    matching_agrees(golden, priors, image)


def test_losses_and_gradients_equal_the_authors(
    golden: Any, priors: torch.Tensor, golden_weights: ModuleType
) -> None:
    net = FastMaskIoUNet(80, CHANNELS)
    names = {}
    for index, layer in zip((0, 2, 4, 6, 8, 10), (*net.convs, net.predictor), strict=True):
        for kind, parameter in layer.named_parameters():
            names[f"maskiou_net.{index}.{kind}"] = parameter
            key = f"maskiou_net.maskiou_net.{index}.{kind}"
            parameter.data = filled(golden_weights, golden, key, parameter.shape)
    predictions = synthetic(golden_weights, len(priors))
    losses, samples = yolact_losses(predictions, ground_truths(golden), priors, loss_settings())
    model = SimpleNamespace(maskiou_net=net, maskiou_weight=25.0, maskiou_min_area=25)
    losses |= YOLACTPlus.extra_losses(model, samples)  # type: ignore[arg-type]
    terms_agree(losses, golden, "synthetic", rel=1e-5)
    sum(losses.values()).backward()
    gradients_agree(predictions, golden)
    for name, parameter in names.items():
        expected = float(golden[f"synthetic/grad_maskiou_{name}_abs"])
        gradient_sum = parameter.grad.double().abs().sum().item()
        assert gradient_sum == pytest.approx(expected, rel=1e-4), name


@pytest.mark.parametrize(
    ("blocks", "count", "interval", "expected"),
    [
        (3, 0, 1, []),
        (4, 4, 1, [0, 1, 2, 3]),
        (4, 4, 3, [0, 3]),
        (23, 23, 3, [0, 3, 6, 9, 12, 15, 18, 21]),
        (3, 3, 3, [0]),
        (6, 2, 1, [4, 5]),
    ],
)
def test_deformable_blocks_are_those_of_the_authors(
    blocks: int, count: int, interval: int, expected: list[int]
) -> None:
    assert deformable_blocks(blocks, count, interval) == expected


@pytest.mark.parametrize(
    ("config", "expected"), [("yolact_plus_resnet50", 13), ("yolact_plus_base", 11)]
)
def test_as_many_blocks_are_deformable_as_released(config: str, expected: int) -> None:
    model = meta_model(f"yolact_plus/{config}.yaml")
    assert sum(isinstance(layer, DeformableConv2d) for layer in model.modules()) == expected


def test_a_deformable_layer_begins_as_half_the_plain_one() -> None:
    plain = Conv2d(4, 6, 3, stride=2, padding=1, bias=False)
    x = torch.randn(2, 4, 9, 7)
    expected = plain(x) / 2  # strengths sigmoid(0)
    torch.testing.assert_close(DeformableConv2d(plain)(x), expected)


def test_a_deformable_layer_in_the_place_of_a_frozen_one_is_frozen() -> None:
    plain = Conv2d(4, 6, 3, padding=1, bias=False)
    plain.requires_grad_(False)
    assert not any(value.requires_grad for value in DeformableConv2d(plain).parameters())


def test_an_offset_moves_what_is_sampled_down_and_right() -> None:
    """dy = 1 for every tap: the plain result of the map moved up by a row."""
    layer = DeformableConv2d(Conv2d(1, 1, 3, padding=1, bias=False))
    x = torch.randn(1, 1, 8, 8)
    at_rest = layer(x)
    layer.offset_mask.bias.data[0:18:2] = 1
    torch.testing.assert_close(layer(x)[:, :, 1:-2], at_rest[:, :, 2:-1])
    layer.offset_mask.bias.data[:18] = torch.tensor([0.0, 1.0]).repeat(9)
    torch.testing.assert_close(layer(x)[..., 1:-2], at_rest[..., 2:-1])


def test_offsets_that_are_no_numbers_give_a_result_that_is_none() -> None:
    """Torchvision's operator would read outside of the map, which can end the process."""
    layer = DeformableConv2d(Conv2d(1, 1, 3, padding=1, bias=False))
    layer.offset_mask.bias.data[:18] = torch.nan
    assert layer(torch.randn(1, 1, 64, 64)).isnan().all()


def test_the_iou_of_masks_counts_pixels() -> None:
    first, second = torch.zeros(2, 4, 4, dtype=torch.bool), torch.zeros(2, 4, 4, dtype=torch.bool)
    first[0, :2], second[0, 1:3] = True, True
    assert mask_ious(first, second).tolist() == pytest.approx([1 / 3, 0])


def test_the_iou_of_masks_equals_that_of_the_authors_of_fcis() -> None:
    """They cut masks to their boxes, inclusive corners, first."""
    golden = np.load(GOLDEN / "position_sensitive" / "official_fcis_helpers.npz")
    masks = torch.zeros(golden["annot_gt_masks"].shape, dtype=torch.bool)
    boxes = golden["annot_gt_boxes"][:, :4].astype(int)
    for mask, every, (x1, y1, x2, y2) in zip(masks, golden["annot_gt_masks"], boxes, strict=True):
        inside = slice(y1, y2 + 1), slice(x1, x2 + 1)
        mask[inside] = torch.from_numpy(every[inside]) > 0
    first, second = torch.from_numpy(golden["mo_pairs"]).T
    close(mask_ious(masks[first], masks[second]).double(), golden["mask_overlap"])


def test_small_masks_do_not_train_the_rescoring() -> None:
    targets = torch.zeros(2, 63, 63)
    targets[0, :5, :5], targets[1, :5, :6] = 1, 1
    mask_counts = []
    net = FastMaskIoUNet(3, CHANNELS)
    net.register_forward_pre_hook(lambda _, inputs: mask_counts.append(len(inputs[0])))
    model = SimpleNamespace(maskiou_net=net, maskiou_weight=25.0, maskiou_min_area=25)
    samples = MaskSamples(torch.rand(2, 63, 63), targets, torch.tensor([0, 1]), 2)
    YOLACTPlus.extra_losses(model, samples)  # type: ignore[arg-type]
    assert mask_counts == [1]


def test_mask_scores_are_scores_times_predicted_ious(model: nn.Module) -> None:
    model.maskiou_net.predictor.weight.data.zero_()
    model.maskiou_net.predictor.bias.data.fill_(0.25)
    with torch.no_grad():
        instances = model([image(40, 60, 0)])[0]["instances"]
    assert len(instances) > 0
    torch.testing.assert_close(instances.mask_scores, instances.scores / 4)


def test_mask_scores_do_not_depend_on_how_many_are_predicted_together(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules[YOLACTPlus.__module__]
    scores, sizes = [], []
    model.maskiou_net.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    for size in (1000, 3):
        monkeypatch.setattr(module, "_MASKS", size)
        with torch.no_grad():
            scores.append(model([image(40, 60, 0)])[0]["instances"].mask_scores)
    assert len(scores[0]) == sizes[0] > 3 >= max(sizes[1:])
    torch.testing.assert_close(*scores)


def test_a_batch_without_instances_trains_every_parameter(model: nn.Module) -> None:
    losses = model.train()([with_instances(image(40, 60, i), 0) for i in range(2)])
    assert losses["loss_maskiou"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_number_of_classes_is_yolacts() -> None:
    assert num_classes_key(instseg.load_cfg(CONFIG)) == "MODEL.YOLACT.NUM_CLASSES"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["MODEL.YOLACT_PLUS.MASKIOU_CHANNELS", [4] * 6],
            "expected at most 3 layers, as each",
        ),
        (["MODEL.YOLACT_PLUS.DEFORMABLE_BLOCKS", [1]], "a number for each of res2..res5"),
        (["MODEL.YOLACT_PLUS.DEFORMABLE_INTERVAL", 0], "DEFORMABLE_INTERVAL is 0; .* at least 1"),
        (["MODEL.RESNETS.DEPTH", 18], "DEPTH is 18; expected 50, 101 or 152, as build_deform"),
        (["MODEL.RESNETS.RES5_DILATION", 2], "RES5_DILATION is 2; expected 1, as build_deform"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_refused(
    overrides: list[Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Trainer.build_model(instseg.load_cfg(CONFIG, [*SMALL_PLUS, *overrides]))
