"""Fast NMS keeps what its definition by operators of torch keeps, bit for bit, ties included."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from instseg.modeling import cross_class_nms, fast_nms
from instseg.ops.fast_nms import surviving_boxes, surviving_boxes_reference

OPERATOR = sys.modules[surviving_boxes.__module__]
NMS = pytest.mark.parametrize("nms", [fast_nms, cross_class_nms])


def some_boxes(count: int, size: float = 0.4) -> Tensor:
    corners = torch.rand(count, 2)
    return torch.cat([corners, corners + torch.rand(count, 2) * size], dim=1)


def by_torch(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(OPERATOR, "_forward", surviving_boxes_reference)
        return call()


@NMS
@pytest.mark.parametrize("min_score", [0.0, 0.3])
@pytest.mark.parametrize("digits", [None, 3, 1], ids=["no ties", "ties", "mostly ties"])
@pytest.mark.parametrize("count, top_k", [(60, 50), (60, 200), (5000, 40), (1, 5), (0, 5)])
def test_kernel_and_definition_keep_the_same_boxes_in_the_same_order(
    nms: Callable[..., Any],
    count: int,
    top_k: int,
    digits: int | None,
    min_score: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    boxes, scores = some_boxes(count), torch.rand(7, count).square()
    if digits is not None:
        scores = scores.round(decimals=digits)
    limits = {"top_k": top_k, "max_detections": 30, "min_score": min_score, "iou_threshold": 0.3}
    kept = nms(boxes, scores, **limits)
    expected = by_torch(monkeypatch, lambda: nms(boxes, scores, **limits))
    assert all(map(torch.equal, kept, expected))
    assert count < 60 or len(kept[0]) > 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_areas_beyond_half_precision_are_compared(dtype: torch.dtype) -> None:
    boxes = torch.tensor([[0, 0, 400, 400], [0, 0, 400, 396]], dtype=dtype)
    for nms in (surviving_boxes, surviving_boxes_reference):
        _, survives = nms(boxes, torch.tensor([[0.9, 0.8]]), 0.5, 2)
        assert survives.tolist() == [[True, False]]


number = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.5, 1.0, float("inf"), float("nan"), -1.0])


@given(
    rows=st.lists(st.tuples(*[number] * 6), min_size=1, max_size=12),
    top_k=st.integers(0, 14),
    min_score=st.sampled_from([0.0, 0.1, 0.3]),
    iou_threshold=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_kernel_and_definition_agree_on_odd_numbers(
    rows: list[tuple[float, ...]], top_k: int, min_score: float, iou_threshold: float
) -> None:
    values = torch.tensor(rows)
    boxes, scores = values[:, :4], values[:, 4:].T
    rows_, survives = surviving_boxes(boxes, scores, iou_threshold, top_k, min_score)
    expected_rows, expected = surviving_boxes_reference(boxes, scores, iou_threshold, top_k)
    if min_score > 0:
        expected &= scores.gather(1, expected_rows) > min_score
    assert torch.equal(survives, expected)
    assert torch.equal(rows_[survives], expected_rows[expected])


def test_a_box_that_is_removed_removes_others() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 4, 10, 14], [0, 8, 10, 18], [20, 0, 30, 10]])
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.1], [0.0, 0.6, 0.9, 0.0]])
    rows, survives = surviving_boxes(boxes, scores, 0.4, 4)
    # Neighbours share 60 of 140.  In class 1 the boxes of score 0 have an order of torch's own.
    assert rows[0].tolist() == [0, 1, 2, 3] and survives[0].tolist() == [True, False, False, True]
    assert rows[1, :2].tolist() == [2, 1] and survives[1, :2].tolist() == [True, False]
    assert surviving_boxes(boxes, scores, 60 / 140 + 1e-4, 4)[1][0].all()


def test_threads_and_layouts_change_nothing() -> None:
    torch.manual_seed(0)
    boxes, scores = some_boxes(3000, 0.1), torch.rand(3000, 20)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = surviving_boxes(boxes, scores.T, 0.3, 50)
        torch.set_num_threads(3)
        kept = surviving_boxes(boxes, scores.T.contiguous(), 0.3, 50)
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, kept, expected)) and not expected[1].all()


def test_operator_keeps_the_rules_of_torch() -> None:
    for count in (0, 30):
        arguments = (some_boxes(count), torch.rand(3, count), 0.5, 20, 0.1)
        torch.library.opcheck(torch.ops.instseg.fast_nms.default, arguments)


@pytest.mark.parametrize("pairs", [1, 700])
def test_the_definition_does_not_depend_on_the_number_compared_together(
    pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    boxes, scores = some_boxes(60), torch.rand(3, 60)
    expected = surviving_boxes_reference(boxes, scores, 0.2, 50)
    assert 10 < expected[1].sum() < expected[1].numel()
    monkeypatch.setattr(OPERATOR, "_PAIRS", pairs)
    assert all(map(torch.equal, surviving_boxes_reference(boxes, scores, 0.2, 50), expected))


def test_no_more_pairs_are_compared_together_than_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []
    shared = OPERATOR._shared

    def counted(*arguments: Any) -> Tensor:
        lengths: Tensor = shared(*arguments)
        sizes.append(lengths.numel())
        return lengths

    monkeypatch.setattr(OPERATOR, "_PAIRS", 1000)
    monkeypatch.setattr(OPERATOR, "_shared", counted)
    boxes = torch.tensor([[0.0, 0, 1, 1]]).repeat(40, 1)
    assert surviving_boxes_reference(boxes, torch.rand(2, 40), 0.5, 40)[1].sum() == 2
    assert max(sizes) <= 1000 and len(sizes) > 2
