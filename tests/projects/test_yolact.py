"""YOLACT's parts against numbers of its authors' code and against sums done by hand.

``golden/yolact`` was computed by the authors' code; see the README there.  The stages of whole
networks are compared in ``tests/convert/test_convert_yolact.py``.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model

import instseg
from instseg.errors import CheckpointError, ConfigError
from instseg.projects.yolact import (
    DarkNet,
    Detections,
    ProtoNet,
    assemble_masks,
    crop,
    cross_class_nms,
    decode,
    encode,
    fast_nms,
    level_sizes,
    make_priors,
    mask_probabilities,
)
from instseg.training.trainer import Trainer
from tests.conftest import close
from tests.support.yolact_common import SMALL, image, load, with_instances

RATIOS = [1.0, 0.5, 2.0]


@pytest.fixture(scope="module")
def nms() -> Any:
    return load("fast_nms")


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(instseg.load_cfg("yolact/yolact_resnet50.yaml", SMALL)).eval()


@pytest.mark.parametrize(
    ("size", "expected"),
    [(550, [69, 35, 18, 9, 5]), (400, [50, 25, 13, 7, 4]), (700, [88, 44, 22, 11, 6])],
)
def test_the_levels_have_the_sizes_of_the_authors(size: int, expected: list[int]) -> None:
    assert level_sizes(size, (8, 16, 32, 64, 128)) == expected


def test_anchors_with_their_ratio_have_the_area_of_their_scale() -> None:
    """24 pixels of 550 at ratio 1/2: 24 * sqrt(1/2) wide, 24 / sqrt(1/2) high."""
    first = make_priors(550, [69], [[24]], RATIOS)[:3]
    expected = [[0.04363636, 0.04363636], [0.03085557, 0.06171114], [0.06171114, 0.03085557]]
    close(first[:, 2:], np.float32(expected), 1e-7)
    close(first[:, :2], np.full((3, 2), 0.5 / 69, np.float32), 1e-7)


def test_levels_may_have_ratios_of_their_own() -> None:
    ratios = [[1.0], [0.5, 2.0]]
    priors = make_priors(64, [2, 1], [[8], [16]], ratios)
    assert torch.equal(priors[:4], make_priors(64, [2], [[8]], ratios[0]))
    assert torch.equal(priors[4:], make_priors(64, [1], [[16]], ratios[1]))


def test_levels_may_have_heads_of_their_own() -> None:
    torch.manual_seed(0)
    ratios = [RATIOS, RATIOS, [1.0], [1.0, 2.0], [1.0]]
    keys = ["MODEL.YOLACT.SHARE_HEAD", False, "MODEL.YOLACT.ANCHOR_RATIOS", ratios]
    model = build_model(instseg.load_cfg("yolact/yolact_resnet50.yaml", [*SMALL, *keys])).eval()
    pyramid = model.features(torch.rand(1, 3, 64, 64))
    together = model.head(pyramid)
    alone = [head([level]) for head, level in zip(model.head, pyramid, strict=True)]
    for joined, *parts in zip(together, *alone, strict=True):
        assert torch.equal(joined, torch.cat(parts, dim=1)) and joined.shape[1] == len(model.priors)
    assert len({head.class_logits.weight.shape[0] for head in model.head}) == 3
    losses = model.train()([with_instances(image(40, 60, i), 2) for i in range(2)])
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_without_a_weight_there_is_no_semantic_layer_and_no_loss_of_it() -> None:
    keys = ["MODEL.YOLACT.SEMANTIC_WEIGHT", 0.0]
    model = build_model(instseg.load_cfg("yolact/yolact_resnet50.yaml", [*SMALL, *keys]))
    assert not [name for name in model.state_dict() if name.startswith("semantic")]
    losses = model.train()([with_instances(image(40, 60, 0), 2)])
    assert set(losses) == {"loss_box", "loss_cls", "loss_mask"}
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_boxes_are_decoded_and_encoded_as_by_the_authors(nms: Any) -> None:
    anchors, deltas = torch.from_numpy(nms["box/priors"]), torch.from_numpy(nms["box/loc"])
    decoded = decode(deltas, anchors)
    close(decoded, nms["box/decoded"], 1e-6)
    close(encode(decoded, anchors), nms["box/re_encoded"], 1e-4)


def test_a_crop_equals_the_authors(nms: Any) -> None:
    masks = torch.from_numpy(nms["crop/masks"]).permute(2, 0, 1)
    cropped = crop(masks, torch.from_numpy(nms["crop/boxes"]))
    assert torch.equal(cropped.permute(1, 2, 0), torch.from_numpy(nms["crop/out"]))


def test_a_crop_without_padding_has_the_columns_of_the_authors(nms: Any) -> None:
    """Column j of 640 stays if x1 <= j < x2."""
    boxes = torch.from_numpy(nms["crop/boxes"])
    boxes[:, 1::2] = torch.tensor([0.0, 1.0])
    cropped = crop(torch.ones(len(boxes), 1, 640), boxes, padding=0)[:, 0]
    first, last = (torch.from_numpy(nms[f"crop/{x}_640"])[:, None] for x in ("x1", "x2"))
    columns = torch.arange(640)
    assert torch.equal(cropped > 0, (columns >= first) & (columns < last))


def test_corners_in_pixels_are_truncated_as_by_the_authors(nms: Any, model: Any) -> None:
    """The authors clamp only the right end of a box right of the image, which is left out later."""
    boxes = torch.from_numpy(nms["crop/boxes"])
    ordered = torch.cat([boxes.view(-1, 2, 2).amin(dim=1), boxes.view(-1, 2, 2).amax(dim=1)], 1)
    none = torch.zeros(len(boxes))
    x_coordinates = model.pixel_boxes(Detections(ordered, none, none, none), (480, 640)).tensor[
        :, ::2
    ]
    expected = torch.stack([torch.from_numpy(nms[f"crop/{x}_640_long"]) for x in ("x1", "x2")], 1)
    missed = expected[:, 0] >= expected[:, 1]
    assert torch.equal(x_coordinates[~missed].long(), expected[~missed])
    assert missed.any() and (x_coordinates[missed] == 640).all()


@pytest.mark.parametrize("case", "abcd")
@pytest.mark.parametrize(
    ("kind", "function", "settings"),
    [
        ("fast", fast_nms, {}),
        ("fast_second", fast_nms, {"min_score": 0.05}),
        ("cross_class", cross_class_nms, {}),
    ],
)
def test_fast_nms_equals_the_authors(
    nms: Any, case: str, kind: str, function: Any, settings: dict[str, float]
) -> None:
    boxes, scores = (torch.from_numpy(nms[f"{case}/{name}"]) for name in ("boxes", "scores"))
    rows, classes, best = function(
        boxes,
        scores,
        iou_threshold=float(nms[f"{case}/iou_threshold"]),
        top_k=int(nms[f"{case}/top_k"]),
        **settings,
    )
    assert rows.tolist() == nms[f"{case}/{kind}_index"].tolist()
    assert classes.tolist() == nms[f"{case}/{kind}_class"].tolist()
    assert best.tolist() == nms[f"{case}/{kind}_score"].tolist()
    assert boxes[rows].tolist() == nms[f"{case}/{kind}_box"].tolist()


def test_a_box_that_is_removed_still_removes_others(nms: Any) -> None:
    boxes, scores = torch.from_numpy(nms["chain/boxes"]), torch.from_numpy(nms["chain/scores"])
    assert fast_nms(boxes, scores)[0].tolist() == nms["chain/kept"].tolist() == [0]


@pytest.mark.parametrize("function", [fast_nms, cross_class_nms])
def test_without_candidates_there_are_no_detections(function: Any) -> None:
    assert [len(x) for x in function(torch.zeros(0, 4), torch.zeros(80, 0))] == [0, 0, 0]


@pytest.mark.parametrize("function", [fast_nms, cross_class_nms])
def test_equal_scores_of_disjoint_boxes_fill_the_limit(function: Any) -> None:
    x = torch.arange(5000.0)
    boxes = torch.stack([x, x * 0, x + 0.5, x * 0 + 1], dim=1)
    rows, _, scores = function(boxes, torch.full((3, 5000), 0.5), max_detections=100)
    assert len(rows) == 100 and (scores == 0.5).all()


def test_all_detections_of_one_class_are_told_apart() -> None:
    """Boxes 0 and 1 share 0.9 of their union, box 2 is alone."""
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 9], [20, 0, 30, 10.0]])
    scores = torch.tensor([[0.0, 0, 0], [0.5, 0.6, 0.4]])
    rows, classes, _ = fast_nms(boxes, scores, min_score=0.1)
    assert (rows.tolist(), classes.tolist()) == ([1, 2], [1, 1])


def test_assembled_masks_are_the_cropped_probabilities_above_a_half() -> None:
    """One prototype, at the size of the result: nothing is interpolated."""
    prototypes = torch.full((8, 8, 1), 1.0)
    masks = assemble_masks(
        prototypes, torch.tensor([[3.0], [-3.0]]), torch.tensor([[2, 2, 5, 6.0]] * 2), (8, 8)
    )
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[1:7, 1:6] = True  # one cell around the box
    assert torch.equal(masks[0], expected) and not masks[1].any()


def test_no_detections_give_no_probabilities() -> None:
    assert mask_probabilities(torch.rand(4, 4, 2), torch.zeros(0, 2), torch.zeros(0, 4)).shape == (
        (0, 4, 4)
    )


def test_the_prototypes_have_twice_the_cells_of_p3_and_are_not_negative() -> None:
    prototypes = ProtoNet(8, 1, 4, "")(torch.randn(2, 8, 5, 7))
    assert prototypes.shape == (2, 10, 14, 4) and prototypes.min() == 0


def test_darknet_has_the_outputs_that_it_tells() -> None:
    backbone = DarkNet(3, 4, [1, 1, 1, 1, 1], "BN")
    outputs = backbone(torch.randn(1, 3, 64, 64))
    expected = {"stage3": (32, 8), "stage4": (64, 16), "stage5": (128, 32)}
    assert {k: (v.channels, v.stride) for k, v in backbone.output_shape().items()} == expected
    assert {k: (v.shape[1], 64 // v.shape[2]) for k, v in outputs.items()} == expected


def test_images_of_different_sizes_give_the_same_alone_and_in_a_batch(
    model: torch.nn.Module,
) -> None:
    items = [image(40, 60, 0), image(70, 30, 1), image(64, 64, 2)]
    with torch.no_grad():
        alone = [model([item])[0]["instances"] for item in items]
        batch = [result["instances"] for result in model(items)]
    for one, other in zip(alone, batch, strict=True):
        assert len(one) == len(other) > 0
        assert one.pred_masks.shape[1:] == one.image_size
        torch.testing.assert_close(one.scores, other.scores, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            one.pred_boxes.tensor, other.pred_boxes.tensor, rtol=0, atol=1.01
        )


def test_boxes_are_whole_pixels_inside_the_image_and_have_an_area(
    model: torch.nn.Module,
) -> None:
    with torch.no_grad():
        boxes = model([image(40, 60, 0)])[0]["instances"].pred_boxes
    assert torch.equal(boxes.tensor, boxes.tensor.round())
    assert boxes.nonempty().all() and boxes.inside_box((40, 60), 1).all()


def test_a_batch_without_instances_trains_every_parameter(model: torch.nn.Module) -> None:
    losses = model.train()([with_instances(image(40, 60, i), 0) for i in range(2)])
    assert [losses[f"loss_{name}"].item() for name in ("box", "cls", "mask")] == [0, 0, 0]
    assert losses["loss_semantic"] > 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_an_image_without_instances_changes_no_loss_but_the_semantic_one(
    model: torch.nn.Module,
) -> None:
    model.train()
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.eval()
    alone = model([with_instances(image(40, 60, 0), 2)])
    pair = model([with_instances(image(40, 60, 0), 2), with_instances(image(40, 60, 1), 0)])
    for name in ("loss_box", "loss_cls", "loss_mask"):
        torch.testing.assert_close(alone[name], pair[name], rtol=1e-4, atol=1e-5)


def test_one_image_is_learnt(model: torch.nn.Module) -> None:
    item = with_instances(image(40, 60, 0), 2)
    optimizer = torch.optim.Adam(model.train().parameters(), 2e-3)
    steps = []
    for _ in range(20):
        steps.append(model([item, item]))
        optimizer.zero_grad()
        sum(steps[-1].values()).backward()
        optimizer.step()
    assert all(steps[-1][name] < 0.6 * first for name, first in steps[0].items())


def test_the_network_compiles_without_graph_breaks(model: torch.nn.Module) -> None:
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        compiled = torch.compile(model.raw, fullgraph=True, backend="eager")(images)
        torch.testing.assert_close(compiled, model.raw(images))


def test_weights_that_are_not_finite_are_reported(model: torch.nn.Module) -> None:
    model.head.class_logits.bias.data[0] = float("nan")
    with pytest.raises(CheckpointError, match="values that are not finite"):
        model([image(40, 60, 0)])


def test_boxes_too_large_for_numbers_are_reported(model: torch.nn.Module) -> None:
    model.detection_settings = dataclasses.replace(model.detection_settings, score_threshold=0.0)
    model.head.box_deltas.bias.data.fill_(1e4)  # the exponential of 0.2 times that is infinite
    with pytest.raises(CheckpointError, match="values that are not finite"):
        model([image(40, 60, 0)])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["INPUT.SQUARE_SIZE", 0], "INPUT.SQUARE_SIZE is 0"),
        (["MODEL.YOLACT.NMS", "soft"], "'soft'; expected fast or cross_class"),
        (["MODEL.YOLACT.ANCHOR_SCALES", [[24]]], "expected 5 lists, for P3..P7"),
        (["MODEL.YOLACT.ANCHOR_SCALES", [24, 48, 96, 192, 384]], "expected 5 lists, for P3..P7"),
        (
            ["MODEL.YOLACT.ANCHOR_SCALES", [[24, 30], [48], [96], [192], [384]]],
            "gives P3..P7 .6, 3",
        ),
        (["MODEL.YOLACT.ANCHOR_RATIOS", []], "expected numbers, or 5 lists"),
        (["MODEL.YOLACT.ANCHOR_RATIOS", [[1.0], 2.0]], "expected numbers, or 5 lists"),
        (["MODEL.YOLACT.ANCHOR_RATIOS", [[1.0]] * 4 + [[]]], "expected numbers, or 5 lists"),
        (["MODEL.RESNETS.OUT_FEATURES", ["res4", "res5"]], "strides 8, 16, 32"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_refused(
    overrides: list[Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Trainer.build_model(instseg.load_cfg("yolact/yolact_resnet50.yaml", [*SMALL, *overrides]))


def test_the_backbone_is_registered_with_its_configuration() -> None:
    cfg = instseg.get_cfg()
    cfg.MODEL.DARKNET.DEPTHS = [1, 1, 1]
    cfg.MODEL.BACKBONE.NAME = "build_darknet_backbone"
    shapes = build_backbone(cfg, ShapeSpec(channels=3)).output_shape()
    assert {name: shape.channels for name, shape in shapes.items()} == {"stage3": 256}
