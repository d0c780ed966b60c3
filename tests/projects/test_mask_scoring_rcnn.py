"""Mask Scoring R-CNN against numbers of its authors' code and against sums done by hand.

``golden/mask_scoring_rcnn`` was computed by the authors' code; see the README there. It counts
classes from 1, with column 0 for the background. The stages of the whole detector are compared in
``tests/convert/test_convert_maskscoring_rcnn.py``.
"""

import json
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.structures.masks import polygons_to_bitmask
from detectron2.utils.events import EventStorage
from torch import nn

import instseg
from instseg.errors import ConfigError
from instseg.projects.mask_scoring_rcnn import (
    MaskIoUHead,
    MaskScoringROIHeads,
    maskiou_loss,
    maskiou_targets,
    select_masks,
    visible_ratios,
)
from instseg.training.trainer import Trainer
from tests.conftest import GOLDEN, load_module

FOLDER = GOLDEN / "mask_scoring_rcnn"
PREFIXES = ("roi_heads.maskiou.feature_extractor.", "roi_heads.maskiou.predictor.")
SIZES = [(240, 320), (280, 200)]  # height, width
SQUARE = [np.array([10.0, 10, 30, 10, 30, 30, 10, 30])]


@pytest.fixture(scope="module")
def golden() -> Any:
    return np.load(FOLDER / "golden.npz")


@pytest.fixture(scope="module")
def inputs() -> ModuleType:
    return load_module(FOLDER / "inputs.py")


def of_the_paper(channels: int) -> MaskIoUHead:
    shape = ShapeSpec(channels=channels, height=14, width=14)
    return MaskIoUHead(shape, num_classes=80, num_conv=4, conv_dim=256, fc_dim=1024)


@pytest.fixture(scope="module")
def head(golden_weights: ModuleType) -> MaskIoUHead:
    """The head filled as the golden one, without the background's output."""
    head = of_the_paper(256)
    state = {}
    for name, entry in json.loads((FOLDER / "keys.json").read_text()).items():
        ours = name.removeprefix(PREFIXES[0]).removeprefix(PREFIXES[1])
        value = torch.from_numpy(golden_weights.fill(name, entry["shape"]))
        state[ours] = value[1:] if ours.startswith("maskiou.") else value
    head.load_state_dict(state)
    return head


class Pooler(nn.Module):
    """Gives the features it was made with, whatever the boxes."""

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__()
        self.features = features

    def forward(self, maps: Any, boxes: Any) -> torch.Tensor:
        return self.features


class MaskHead(BaseMaskRCNNHead):
    """Gives the logits it was made with, whatever the features."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def layers(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits


def roi_heads(head: nn.Module, features: torch.Tensor, logits: torch.Tensor) -> MaskScoringROIHeads:
    return MaskScoringROIHeads(
        num_classes=80,
        batch_size_per_image=512,
        positive_fraction=0.25,
        proposal_matcher=None,
        box_in_features=["p2"],
        box_pooler=nn.Identity(),
        box_head=nn.Identity(),
        box_predictor=nn.Identity(),
        mask_in_features=["p2"],
        mask_pooler=Pooler(features),
        mask_head=MaskHead(logits),
        maskiou_head=head,
        maskiou_loss_weight=1.0,
        stop_gradient=False,
    )


def scene(golden: Any, inputs: ModuleType, raster: bool = False) -> list[Instances]:
    """The 15 positive regions of each image, as the sampler of Detectron2 gives them."""
    images = []
    for i, (height, width) in enumerate(SIZES):
        count = len(golden[f"proposals_{i}"])
        rows = slice(count * i, count * i + count)
        objects = inputs.polygons(golden, i)
        polygons = PolygonMasks([objects[j] for j in golden["matched_gt"][rows]])
        image = Instances((height, width))
        image.proposal_boxes = Boxes(torch.from_numpy(golden[f"proposals_{i}"]))
        image.gt_classes = torch.from_numpy(golden["labels"][rows]) - 1
        image.gt_masks = polygons
        if raster:
            masks = [polygons_to_bitmask(parts, height, width) for parts in polygons.polygons]
            image.gt_masks = BitMasks(np.stack(masks))
        images.append(image)
    return images


def ratios_of(images: list[Instances]) -> torch.Tensor:
    return torch.cat(
        [visible_ratios(x.gt_masks, x.proposal_boxes.tensor, x.image_size) for x in images]
    )


def close(actual: torch.Tensor, expected: Any, tolerance: float) -> None:
    torch.testing.assert_close(
        actual.detach().float(), torch.as_tensor(np.asarray(expected)), rtol=0, atol=tolerance
    )


def test_visible_ratios_of_polygons_equal_the_authors(golden: Any, inputs: ModuleType) -> None:
    assert ratios_of(scene(golden, inputs)).numpy().tolist() == golden["mask_ratios"].tolist()


def test_visible_ratios_of_bit_masks_are_near_the_authors(golden: Any, inputs: ModuleType) -> None:
    """0.017 is the largest difference that the README of the numbers gives."""
    close(ratios_of(scene(golden, inputs, raster=True)), golden["mask_ratios"], 0.017)


def test_targets_equal_the_authors(golden: Any, inputs: ModuleType) -> None:
    images = scene(golden, inputs)
    true = torch.cat([x.gt_masks.crop_and_resize(x.proposal_boxes.tensor, 28) for x in images])
    assert (true.numpy() == golden["mask_targets"]).all()
    logits = torch.from_numpy(inputs.mask_logits())[:, 1:]
    class_masks = select_masks(logits, torch.cat([x.gt_classes for x in images]))[:, 0]
    close(maskiou_targets(class_masks, true, ratios_of(images)), golden["maskiou_targets"], 1e-6)


def test_the_head_equals_the_authors(head: MaskIoUHead, golden: Any, inputs: ModuleType) -> None:
    hidden = []
    hook = head.maskiou.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    labels = torch.from_numpy(golden["labels"])
    masks = select_masks(torch.from_numpy(inputs.mask_logits()), labels).sigmoid()
    with torch.no_grad():
        predicted = head(torch.from_numpy(inputs.roi_features()), masks)
    hook.remove()
    close(nn.functional.max_pool2d(masks, 2)[:, 0], golden["selected_mask_pooled"], 1e-6)
    close(hidden[0][:, ::4], golden["maskiou_hidden"], 1e-5)
    close(predicted, golden["pred_maskiou"][:, 1:], 1e-5)


def test_losses_and_gradients_equal_the_authors(
    head: MaskIoUHead, golden: Any, inputs: ModuleType
) -> None:
    features = torch.from_numpy(inputs.roi_features()).requires_grad_()
    logits = torch.from_numpy(inputs.mask_logits())[:, 1:].clone().requires_grad_()
    heads = roi_heads(head, features, logits).train()
    with EventStorage():
        losses = heads._forward_mask({"p2": features}, scene(golden, inputs))
    close(losses["loss_mask"], golden["loss_mask"], 1e-6)
    close(losses["loss_maskiou"], golden["loss_maskiou"], 1e-6)
    by_mask, by_features = torch.autograd.grad(losses["loss_maskiou"], [logits, features])
    class_masks = select_masks(by_mask, torch.from_numpy(golden["labels"]) - 1)[::4, 0]
    close(class_masks, golden["grad_maskiou_wrt_mask_logits_gt"], 1e-7)
    sums = torch.stack([by_mask.abs().sum(), by_features.abs().sum()])
    expected = [
        golden["grad_maskiou_wrt_mask_logits_abs_sum"],
        golden["grad_maskiou_wrt_roi_features_abs_sum"],
    ]
    close(sums, np.array(expected), 1e-5)


def test_a_stopped_gradient_trains_the_head_alone(
    head: MaskIoUHead, golden: Any, inputs: ModuleType
) -> None:
    features = torch.from_numpy(inputs.roi_features()).requires_grad_()
    logits = torch.from_numpy(inputs.mask_logits())[:, 1:].clone().requires_grad_()
    heads = roi_heads(head, features, logits).train()
    heads.stop_gradient = True
    with EventStorage():
        loss = heads._forward_mask({"p2": features}, scene(golden, inputs))["loss_maskiou"]
    close(loss, golden["loss_maskiou"], 1e-6)
    others = torch.autograd.grad(loss, [features, logits], allow_unused=True, retain_graph=True)
    assert others == (None, None)
    (gradient,) = torch.autograd.grad(loss, [head.maskiou_fcn1.weight])
    assert gradient.abs().sum() > 0


def test_a_network_with_the_head_starts_as_mask_rcnn_does_and_leaves_its_random_numbers() -> None:
    states, drawn = [], []
    for name in ("mask_rcnn", "mask_scoring_rcnn"):
        cfg = instseg.load_cfg(f"{name}/{name}_shapes.yaml", ["MODEL.DEVICE", "cpu"])
        torch.manual_seed(3)
        states.append(build_model(cfg).state_dict())
        drawn.append(torch.rand(()))
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert drawn[0] == drawn[1]


def detections(golden: Any, rows: slice) -> Instances:
    image = Instances((240, 320))
    image.pred_boxes = Boxes(
        torch.from_numpy(golden["proposals_0"][: len(golden["det_scores"])][rows])
    )
    image.scores = torch.from_numpy(golden["det_scores"][rows])
    image.pred_classes = torch.from_numpy(golden["det_labels"][rows]) - 1
    return image


def test_rescoring_equals_the_authors_and_leaves_box_scores_alone(
    head: MaskIoUHead, golden: Any, inputs: ModuleType
) -> None:
    count = len(golden["det_scores"])
    features = torch.from_numpy(inputs.roi_features())[:count]
    logits = torch.from_numpy(inputs.mask_logits())[:count, 1:]
    heads = roi_heads(head, features, logits).eval()
    with torch.no_grad():
        (image,) = heads._forward_mask({"p2": features}, [detections(golden, slice(count))])
    close(image.mask_scores, golden["det_mask_scores"], 1e-5)
    assert image.scores.tolist() == golden["det_scores_after"].tolist()
    assert (image.mask_scores < 0).any(), "negative scores are kept"


def test_every_image_of_a_batch_gets_its_own_mask_scores(
    head: MaskIoUHead, golden: Any, inputs: ModuleType
) -> None:
    count = len(golden["det_scores"])
    features = torch.from_numpy(inputs.roi_features())[:count]
    logits = torch.from_numpy(inputs.mask_logits())[:count, 1:]
    heads = roi_heads(head, features, logits).eval()
    batch = [detections(golden, rows) for rows in (slice(5), slice(0), slice(5, count))]
    with torch.no_grad():
        results = heads._forward_mask({"p2": features}, batch)
    assert [len(x.mask_scores) for x in results] == [5, 0, count - 5]
    close(torch.cat([x.mask_scores for x in results]), golden["det_mask_scores"], 1e-5)


def test_boxes_without_scores_get_masks_alone(
    head: MaskIoUHead, golden: Any, inputs: ModuleType
) -> None:
    features = torch.from_numpy(inputs.roi_features())[:2]
    given = detections(golden, slice(2))
    given.remove("scores")
    heads = roi_heads(head, features, torch.from_numpy(inputs.mask_logits())[:2, 1:]).eval()
    with torch.no_grad():
        (image,) = heads.forward_with_given_boxes({"p2": features}, [given])
    assert set(image.get_fields()) == {"pred_boxes", "pred_classes", "pred_masks"}


@pytest.mark.parametrize(
    "masks",
    [PolygonMasks([SQUARE]), BitMasks(polygons_to_bitmask(SQUARE, 40, 40)[None])],
    ids=["polygons", "bit masks"],
)
def test_a_region_that_cuts_an_instance_in_half_shows_half_of_it(masks: Any) -> None:
    """The square has 20 x 20 pixels, of which the region has 10 x 20."""
    assert visible_ratios(masks, torch.tensor([[10.0, 5, 20, 35]]), (40, 40)).tolist() == [0.5]


def test_overlapping_parts_of_an_instance_count_twice_as_with_the_authors() -> None:
    """Two parts, the second being the left half: 200 + 200 of 400 + 200 pixels are inside."""
    half = np.array([10.0, 10, 20, 10, 20, 30, 10, 30])
    ratios = visible_ratios(
        PolygonMasks([[*SQUARE, half]]), torch.tensor([[10.0, 5, 20, 35]]), (40, 40)
    )
    assert ratios.tolist() == pytest.approx([400 / 600])


def test_the_target_extrapolates_the_hidden_part_of_the_instance() -> None:
    """16 cells predicted and visible are half of 32: 16 / (16 + 32 - 16)."""
    every = torch.ones(1, 4, 4)
    assert maskiou_targets(every, every > 0, torch.tensor([0.5])).tolist() == [0.5]


def test_a_cell_counts_as_predicted_from_probability_one_half() -> None:
    """Logit 0.3 is probability 0.57; comparing the logit with 0.5 would predict nothing."""
    every = torch.ones(1, 4, 4)
    assert maskiou_targets(every * 0.3, every > 0, torch.ones(1)).tolist() == [1]
    assert maskiou_targets(every * -0.3, every > 0, torch.ones(1)).tolist() == [0]


@pytest.mark.parametrize("polygons", [[np.array([10.0, 10, 10, 30, 10, 20])], []])
def test_an_instance_without_area_has_target_zero_although_its_ratio_is_not_a_number(
    polygons: list[Any],
) -> None:
    ratios = visible_ratios(PolygonMasks([polygons]), torch.tensor([[5.0, 5, 35, 35]]), (40, 40))
    assert ratios.isnan().all()
    # Drawn at 28 x 28 even a line may fill cells, so that the sums alone would give a target > 0.
    every = torch.ones(1, 4, 4)
    assert maskiou_targets(every, every > 0, ratios).tolist() == [0]


def test_a_region_of_less_than_a_pixel_shows_nothing_of_its_instance() -> None:
    square = [np.array([10.0, 10, 30, 10, 30, 30, 10, 30])]
    region = torch.tensor([[12.0, 5, 12.5, 35]])
    assert visible_ratios(PolygonMasks([square]), region, (40, 40)).tolist() == [0]


def test_the_loss_is_half_the_mean_square_over_regions_with_a_target() -> None:
    """((0.5 - 0.7)² + (0.2 - 0.4)²) / 2 / 2 = 0.02; the region with target 0 does not count."""
    predicted = torch.tensor([[0.5, 9], [9, 0.9], [0.2, 9]])
    loss = maskiou_loss(predicted, torch.tensor([0, 1, 0]), torch.tensor([0.7, 0, 0.4]))
    assert loss.item() == pytest.approx(0.02)


@pytest.mark.parametrize("regions", [0, 2])
def test_the_loss_stays_attached_when_no_region_counts(regions: int) -> None:
    weight = torch.ones(3, requires_grad=True)
    predicted = torch.ones(regions, 3) * weight
    loss = maskiou_loss(predicted, torch.zeros(regions, dtype=torch.int64), torch.zeros(regions))
    loss.backward()
    assert loss.item() == 0
    assert weight.grad is not None and weight.grad.tolist() == [0, 0, 0]


def test_a_class_agnostic_mask_head_has_its_one_mask_scored() -> None:
    logits = torch.randn(3, 1, 4, 4)
    assert torch.equal(select_masks(logits, torch.tensor([5, 0, 7])), logits)


def test_mask_scores_stay_with_their_detections_when_empty_ones_are_dropped() -> None:
    image = Instances((40, 40))
    image.pred_boxes = Boxes(torch.tensor([[1.0, 1, 9, 9], [60, 60, 70, 70], [2, 2, 8, 8]]))
    image.scores = torch.tensor([0.9, 0.8, 0.7])
    image.mask_scores = torch.tensor([0.1, 0.2, 0.3])
    image.pred_masks = torch.rand(3, 1, 28, 28)
    assert detector_postprocess(image, 80, 80).mask_scores.tolist() == pytest.approx([0.1, 0.3])


def test_the_head_learns_the_quality_of_eight_masks() -> None:
    head = MaskIoUHead(
        ShapeSpec(channels=4, height=6, width=6), num_classes=2, num_conv=2, conv_dim=8, fc_dim=32
    )
    features, masks = torch.randn(8, 4, 6, 6), torch.rand(8, 1, 12, 12)
    classes, targets = torch.arange(8) % 2, torch.linspace(0.3, 0.9, 8)
    optimizer = torch.optim.Adam(head.parameters(), 0.01)
    for _ in range(40):
        loss = maskiou_loss(head(features, masks), classes, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-3


def test_a_new_head_predicts_little_and_has_no_biases() -> None:
    head = of_the_paper(8)
    assert all(not value.any() for name, value in head.named_parameters() if "bias" in name)
    assert head.maskiou.weight.std().item() == pytest.approx(0.01, rel=0.05)


def build(*overrides: Any) -> nn.Module:
    cfg = instseg.load_cfg(
        "mask_scoring_rcnn/mask_scoring_rcnn_shapes.yaml", ["MODEL.DEVICE", "cpu", *overrides]
    )
    return Trainer.build_model(cfg)


def test_detections_in_a_batch_score_as_they_do_alone() -> None:
    model = build("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0).eval()
    images = [{"image": torch.rand(3, 128, 128) * 255} for _ in range(2)]
    with torch.no_grad():
        together = model(images)
        alone = [model([image])[0] for image in images]
    for a, b in zip(together, alone, strict=True):
        assert len(a["instances"]) > 0
        # Random weights give scores of about -9, from boxes that differ by 1e-4 pixels.
        torch.testing.assert_close(
            a["instances"].mask_scores, b["instances"].mask_scores, rtol=1e-4, atol=1e-4
        )


def test_without_the_maskiou_head_the_model_is_mask_rcnn() -> None:
    cfg = instseg.load_cfg("mask_rcnn/mask_rcnn_shapes.yaml", ["MODEL.DEVICE", "cpu"])
    plain = build_model(cfg).state_dict().keys()
    assert build("MODEL.MASKIOU_ON", False).state_dict().keys() == plain
    assert {name.split(".")[1] for name in build().state_dict().keys() - plain} == {"maskiou_head"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("MODEL.ROI_MASKIOU_HEAD.NAME", "MaskIouHead"), "registered: MaskIoUHead"),
        (
            ("MODEL.ROI_MASKIOU_HEAD.NUM_CONV", 0),
            "NUM_CONV is 0; expected a whole number of at least 1",
        ),
        (("MODEL.MASK_ON", False), "set MODEL.MASK_ON True"),
        (("MODEL.ROI_MASK_HEAD.POOLER_TYPE", ""), "no pooled features to score masks"),
    ],
)
def test_a_configuration_that_cannot_score_masks_says_what_to_change(
    overrides: tuple[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(*overrides)
