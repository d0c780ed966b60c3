"""InstanceFCN as a whole; its parts are in ``test_instance_fcn_targets.py``."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, build_backbone
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor

import instseg
from instseg.checkpoint import Checkpointer
from instseg.config.classes import check_classes, num_classes_key
from instseg.data.dataset import load_all
from instseg.data.synthetic import shapes
from instseg.errors import ConfigError
from instseg.inference.predictor import Predictor
from instseg.masks import tight_boxes
from instseg.modeling import FinestLevel
from instseg.projects.instance_fcn import InstanceFCN, WindowRule
from instseg.training.trainer import Trainer
from tests.support.instance_fcn_common import window_rule

SHAPES = "instance_fcn/instance_fcn_shapes.yaml"
# Narrow enough for a pass in milliseconds.
SMALL = [
    *("MODEL.DEVICE", "cpu"),
    *("MODEL.RESNETS.DEPTH", 18),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    *("MODEL.FPN.OUT_CHANNELS", 16),
    *("MODEL.INSTANCE_FCN.CONV_DIM", 16),
    *("MODEL.INSTANCE_FCN.SCALES_TEST", "(96, 160)"),
]


class Plain(Backbone):
    """Gives the red channel of every eighth pixel."""

    def __init__(self) -> None:
        super().__init__()
        self._out_features = ["cells"]
        self._out_feature_channels = {"cells": 1}
        self._out_feature_strides = {"cells": 8}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"cells": x[:, :1, ::8, ::8]}

    @property
    def size_divisibility(self) -> int:
        return 32


def network(**settings: Any) -> InstanceFCN:
    rule = settings.pop("rule", window_rule())
    return InstanceFCN(
        backbone=Plain(),
        in_feature="cells",
        pixel_mean=[0.0, 0, 0],
        pixel_std=[1.0, 1, 1],
        rule=rule,
        **{
            "conv_dim": 4,
            "parts": 5,
            "windows_per_image": 256,
            "positive_fraction": 0.5,
            "scales": (128,),
            "max_size": 1500,
            "pre_nms_topk": 2000,
            "nms_threshold": 0.8,
            "mask_threshold": 0.5,
            "max_proposals": 1000,
            **settings,
        },
    )


def small(*overrides: Any) -> InstanceFCN:
    torch.manual_seed(0)
    model = Trainer.build_model(instseg.load_cfg(SHAPES, [*SMALL, *overrides]))
    assert isinstance(model, InstanceFCN)
    return model


def sample(size: tuple[int, int], boxes: list[list[float]]) -> dict[str, Any]:
    """A grey training image with full boxes as instances."""
    objects = Instances(size)
    objects.gt_boxes = Boxes(torch.tensor(boxes).view(-1, 4))
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(
        masks, np.array(boxes, dtype=int).reshape(-1, 4), strict=True
    ):
        mask[y1:y2, x1:x2] = True
    objects.gt_masks = BitMasks(masks)
    return {"image": torch.full((3, *size), 118.0), "instances": objects}


def centred(y: float, x: float, side: float) -> list[float]:
    return [x - side / 2, y - side / 2, x + side / 2, y + side / 2]


def test_half_of_the_windows_are_positive_if_there_are_enough() -> None:
    model = network(windows_per_image=16)
    for side, shown in ((128, 8), (60, 0)):
        _, targets, counted, scores, positive = model._sample(
            [sample((328, 328), [centred(164, 164, side)])]
        )
        assert (len(targets), len(counted), len(scores)) == (shown, shown, 16)
        assert positive.sum() == shown


def test_windows_are_never_drawn_from_the_padding() -> None:
    model = network(windows_per_image=10**6)
    _, _, _, scores, _ = model._sample([sample((20, 33), []), sample((20, 33), [])])
    assert len(scores) == 2 * 3 * 5


def test_the_targets_belong_to_the_windows_they_are_compared_with() -> None:
    """A map that is 1 on the instance makes every assembled mask equal to its target."""
    model = network(parts=1, rule=window_rule(size=7, canonical_size=40, positive_offset=8))
    boxes = [centred(36, 60, 40), centred(100, 28, 40)]
    group = [sample((160, 120), boxes[:1]), sample((160, 120), boxes[1:])]
    maps = torch.stack([x["instances"].gt_masks.tensor.any(0)[3::8, 3::8] for x in group])
    model.maps = lambda images: (maps[:, None].float(), maps.float())  # type: ignore[method-assign]
    logits, targets, counted, scores, positive = model._sample(group)
    assert len(targets) == 18
    assert torch.equal(logits[counted], targets[counted])
    assert not targets[~counted].any()
    assert scores[positive].all()


def part_maps(masks: Tensor, parts: int, rule: WindowRule) -> tuple[Tensor, Tensor]:
    """Output of a perfect network: every instance divided into its parts, its centre scored."""
    rows, columns = masks.shape[-2] // rule.stride, masks.shape[-1] // rule.stride
    maps = torch.full((1, parts**2, rows, columns), -5.0)
    scores = torch.full((1, rows, columns), -5.0)
    for mask in masks:
        x1, y1, x2, y2 = tight_boxes(mask[None])[0].tolist()
        row, column = int((y1 + y2) / 2 / rule.stride), int((x1 + x2) / 2 / rule.stride)
        scores[0, row, column] = 5
        cells = mask[4::8, 4::8]
        for i in range(rule.size):
            for j in range(rule.size):
                y, x = row - rule.size // 2 + i, column - rule.size // 2 + j
                part = (2 * i + 1) * parts // (2 * rule.size) * parts
                part += (2 * j + 1) * parts // (2 * rule.size)
                if cells[y, x]:
                    maps[0, part, y, x] = 5
    return maps, scores


def test_perfect_maps_give_two_touching_instances() -> None:
    model = network(scales=(256,), pre_nms_topk=2)
    masks = torch.zeros(2, 256, 320, dtype=torch.bool)
    masks[0, 88:168, 88:168] = True
    masks[1, 88:168, 168:240] = True
    maps = part_maps(masks, 5, model.rule)
    model.maps = lambda images: maps  # type: ignore[method-assign]
    instances = model.eval().propose({"image": torch.zeros(3, 256, 320)})
    order = instances.pred_boxes.tensor[:, 0].argsort()
    assert instances.pred_boxes.tensor[order].tolist() == [[88, 88, 168, 168], [168, 88, 240, 168]]
    # Interpolation between cells rounds the corners off.
    assert not (instances.pred_masks[order] & ~masks).any()
    assert (masks & ~instances.pred_masks[order]).sum() < 0.02 * masks.sum()
    assert instances.scores.tolist() == pytest.approx([torch.tensor(5.0).sigmoid().item()] * 2)
    assert instances.pred_classes.tolist() == [0, 0]


def test_proposals_have_the_size_asked_for() -> None:
    model = network(scales=(256,), pre_nms_topk=1)
    masks = torch.zeros(1, 256, 320, dtype=torch.bool)
    masks[0, 88:168, 88:168] = True
    maps = part_maps(masks, 5, model.rule)
    model.maps = lambda images: maps  # type: ignore[method-assign]
    instances = model.eval().propose(
        {"image": torch.zeros(3, 256, 320), "height": 128, "width": 640}
    )
    assert instances.image_size == (128, 640)
    assert instances.pred_boxes.tensor.tolist() == [[176, 44, 336, 84]]


def test_of_two_masks_with_one_box_the_better_scored_stays() -> None:
    """The windows are one cell apart, their masks are the same; a third is another instance."""
    model = network(parts=1, rule=window_rule(size=5), scales=(64,), pre_nms_topk=3)
    maps, scores = torch.full((1, 1, 8, 16), -5.0), torch.full((1, 8, 16), -9.0)
    maps[0, 0, 3, 3] = maps[0, 0, 3, 12] = 5
    scores[0, 3, 3], scores[0, 3, 4], scores[0, 3, 12] = 1, 2, 0
    model.maps = lambda images: (maps, scores)  # type: ignore[method-assign]
    instances = model.eval().propose({"image": torch.zeros(3, 64, 128)})
    assert instances.scores.tolist() == torch.tensor([2.0, 0]).sigmoid().tolist()
    assert instances.pred_boxes.tensor[:, 0].tolist() == [24, 96]


def test_masks_without_a_pixel_are_dropped() -> None:
    model = network().eval()
    model.maps = lambda images: (  # type: ignore[method-assign]
        torch.full((1, 25, 16, 16), -1.0),
        torch.zeros(1, 16, 16),
    )
    assert len(model.propose({"image": torch.zeros(3, 128, 128)})) == 0


def test_the_mask_threshold_is_a_probability() -> None:
    """Logit -1 is probability 0.27."""
    areas = []
    for threshold in (0.2, 0.3):
        model = network(mask_threshold=threshold, pre_nms_topk=1).eval()
        model.maps = lambda images: (  # type: ignore[method-assign]
            torch.full((1, 25, 16, 16), -1.0),
            torch.zeros(1, 16, 16),
        )
        areas.append(model.propose({"image": torch.zeros(3, 128, 128)}).pred_masks.sum().item())
    assert areas[0] > 0 and areas[1] == 0


def test_no_more_windows_than_asked_for_are_assembled() -> None:
    instances = small("MODEL.INSTANCE_FCN.PRE_NMS_TOPK_TEST", 3).eval()(
        [{"image": torch.zeros(3, 96, 96)}]
    )
    assert len(instances[0]["instances"]) <= 2 * 3


def test_scales_that_the_longer_side_makes_equal_are_searched_once() -> None:
    model = network(scales=(128, 256, 512), max_size=200).eval()
    shapes = []
    search = model._search
    model._search = lambda image, shape, size: (shapes.append(shape), search(image, shape, size))[1]  # type: ignore[method-assign]
    with torch.no_grad():
        model.propose({"image": torch.zeros(3, 64, 100)})
    assert shapes == [(128, 200)]


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (300, 2)])
def test_a_very_thin_image_gives_a_valid_result(size: tuple[int, int]) -> None:
    with torch.no_grad():
        instances = small().eval()([{"image": torch.zeros(3, *size)}])[0]["instances"]
    assert instances.pred_masks.shape == (len(instances), *size)
    assert instances.pred_masks.flatten(1).any(dim=1).all()


def test_the_branches_have_the_layers_of_the_paper() -> None:
    with torch.device("meta"):
        cfg = instseg.load_cfg("instance_fcn/instance_fcn_VGG16_coco.yaml", ["MODEL.DEVICE", "cpu"])
        model = InstanceFCN(**InstanceFCN.from_config(cfg))
    sizes = {name: tuple(p.shape) for name, p in model.named_parameters() if "branch" in name}
    assert sizes == {
        "mask_branch.0.weight": (512, 512, 1, 1),
        "mask_branch.0.bias": (512,),
        "mask_branch.2.weight": (25, 512, 3, 3),
        "mask_branch.2.bias": (25,),
        "score_branch.0.weight": (512, 512, 3, 3),
        "score_branch.0.bias": (512,),
        "score_branch.2.weight": (1, 512, 1, 1),
        "score_branch.2.bias": (1,),
    }
    assert model.mask_branch[2].weight.numel() == 115_200
    assert model.rule == window_rule()


def test_new_convolutions_start_from_a_narrow_gaussian() -> None:
    layer = network(conv_dim=512).score_branch[0]
    assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not layer.bias.any()


def test_the_dilated_resnet_has_8_pixels_per_cell_and_the_parameters_of_detectron2() -> None:
    cfg = instseg.load_cfg("instance_fcn/instance_fcn_R_50_coco.yaml")
    ours = build_backbone(cfg, ShapeSpec(channels=3))
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    plain = build_backbone(cfg, ShapeSpec(channels=3))
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in plain.state_dict().items()
    }
    assert ours.output_shape()["res5"].stride == 8
    assert ours(torch.zeros(1, 3, 64, 96))["res5"].shape == (1, 2048, 8, 12)


def test_the_finest_level_merges_all_stages_at_stride_4() -> None:
    cfg = instseg.load_cfg(SHAPES, SMALL)
    backbone = build_backbone(cfg, ShapeSpec(channels=3)).eval()
    assert isinstance(backbone, FinestLevel)
    shape = backbone.output_shape()["p2"]
    assert (shape.stride, shape.channels, backbone.size_divisibility) == (4, 16, 32)
    image = torch.rand(1, 3, 64, 96)
    stages = backbone.bottom_up(image)
    total = torch.zeros(1, 16, 16, 24)
    for name, projection in backbone.lateral.items():
        projected = projection(stages[name])
        factor = 16 // projected.shape[-2]
        total += projected.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    torch.testing.assert_close(backbone(image)["p2"], backbone.output(total))


def test_the_finest_level_of_a_unet_has_a_cell_for_every_pixel() -> None:
    cfg = instseg.load_cfg("instance_fcn/instance_fcn_nuclei.yaml", ["MODEL.WEIGHTS", ""])
    backbone = build_backbone(cfg, ShapeSpec(channels=3)).eval()
    assert isinstance(backbone, FinestLevel)
    shape = backbone.output_shape()["p0"]
    assert (shape.stride, shape.channels, backbone.size_divisibility) == (1, 32, 16)
    image = torch.rand(1, 3, 64, 96)
    cells = backbone(image)["p0"]
    assert cells.shape == (1, 32, 64, 96)
    # The coarsest level, whose cells have 16 pixels, is part of every cell.
    image[..., 40:, 60:] += 1.0
    assert not torch.equal(backbone(image)["p0"][..., :20, :20], cells[..., :20, :20])


def test_a_resnet_without_bottlenecks_cannot_be_dilated() -> None:
    with pytest.raises(ConfigError, match="DEPTH is 18; expected 50, 101 or 152, as dilated"):
        instseg.load_cfg("instance_fcn/instance_fcn_R_50_coco.yaml", ["MODEL.RESNETS.DEPTH", 18])


@pytest.mark.parametrize("parts", [1, 5])
@pytest.mark.parametrize("boxes", [[], [centred(64, 64, 48)]], ids=["empty", "one instance"])
def test_every_parameter_gets_a_gradient(parts: int, boxes: list[list[float]]) -> None:
    model = small("MODEL.INSTANCE_FCN.PARTS", parts).train()
    losses = model([sample((128, 128), boxes)])
    assert set(losses) == {"loss_mask", "loss_score"}
    assert (losses["loss_mask"] > 0) == bool(boxes)
    sum(losses.values()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_images_of_several_sizes_train_together() -> None:
    model = small().train()
    group = [
        sample((128, 128), [centred(64, 64, 48)]),
        sample((96, 160), []),
        sample((128, 128), []),
    ]
    assert all(loss.isfinite() for loss in model(group).values())


def test_a_batch_gives_what_single_images_give() -> None:
    model = small().eval()
    images = [{"image": torch.rand(3, *size) * 255} for size in ((96, 128), (128, 100))]
    with torch.no_grad():
        together = model(images)
        alone = [model([image])[0] for image in images]
    for a, b in zip(together, alone, strict=True):
        assert len(a["instances"]) > 0
        assert torch.equal(a["instances"].scores, b["instances"].scores)
        assert torch.equal(a["instances"].pred_masks, b["instances"].pred_masks)


def test_the_network_learns_one_image() -> None:
    model = small("MODEL.INSTANCE_FCN.SCALES_TEST", "(96,)").train()
    image = sample((96, 128), [centred(48, 36, 48), centred(48, 84, 48)])
    for number, mask in enumerate(image["instances"].gt_masks.tensor):
        image["image"][:, mask] = 40.0 + 150 * number
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(45):
        loss = sum(model([image]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        instances = model.eval()([{"image": image["image"]}])[0]["instances"]
    for mask in image["instances"].gt_masks.tensor:
        common = (instances.pred_masks & mask).flatten(1).sum(dim=1)
        union = (instances.pred_masks | mask).flatten(1).sum(dim=1)
        assert (common / union).max() > 0.8


def test_every_shape_has_a_scale() -> None:
    """All but the few that a border or another shape has cut down to a sliver."""
    cfg = instseg.load_cfg(SHAPES)
    records = shapes.load("shapes_val", 128)
    sides = torch.tensor([max(a["bbox"][2:]) for r in records for a in r["annotations"]])
    factors = torch.tensor(cfg.MODEL.INSTANCE_FCN.SCALES_TEST) / 128
    octaves = (sides[:, None] * factors / cfg.MODEL.INSTANCE_FCN.CANONICAL_SIZE).log2().abs()
    matched = octaves.amin(dim=1) <= cfg.MODEL.INSTANCE_FCN.POSITIVE_OCTAVES
    assert matched.float().mean() > 0.98


def test_the_model_is_class_agnostic() -> None:
    cfg = instseg.load_cfg(SHAPES)
    assert num_classes_key(cfg) is None
    check_classes(cfg, load_all(("shapes_val",)))


def test_both_predictors_agree(tmp_path: Path) -> None:
    model = small()
    Checkpointer(model, str(tmp_path)).save("weights")
    cfg = instseg.load_cfg(SHAPES, [*SMALL, "MODEL.WEIGHTS", str(tmp_path / "weights.pth")])
    image = np.ascontiguousarray(shapes.image("shapes_val", 0, 128)[:, :100, ::-1])
    theirs = DefaultPredictor(cfg)(image)["instances"]
    ours = Predictor(cfg)(image)["instances"]
    assert len(ours) > 0
    assert ours.pred_masks.shape[1:] == (128, 100)
    assert torch.equal(ours.pred_masks, theirs.pred_masks)
    assert torch.equal(ours.scores, theirs.scores)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("MODEL.INSTANCE_FCN.IN_FEATURE", "p7"), "IN_FEATURE is 'p7'; expected one of p2"),
        (("MODEL.INSTANCE_FCN.PARTS", 0), "PARTS is 0; expected a whole number of at least 1"),
        (("MODEL.INSTANCE_FCN.WINDOW_SIZE", 3), "WINDOW_SIZE is 3; .* at least PARTS, which is 5"),
        (
            ("MODEL.INSTANCE_FCN.CANONICAL_SIZE", 0.0),
            "CANONICAL_SIZE is 0.0; .* a length in pixels",
        ),
        (("MODEL.INSTANCE_FCN.POSITIVE_FRACTION_TRAIN", 2.0), "FRACTION_TRAIN is 2.0; .* 0 to 1"),
        (("MODEL.INSTANCE_FCN.SCALES_TEST", ()), "expected one or more lengths"),
        (("MODEL.INSTANCE_FCN.MASK_THRESH_TEST", 0.0), "MASK_THRESH_TEST is 0.0; .* a probability"),
        (("INPUT.MASK_FORMAT", "polygon"), "expected bitmask, as InstanceFCN trains on bit masks"),
    ],
)
def test_an_impossible_configuration_says_what_to_change(
    overrides: tuple[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        small(*overrides)
