"""Targets, maps and the decoder of bottom-up methods."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import Instances, PolygonMasks

from instseg.modeling import (
    IGNORED,
    NONE,
    DenseDecoder,
    at_size,
    attached_zero,
    dense_targets,
    padded_batch,
    renumbered,
    resized_index,
    result_size,
)
from tests.support.dense_common import rectangles

CPU = torch.device("cpu")


def test_instances_are_numbered_over_the_batch() -> None:
    batch = [
        rectangles((2, 4), (5, 0, 0, 2, 1), (3, 0, 2, 1, 4)),
        rectangles((2, 4), (1, 1, 1, 2, 3)),
    ]
    targets = dense_targets(batch, (2, 4), 1, CPU)
    assert targets.owners.tolist() == [
        [[0, NONE, 1, 1], [0, NONE, NONE, NONE]],
        [[NONE] * 4, [NONE, 2, 2, NONE]],
    ]
    assert targets.semantic.tolist() == [
        [[6, 0, 4, 4], [6, 0, 0, 0]],
        [[0] * 4, [0, 2, 2, 0]],
    ]
    assert (targets.images.tolist(), targets.classes.tolist()) == ([0, 0, 1], [5, 3, 1])


def test_the_smaller_of_two_overlapping_instances_is_on_top() -> None:
    small_last = rectangles((1, 4), (0, 0, 0, 1, 4), (1, 0, 1, 1, 2))
    small_first = rectangles((1, 4), (1, 0, 1, 1, 2), (0, 0, 0, 1, 4))
    targets = dense_targets([small_last, small_first], (1, 4), 1, CPU)
    assert targets.owners.tolist() == [[[0, 1, 0, 0]], [[3, 2, 3, 3]]]


def test_padding_is_ignored_and_belongs_to_no_instance() -> None:
    targets = dense_targets(
        [rectangles((1, 2), (0, 0, 0, 1, 2)), rectangles((2, 3))], (2, 4), 1, CPU
    )
    assert targets.semantic.tolist() == [
        [[1, 1, IGNORED, IGNORED], [IGNORED] * 4],
        [[0, 0, 0, IGNORED], [0, 0, 0, IGNORED]],
    ]
    assert (targets.owners >= 0).sum() == 2


def test_a_cell_has_the_label_of_its_centre() -> None:
    # Stride 4: cells stand for the pixels 2 and 6 of a row.
    batch = [rectangles((4, 8), (0, 0, 2, 4, 3)), rectangles((4, 8), (0, 0, 3, 4, 6))]
    targets = dense_targets(batch, (4, 8), 4, CPU)
    assert targets.owners.tolist() == [[[0, NONE]], [[NONE, NONE]]]
    assert len(targets.images) == 2  # numbered, though it has no cell


def test_the_last_cell_of_an_image_that_ends_inside_it_has_a_label() -> None:
    targets = dense_targets([rectangles((5, 5), (0, 4, 4, 5, 5))], (8, 8), 4, CPU)
    assert targets.semantic.tolist() == [[[0, 0], [0, 1]]]


def test_polygons_are_drawn_and_masks_may_miss_where_there_is_no_instance() -> None:
    polygons = Instances((4, 4))
    polygons.gt_classes = torch.tensor([2])
    polygons.gt_masks = PolygonMasks([[[0.0, 0, 2, 0, 2, 4, 0, 4]]])
    empty = Instances((4, 4))
    empty.gt_classes = torch.zeros(0, dtype=torch.int64)
    targets = dense_targets([polygons, empty], (4, 4), 1, CPU)
    assert targets.semantic[0].tolist() == [[3, 3, 0, 0]] * 4
    assert not targets.semantic[1].any()


def test_a_batch_smaller_than_its_images_or_no_multiple_of_the_stride_is_refused() -> None:
    with pytest.raises(ValueError, match=r"does not fit into \(4, 4\)"):
        dense_targets([rectangles((4, 5))], (4, 4), 1, CPU)
    with pytest.raises(ValueError, match="no multiple of stride 4"):
        dense_targets([rectangles((4, 5))], (4, 6), 4, CPU)


def test_the_decoder_ends_at_the_finest_level_and_uses_all() -> None:
    levels = {"a": ShapeSpec(channels=3, stride=4), "b": ShapeSpec(channels=5, stride=8)}
    decoder = DenseDecoder(levels, channels=6, norm="")
    features = {
        "a": torch.randn(2, 3, 8, 12, requires_grad=True),
        "b": torch.randn(2, 5, 4, 6, requires_grad=True),
    }
    result = decoder(features)
    assert result.shape == (2, 6, 8, 12)
    result.sum().backward()
    assert all(x.grad is not None and x.grad.any() for x in features.values())


def test_a_batch_is_padded_at_right_and_bottom() -> None:
    images = [torch.ones(3, 5, 9), torch.full((3, 8, 2), 2.0)]
    batch = padded_batch(images, 4)
    assert batch.shape == (2, 3, 8, 12)
    assert all(
        torch.equal(batch[i, :, : x.shape[1], : x.shape[2]], x) for i, x in enumerate(images)
    )
    assert batch.sum() == sum(x.sum() for x in images)
    assert padded_batch(images, 4, least=13).shape == (2, 3, 16, 16)


def test_maps_come_at_the_size_asked_for() -> None:
    maps = torch.tensor([[[[0.0, 4.0]]]], dtype=torch.float16)
    assert at_size(maps, (1, 4)).tolist() == [[[[0, 1, 3, 4]]]]
    assert at_size(maps, (1, 2)).dtype == torch.float32


def test_a_resized_side_takes_the_nearest_pixels() -> None:
    assert resized_index(4, 8, 1, CPU).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert resized_index(6, 2, 1, CPU).tolist() == [1, 4]
    assert resized_index(6, 6, 4, CPU).tolist() == [0, 0, 0, 0, 1, 1]


def test_the_chosen_numbers_are_counted_anew_in_their_order() -> None:
    numbers = torch.tensor([[0, 1, 1, NONE, 2, 3]])
    assert renumbered(numbers, torch.tensor([2, 1]), 4).tolist() == [[NONE, 1, 1, NONE, 0, NONE]]
    assert (renumbered(numbers, torch.tensor([], dtype=torch.int64), 4) == NONE).all()


def test_a_result_has_the_size_that_its_input_asks_for() -> None:
    image = torch.zeros(3, 4, 6)
    assert result_size({"image": image}) == (4, 6)
    assert result_size({"image": image, "height": 8, "width": 9}) == (8, 9)


def test_an_attached_zero_gives_a_gradient_of_0() -> None:
    tensors = [torch.ones(2, requires_grad=True), torch.ones(3, 1, requires_grad=True)]
    zero = attached_zero(tensors)
    zero.backward()
    assert zero == 0
    assert all(x.grad is not None and not x.grad.any() for x in tensors)
