"""YolactEdge's parts against sums done by hand; numbers of its authors are compared elsewhere.

See ``tests/convert/test_convert_yolact_edge.py`` for those.
"""

from typing import Any

import pytest
import torch
from torch import nn

import instseg
from instseg.errors import ConfigError, DatasetError
from instseg.inference.optimize import optimize
from instseg.modeling import VideoModel, as_video, warp
from instseg.projects.yolact_edge import (
    FeatFlowNet,
    MobileNetV2,
    Motion,
    Refinement,
    flow_loss,
    relative_flow,
    warp_loss,
)
from instseg.training.trainer import Trainer
from tests.support.yolact_common import SMALL, image, with_instances

CONFIG = "yolact_edge/yolact_edge_vid_resnet50.yaml"
SIDE = 64


def build(*overrides: Any, config: str = CONFIG) -> Any:
    torch.manual_seed(0)
    settings = [*SMALL, "MODEL.YOLACT_EDGE.FLOW_CHANNELS", 4, *overrides]
    return Trainer.build_model(instseg.load_cfg(config, settings)).eval()


def video_item(seed: int, objects: int = 2, flow: bool = False) -> dict[str, Any]:
    """A training image with an earlier frame."""
    item = with_instances(image(SIDE, SIDE, seed), objects)
    item["reference_image"] = image(SIDE, SIDE, seed + 100)["image"]
    if flow:
        item["flow"] = torch.full((2, SIDE, SIDE), 4.0)
    return item


def restless(model: Any) -> Any:
    """Motions that are neither none nor the same everywhere."""
    for predictor in model.flow_net.predictors:
        for layer in (predictor.flow, predictor.scale, predictor.bias):
            nn.init.normal_(layer.weight, std=0.2)
    return model


def test_no_flow_is_the_identity_to_float_precision() -> None:
    features = torch.randn(2, 3, 69, 35)
    moved = warp(features, torch.zeros(2, 2, 69, 35))
    torch.testing.assert_close(moved, features, rtol=0, atol=5e-5)


def test_a_flow_of_a_column_moves_the_map_by_a_column() -> None:
    """Five columns span 2, so one is a half; beyond the last there is nothing."""
    features = torch.arange(15.0).view(1, 1, 3, 5) + 1
    flow = torch.zeros(1, 2, 3, 5)
    flow[:, 0] = 0.5
    expected = torch.tensor([[2.0, 3, 4, 5, 0], [7, 8, 9, 10, 0], [12, 13, 14, 15, 0]])
    torch.testing.assert_close(warp(features, flow)[0, 0], expected)


def test_a_flow_of_half_a_row_is_the_mean_of_two_rows() -> None:
    """Three rows span 2, so half a row is a half."""
    features = torch.tensor([0.0, 4, 6]).view(1, 1, 3, 1)
    flow = torch.tensor([0.0, 0.5]).view(1, 2, 1, 1).expand(1, 2, 3, 1)
    assert warp(features, flow).flatten().tolist() == [2, 5, 3]


def test_a_map_of_one_cell_can_be_moved() -> None:
    assert warp(torch.full((1, 1, 1, 1), 3.0), torch.zeros(1, 2, 1, 1)).item() == 3


def test_a_motion_of_eight_reaches_half_the_image_and_is_scaled_and_shifted() -> None:
    """Column 0 looks at the middle, column 1 at the last: 2 * 5 + 1, 2 * 7 + 1."""
    features = torch.tensor([3.0, 5, 7]).view(1, 1, 1, 3)
    flow = torch.tensor([8.0, 0]).view(1, 2, 1, 1).expand(1, 2, 1, 3)
    scale, bias = torch.full((1, 1, 1, 3), 2.0), torch.ones(1, 1, 1, 3)
    assert Motion(flow, scale, bias).apply(features).flatten().tolist() == [11, 15, 1]


def test_half_the_width_in_pixels_is_eight() -> None:
    flow = torch.tensor([50.0, 10]).view(1, 2, 1, 1).expand(1, 2, 40, 100)
    assert relative_flow(flow)[0, :, 0, 0].tolist() == [8, 4]


def test_at_first_every_motion_is_none() -> None:
    net = FeatFlowNet(16, 4, [[1], [2], [4]])
    frame, reference = (net.reduce(torch.randn(1, 16, 9, 9)) for _ in range(2))
    motions = net(frame, reference)
    assert [tuple(m.flow.shape[2:]) for m in motions] == [(9, 9), (5, 5), (3, 3)]
    for motion in motions:
        features = torch.randn(1, 16, *motion.flow.shape[2:])
        torch.testing.assert_close(motion.apply(features), features)


def test_coarse_motions_do_not_depend_on_whether_finer_ones_are_wanted() -> None:
    net = FeatFlowNet(16, 4, [[1], [2], [4]])
    for predictor in net.predictors:
        nn.init.normal_(predictor.flow.weight)
    frame, reference = torch.randn(2, 1, 4, 9, 9)
    for wanted in (1, 2):
        coarse, every = net(frame, reference, wanted), net(frame, reference)[wanted:]
        for one, other in zip(coarse, every, strict=True):
            assert torch.equal(one.flow, other.flow)


def test_the_encoder_has_the_layers_asked_for() -> None:
    """5 * 4 channels inside the first stage, none inside the second, two layers in the third."""
    net = FeatFlowNet(16, 4, [[5], [], [1, 2]])
    shapes = [[layer.out_channels for layer in stage] for stage in net.encoder]
    assert shapes == [[20, 4], [8], [4, 8, 16]]
    assert [stage[0].stride[0] for stage in net.encoder] == [1, 2, 2]


def test_a_refinement_without_weights_changes_nothing() -> None:
    refinement = Refinement(2, 4)
    for value in refinement.parameters():
        nn.init.zeros_(value)
    features = [torch.randn(1, 4, 5, 5), torch.randn(1, 4, 3, 3)]
    refined = refinement(features, torch.randn(1, 4, 9, 9))
    assert all(torch.equal(a, b) for a, b in zip(refined, features, strict=True))


def test_the_flow_loss_is_the_mean_distance_summed_over_levels() -> None:
    """Distances 5 and 0 on two levels, and on one half of a third 5: 5 + 0 + 2.5."""
    target = torch.tensor([3.0, 4]).view(1, 2, 1, 1).expand(1, 2, 8, 8)
    half = target[..., :4, :4].clone()
    half[..., :2] = 0
    assert flow_loss([torch.zeros(1, 2, 2, 2), target, half], target).item() == pytest.approx(7.5)


def test_cells_whose_flow_is_not_known_do_not_count() -> None:
    """Known are three columns of four; the distance is 1 there."""
    target = torch.zeros(1, 2, 4, 4)
    target[..., 3] = torch.nan
    flow = torch.zeros(1, 2, 4, 4)
    flow[:, 0] = 1
    flow[..., 3] = 100
    flow.requires_grad_()
    loss = flow_loss([flow], target)
    loss.backward()
    assert loss.item() == 1
    assert flow.grad.isfinite().all() and not flow.grad[..., 3].any()


def test_without_any_known_flow_the_loss_is_zero() -> None:
    flow = torch.randn(1, 2, 4, 4, requires_grad=True)
    loss = flow_loss([flow], torch.full((1, 2, 4, 4), torch.nan))
    loss.backward()
    assert loss.item() == 0 and not flow.grad.any()


def test_the_distance_of_features_is_one_minus_the_cosine() -> None:
    """Vectors (1, 0) and (3, 4): 1 - 0.6, and the same behind a layer that changes nothing."""
    layer = nn.Conv2d(2, 2, 1, bias=False)
    layer.weight.data.copy_(torch.eye(2)[:, :, None, None])
    first, second = (torch.tensor(x).view(1, 2, 1, 1) for x in ([1.0, 0], [3.0, 4]))
    assert warp_loss([first], [second], [layer]).item() == pytest.approx(0.4)
    assert warp_loss([second], [2 * second], [layer]).item() == pytest.approx(0, abs=1e-6)


def test_the_distance_of_features_trains_the_moved_ones_alone() -> None:
    layer = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    moved, computed = (torch.randn(1, 2, 3, 3, requires_grad=True) for _ in range(2))
    warp_loss([moved], [computed], [layer]).backward()
    assert moved.grad is not None and computed.grad is None
    assert all(p.grad is None for p in layer.parameters())
    assert layer[1].num_batches_tracked == 0


def test_the_model_says_that_its_frames_share_work() -> None:
    model = build("MODEL.YOLACT_EDGE.KEYFRAME_INTERVAL", 7)
    assert isinstance(model, VideoModel) and as_video(model) is model
    assert model.keyframe_interval == 7
    assert as_video(build(config="yolact_edge/yolact_edge_resnet50.yaml")) is None


@pytest.mark.parametrize("warped", [["p5"], ["p4", "p5"], ["p3", "p4", "p5"]])
def test_a_frame_that_did_not_change_is_predicted_as_its_key_frame(warped: list[str]) -> None:
    """Without motion and refinement the levels are those of the key frame."""
    model = build("MODEL.YOLACT_EDGE.WARPED", warped, "MODEL.YOLACT_EDGE.REFINE", False)
    images = model.preprocess([image(SIDE, SIDE, 0)])
    with torch.no_grad():
        outputs, state = model.keyframe(images)
        between = model.between(images, state)
    assert len(state) == 1 + len(warped)
    for one, other in zip(outputs, between, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_key_frame_is_computed_as_an_image() -> None:
    model = restless(build())
    images = model.preprocess([image(SIDE, SIDE, 0)])
    with torch.no_grad():
        for one, other in zip(model.raw(images), model.keyframe(images)[0], strict=True):
            assert torch.equal(one, other)


def test_frames_after_a_key_frame_leave_its_state_alone() -> None:
    model = restless(build())
    first, second = (model.preprocess([image(SIDE, SIDE, seed)]) for seed in (0, 1))
    with torch.no_grad():
        _, state = model.keyframe(first)
        kept = [x.clone() for x in state]
        once = model.between(second, state)
        again = model.between(second, state)
    assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_frames_of_two_videos_give_the_same_alone_and_in_a_batch() -> None:
    model = restless(build())
    keys = model.preprocess([image(SIDE, SIDE, 0), image(40, 60, 1)])
    later = model.preprocess([image(SIDE, SIDE, 2), image(40, 60, 3)])
    with torch.no_grad():
        together = model.between(later, model.keyframe(keys)[1])
        for i in range(2):
            _, state = model.keyframe(keys[i : i + 1])
            alone = model.between(later[i : i + 1], state)
            for one, other in zip(alone, together, strict=True):
                # Places to sample magnify rounding.
                torch.testing.assert_close(one[0], other[i], rtol=1e-3, atol=1e-3)


def test_frames_after_a_key_frame_do_not_run_the_end_of_the_backbone() -> None:
    model = build()
    images = model.preprocess([image(SIDE, SIDE, 0)])
    ran: list[str] = []
    for name in ("res3", "res4", "res5"):
        part = getattr(model.backbone, name)
        part.register_forward_hook(lambda *_, name=name: ran.append(name))
    with torch.no_grad():
        _, state = model.keyframe(images)
        model.between(images, state)
    assert ran == ["res3", "res4", "res5", "res3"]


TRAINED = {
    "image": {"backbone", "fpn", "protonet", "head", "semantic"},
    "flow": {"flow_net"},
    "joint": {"fpn", "protonet", "head", "semantic", "flow_net", "refinement"},
}


@pytest.mark.parametrize("objects", [0, 2])
@pytest.mark.parametrize("stage", TRAINED)
def test_a_stage_trains_its_parts_and_every_parameter_of_them(stage: str, objects: int) -> None:
    model = restless(build("MODEL.YOLACT_EDGE.STAGE", stage)).train()
    losses = model([video_item(i, objects, flow=True) for i in range(2)])
    assert all(loss.isfinite() and loss.ndim == 0 for loss in losses.values())
    sum(losses.values()).backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.partition(".")[0] for name in trainable} == TRAINED[stage]
    assert not [name for name, p in trainable.items() if p.grad is None]


def test_the_joint_stage_has_every_loss_twice_and_the_distance_of_the_levels() -> None:
    losses = build().train()([video_item(0)])
    names = {"loss_box", "loss_cls", "loss_mask", "loss_semantic"}
    assert set(losses) == names | {f"{name}_warped" for name in names} | {"loss_warp"}


@pytest.mark.parametrize(
    ("stage", "frozen"),
    [("image", []), ("flow", ["backbone", "fpn"]), ("joint", ["backbone"])],
)
def test_what_is_frozen_stays_in_evaluation_mode(stage: str, frozen: list[str]) -> None:
    model = build("MODEL.YOLACT_EDGE.STAGE", stage).train()
    for name in ("backbone", "fpn"):
        assert model.get_submodule(name).training == (name not in frozen)
    assert model.fpn.lateral3.training == (stage == "image")


def test_nothing_is_frozen_on_request_but_the_motion_that_no_one_uses() -> None:
    model = build("MODEL.YOLACT_EDGE.FREEZE", False)
    frozen = {
        name.rpartition(".")[0] for name, p in model.named_parameters() if not p.requires_grad
    }
    assert frozen == {
        *(
            "flow_net.predictors.0.flow",
            "flow_net.predictors.0.scale",
            "flow_net.predictors.0.bias",
        ),
        *("flow_net.up_features.0", "flow_net.up_flow.0"),
    }


def test_images_without_an_earlier_frame_train_as_key_frames() -> None:
    """Only images with an earlier frame are moved: their losses do not depend on the others."""
    model = restless(build()).train()
    still = with_instances(image(SIDE, SIDE, 5), 2)
    losses = model([still])
    assert losses["loss_warp"] == 0 and "loss_box_warped" not in losses
    sum(losses.values()).backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    alone, mixed = model([video_item(0)]), model([still, video_item(0)])
    for name in ("loss_box_warped", "loss_cls_warped", "loss_mask_warped", "loss_warp"):
        torch.testing.assert_close(alone[name], mixed[name], rtol=1e-4, atol=1e-5)


def test_the_flow_stage_refuses_images_without_flow() -> None:
    model = build("MODEL.YOLACT_EDGE.STAGE", "flow").train()
    with pytest.raises(DatasetError, match=r"STAGE flow needs flow .* a\.png has none"):
        model([{**video_item(0), "file_name": "a.png"}])


def test_the_flow_is_learnt() -> None:
    model = build("MODEL.YOLACT_EDGE.STAGE", "flow").train()
    item = video_item(0, flow=True)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(30):
        losses.append(model([item])["loss_flow"])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]


def test_one_pair_of_frames_is_learnt() -> None:
    """The image of ``test_yolact.py`` moved by eight pixels."""
    model = build("MODEL.YOLACT_EDGE.FREEZE", False).train()
    item = with_instances(image(SIDE, SIDE, 0), 2)
    item["reference_image"] = item["image"].roll(8, dims=2)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 2e-3)
    steps = []
    for _ in range(25):  # after 12 some seeds are short of the bound
        steps.append(model([item, item]))
        optimizer.zero_grad()
        sum(steps[-1].values()).backward()
        optimizer.step()
    for name in ("loss_box", "loss_cls", "loss_box_warped", "loss_cls_warped", "loss_mask_warped"):
        assert steps[-1][name] < 0.7 * steps[0][name], name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["MODEL.YOLACT_EDGE.STAGE", "all"], "STAGE is 'all'; expected image, flow or joint"),
        (["MODEL.YOLACT_EDGE.WARPED", ["p4"]], "expected the coarsest levels"),
        (["MODEL.YOLACT_EDGE.WARPED", []], "expected the coarsest levels"),
        (["MODEL.YOLACT_EDGE.KEYFRAME_INTERVAL", 0], "KEYFRAME_INTERVAL is 0; expected a whole"),
        (["MODEL.YOLACT_EDGE.FLOW_LAYERS", [[1]]], "expected 3 lists"),
        (["MODEL.BACKBONE.NAME", "build_darknet_backbone"], "DarkNet does not allow"),
    ],
)
def test_keys_that_cannot_be_used_are_refused(overrides: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(*overrides)


def test_mobilenet_has_the_outputs_of_the_authors() -> None:
    backbone = MobileNetV2(1.0, "BN").eval()
    with torch.no_grad():
        outputs = backbone(torch.randn(1, 3, 96, 96))
    expected = {"stage3": (32, 8), "stage4": (64, 16), "stage5": (160, 32)}
    assert {k: (v.channels, v.stride) for k, v in backbone.output_shape().items()} == expected
    assert {k: (v.shape[1], 96 // v.shape[2]) for k, v in outputs.items()} == expected


def test_a_video_model_on_mobilenet_trains_and_predicts() -> None:
    backbone = ["MODEL.BACKBONE.NAME", "build_mobilenet_v2_backbone", "MODEL.MOBILENET.WIDTH", 0.25]
    model = restless(build(*backbone)).train()
    sum(model([video_item(0), video_item(1)]).values()).backward()
    model.eval()
    images = model.preprocess([image(SIDE, SIDE, 0)])
    with torch.no_grad():
        outputs, state = model.keyframe(images)
        shapes = [x.shape for x in model.between(images, state)]
    assert shapes == [x.shape for x in outputs]


def test_the_normalisations_of_mobilenet_are_folded() -> None:
    backbone = MobileNetV2(0.25, "BN")
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = backbone.eval()(images)
        folded = optimize(backbone)(images)
    assert not [x for x in backbone.modules() if isinstance(x, nn.BatchNorm2d)]
    for name, x in expected.items():
        torch.testing.assert_close(folded[name], x, rtol=1e-4, atol=1e-4)
