"""DeepMask's layers, losses and geometry, against numbers worked out by hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torchvision.models import resnet50

from instseg.modeling import masks_of
from instseg.projects.deepmask import (
    FILL,
    PooledScoreHead,
    Scale,
    SymmetricConv2d,
    SymmetricResNet,
    Windows,
    best_windows,
    mask_loss,
    paste,
    pyramid,
    resize_padded,
    score_loss,
    symmetric_pad,
)
from tests.support.deepmask_common import narrow_resnet


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))
def test_symmetric_padding_is_numpys(height: int, width: int, margin: int) -> None:
    x = torch.arange(2.0 * height * width).view(1, 2, height, width)
    pads = ((0, 0), (0, 0), (margin, margin), (margin, margin))
    expected = np.pad(x.numpy(), pads, mode="symmetric")
    assert torch.equal(symmetric_pad(x, margin), torch.from_numpy(expected))


@pytest.mark.parametrize("margin", [1, 3])
def test_gradients_of_what_padding_adds_are_dropped(margin: int) -> None:
    x = torch.rand(1, 1, 4, 5, requires_grad=True)
    padded = symmetric_pad(x, margin)
    weight = torch.rand_like(padded)
    (padded * weight).sum().backward()
    assert torch.equal(x.grad, weight[:, :, margin:-margin, margin:-margin])


def test_a_symmetric_convolution_keeps_the_size_and_mirrors_the_border() -> None:
    conv = SymmetricConv2d(1, 1, 3, bias=False)
    torch.nn.init.ones_(conv.weight)
    assert conv(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])).tolist() == [[[[18, 21], [24, 27]]]]


def test_the_trunk_is_torchvisions_but_for_the_border() -> None:
    ours = SymmetricResNet(
        depth=50,
        in_channels=3,
        stem_channels=64,
        width=64,
        out_channels=256,
        norm="BN",
        out_features=["conv1", "res2", "res3", "res4"],
    ).eval()
    theirs = resnet50().eval()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not missing
    assert {name.split(".")[0] for name in unexpected} == {"layer4", "fc"}
    x = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        expected = theirs.layer1(theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x)))))
        features = ours(x)["res2"]
    torch.testing.assert_close(features[..., 20:36, 20:36], expected[..., 20:36, 20:36])
    assert not torch.allclose(features[..., 0, :], expected[..., 0, :])


def test_maps_are_rounded_up_as_windows_are_counted() -> None:
    """ceil((h + 160) / 16) - 9 rows of windows for an image h pixels high."""
    trunk = narrow_resnet(out_features=["conv1", "res2", "res3", "res4"])
    maps = trunk(torch.zeros(1, 3, 33, 49))
    assert [tuple(maps[name].shape[-2:]) for name in maps] == [(17, 25), (9, 13), (5, 7), (3, 4)]
    assert [shape.stride for shape in trunk.output_shape().values()] == [2, 4, 8, 16]


def test_a_frozen_trunk_has_no_trainable_normalisation() -> None:
    names = [name for name, _ in narrow_resnet(norm="FrozenBN").named_parameters()]
    assert not [name for name in names if "bn" in name]
    assert "layer2.0.downsample.0.weight" in names


def test_pooled_scores_equal_those_of_the_interleaving_trick() -> None:
    """The paper pools with stride 2 at four offsets; each gives every second window."""
    head = PooledScoreHead(3, 4, 5, window=6, dropout=0.5).eval()
    features = torch.rand(1, 3, 10, 11)
    dense = head(features, features)
    plain = torch.nn.Conv2d(3, 4, 3)
    plain.weight, plain.bias = head.pooled.weight, head.pooled.bias
    interleaved = torch.zeros_like(dense)
    for i in (0, 1):
        for j in (0, 1):
            x = F.relu(plain(F.max_pool2d(features[:, :, i:, j:], 2)))
            scores = head.output(F.relu(head.hidden(x)))[:, 0]
            cells = interleaved[:, i::2, j::2]
            cells.copy_(scores[:, : cells.shape[1], : cells.shape[2]])
    torch.testing.assert_close(dense, interleaved)


def test_the_mask_loss_is_a_sum_over_patches_of_means_over_pixels() -> None:
    logits = torch.zeros(2, 2, 2)
    logits[1] = math.log(3)  # probability 0.75
    targets = torch.ones(2, 2, 2)
    targets[1, 0] = -1
    right, wrong = math.log(4 / 3), math.log(4)
    expected = math.log(2) + (right + wrong) / 2
    assert mask_loss(logits, targets).item() == pytest.approx(expected)


def test_a_score_weighs_a_32nd_of_a_mask() -> None:
    logits = torch.tensor([math.log(3), math.log(3)])
    labels = torch.tensor([1.0, -1.0])
    expected = (math.log(4 / 3) + math.log(4)) / 32
    assert score_loss(logits, labels, 1 / 32).item() == pytest.approx(expected)
    masks = mask_loss(torch.zeros(32, 4, 4), torch.ones(32, 4, 4))
    scores = score_loss(torch.zeros(32), torch.ones(32), 1 / 32)
    assert (scores / masks).item() == pytest.approx(1 / 32)


def test_levels_have_the_sizes_of_the_released_code() -> None:
    """floor(s * h + 0.5)."""
    levels = pyramid(480, 640, (0.5, -1.0, 0.0), 2000)
    assert [(level.height, level.width) for level in levels] == [(240, 320), (480, 640), (679, 905)]


def test_levels_beyond_the_limit_become_one() -> None:
    levels = pyramid(50, 100, (0.0, 1.0, 2.0), 150)
    assert [(level.height, level.width) for level in levels] == [(50, 100), (75, 150)]


def test_a_level_is_resized_corner_to_corner_and_surrounded_by_the_fill() -> None:
    image = torch.tensor([0.0, 30.0]).expand(3, 2, 2)
    padded = resize_padded(image, Scale(2.0, 4, 4), margin=2, multiple=5)
    assert padded.shape == (1, 3, 10, 10)
    assert padded[0, 0, 2, 2:6].tolist() == pytest.approx([0, 10, 20, 30])
    assert (padded[0, :, :2] == FILL).all() and (padded[0, :, 6:] == FILL).all()
    assert (padded[0, :, :, :2] == FILL).all() and (padded[0, :, :, 6:] == FILL).all()


def test_the_best_windows_of_all_scales_are_kept_the_smaller_scale_first_of_equals() -> None:
    windows = [
        Windows(Scale(f, 1, 1), torch.tensor(s), torch.zeros(2, 2), torch.zeros(2, 1))
        for f, s in ((0.5, [0.9, 0.5]), (1.0, [0.7, 0.5]))
    ]
    kept = best_windows(windows, 3)
    assert kept[0].scores.tolist() == pytest.approx([0.9, 0.5])
    assert kept[1].scores.tolist() == pytest.approx([0.7])


def drawn(logits: Tensor, cells: Tensor, size: tuple[int, int], **geometry: Any) -> Tensor:
    """(N, H, W) masks of windows."""
    placed = paste(logits, cells, range(len(cells)), size, **geometry)
    return masks_of(placed, len(cells), size, cropped=False, device="cpu")


def test_a_window_is_pasted_where_it_was_seen() -> None:
    """Window (7, 9) at scale 1/2: top-left (16 * 7 - 80) * 2 = 64, (16 * 9 - 80) * 2 = 128."""
    geometry = {"factors": (0.5, 0.5), "patch_size": 160, "stride": 16, "threshold": 0.0}
    masks = drawn(torch.ones(1, 56, 56), torch.tensor([[7, 9]]), (500, 700), **geometry)
    rows, columns = masks[0].nonzero().unbind(1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (64, 383, 128, 447)


def test_positions_and_sides_are_rounded_down() -> None:
    """At 2^0.5 a window has floor(160 / 1.41421) = 113 pixels; its corner is at -80 / 1.41421."""
    factor = 2**0.5
    geometry = {"factors": (factor, factor), "patch_size": 160, "stride": 16, "threshold": 0.0}
    masks = drawn(torch.ones(1, 56, 56), torch.tensor([[0, 6]]), (200, 200), **geometry)
    rows, columns = masks[0].nonzero().unbind(1)
    # floor(-56.57) = -57, so 56 rows are left; floor(16 / 1.41421) = 11.
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 55, 11, 123)


@given(st.integers(2, 12), st.integers(1, 40))
def test_masks_are_enlarged_linearly_and_shrunk_by_averages(size: int, side: int) -> None:
    logits = torch.randn(1, size, size)
    # A window as large as the image, whose corner is the image's.
    geometry = {"factors": (1.0, 1.0), "patch_size": side, "stride": 2, "threshold": 0.1}
    if side % 4 == 0:
        masks = drawn(logits, torch.tensor([[side // 4, side // 4]]), (side, side), **geometry)
        if side >= size:
            expected = F.interpolate(logits[None], side, mode="bilinear", align_corners=True)[0]
        elif size % side == 0:
            expected = F.avg_pool2d(logits, size // side)
        else:
            return
        clear = (expected - 0.1).abs() > 1e-4
        assert torch.equal(masks[clear], (expected > 0.1)[clear])


def test_a_mask_shrunk_by_a_fraction_is_averaged_by_area() -> None:
    """Three values on two pixels: (a + b / 2) / 1.5 and (b / 2 + c) / 1.5."""
    from instseg.projects.deepmask.inference import _resampling

    expected = [[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]]
    torch.testing.assert_close(_resampling(3, 2), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("cell", [(-50, 3), (3, -50), (400, 3), (3, 400)])
def test_a_window_outside_the_image_leaves_no_trace(cell: tuple[int, int]) -> None:
    geometry = {"factors": (1.0, 1.0), "patch_size": 64, "stride": 16, "threshold": 0.0}
    masks = drawn(torch.ones(1, 8, 8), torch.tensor([cell]), (30, 40), **geometry)
    assert not masks.any()


def test_the_mask_threshold_is_a_logit() -> None:
    """Probability 0.2 is logit -1.386."""
    assert math.log(0.2 / 0.8) == pytest.approx(-1.386, abs=1e-3)
    areas = []
    for value in (-1.38, -1.39):
        geometry = {"factors": (1.0, 1.0), "patch_size": 64, "stride": 16}
        cells = torch.tensor([[2, 2]])
        masks = drawn(
            torch.full((1, 8, 8), value), cells, (64, 64), threshold=math.log(0.25), **geometry
        )
        areas.append(int(masks.sum()))
    assert areas == [64 * 64, 0]
