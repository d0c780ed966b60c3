"""SharpMask: its refinement is right, and nothing else of it learns."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import instseg
from instseg.config.classes import num_classes_key
from instseg.errors import ConfigError
from instseg.projects.deepmask import Scale
from instseg.projects.sharpmask import Refinement, SharpMask, gather_windows
from instseg.training.trainer import Trainer
from tests.support.deepmask_common import mask_patch, narrow_resnet, score_patch, settings
from tests.support.deepmask_common import small as small_deepmask

RELEASED = "sharpmask/sharpmask_resnet50_coco.yaml"
SHAPES = "sharpmask/sharpmask_shapes.yaml"
MAPS = ["conv1", "res2", "res3", "res4"]


def small(**changed: Any) -> SharpMask:
    torch.manual_seed(0)
    trunk = narrow_resnet(norm=changed.pop("norm", ""), out_features=MAPS)
    sizes = {"mask_dim": 16, "skip_dim": 16, "reduced_dims": (8, 8, 8, 8)}
    return SharpMask(backbone=trunk, **settings(refactored=True) | sizes | changed)


def released() -> SharpMask:
    cfg = instseg.load_cfg(RELEASED, ["MODEL.DEVICE", "cpu"])
    with torch.device("meta"):
        return SharpMask(**SharpMask.from_config(cfg)).to("meta")


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_released_network_has_the_parameters_of_the_specification() -> None:
    refinement = released().refinement
    assert [count(net) for net in refinement.horizontal] == [612_976, 305_368, 152_428, 19_694]
    assert count(refinement.start) == 1_641_600
    assert [count(net) for net in refinement.vertical] == [13_872, 3_480, 876, 222]
    assert count(refinement.output) == 19


def test_all_that_is_trained_is_the_refinement() -> None:
    model = released()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 1_090_466 + 1_660_050 + 19
    assert count(model) == 17_333_121 + trained


def test_every_stage_doubles_the_size_and_halves_the_channels() -> None:
    model = released().train()
    shapes: list[tuple[int, ...]] = []
    for net in (*model.refinement.horizontal, *model.refinement.vertical):
        net.register_forward_hook(lambda *a: shapes.append(tuple(a[2].shape[1:])))
    patch = {"image": torch.zeros(3, 192, 192, device="meta")}
    maps = model.patch_features([patch])
    assert [tuple(maps[name].shape[1:]) for name in model.levels] == [
        (1024, 10, 10),
        (512, 20, 20),
        (256, 40, 40),
        (64, 80, 80),
    ]
    skips = model.refinement.skips([maps[name] for name in model.levels])
    logits = model.refinement(torch.zeros(1, 512, device="meta"), skips)
    expected = [(16, 10, 10), (8, 20, 20), (4, 40, 40), (2, 80, 80)]
    assert shapes == expected * 2
    assert logits.shape == (1, 160, 160)


def test_the_sum_of_both_nets_is_the_convolution_of_both_maps_together() -> None:
    """The paper's plain module (section 3.1), worked out with one convolution of [V, H]."""
    refinement = Refinement(
        embedding_dim=4, window=3, feature_channels=[5], mask_dim=8, skip_dim=6, reduced_dims=[7]
    )
    features, masks = torch.rand(2, 5, 3, 3), torch.rand(2, 8, 3, 3)
    horizontal, vertical = refinement.horizontal[0], refinement.vertical[0]
    together = torch.cat([vertical[:2](masks), horizontal[:4](features)], dim=1)
    weight = torch.cat([vertical[2].weight, horizontal[4].weight], dim=1)
    bias = vertical[2].bias + horizontal[4].bias
    plain = F.conv2d(F.pad(together, (1,) * 4, mode="replicate"), weight, bias)
    torch.testing.assert_close(vertical(masks) + horizontal(features), plain)


def test_masks_are_enlarged_by_repetition() -> None:
    refinement = Refinement(
        embedding_dim=2, window=2, feature_channels=[3], mask_dim=2, skip_dim=2, reduced_dims=[2]
    )
    centre = torch.zeros(1, 1, 3, 3)
    centre[..., 1, 1] = 1
    refinement.output.weight.data, refinement.output.bias.data = centre, torch.zeros(1)
    skip = torch.tensor([[[[100.0, 200.0], [300.0, 400.0]]]])
    logits = refinement(torch.zeros(1, 2), [skip])
    shift = logits[0, 0, 0] - 100
    expected = skip[0, 0].repeat_interleave(2, 0).repeat_interleave(2, 1)
    torch.testing.assert_close((logits[0] - shift).round(), expected, atol=1, rtol=0)


def test_windows_are_cut_out_with_zeros_beyond_the_map() -> None:
    x = torch.arange(1.0, 13).view(1, 3, 4)
    windows = gather_windows(x, torch.tensor([[0, 1], [2, 3]]), 2)
    assert windows.tolist() == [[[[2, 3], [6, 7]]], [[[12, 0], [0, 0]]]]
    assert gather_windows(x, torch.zeros(0, 2, dtype=torch.int64), 2).shape == (0, 1, 2, 2)


def refined(model: SharpMask, image: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and cells of all windows of an image at its own size."""
    model.max_proposals = 10**6
    with torch.no_grad():
        windows, level = model.search(image, Scale(1.0, *image.shape[-2:]))
        order = (windows.cells @ torch.tensor([10**6, 1])).argsort()
        return model.logits_of(windows[order], level), windows.cells[order]


def test_the_dense_form_equals_the_plain_one_away_from_borders() -> None:
    """Three convolutions of the coarsest map reach 48 pixels into a window of 224."""
    image = torch.rand(3, 64, 80) * 255
    both = [refined(small(refactored=r, patch_size=224).eval(), image)[0] for r in (True, False)]
    inner = slice(96, 128)
    torch.testing.assert_close(
        both[0][:, inner, inner], both[1][:, inner, inner], rtol=0, atol=1e-4
    )
    assert not torch.allclose(both[0], both[1])


def test_inference_of_a_window_equals_training_away_from_borders() -> None:
    """A patch that is the whole padded image; its context lies beyond the window."""
    model = small(patch_size=224).eval()
    image = torch.rand(3, 32, 32) * 255
    logits, cells = refined(model, image)
    middle = int(((cells == 1).all(dim=1)).nonzero())
    patch = F.pad(image, (112,) * 4, value=127.5)
    with torch.no_grad():
        maps = model.patch_features([{"image": patch}])
        vectors = model.embedding(maps["res4"])[:, :, 0, 0]
        alone = model.refinement(vectors, model.refinement.skips([maps[n] for n in model.levels]))
    inner = slice(96, 128)
    torch.testing.assert_close(
        logits[middle, inner, inner], alone[0, inner, inner], rtol=0, atol=1e-4
    )


def test_a_trained_deepmask_is_found_again_under_the_same_names() -> None:
    deepmask = small_deepmask()
    missing, unexpected = small().load_state_dict(deepmask.state_dict(), strict=False)
    assert not unexpected
    assert {name.split(".")[0] for name in missing} == {"refinement"}


def test_training_changes_neither_weights_nor_statistics_of_deepmask() -> None:
    model = small(norm="BN").train()
    before = {k: v.clone() for k, v in model.state_dict().items() if "refinement" not in k}
    model([mask_patch(mask=64)] * 2)["loss_mask"].backward()
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    with_gradient = {
        name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None
    }
    assert with_gradient == {"refinement"}
    assert not [n for n, p in model.refinement.named_parameters() if p.grad is None]


def test_patches_for_the_score_are_refused() -> None:
    with pytest.raises(ValueError, match="SharpMask trains the mask alone"):
        small().train()([score_patch()])


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (90, 70)])
def test_an_image_alone_gives_what_it_gives_in_a_batch(size: tuple[int, int]) -> None:
    model = small(max_proposals=20, mask_threshold=0.4).eval()
    images = [{"image": torch.rand(3, *size) * 255}, {"image": torch.rand(3, 64, 64) * 255}]
    with torch.no_grad():
        together = model(images)[0]["instances"]
        alone = model(images[:1])[0]["instances"]
    assert alone.pred_masks.shape[1:] == size
    assert torch.equal(together.pred_masks, alone.pred_masks)
    assert torch.equal(together.scores, alone.scores)


def test_scores_are_those_of_deepmask() -> None:
    sharp, plain = small().eval(), small_deepmask().eval()
    plain.load_state_dict(sharp.state_dict(), strict=False)
    scale = Scale(1.0, 64, 64)
    image = torch.rand(3, 64, 64) * 255
    with torch.no_grad():
        windows, expected = (model.search(image, scale)[0] for model in (sharp, plain))
    assert torch.equal(windows.scores, expected.scores)
    assert torch.equal(windows.cells, expected.cells)


def test_the_refinement_learns_a_mask_finer_than_a_cell() -> None:
    model = small(mask_dim=64, skip_dim=64).train()
    patch = mask_patch(mask=64)
    patch["image"] = torch.full((3, 96, 96), 90.0)
    patch["image"][:, 33:52, 37:61] = 200
    patch["gt_mask"] = torch.where(patch["image"][0, 16:80, 16:80] > 100, 1.0, -1.0)
    optimizer = torch.optim.Adam(model.refinement.parameters(), 1e-2)
    for _ in range(100):  # after 60 one of six seeds has found nothing, after 90 all are above 0.93
        loss = model([patch])["loss_mask"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        maps = model.patch_features([patch])
        vectors = model.embedding(maps["res4"])[:, :, 0, 0]
        skips = model.refinement.skips([maps[n] for n in model.levels])
        predicted = model.refinement(vectors, skips)[0] > 0
    true_mask = patch["gt_mask"] > 0
    assert (predicted & true_mask).sum() / (predicted | true_mask).sum() > 0.9


def test_both_forms_are_compared_on_the_windows_that_are_kept() -> None:
    model = small(octaves=(0.0,), max_proposals=5).eval()
    with torch.no_grad():
        _, comparison = model.comparisons(torch.rand(3, 64, 64) * 255)
        comparison.ours()
        comparison.theirs()
    assert comparison.name == "refined masks of 5 windows"
    assert model.refactored


def test_the_model_is_class_agnostic() -> None:
    assert num_classes_key(instseg.load_cfg(SHAPES)) is None


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "DEEPMASK.SCORE_FRACTION",
            0.5,
            "0.5; expected 0.0, as SharpMask trains the mask alone",
        ),
        ("DEEPMASK.TRAIN_MASK_SIZE", 48, "TRAIN_MASK_SIZE is 48; expected 96, which is PATCH_SIZE"),
        ("SHARPMASK.MASK_DIM", 24, "MASK_DIM is 24; expected a multiple of 16"),
        ("SHARPMASK.REDUCED_DIMS", "(8, 8)", "REDUCED_DIMS is .8, 8.; expected 4 numbers"),
        ("RESNETS.OUT_FEATURES", "['res4']", "needs maps of the strides 16, 8 ... 2"),
    ],
)
def test_values_that_make_no_network_are_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Trainer.build_model(
            instseg.load_cfg(SHAPES, ["MODEL.DEVICE", "cpu", f"MODEL.{key}", value])
        )
