"""Losses of the FCIS head against numbers worked out by hand."""

from typing import Any

import numpy as np
import pytest
import torch

from instseg.projects.fcis import fcis_losses


def losses(**changes: Any) -> dict[str, float]:
    """Of two regions, an object and background, in the second of two images."""
    settings: dict[str, Any] = dict(
        scores=torch.tensor([[0.0, 0.0], [0.0, 0.0]]),
        mask_logits=torch.zeros(2, 2, 2, 2),
        deltas=torch.zeros(2, 8),
        labels=torch.tensor([1, 0]),
        targets=torch.tensor([[[1, 0], [0, -1]], [[-1, -1], [-1, -1]]]),
        box_targets=torch.zeros(2, 4),
        images=torch.tensor([1, 1]),
        num_images=2,
        regions_per_image=128,
    )
    return {name: loss.item() for name, loss in fcis_losses(**{**settings, **changes}).items()}


def test_the_class_loss_is_a_mean_over_regions_and_images() -> None:
    """ln 2 for both regions of one image, nothing in the other."""
    assert losses()["loss_cls"] == pytest.approx(np.log(2) / 2)


def test_the_mask_loss_is_a_mean_over_all_bins_times_10_over_128_per_image() -> None:
    """Three of four bins count, each with ln 2; the background region has none."""
    assert losses()["loss_mask"] == pytest.approx(10 / 128 / 2 * 3 / 4 * np.log(2))


def test_the_box_loss_takes_the_last_four_deltas_of_objects() -> None:
    """0.5 * 0.5² + (2 - 0.5) of the object; the background's and the first four do not count."""
    deltas = torch.tensor([[9.0, 9, 9, 9, 0.5, 2, 0, 0], [9, 9, 9, 9, 9, 9, 9, 9]])
    assert losses(deltas=deltas)["loss_box"] == pytest.approx((0.125 + 1.5) / 128 / 2)


def test_losses_without_regions_are_zero_and_attached() -> None:
    weight = torch.ones(8, requires_grad=True)
    found = fcis_losses(
        scores=torch.zeros(0, 8) * weight,
        mask_logits=torch.zeros(0, 2, 2, 8) * weight,
        deltas=torch.zeros(0, 8) * weight,
        labels=torch.zeros(0, dtype=torch.int64),
        targets=torch.zeros(0, 2, 8, dtype=torch.int64),
        box_targets=torch.zeros(0, 4),
        images=torch.zeros(0, dtype=torch.int64),
        num_images=1,
        regions_per_image=128,
    )
    total = torch.stack(list(found.values())).sum()
    total.backward()
    assert total.item() == 0
    assert weight.grad is not None and not weight.grad.any()
