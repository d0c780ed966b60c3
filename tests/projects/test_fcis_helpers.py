"""Boxes, anchors, proposals, labels and targets of FCIS against the authors' code and by hand.

``golden/position_sensitive/official_fcis_helpers.npz`` holds their inclusive boxes; see the README
there.
"""

from typing import Any

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import EventStorage

import instseg
from instseg.errors import CheckpointError, ConfigError
from instseg.projects.fcis import (
    FCISRPN,
    Regions,
    RoundedAnchorGenerator,
    Samples,
    assign_labels,
    clip_boxes,
    every_candidate,
    hard_examples,
    mask_targets,
    random_candidates,
    refine_boxes,
    to_rois,
)
from tests.conftest import GOLDEN, close

HALF = Matcher([0.5], [0, 1])


@pytest.fixture(scope="module")
def golden() -> Any:
    return np.load(GOLDEN / "position_sensitive" / "official_fcis_helpers.npz")


def continuous(boxes: Any) -> torch.Tensor:
    """(N, 4) inclusive corners → continuous ones, float32."""
    return torch.from_numpy(np.asarray(boxes, dtype=np.float32)) + torch.tensor([0.0, 0, 1, 1])


def image_size(golden: Any) -> tuple[int, int]:
    """Height and width of the image."""
    height, width = golden["annot_gt_masks"].shape[1:]
    return height, width


def candidates(golden: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Proposals followed by the instances' own boxes, those boxes, and their classes from 0."""
    gt_boxes = continuous(golden["annot_gt_boxes"][:, :4])
    classes = torch.from_numpy(golden["annot_gt_boxes"][:, 4]).to(torch.int64) - 1
    return torch.cat([continuous(golden["annot_rois"][:, 1:]), gt_boxes]), gt_boxes, classes


def test_boxes_overlap_as_with_the_authors(golden: Any) -> None:
    boxes, gt_boxes, _ = candidates(golden)
    close(
        pairwise_iou(Boxes(boxes[: len(golden["annot_rois"])]), Boxes(gt_boxes)).double(),
        golden["overlaps"],
    )


def test_deltas_between_boxes_equal_the_authors(golden: Any) -> None:
    boxes, gt_boxes, _ = candidates(golden)
    transform = Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0))
    close(transform.get_deltas(boxes[: len(gt_boxes)], gt_boxes).double(), golden["transform"])


def test_predicted_and_clipped_boxes_equal_the_authors(golden: Any) -> None:
    boxes, _, _ = candidates(golden)
    transform = Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0))
    deltas = torch.from_numpy(golden["deltas"])
    predicted = transform.apply_deltas(deltas, boxes[: len(deltas)]).unflatten(1, (-1, 4))
    inclusive = torch.tensor([0.0, 0, 1, 1])
    close((predicted - inclusive).flatten(1).double(), golden["pred"], 1e-3)
    clipped = clip_boxes(predicted, image_size(golden)) - inclusive
    close(clipped.flatten(1).double(), golden["pred_clipped"], 1e-3)


def test_refined_regions_equal_the_authors(golden: Any) -> None:
    boxes = continuous(golden["annot_rois"][:, 1:])
    deltas = torch.from_numpy(golden["parser_delta"])
    transform = Box2BoxTransform(weights=(5.0, 5.0, 2.0, 2.0))
    refined = to_rois([refine_boxes(boxes, deltas, transform, image_size(golden))])
    close(refined, golden["parser_out_rois"], 1e-3)


@pytest.mark.parametrize(
    ("name", "sizes"), [("coco", [64, 128, 256, 512]), ("voc", [128, 256, 512])]
)
def test_anchors_equal_the_authors(golden: Any, name: str, sizes: list[int]) -> None:
    anchors = anchor_generator(sizes)([torch.zeros(1, 1, 1, 1)])[0].tensor
    close((anchors - torch.tensor([0.0, 0, 1, 1])).double(), golden[f"anchors_{name}"], 0)


def anchor_generator(sizes: list[int]) -> RoundedAnchorGenerator:
    return RoundedAnchorGenerator(
        sizes=[sizes], aspect_ratios=[[0.5, 1.0, 2.0]], strides=[16], offset=0.5
    )


def test_anchors_of_the_configurations_are_those_of_the_authors(golden: Any) -> None:
    for name, config in (("coco", "fcis_R_101_coco"), ("voc", "fcis_R_101_voc")):
        cfg = instseg.load_cfg(f"fcis/{config}.yaml")
        generator = build_anchor_generator(cfg, [ShapeSpec(channels=1, stride=16)])
        anchors = generator([torch.zeros(1, 1, 1, 1)])[0].tensor
        close((anchors - torch.tensor([0.0, 0, 1, 1])).double(), golden[f"anchors_{name}"], 0)


def test_rounded_anchors_on_two_feature_maps_are_refused() -> None:
    with pytest.raises(ConfigError, match="names 2 feature maps"):
        RoundedAnchorGenerator(sizes=[[64]], aspect_ratios=[[1.0]], strides=[8, 16], offset=0.5)


def rpn(**changes: Any) -> FCISRPN:
    settings: dict[str, Any] = dict(
        in_features=["res4"],
        head=StandardRPNHead(in_channels=1, num_anchors=12),
        anchor_generator=anchor_generator([64, 128, 256, 512]),
        anchor_matcher=Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True),
        box2box_transform=Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)),
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_topk=(6000, 6000),
        post_nms_topk=(300, 300),
        min_box_size=2,
        smooth_l1_beta=1 / 9,
    )
    return FCISRPN(**{**settings, **changes})


def test_proposals_equal_the_authors(golden: Any) -> None:
    """The last row and column of the map, which reach beyond the image, are not decoded."""
    probability = torch.from_numpy(golden["rpn_cls_prob"])
    background, foreground = probability.log().chunk(2, dim=1)
    logits = (foreground - background).permute(0, 2, 3, 1).flatten(1)
    deltas = torch.from_numpy(golden["rpn_bbox_pred"]).unflatten(1, (-1, 4))
    deltas = deltas.permute(0, 3, 4, 1, 2).flatten(1, 3)
    generator = rpn().eval()
    anchors = generator.anchor_generator([torch.zeros(1, 1, *probability.shape[2:])])
    size = tuple(golden["rpn_im_info"][0, :2].astype(int).tolist())
    (proposals,) = generator.predict_proposals(anchors, [logits], [deltas], [size])
    close(to_rois([proposals.proposal_boxes.tensor]), golden["rpn_out_rois"], 1e-3)
    assert (proposals.objectness_logits.diff() <= 0).all()


def test_proposals_that_are_not_finite_stop_a_training_and_a_test() -> None:
    generator = rpn()
    anchors = generator.anchor_generator([torch.zeros(1, 1, 2, 2)])
    logits, deltas = torch.zeros(1, 48), torch.zeros(1, 48, 4)
    logits[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="diverged"):
        generator.predict_proposals(anchors, [logits], [deltas], [(32, 32)])
    with pytest.raises(CheckpointError, match="not finite"):
        generator.eval().predict_proposals(anchors, [logits], [deltas], [(32, 32)])


def one_instance(box: list[float], size: tuple[int, int]) -> Instances:
    image = Instances(size)
    image.gt_boxes = Boxes(torch.tensor([box]))
    return image


def test_an_instance_takes_its_best_anchor_among_those_inside_the_image() -> None:
    """Its best anchor of all, of cell (1, 1), is outside: Detectron2 would leave it without one."""
    generator = rpn(anchor_generator=anchor_generator([64]), batch_size_per_image=4096)
    anchors = generator.anchor_generator([torch.zeros(1, 1, 10, 10)])
    instance = one_instance([0.0, 0, 60, 60], (160, 160))
    (labels,), (boxes,) = generator.label_and_sample_anchors(anchors, [instance])
    # Square anchors are the second of three; the first inside is that of cell (2, 2).
    assert (labels == 1).nonzero()[:, 0].tolist() == [3 * 22 + 1]
    assert boxes[3 * 22 + 1].tolist() == [0, 0, 60, 60]


def test_an_anchor_that_touches_the_border_is_inside() -> None:
    """Cell (1, 1) of a 48 x 48 image: 16 x 16 pixels times 3 around (24, 24)."""
    generator = rpn(anchor_generator=anchor_generator([48]))
    anchors = generator.anchor_generator([torch.zeros(1, 1, 3, 3)])
    instance = one_instance([0.0, 0, 48, 48], (48, 48))
    (labels,), _ = generator.label_and_sample_anchors(anchors, [instance])
    assert (labels >= 0).nonzero()[:, 0].tolist() == [3 * 4 + 1]
    assert labels[3 * 4 + 1] == 1


def test_an_instance_that_no_anchor_meets_makes_none_positive() -> None:
    generator = rpn(anchor_generator=anchor_generator([64]))
    anchors = generator.anchor_generator([torch.zeros(1, 1, 10, 20)])
    instance = one_instance([318.0, 0, 319, 1], (64, 320))
    (labels,), _ = generator.label_and_sample_anchors(anchors, [instance])
    assert set(labels.tolist()) == {-1, 0}


def test_the_rpn_classification_loss_is_the_mean_over_the_sampled_anchors_of_an_image() -> None:
    """Image 1: ln 2 and 0 of two; image 2: ln 2 of one; mean of ln 2 / 2 and ln 2."""
    generator = rpn()
    anchors = [Boxes(torch.tensor([[0.0, 0, 16, 16]] * 3))]
    logits = torch.tensor([[0.0, 100, 5], [0, 5, 5]], requires_grad=True)
    labels = [torch.tensor([0, 1, -1]), torch.tensor([0, -1, -1])]
    boxes = [torch.tensor([[0.0, 0, 16, 16]] * 3)] * 2
    with EventStorage():
        losses = generator.losses(anchors, [logits], labels, [torch.zeros(2, 3, 4)], boxes)
    assert losses["loss_rpn_cls"].item() == pytest.approx(0.75 * np.log(2))


def test_the_rpn_box_loss_is_smooth_l1_with_sigma_3_over_256() -> None:
    """The errors are 0.1 and 1 in dx and dy: 4.5 * 0.01 + (1 - 1 / 18)."""
    generator = rpn()
    anchors = [Boxes(torch.tensor([[0.0, 0, 16, 16]]))]
    deltas = torch.tensor([[[0.1, 1.0, 0, 0]]])
    with EventStorage():
        losses = generator.losses(
            anchors, [torch.zeros(1, 1)], [torch.tensor([1])], [deltas], [anchors[0].tensor]
        )
    assert losses["loss_rpn_loc"].item() == pytest.approx((0.045 + 17 / 18) / 256)


def test_labels_and_targets_of_every_candidate_equal_the_authors(golden: Any) -> None:
    boxes, gt_boxes, classes = candidates(golden)
    labels, matched = assign_labels(boxes, gt_boxes, classes, HALF)
    order = every_candidate(labels)
    boxes, labels, matched = boxes[order], labels[order], matched[order]
    close(to_rois([boxes]), golden["annot_out_rois"], 1e-3)
    assert labels.tolist() == golden["annot_out_labels"].tolist()

    objects = labels > 0
    weights = np.zeros_like(golden["annot_out_bbox_weights"])
    weights[objects.numpy(), 4:] = 1
    assert (weights == golden["annot_out_bbox_weights"]).all()
    transform = Box2BoxTransform(weights=(5.0, 5.0, 2.0, 2.0))
    deltas = torch.zeros(len(boxes), 8)
    deltas[objects, 4:] = transform.get_deltas(boxes[objects], gt_boxes[matched[objects]])
    close(deltas, golden["annot_out_bbox_targets"])

    side = golden["annot_out_mask_targets"].shape[-1]
    masks = torch.full((len(boxes), side, side), -1)
    gt_masks = torch.from_numpy(golden["annot_gt_masks"])
    masks[objects] = mask_targets(
        boxes[objects], matched[objects], gt_boxes, gt_masks, size=side, threshold=0.4
    )
    assert masks.tolist() == golden["annot_out_mask_targets"][:, 0].tolist()


def test_hard_examples_equal_the_authors(golden: Any) -> None:
    def tensor(name: str) -> torch.Tensor:
        return torch.from_numpy(golden[f"ohem_{name}"])

    masks = tensor("mask_targets")[:, 0].to(torch.int64)
    labels, targets = tensor("labels"), tensor("bbox_targets")
    # The head trains the last four deltas of instances and no others.
    assert torch.equal(tensor("bbox_weights").bool(), (targets != 0) & (labels > 0)[:, None])
    zeros = torch.zeros_like(labels)
    kept = hard_examples(
        Regions(tensor("cls_score"), tensor("seg_pred"), labels, tensor("bbox_pred")),
        Samples(zeros, targets[:, 4:], labels, masks, targets[:, 4:]),
        count=int(golden["ohem_keep"]),
        mask_weight=10.0,
    )
    dropped = torch.ones(len(masks), dtype=torch.bool)
    dropped[kept] = False
    assert len(kept) == golden["ohem_keep"]
    assert tensor("labels").masked_fill(dropped, -1).tolist() == golden["ohem_out_labels"].tolist()
    masks[dropped] = -1
    assert (masks.numpy() == golden["ohem_out_mask_targets"][:, 0]).all()
    weights = tensor("bbox_weights").masked_fill(dropped[:, None], 0)
    assert (weights.numpy() == golden["ohem_out_bbox_weights"]).all()


def test_fewer_regions_than_hard_examples_are_all_kept() -> None:
    labels = torch.zeros(3, dtype=torch.int64)
    scores = torch.tensor([[0.0, 1], [0, 3], [0, 2]])
    masks = torch.full((3, 2, 2), -1)
    regions = Regions(scores, torch.zeros(3, 2, 2, 2), labels, torch.zeros(3, 8))
    samples = Samples(labels, torch.zeros(3, 4), labels, masks, torch.zeros(3, 4))
    kept = hard_examples(regions, samples, 128, 10.0)
    assert kept.tolist() == [1, 2, 0], "by descending loss"


def test_an_image_without_instances_has_background_alone() -> None:
    empty = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    labels, _ = assign_labels(torch.tensor([[0.0, 0, 9, 9]]), *empty, HALF)
    assert labels.tolist() == [0]


def test_the_voc_setting_ignores_regions_that_hardly_meet_an_instance() -> None:
    """IoU 1, 0.25 and 0.05 with the instance: instance, background, neither."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 5, 5], [0, 0, 5, 1]])
    matcher = Matcher([0.1, 0.5], [-1, 0, 1])
    labels, _ = assign_labels(boxes, boxes[:1], torch.tensor([6]), matcher)
    assert labels.tolist() == [7, 0, -1]


def test_random_sampling_takes_a_quarter_of_instances_at_most() -> None:
    labels = torch.tensor([3] * 60 + [0] * 200)
    chosen, given = random_candidates(labels, 128, 0.25)
    assert given.tolist() == [3] * 32 + [0] * 96
    assert (labels[chosen[:32]] == 3).all() and (labels[chosen[32:]] == 0).all()
    assert len(set(chosen.tolist())) == 128


def test_random_sampling_fills_up_with_anything_but_the_chosen_instances() -> None:
    labels = torch.tensor([3] * 8 + [-1] * 4)
    chosen, given = random_candidates(labels, 8, 0.25)
    assert given.tolist() == [3, 3, 0, 0, 0, 0, 0, 0]
    assert not set(chosen[2:].tolist()) & set(chosen[:2].tolist())


def test_random_sampling_of_few_candidates_takes_what_there_is() -> None:
    chosen, given = random_candidates(torch.tensor([0, 5]), 128, 0.25)
    assert given.tolist()[:2] == [5, 0] and set(given.tolist()[2:]) <= {0}
    assert chosen[0] == 1


def halves() -> tuple[torch.Tensor, torch.Tensor]:
    """An instance of 10 x 10 pixels at (10, 10) and its mask."""
    masks = torch.zeros(1, 40, 40, dtype=torch.bool)
    masks[0, 10:20, 10:20] = True
    return torch.tensor([[10.0, 10, 20, 20]]), masks


def test_a_region_that_is_half_instance_has_half_a_mask() -> None:
    """The region spans columns 5..14, the instance begins at 10; two bins per column."""
    boxes, masks = halves()
    target = mask_targets(
        torch.tensor([[5.0, 10, 15, 20]]), torch.tensor([0]), boxes, masks, 20, 0.4
    )
    # Centres of the bins lie at 5 + (i + 0.5) / 2 - 0.5; the value at 9.25 is 0.25, at 9.75 0.75.
    assert target[0, 0].tolist() == [0] * 10 + [1] * 10


def test_the_threshold_of_a_mask_target_belongs_to_the_inside() -> None:
    """A column of 0.4 throughout, cast as the masks of the authors are."""
    boxes = torch.tensor([[0.0, 0, 4, 4]])
    masks = torch.full((1, 4, 4), 0.4)
    assert mask_targets(boxes, torch.tensor([0]), boxes, masks, 4, 0.4).all()


def test_a_mask_outside_the_box_of_its_instance_does_not_count() -> None:
    boxes, masks = halves()
    masks[:] = True
    target = mask_targets(
        torch.tensor([[5.0, 10, 15, 20]]), torch.tensor([0]), boxes, masks, 10, 0.4
    )
    assert target[0, 0].tolist() == [0] * 5 + [1] * 5


def test_a_region_away_from_its_instance_has_an_empty_mask() -> None:
    boxes, masks = halves()
    target = mask_targets(
        torch.tensor([[30.0, 30, 40, 40]]), torch.tensor([0]), boxes, masks, 7, 0.4
    )
    assert not target.any()
