"""DeepMask as a whole; its parts are in ``test_deepmask_parts.py``."""

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from torch import Tensor

import instseg
from instseg.checkpoint import Checkpointer
from instseg.config.classes import num_classes_key
from instseg.errors import CheckpointError, ConfigError
from instseg.inference.predictor import Predictor
from instseg.projects.deepmask import FILL, DeepMask, Scale, pyramid
from instseg.training.trainer import Trainer
from tests.support.deepmask_common import NearSighted, mask_patch, narrow_resnet, score_patch, small

RELEASED = "deepmask/deepmask_resnet50_coco.yaml"
PAPER = "deepmask/deepmask_vgg_a_coco.yaml"
SHAPES = "deepmask/deepmask_shapes.yaml"


def meta(config: str) -> DeepMask:
    """The model of a configuration, without memory for its weights."""
    cfg = instseg.load_cfg(config, ["MODEL.DEVICE", "cpu"])
    with torch.device("meta"):
        return DeepMask(**DeepMask.from_config(cfg))


def count(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def test_the_released_network_has_the_parameters_its_program_printed() -> None:
    model = meta(RELEASED)
    assert count(model.backbone) == 8_512_704
    assert count(model.embedding.reduce) == 131_200
    assert count(model.embedding.project) == 6_554_112
    assert count(model.mask_head) == 1_608_768
    assert count(model.score_head) == 526_337
    assert count(model) == 17_333_121


def test_the_network_of_the_paper_has_75_million_parameters() -> None:
    model = meta(PAPER)
    assert count(model.backbone) == 9_220_480
    assert count(model.embedding.reduce) == 512 * 512 + 512
    assert count(model.embedding.project) == 512 * 14 * 14 * 512 + 512
    assert count(model.mask_head) == 512 * 56 * 56 + 56 * 56
    assert count(model.score_head) == (512 * 7 * 7 * 512 + 512) + (512 * 1024 + 1024) + (1024 + 1)
    assert count(model) == 75_844_545


def shapes_inside(model: DeepMask, side: int) -> dict[str, tuple[int, ...]]:
    """Output of each layer for a training patch."""
    shapes: dict[str, tuple[int, ...]] = {}

    def remember(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                shapes[name] = tuple(output.shape[1:])

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(remember(name))
    model.to("meta").train()
    maps = model.patch_features([{"image": torch.zeros(3, side, side, device="meta")}] * 2)
    shapes["cropped"] = tuple(maps[model.in_feature].shape[1:])
    vectors = model.embedding(maps[model.in_feature])
    model.score_head(maps[model.in_feature], vectors)
    shapes["mask"] = tuple(model.mask_logits(vectors[:, :, 0, 0]).shape[1:])
    return shapes


def test_the_layers_of_the_released_network_have_the_shapes_of_the_specification() -> None:
    expected = {
        "backbone.conv1": (64, 96, 96),
        "backbone.layer1": (256, 48, 48),
        "backbone.layer2": (512, 24, 24),
        "backbone.layer3": (1024, 12, 12),
        "cropped": (1024, 10, 10),
        "embedding.reduce": (128, 10, 10),
        "embedding": (512, 1, 1),
        "score_head.hidden": (1024, 1, 1),
        "score_head.output": (1, 1, 1),
        "mask": (56, 56),
    }
    assert expected.items() <= shapes_inside(meta(RELEASED), 192).items()


def test_the_layers_of_the_network_of_the_paper_have_the_shapes_of_the_specification() -> None:
    expected = {
        "cropped": (512, 14, 14),
        "embedding.reduce": (512, 14, 14),
        "embedding": (512, 1, 1),
        "score_head.pooled": (512, 1, 1),
        "score_head.hidden": (1024, 1, 1),
        "mask": (56, 56),
    }
    assert expected.items() <= shapes_inside(meta(PAPER), 224).items()


@pytest.mark.parametrize("branch", ["shared", "pooled"])
def test_dense_inference_equals_patches_at_every_position_of_the_grid(branch: str) -> None:
    """Through a trunk that sees no farther than a patch's context, from pixels to results."""
    model = small(backbone=NearSighted(), score_branch=branch, max_proposals=10**6).eval()
    image = torch.rand(3, 90, 120) * 255
    with torch.no_grad():
        for factor in (0.5, 1.0, 1.3):
            scale = Scale(factor, round(90 * factor), round(120 * factor))
            windows, _ = model.search(image, scale)
            logits = model.logits_of(windows, None)
            patches = all_patches(model, image, scale, windows.cells)
            maps = model.patch_features(patches)["res4"]
            vectors = model.embedding(maps)
            scores = model.score_head(maps, vectors)[:, 0, 0].sigmoid()
            rows = -(-(scale.height + 64) // 16) - 3
            columns = -(-(scale.width + 64) // 16) - 3
            assert len(patches) == rows * columns
            torch.testing.assert_close(windows.scores, scores, rtol=0, atol=1e-4)
            alone = model.mask_logits(vectors[:, :, 0, 0])
            torch.testing.assert_close(logits, alone, rtol=0, atol=1e-4)


def all_patches(
    model: DeepMask, image: Tensor, scale: Scale, cells: Tensor
) -> list[dict[str, Tensor]]:
    """Windows cut from the resized image one by one, with their context."""
    size = (scale.height, scale.width)
    resized = torch.nn.functional.interpolate(
        image[None], size, mode="bilinear", align_corners=True
    )[0]
    margin = model.patch_size // 2
    side = model.patch_size + 2 * model.context
    wide = torch.nn.functional.pad(resized, (side,) * 4, value=FILL)
    patches = []
    for row, column in cells.tolist():
        top, left = (16 * i - margin - model.context + side for i in (row, column))
        patches.append({"image": wide[:, top : top + side, left : left + side]})
    return patches


def test_the_resnet_sees_a_patch_as_the_middle_of_an_image_of_its_size() -> None:
    """The image with its margin is then the patch with its context, borders included."""
    model = small().eval()
    patch = torch.full((3, 96, 96), FILL)
    patch[:, 32:64, 32:64] = torch.rand(3, 32, 32) * 255
    with torch.no_grad():
        windows, _ = model.search(patch[:, 32:64, 32:64], Scale(1.0, 32, 32))
        middle = (windows.cells == 1).all(dim=1)
        alone = model.embedding(model.patch_features([{"image": patch}])["res4"])[0, :, 0, 0]
    assert windows.cells.amax() == 2
    torch.testing.assert_close(windows.vectors[middle][0], alone, rtol=0, atol=1e-4)


def test_every_window_of_an_image_of_480_x_640_is_searched() -> None:
    """31 x 41 at scale 1, 5203 at the seven scales."""
    model = small(
        backbone=NearSighted(1), embedding_dim=1, patch_size=160, max_proposals=10**6, max_size=2000
    ).eval()
    octaves = (-2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5)
    counts = []
    with torch.no_grad():
        for scale in pyramid(480, 640, octaves, 2000):
            windows, _ = model.search(torch.zeros(3, 480, 640), scale)
            counts.append(len(windows.scores))
    assert counts[-2] == 31 * 41
    assert sum(counts) == 5203


def test_a_perfect_window_becomes_the_mask_of_the_instance() -> None:
    """Window (2, 3) of scale 1 has its top-left corner at (2 * 16 - 32, 3 * 16 - 32)."""
    model = small(octaves=(0.0,), max_proposals=1).eval()
    logits = torch.full((16, 16), -9.0)
    logits[4:12, 6:10] = 9.0
    model.mask_logits = lambda vectors: logits.expand(len(vectors), 16, 16)  # type: ignore[method-assign]
    scores = torch.full((1, 5, 6), -1.0)
    scores[0, 2, 3] = 1
    model.score_head.forward = lambda *_: scores  # type: ignore[method-assign, assignment]
    instances = model.propose({"image": torch.zeros(3, 64, 80)})
    # 16 logits become 64 pixels, corner to corner: 4.2 pixels from one to the next.
    box = instances.pred_boxes.tensor[0]
    assert box.tolist() == [16 + 23, 15, 16 + 41, 49]
    assert instances.pred_masks[0, 17:47, 41:55].all()
    assert instances.scores.tolist() == pytest.approx([torch.tensor(1.0).sigmoid().item()])


def test_results_have_the_size_asked_for() -> None:
    model = small(octaves=(0.0,), mask_threshold=0.01).eval()
    with torch.no_grad():
        image = torch.rand(3, 64, 80) * 255
        plain = model.propose({"image": image})
        large = model.propose({"image": image, "height": 128, "width": 240})
    assert large.image_size == (128, 240)
    assert large.pred_masks.shape[1:] == (128, 240)
    ratio = large.pred_boxes.tensor / plain.pred_boxes.tensor.clamp(min=1)
    assert ratio.median(dim=0).values.tolist()[2:] == pytest.approx([3, 2], rel=0.1)


def test_there_is_no_suppression_and_results_are_in_the_order_of_scores() -> None:
    model = small(mask_threshold=0.01, octaves=(0.0, 0.5), max_proposals=50).eval()
    with torch.no_grad():
        instances = model.propose({"image": torch.rand(3, 80, 96) * 255})
    assert len(instances) == 50
    assert (instances.scores.diff() <= 0).all()
    assert instances.pred_classes.unique().tolist() == [0]


def test_masks_without_a_pixel_are_dropped() -> None:
    model = small(octaves=(0.0,)).eval()
    model.mask_logits = lambda vectors: torch.full((len(vectors), 16, 16), -5.0)  # type: ignore[method-assign]
    assert len(model.propose({"image": torch.zeros(3, 64, 64)})) == 0


def test_a_batch_gives_what_single_images_give() -> None:
    model = small().eval()
    images = [{"image": torch.rand(3, *size) * 255} for size in ((96, 128), (70, 50))]
    with torch.no_grad():
        together = model(images)
        alone = [model([image])[0] for image in images]
    for a, b in zip(together, alone, strict=True):
        assert len(a["instances"]) > 0
        assert torch.equal(a["instances"].scores, b["instances"].scores)
        assert torch.equal(a["instances"].pred_masks, b["instances"].pred_masks)


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (300, 2)])
def test_a_very_thin_image_gives_a_valid_result(size: tuple[int, int]) -> None:
    with torch.no_grad():
        instances = small(max_proposals=30).eval()([{"image": torch.zeros(3, *size)}])[0][
            "instances"
        ]
    assert instances.pred_masks.shape == (len(instances), *size)
    assert instances.pred_masks.flatten(1).any(dim=1).all()


def test_a_huge_image_is_searched_no_larger_than_the_limit() -> None:
    model = small(octaves=(-1.0, 0.0, 1.0), max_size=128, max_proposals=3).eval()
    shapes = []
    model.backbone.register_forward_hook(lambda *a: shapes.append(a[1][0].shape[-2:]))
    with torch.no_grad():
        model.propose({"image": torch.zeros(3, 1500, 1000)})
    assert [tuple(shape) for shape in shapes] == [(128 + 64, 85 + 64)]


def test_weights_that_are_not_finite_are_an_error_not_a_result() -> None:
    model = small().eval()
    torch.nn.init.constant_(model.score_head.output.weight, torch.nan)
    with pytest.raises(CheckpointError, match="values that are not finite"):
        model([{"image": torch.zeros(3, 64, 64)}])


@pytest.mark.parametrize("branch", ["shared", "pooled"])
@pytest.mark.parametrize("patch", [mask_patch, score_patch])
def test_every_parameter_gets_a_gradient_from_either_kind_of_batch(branch: str, patch: Any) -> None:
    model = small(score_branch=branch).train()
    losses = model([patch(), patch()])
    sum(losses.values()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


@pytest.mark.parametrize(
    ("patch", "trained", "other"),
    [(mask_patch, "mask_head", "score_head"), (score_patch, "score_head", "mask_head")],
)
def test_a_batch_trains_the_trunk_and_one_head(patch: Any, trained: str, other: str) -> None:
    model = small(dropout=0.0).train()
    sum(model([patch(), patch()]).values()).backward()
    moved = {name for name, p in model.named_parameters() if p.grad.abs().sum() > 0}
    for part, moves in (("backbone.conv1", True), (trained, True), (other, False)):
        assert any(name.startswith(part) for name in moved) == moves


def test_a_batch_for_both_heads_is_refused() -> None:
    with pytest.raises(ValueError, match=r"trains one head; found \['mask', 'score'\]"):
        small().train()([mask_patch(), score_patch()])


def test_a_patch_of_another_size_is_refused() -> None:
    patch = {**mask_patch(), "image": torch.zeros(3, 64, 64)}
    with pytest.raises(ValueError, match="64, 64.* pixels; expected 96 x 96"):
        small().train()([patch])


def test_the_losses_of_a_batch_are_weighted_as_stated() -> None:
    """Untouched logits of 0 cost log 2 per sample: 32 of them, and 32 / 32."""
    model = small().train()
    for head in (model.mask_head, model.score_head.output):
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
    log2 = torch.tensor(2.0).log().item()
    assert model([mask_patch()] * 32)["loss_mask"].item() == pytest.approx(32 * log2, rel=1e-5)
    assert model([score_patch()] * 32)["loss_score"].item() == pytest.approx(log2, rel=1e-5)


def test_the_network_learns_an_image() -> None:
    """From windows of it, the mask of the one centred on the instance and the scores of all."""
    model = small(backbone=narrow_resnet(norm="BN"), dropout=0.0, octaves=(0.0,), max_proposals=1)
    image = torch.full((3, 128, 160), 90.0)
    image[:, 48:80, 80:112] = 200
    cells = torch.cartesian_prod(torch.arange(9), torch.arange(11))
    patches = all_patches(model, image, Scale(1.0, 128, 160), cells)
    distance = (cells - torch.tensor([4, 6])).abs().amax(dim=1)
    target = mask_patch()["gt_mask"]
    centred = {**patches[int(distance.argmin())], "head": "mask", "gt_mask": target}
    positive = {**centred, "head": "score", "label": 1.0}
    negative = [
        {**patches[i], "head": "score", "label": -1.0} for i in (distance > 1).nonzero()[:, 0]
    ]
    optimizer = torch.optim.Adam(model.train().parameters(), 3e-3)
    for step in range(30):
        score_batch = [positive] * 3 + negative[step % 10 :: 10]
        losses = model([centred] * 2 if step % 2 else score_batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    with torch.no_grad():
        mask = model.eval()([{"image": image}])[0]["instances"].pred_masks[0]
    true_mask = image[0] > 100
    assert (mask & true_mask).sum() / (mask | true_mask).sum() > 0.7


def test_dense_inference_is_compared_with_some_of_the_patches() -> None:
    model = small(backbone=NearSighted(), octaves=(0.0,)).eval()
    with torch.no_grad():
        (comparison,) = model.comparisons(torch.rand(3, 160, 192) * 255)
        comparison.ours()
        comparison.theirs()
    # ceil((160 + 64) / 16) - 3 rows, ceil((192 + 64) / 16) - 3 columns; every second, 64 at most.
    assert comparison.name == f"{11 * 13} windows"
    assert comparison.peer == "patch by patch, from 64 of them"
    assert comparison.share == pytest.approx(64 / 143)


def test_the_model_is_class_agnostic() -> None:
    assert num_classes_key(instseg.load_cfg(SHAPES)) is None


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("DEEPMASK.PATCH_SIZE", 100, "PATCH_SIZE is 100; expected a multiple of 32"),
        ("DEEPMASK.CONTEXT", 8, "CONTEXT is 8; expected a multiple of 16"),
        ("DEEPMASK.OBJECT_SIZE", -1, "OBJECT_SIZE is -1; expected pixels"),
        (
            "DEEPMASK.TRAIN_MASK_SIZE",
            0,
            "TRAIN_MASK_SIZE is 0; expected a whole number of at least 2",
        ),
        ("DEEPMASK.SHIFT", -1.0, "SHIFT is -1.0; expected pixels, at least 0"),
        ("DEEPMASK.SCALE_JITTER", -0.1, "SCALE_JITTER is -0.1; expected octaves"),
        ("DEEPMASK.SCORE_BRANCH", "both", "SCORE_BRANCH is 'both'; expected shared or pooled"),
        ("DEEPMASK.MASK_THRESH_TEST", 1.0, "MASK_THRESH_TEST is 1.0; expected a probability"),
        ("DEEPMASK.IN_FEATURE", "res5", "IN_FEATURE is 'res5'; the backbone gives res4"),
        ("DEEPMASK.OCTAVES_TEST", "()", "OCTAVES_TEST is \\(\\); expected one number or more"),
        ("DEEPMASK.SCORE_FRACTION", 1.5, "SCORE_FRACTION is 1.5; expected a number from 0 to 1"),
        ("INPUT.RANDOM_FLIP", "vertical", "'vertical'; expected none or horizontal for patches"),
        ("MODEL.RESNETS.DEPTH", 152, "DEPTH is 152; expected 18, 34, 50 or 101"),
        ("MODEL.RESNETS.OUT_FEATURES", ["res5"], "is .'res5'.; expected some of conv1"),
        ("MODEL.RESNETS.OUT_FEATURES", [], "OUT_FEATURES is ..; expected some of conv1"),
        ("TEST.DETECTIONS_PER_IMAGE", 0, "PER_IMAGE is 0; expected at least 1, for DeepMask"),
    ],
)
def test_values_that_make_no_network_are_refused(key: str, value: Any, message: str) -> None:
    key = f"MODEL.{key}" if key.startswith("DEEPMASK.") else key
    with pytest.raises(ConfigError, match=message):
        Trainer.build_model(instseg.load_cfg(SHAPES, ["MODEL.DEVICE", "cpu", key, value]))


def test_both_predictors_agree(tmp_path: Path) -> None:
    cfg = instseg.load_cfg(SHAPES, ["MODEL.DEVICE", "cpu", "TEST.DETECTIONS_PER_IMAGE", 20])
    Checkpointer(build_model(cfg), str(tmp_path)).save("weights")
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    image = (torch.rand(60, 80, 3) * 255).byte().numpy()
    ours = Predictor(cfg)(image)["instances"]
    stock = DefaultPredictor(cfg)(image)["instances"]
    assert len(ours) > 0
    assert torch.equal(ours.pred_masks, stock.pred_masks)
    assert torch.equal(ours.scores, stock.scores)
