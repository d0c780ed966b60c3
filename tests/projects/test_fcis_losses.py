"""Losses of the FCIS head against the authors' gradients and numbers worked out by hand."""

import numpy as np
import pytest
import torch

from instseg.projects.fcis import Regions, Samples, fcis_losses
from tests.conftest import GOLDEN, close


def losses(deltas: torch.Tensor | None = None) -> dict[str, float]:
    """Samples of two regions, an instance and background, in the second of two images."""
    labels = torch.tensor([1, 0])
    zeros = torch.zeros(2, 8) if deltas is None else deltas
    regions = Regions(torch.zeros(2, 2), torch.zeros(2, 2, 2, 2), labels, zeros)
    masks = torch.tensor([[[1, 0], [0, -1]], [[-1, -1], [-1, -1]]])
    samples = Samples(torch.tensor([1, 1]), torch.zeros(2, 4), labels, masks, torch.zeros(2, 4))
    return {name: loss.item() for name, loss in fcis_losses(regions, samples, 2, 128, 10.0).items()}


@pytest.mark.parametrize(("dtype", "tolerance"), [("f32", 1e-5), ("f64", 1e-7)])
def test_gradients_of_the_losses_equal_the_authors(dtype: str, tolerance: float) -> None:
    """Regions labelled -1 are not chosen; the losses of one image count."""
    golden = np.load(GOLDEN / "position_sensitive" / "official_head.npz")
    names = [f"{name}_{dtype}" for name in ("cls_score", "label_seg_logits")]
    scores, logits = (torch.from_numpy(golden[name]).requires_grad_() for name in names)
    labels = torch.from_numpy(golden["labels"])
    targets = torch.from_numpy(golden["mask_targets"])[:, 0].long()
    chosen = labels >= 0
    count = int(chosen.sum())
    zeros, labels = torch.zeros(count, 8), labels[chosen]
    images = torch.zeros_like(labels)
    losses = fcis_losses(
        Regions(scores[chosen], logits[chosen], labels, zeros),
        Samples(images, zeros[:, 4:], labels, targets[chosen], zeros[:, 4:]),
        num_images=1,
        regions_per_image=128,
        mask_weight=10.0,
    )
    (losses["loss_cls"] + losses["loss_mask"]).backward()
    for name, leaf in (("cls_score", scores), ("seg_logits", logits)):
        assert leaf.grad is not None
        close(leaf.grad, golden[f"loss_grad_{name}_{dtype}"], tolerance)


def test_the_class_loss_is_a_mean_over_regions_and_images() -> None:
    """ln 2 for both regions of one image, nothing in the other."""
    assert losses()["loss_cls"] == pytest.approx(np.log(2) / 2)


def test_the_mask_loss_is_a_mean_over_all_bins_times_10_over_128_per_image() -> None:
    """Three of four bins count, each with ln 2; the background region has none."""
    assert losses()["loss_mask"] == pytest.approx(10 / 128 / 2 * 3 / 4 * np.log(2))


def test_the_box_loss_takes_the_last_four_deltas_of_instances() -> None:
    """0.5 * 0.5² + (2 - 0.5) of the instance; the background's and the first four do not count."""
    deltas = torch.tensor([[9.0, 9, 9, 9, 0.5, 2, 0, 0], [9, 9, 9, 9, 9, 9, 9, 9]])
    assert losses(deltas=deltas)["loss_box"] == pytest.approx((0.125 + 1.5) / 128 / 2)


def test_losses_without_regions_are_zero_and_attached() -> None:
    weight = torch.ones(8, requires_grad=True)
    none, boxes = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4)
    scores, logits = torch.zeros(0, 8) * weight, torch.zeros(0, 2, 2, 8) * weight
    losses = fcis_losses(
        Regions(scores, logits, none, torch.zeros(0, 8) * weight),
        Samples(none, boxes, none, torch.zeros(0, 2, 8, dtype=torch.int64), boxes),
        num_images=1,
        regions_per_image=128,
        mask_weight=10.0,
    )
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    assert total.item() == 0
    assert weight.grad is not None and not weight.grad.any()
