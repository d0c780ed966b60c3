"""YOLACT's matching and losses against numbers of its authors' code and sums done by hand."""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from instseg.projects.yolact import (
    GroundTruth,
    Predictions,
    crop,
    hardest_background,
    level_sizes,
    make_priors,
    mask_bce,
    match,
    semantic_loss,
    yolact_losses,
)
from instseg.projects.yolact import convert as converter
from tests.support.yolact_common import (
    SEED,
    convert,
    gradients_agree,
    ground_truths,
    keys,
    load,
    loss_settings,
    matching_agrees,
    synthetic,
    terms_agree,
)


@pytest.fixture(scope="module")
def golden() -> Any:
    return load("loss_yolact_resnet50")


@pytest.fixture(scope="module")
def priors() -> torch.Tensor:
    sizes = level_sizes(550, (8, 16, 32, 64, 128))
    return make_priors(550, sizes, [[24], [48], [96], [192], [384]], [1.0, 0.5, 2.0], square=True)


@pytest.mark.parametrize("image", [0, 1])
def test_matching_equals_the_authors(golden: Any, priors: torch.Tensor, image: int) -> None:
    matching_agrees(golden, priors, image)


def test_two_instances_that_want_one_anchor_get_an_anchor_each() -> None:
    """Instance 1 fits anchor 0 exactly; instance 0 overlaps it most, but has to take anchor 1."""
    anchors = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5]])
    boxes = torch.tensor([[0, 0, 0.5, 0.4], [0, 0, 0.5, 0.5]])
    labels, objects = match(boxes, torch.tensor([3, 5]), torch.zeros(0, 4), anchors)
    assert (labels.tolist(), objects.tolist()) == ([6, 4], [1, 0])


def test_more_instances_than_anchors_are_matched_as_far_as_anchors_go() -> None:
    anchors = torch.tensor([[0.5, 0.5, 1, 1]])
    boxes = torch.tensor([[0, 0, 0.9, 1], [0, 0, 1, 1]])
    labels, objects = match(boxes, torch.tensor([0, 1]), torch.zeros(0, 4), anchors)
    assert (labels.tolist(), objects.tolist()) == ([2], [1])


def test_an_anchor_in_a_crowd_is_no_background() -> None:
    """Nine tenths of anchor 0 lie in the crowd, two tenths of anchor 1."""
    anchors = torch.tensor([[0.5, 0.5, 1, 1], [0.5, 0.5, 0.2, 1]])
    crowd = torch.tensor([[0, 0, 0.9, 1.0], [0.44, 0, 0.48, 1]])
    nobody = torch.zeros(0, 4)
    labels, _ = match(nobody, torch.zeros(0, dtype=torch.int64), crowd[:1], anchors)
    assert labels.tolist() == [-1, -1]
    labels, _ = match(nobody, torch.zeros(0, dtype=torch.int64), crowd[1:], anchors)
    assert labels.tolist() == [0, 0]


def test_losses_and_gradients_equal_the_authors(
    golden: Any, priors: torch.Tensor, golden_weights: ModuleType
) -> None:
    predictions = synthetic(golden_weights, len(priors))
    losses, _ = yolact_losses(predictions, ground_truths(golden), priors, loss_settings())
    terms_agree(losses, golden, "synthetic", rel=1e-5)
    sum(losses.values()).backward()
    gradients_agree(predictions, golden)


def test_losses_and_gradients_of_the_network_equal_the_authors(
    golden: Any, golden_weights: ModuleType, tmp_path: Path
) -> None:
    """Gradients of parameters depend on the convolution algorithm; the README says 3e-4."""
    network, _ = convert("yolact_resnet50", golden_weights, tmp_path, golden)
    arrays = [golden_weights.image(480, 640, SEED + i)[:, :, ::-1].copy() for i in (0, 10)]
    images = network.preprocess([{"image": torch.from_numpy(x).permute(2, 0, 1)} for x in arrays])
    pyramid = network.features(images)
    outputs = (*network.head(pyramid), network.protonet(pyramid[0]), network.semantic(pyramid[0]))
    losses, _ = yolact_losses(
        Predictions(*outputs), ground_truths(golden), network.priors, network.loss_settings
    )
    terms_agree(losses, golden, "network", rel=1e-4)
    sum(losses.values()).backward()
    parameters = dict(network.named_parameters())
    our_name = converter.naming({key: torch.empty(0) for key in keys("yolact_resnet50")})
    for key in golden.files:
        if key.startswith("network/grad_abs/"):
            parameter = parameters[our_name(key.removeprefix("network/grad_abs/"))]
            measured = parameter.grad.double().abs().sum().item()
            assert measured == pytest.approx(float(golden[key]), rel=2e-3), key


def test_background_is_mined_by_how_little_it_looks_like_background() -> None:
    """One positive anchor at ratio 2: the background anchors 4 and 1; anchor 3 is neutral."""
    foreground = torch.tensor([9.0, 2.0, 1.0, 8.0, 3.0])
    logits = torch.stack([torch.zeros(5), foreground], dim=1)[None]
    labels = torch.tensor([[1, 0, 0, -1, 0]])
    assert hardest_background(logits, labels, 2)[0].tolist() == [False, True, False, False, True]


def test_an_image_without_positive_anchors_mines_no_background() -> None:
    assert not hardest_background(
        torch.randn(1, 6, 3), torch.zeros(1, 6, dtype=torch.int64), 3
    ).any()


def test_the_mask_loss_is_divided_by_the_area_of_the_box() -> None:
    """Half of 4 x 4 cells at p = 1/2: 16 ln 2 / (4 * 2)."""
    loss = mask_bce(torch.full((1, 4, 4), 0.5), torch.ones(1, 4, 4), torch.tensor([[0, 0, 1, 0.5]]))
    assert loss.item() == pytest.approx(16 * np.log(2) / 8)


def test_an_instance_outside_its_box_costs_100_a_cell() -> None:
    probabilities = crop(torch.ones(1, 2, 8), torch.tensor([[0, 0, 0.5, 1.0]]))
    loss = mask_bce(probabilities, torch.ones(1, 2, 8), torch.tensor([[0, 0, 0.5, 1.0]]))
    assert loss.item() == pytest.approx(3 * 2 * 100 / 8)  # columns 5, 6, 7; the box has 8 cells


def test_only_some_masks_of_many_are_trained_but_count_for_all(priors: torch.Tensor) -> None:
    """Equal anchors: with half of them the loss, scaled up, is that of all."""
    anchors = torch.tensor([[0.5, 0.5, 0.5, 0.5]]).repeat(4, 1)
    ground_truth = GroundTruth(
        torch.tensor([[0.25, 0.25, 0.75, 0.75]]),
        torch.tensor([0]),
        torch.ones(1, 16, 16),
        torch.zeros(0, 4),
    )
    predictions = Predictions(
        *(torch.zeros(1, 4, 4), torch.zeros(1, 4, 3), torch.ones(1, 4, 2)),
        *(torch.rand(1, 8, 8, 2), torch.zeros(1, 2, 4, 4)),
    )
    every, _ = yolact_losses(predictions, [ground_truth], anchors, loss_settings())
    some, samples = yolact_losses(predictions, [ground_truth], anchors, loss_settings(max_masks=2))
    assert len(samples.classes) == 2
    torch.testing.assert_close(some["loss_mask"], every["loss_mask"])


def test_the_semantic_loss_takes_the_union_of_a_class() -> None:
    """Logits 0: ln 2 for every class and pixel, whatever the target, hence certain logits."""
    masks = torch.zeros(2, 4, 4)
    masks[0, :2], masks[1, 1:] = 1, 1
    ground_truth = GroundTruth(torch.rand(2, 4), torch.tensor([1, 1]), masks, torch.zeros(0, 4))
    logits = torch.full((1, 2, 4, 4), -50.0)
    logits[0, 1] = 50
    assert semantic_loss(logits, [ground_truth]).item() == pytest.approx(0, abs=1e-6)
    logits[0, 1, 3, 3] = -50
    assert semantic_loss(logits, [ground_truth]).item() == pytest.approx(50 / 16)
