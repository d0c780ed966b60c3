"""Boxes that are compared some at a time survive as if all were compared together."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from instseg.modeling import cross_class_nms, fast_nms

MODULE = sys.modules[fast_nms.__module__]


@pytest.mark.parametrize("nms", [fast_nms, cross_class_nms])
@pytest.mark.parametrize("pairs", [1, 700])
def test_the_result_does_not_depend_on_the_number_compared_together(
    nms: Callable[..., Any], pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    corners = torch.rand(60, 2)
    boxes = torch.cat([corners, corners + torch.rand(60, 2) * 0.4], dim=1)
    scores = torch.rand(3, 60)

    def kept(iou_threshold: float) -> tuple[torch.Tensor, ...]:
        detections: tuple[torch.Tensor, ...] = nms(
            boxes, scores, iou_threshold=iou_threshold, top_k=50, max_detections=1000
        )
        return detections

    expected = kept(0.2)
    assert 10 < len(expected[0]) < len(kept(1.0)[0])
    monkeypatch.setattr(MODULE, "_PAIRS", pairs)
    for value, value_expected in zip(kept(0.2), expected, strict=True):
        assert torch.equal(value, value_expected)


def test_no_more_pairs_are_compared_together_than_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []
    shared = MODULE._shared

    def counted(*arguments: Any) -> torch.Tensor:
        lengths: torch.Tensor = shared(*arguments)
        sizes.append(lengths.numel())
        return lengths

    monkeypatch.setattr(MODULE, "_PAIRS", 1000)
    monkeypatch.setattr(MODULE, "_shared", counted)
    boxes = torch.tensor([[0.0, 0, 1, 1]]).repeat(40, 1)
    assert fast_nms(boxes, torch.rand(2, 40))[0].shape == (2,)
    assert max(sizes) <= 1000 and len(sizes) > 2
