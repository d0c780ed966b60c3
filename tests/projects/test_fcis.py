"""The FCIS network: trunk, head, training, inference and what its configuration refuses."""

from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import nn

import instseg
from instseg.config.classes import num_classes_key
from instseg.errors import ConfigError
from instseg.projects.fcis import CeilPoolStem, Detections, Detector, FCISROIHeads, paste_masks
from instseg.training.trainer import Trainer

CONFIG = "fcis/fcis_shapes.yaml"
SETTINGS = ["MODEL.DEVICE", "cpu"]


def build(*overrides: Any) -> nn.Module:
    return Trainer.build_model(instseg.load_cfg(CONFIG, [*SETTINGS, *overrides]))


def image(height: int, width: int) -> dict[str, Any]:
    return {"image": torch.rand(3, height, width) * 255}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


def test_the_stem_pools_without_padding_and_rounds_up() -> None:
    """7 → 4 cells of conv1 → the maxima of the cells 0..2 and 2..3."""
    stem = CeilPoolStem(1, 1, "")
    nn.init.zeros_(stem.conv1.weight)
    stem.conv1.weight.data[0, 0, 3, 3] = 1
    row = torch.tensor([5.0, 0, 1, 0, 2, 0, 3])
    assert stem(row.expand(7, 7)[None, None])[0, 0].tolist() == [[5, 3], [5, 3]]


def test_the_trunk_has_the_sizes_and_dilations_of_the_paper() -> None:
    cfg = instseg.load_cfg("fcis/fcis_R_50_coco.yaml", SETTINGS)
    backbone = build_backbone(cfg).eval()
    with torch.no_grad():
        features = backbone(torch.zeros(1, 3, 152, 200))
    # 152 → 76 → 38 → 19 → 10 and 200 → 100 → 50 → 25 → 13.
    assert features["res4"].shape == (1, 1024, 10, 13)
    assert features["res5"].shape == (1, 2048, 10, 13)
    assert [block.conv2.dilation for block in backbone.res5] == [(2, 2)] * 3
    assert backbone.res3[0].conv1.stride == (2, 2)
    frozen = {n.split(".")[0] for n, p in backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"stem", "res2"}


def heads(**changes: Any) -> FCISROIHeads:
    """One part and one bin, on maps that are the features themselves, of one foreground class."""
    settings: dict[str, Any] = dict(
        in_feature="res5",
        in_channels=12,
        stride=16,
        num_classes=1,
        box_transform=Box2BoxTransform(weights=(5.0, 5.0, 2.0, 2.0)),
        matcher=Matcher([0.5], [0, 1]),
        conv_dim=12,
        conv_lr_factor=3.0,
        group_size=1,
        pooled_size=1,
        sampling="ohem",
        regions_per_image=2,
        positive_fraction=0.25,
        mask_weight=10.0,
        mask_threshold=0.4,
    )
    module = FCISROIHeads(**{**settings, **changes})
    for layer, first in ((module.conv_new_1, 0), (module.cls_seg, 0), (module.bbox, 4)):
        nn.init.zeros_(layer.weight)
        for row in range(layer.out_channels):
            layer.weight.data[row, first + row] = 1
    return module


def test_scores_masks_and_deltas_of_a_region_by_hand() -> None:
    """Outside and inside are 1 and 3 for the background, 2 and 5 for the class."""
    cells = torch.tensor([1.0, 2, 3, 5, 0, 0, 0, 0, 6, 7, 8, 9])
    module = heads()
    maps = module.maps(cells.view(1, 12, 1, 1).expand(1, 12, 2, 2))
    regions = module.regions(maps, torch.tensor([[0.0, 0, 0, 31, 31]]))
    assert regions.scores.tolist() == [[3, 5]]
    assert regions.mask_logits.flatten().tolist() == [2, 5]
    assert regions.classes.tolist() == [1]
    assert regions.deltas.tolist() == [[0, 0, 0, 0, 6, 7, 8, 9]]


def test_score_maps_leave_the_head_in_the_memory_layout_of_the_operator() -> None:
    maps = heads().maps(torch.rand(2, 12, 3, 4))
    assert maps.scores.is_contiguous(memory_format=torch.channels_last)


def sample(size: tuple[int, int], box: list[float] | None) -> tuple[Instances, Instances]:
    """Two proposals, the first of which is the instance if there is one, and the instances."""
    proposals = Instances(size)
    first = box or [0.0, 0, 16, 16]
    proposals.proposal_boxes = Boxes(torch.tensor([first, [16.0, 16, 32, 32]]))
    objects = Instances(size)
    objects.gt_boxes = Boxes(torch.tensor([box] if box else []).view(-1, 4))
    objects.gt_classes = torch.zeros(len(objects.gt_boxes), dtype=torch.int64)
    if box:
        objects.gt_masks = BitMasks(torch.ones(1, *size, dtype=torch.bool))
    return proposals, objects


def head_losses(module: FCISROIHeads, boxes: list[list[float] | None]) -> dict[str, float]:
    """Losses on maps that are zero everywhere: probability one half for everything."""
    samples = [sample((32, 32), box) for box in boxes]
    images = ImageList(torch.zeros(len(boxes), 3, 32, 32), [(32, 32)] * len(boxes))
    features = {"res5": torch.zeros(len(boxes), 12, 2, 2)}
    proposals, objects = ([pair[i] for pair in samples] for i in (0, 1))
    with EventStorage():
        _, losses = module(images, features, proposals, objects)
    return {name: loss.item() for name, loss in losses.items()}


def test_hard_examples_of_an_image_are_its_two_instances() -> None:
    """The proposal and the instance's own box have mask losses, the background has none.

    Of zero maps: ln 2 per class loss, 10 ln 2 / 2 per mask of one bin, both boxes exact.
    """
    losses = head_losses(heads(), [[0.0, 0, 16, 16]])
    ln2 = float(np.log(2))
    expected = {"loss_cls": ln2, "loss_mask": 10 / 2 * 2 * ln2, "loss_box": 0.0}
    assert losses == pytest.approx(expected)


def test_losses_of_a_batch_are_the_means_of_those_of_its_images() -> None:
    boxes = [[0.0, 0, 16, 16], None]
    together = head_losses(heads(), boxes)
    alone = [head_losses(heads(), [box]) for box in boxes]
    assert alone[1]["loss_mask"] == 0
    expected = {name: (alone[0][name] + alone[1][name]) / 2 for name in together}
    assert together == pytest.approx(expected)


def test_random_sampling_trains_on_the_background_as_well() -> None:
    """One region of two is the instance (twice there), the other one background."""
    module = heads(sampling="random", positive_fraction=0.5)
    losses = head_losses(module, [[0.0, 0, 16, 16]])
    assert losses["loss_mask"] == pytest.approx(10 / 2 * np.log(2))


def test_training_without_instances_given_is_refused() -> None:
    proposals, _ = sample((32, 32), None)
    images = ImageList(torch.zeros(1, 3, 32, 32), [(32, 32)])
    with pytest.raises(ValueError, match="needs gt_boxes"):
        heads()(images, {"res5": torch.zeros(1, 12, 2, 2)}, [proposals])


def test_every_proposal_is_scored_as_it_is_and_refined_once() -> None:
    """A delta dx of 2.5 over the weight 5 moves a box by half of its width."""
    module = heads().eval()
    features = torch.zeros(1, 12, 4, 4)
    features[:, 8] = 2.5
    proposals = Instances((64, 64))
    proposals.proposal_boxes = Boxes(torch.tensor([[16.0, 16, 32, 32], [0, 0, 64, 64]]))
    images = ImageList(torch.zeros(1, 3, 64, 64), [(64, 64)])
    with torch.no_grad():
        (regions,), losses = module(images, {"res5": features}, [proposals])
    assert losses == {}
    assert regions.boxes.tolist() == [
        [16, 16, 32, 32],
        [0, 0, 64, 64],
        [24, 16, 40, 32],
        [32, 0, 64, 64],
    ]
    assert regions.probabilities.tolist() == [[0.5, 0.5]] * 4
    assert regions.masks.flatten().tolist() == [0.5] * 4


def found(boxes: list[list[float]], scores: list[list[float]], inside: float = 1) -> Detections:
    return Detections(
        torch.tensor(boxes), torch.tensor(scores), torch.full((len(boxes), 3, 3), inside)
    )


def detector(**changes: Any) -> Detector:
    settings: dict[str, Any] = dict(
        voting="image",
        min_size=2,
        nms_threshold=0.3,
        merge_threshold=0.5,
        mask_threshold=0.4,
        max_detections=100,
        score_threshold=0.001,
    )
    return Detector(**{**settings, **changes})


@pytest.mark.parametrize("voting", ["image", "box", "none"])
def test_a_region_becomes_a_detection_at_the_size_of_the_image(voting: str) -> None:
    """Network pixels 20..59 are inclusive 10..29.5 of the image, rounded to 30 (half to even)."""
    regions = found([[20.0, 20, 60, 60]], [[0.1, 0.2, 0.7]])
    result = detector(voting=voting, score_threshold=0.3)(regions, (100, 100), (50, 50))
    assert result.pred_classes.tolist() == [1]
    assert result.scores.tolist() == pytest.approx([0.7])
    mask = torch.zeros(50, 50, dtype=torch.bool)
    mask[10:31, 10:31] = True
    assert torch.equal(result.pred_masks[0], mask)


@pytest.mark.parametrize("voting", ["image", "box", "none"])
def test_no_region_is_no_detection(voting: str) -> None:
    result = detector(voting=voting)(
        Detections(torch.zeros(0, 4), torch.zeros(0, 3), torch.zeros(0, 21, 21)), (64, 64), (32, 40)
    )
    assert len(result) == 0 and result.pred_masks.shape == (0, 32, 40)


def test_regions_below_the_least_side_are_dropped() -> None:
    regions = found([[10.0, 10, 11.5, 40], [10, 10, 12, 40]], [[0.1, 0.9], [0.2, 0.8]])
    result = detector(voting="none", min_size=2)(regions, (64, 64), (64, 64))
    assert result.scores.tolist() == pytest.approx([0.8])


def test_without_voting_classes_are_suppressed_apart() -> None:
    """Two equal regions, both of both classes: one detection in each class."""
    regions = found([[0.0, 0, 20, 20]] * 2, [[0.1, 0.5, 0.4], [0.1, 0.3, 0.6]])
    result = detector(voting="none")(regions, (64, 64), (64, 64))
    assert list(zip(result.pred_classes.tolist(), result.scores.tolist(), strict=True)) == [
        (1, pytest.approx(0.6)),
        (0, pytest.approx(0.5)),
    ]


def test_without_voting_at_most_the_asked_number_is_kept() -> None:
    regions = found([[0.0, 0, 9, 9], [20, 20, 29, 29], [40, 40, 49, 49]], [[0.5, 0.5]] * 3)
    assert len(detector(voting="none", max_detections=2)(regions, (64, 64), (64, 64))) == 2


def test_a_pasted_mask_is_resized_linearly_and_cut_at_the_threshold() -> None:
    """Values 0 and 1 on six columns: 0, 0, 1/3, 2/3, 1, 1."""
    mask = torch.tensor([[[0.0, 1], [0, 1]]])
    (part,) = paste_masks(mask, torch.tensor([[1.0, 0, 6, 1]]), (2, 8), 0.4)
    assert part[:3] == (0, 1, 0)
    # Position (i + 0.5) / 3 - 0.5 of column i is -1/3, 0, 1/3, 2/3, 1, 4/3.
    assert part.pixels.int().tolist() == [[0, 0, 0, 1, 1, 1]] * 2


def test_detections_in_a_batch_are_exactly_those_of_single_images(model: nn.Module) -> None:
    images = [image(128, 96), image(64, 160)]
    with torch.no_grad():
        together = model(images)
        alone = [model([one])[0] for one in images]
    for a, b in zip(together, alone, strict=True):
        assert len(a["instances"])
        assert torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)
        assert torch.equal(a["instances"].pred_masks, b["instances"].pred_masks)


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (15, 64)])
def test_an_image_without_a_whole_cell_has_no_instances(
    model: nn.Module, size: tuple[int, int]
) -> None:
    with torch.no_grad():
        instances = model([image(*size)])[0]["instances"]
    assert len(instances) == 0 and instances.pred_masks.shape == (0, *size)


@pytest.fixture(scope="module")
def batch() -> list[dict[str, Any]]:
    cfg = instseg.load_cfg(CONFIG, [*SETTINGS, "INPUT.MIN_SIZE_TRAIN", "(128,)"])
    return [DatasetMapper(cfg, True)(DatasetCatalog.get("shapes_val")[i]) for i in (0, 1)]


@pytest.mark.parametrize(
    ("overrides", "channels"),
    [
        (("MODEL.FCIS.GROUP_SIZE", 1), 8),
        (("MODEL.FCIS.GROUP_SIZE", 5, "MODEL.FCIS.POOLED_SIZE", 14), 200),
        (("MODEL.FCIS.SAMPLING", "random"), 392),
    ],
)
def test_sizes_and_sampling_are_real_options(
    batch: list[dict[str, Any]], overrides: tuple[Any, ...], channels: int
) -> None:
    model = build(*overrides)
    assert model.roi_heads.cls_seg.out_channels == channels
    with EventStorage():
        losses = model.train()(batch)
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        (result,) = model.eval()([{"image": batch[0]["image"], "height": 70, "width": 60}])
    assert result["instances"].pred_masks.shape[1:] == (70, 60)


def test_accuracy_on_instances_is_logged(batch: list[dict[str, Any]]) -> None:
    with EventStorage() as storage:
        build().train()(batch)
    assert {"fcis/fg_accuracy", "fcis/accuracy", "fcis/num_fg"} <= storage.latest().keys()


def test_conv_new_1_trains_at_three_times_the_rate_and_biases_do_not_decay() -> None:
    cfg = instseg.load_cfg(
        CONFIG,
        [*SETTINGS, "SOLVER.OPTIMIZER", "SGD", "MODEL.FCIS.CONV_LR_FACTOR", 3.0],
    )
    model = build_model(cfg)
    groups = Trainer.build_optimizer(cfg, model).param_groups
    rates = {
        id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]
    }
    rate, decay = cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY
    heads = model.roi_heads
    assert rates[id(heads.conv_new_1.weight)] == pytest.approx((3 * rate, decay))
    assert rates[id(heads.conv_new_1.bias)] == pytest.approx((3 * rate, 0))
    assert rates[id(heads.bbox.weight)] == pytest.approx((rate, decay))
    assert rates[id(heads.bbox.bias)] == pytest.approx((rate, 0))


def test_the_classes_are_counted_in_the_roi_heads() -> None:
    assert num_classes_key(instseg.load_cfg(CONFIG)) == "MODEL.ROI_HEADS.NUM_CLASSES"


def test_the_predictor_of_detectron2_runs_the_model() -> None:
    cfg = instseg.load_cfg(CONFIG, SETTINGS)
    instances = DefaultPredictor(cfg)(np.full((90, 120, 3), 99, dtype=np.uint8))["instances"]
    assert instances.pred_masks.shape == (len(instances), 90, 120)
    assert instances.pred_masks.dtype == torch.bool


def test_the_model_learns_one_image() -> None:
    cfg = instseg.load_cfg(CONFIG, [*SETTINGS, "INPUT.MIN_SIZE_TRAIN", "(192,)"])
    record = DatasetCatalog.get("shapes_val")[1]
    sample = DatasetMapper(cfg, True, augmentations=[])(record)
    image = nn.functional.interpolate(sample["image"][None].float(), scale_factor=1.5)[0]
    assert len(sample["instances"]) and image.shape[-1] == 192
    model = build().train()
    objects = sample["instances"]
    large = Instances((192, 192))
    large.gt_boxes = Boxes(objects.gt_boxes.tensor * 1.5)
    large.gt_classes = objects.gt_classes
    masks = nn.functional.interpolate(objects.gt_masks.tensor[None].float(), scale_factor=1.5)[0]
    large.gt_masks = BitMasks(masks > 0.5)
    optimizer = torch.optim.AdamW(model.parameters(), 0.002)
    history = []
    with EventStorage():
        for _ in range(60):
            losses = model([{"image": image, "instances": large}])
            total = torch.stack(list(losses.values())).sum()
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            history.append(total.item())
            # The sampled regions differ from step to step.
            if len(history) >= 10 and sum(history[-5:]) / 5 < 0.5 * history[0]:
                return
    pytest.fail(f"not learnt in {len(history)} steps: {history}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("MODEL.FCIS.SAMPLING", "hard"), "SAMPLING is 'hard'; expected ohem or random"),
        (("MODEL.FCIS.VOTING_TEST", "off"), "'off'; expected image, box or none"),
        (("MODEL.FCIS.GROUP_SIZE", 22), "GROUP_SIZE is 22; expected 1 to POOLED_SIZE, which is 21"),
        (("MODEL.FCIS.GROUP_SIZE", 0), "GROUP_SIZE is 0; expected 1 to"),
        (("MODEL.ROI_HEADS.IN_FEATURES", "('res4', 'res5')"), "works on one feature map"),
        (("MODEL.ROI_HEADS.IN_FEATURES", "('res9',)"), "'res9'.*; the backbone gives res4"),
    ],
)
def test_a_configuration_that_cannot_work_says_what_to_change(
    overrides: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(*overrides)
