"""Cropped masks say what dense masks say, in the memory that their instances cover."""

import copy
import pickle
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from detectron2.structures import Instances
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from instseg.masks import CroppedMasks, as_text, cropped, encode, rle_area, to_rle

Dense = np.ndarray[Any, np.dtype[np.bool_]]

KINDS = ("any", "cut", "box", "row", "column", "border", "none", "all")


@st.composite
def sets(draw: st.DrawFn, max_count: int = 5) -> Dense:
    """(N, H, W) masks: any pixels, boxes, thin lines, borders, whole columns, empty and full."""
    shape = (draw(st.integers(0, max_count)), draw(st.integers(1, 11)), draw(st.integers(1, 11)))
    masks = draw(arrays(np.bool_, shape))
    for mask in masks:
        y, x = draw(st.integers(0, shape[1] - 1)), draw(st.integers(0, shape[2] - 1))
        kind = draw(
            st.sampled_from(["any", "cut", "box", "row", "column", "border", "none", "all"])
        )
        rows = np.arange(shape[1])[:, None]
        columns = np.arange(shape[2])[None]
        inside = {
            "any": np.True_,
            "cut": (rows >= y) & (columns >= x),
            "box": (rows >= y) & (columns >= x),
            "row": rows == y,
            "column": columns == x,
            "border": (rows % (shape[1] - 1 or 1) == 0) | (columns % (shape[2] - 1 or 1) == 0),
            "none": np.False_,
            "all": np.True_,
        }[kind]
        mask[:] = mask & inside if kind in ("any", "cut") else inside
    return masks


CONTINUED = np.array([[[0, 1, 1], [0, 1, 0], [1, 1, 0]]], dtype=bool)
"""A run from the bottom of each column to the top of the next."""


@given(sets())
@example(CONTINUED)
@example(np.zeros((3, 0, 4), dtype=bool))
@example(np.ones((2, 1, 1), dtype=bool))
def test_masks_from_every_source_are_the_dense_ones(masks: Dense) -> None:
    size = masks.shape[1:]
    rles = [encode(mask) for mask in masks]
    lists = [{"size": list(size), "counts": _lengths(mask)} for mask in masks]
    for made in (
        CroppedMasks.from_dense(masks),
        CroppedMasks.from_dense(torch.from_numpy(masks)),
        CroppedMasks.from_crops(list(masks), np.zeros((len(masks), 2)), size),
        CroppedMasks.from_rles(rles, size),
        CroppedMasks.from_rles([as_text(rle) for rle in rles], size),
        CroppedMasks.from_rles(lists, size),
    ):
        assert made.image_size == size and len(made) == len(masks)
        assert made.to_dense().dtype == torch.bool
        np.testing.assert_array_equal(made.to_dense(), masks)
        assert made.to_rle() == rles
        assert made.areas().tolist() == [rle_area(rle) for rle in rles]
        for index, (mask, box) in enumerate(zip(masks, made.boxes.tolist(), strict=True)):
            rows, columns = mask.nonzero()
            tight = (
                [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                if len(rows)
                else 4 * [0]
            )
            x, y, crop = made.crop(index)
            assert box == tight and [x, y] == tight[:2] and crop.dtype == bool
            np.testing.assert_array_equal(crop, mask[tight[1] : tight[3], tight[0] : tight[2]])


def _lengths(mask: Dense) -> list[int]:
    """Runs down the columns, counted pixel by pixel."""
    lengths = [0]
    for pixel in mask.T.ravel().tolist():
        if pixel != (len(lengths) - 1) % 2:
            lengths.append(0)
        lengths[-1] += 1
    return lengths


@given(sets(), st.integers(-3, 3), st.integers(-3, 3), st.integers(1, 9), st.integers(1, 9))
def test_crops_are_cut_at_the_edges_of_the_image(
    crops: Dense, x: int, y: int, height: int, width: int
) -> None:
    corners = np.array([(x + number, y) for number in range(len(crops))]).reshape(-1, 2)
    dense = np.zeros((len(crops), height + 40, width + 40), dtype=bool)
    for canvas, crop, (left, top) in zip(dense, crops, corners + 20, strict=True):
        canvas[top : top + crop.shape[0], left : left + crop.shape[1]] = crop
    made = CroppedMasks.from_crops(list(crops), corners, (height, width))
    expected = dense[:, 20 : 20 + height, 20 : 20 + width]
    np.testing.assert_array_equal(made.to_dense(), expected)


@given(
    arrays(np.int32, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 6))
)
def test_a_label_image_is_taken_apart(labels: np.ndarray[Any, np.dtype[np.int32]]) -> None:
    """Five masks, some of them empty; the value 6 belongs to none."""
    made = CroppedMasks.from_label_image(labels, 5)
    np.testing.assert_array_equal(made.to_dense(), labels == np.arange(1, 6)[:, None, None])
    np.testing.assert_array_equal(made.to_label_image(), np.where(labels > 5, 0, labels))
    assert len(CroppedMasks.from_label_image(labels, 0)) == 0


def test_a_part_is_packed_before_the_next_is_made() -> None:
    """The same memory can hold one part after the other."""
    canvas = np.zeros((4, 4), dtype=bool)

    def parts() -> Iterator[tuple[int, int, Dense]]:
        for number in range(4):
            canvas[:] = False
            canvas[number] = True
            yield number, 0, canvas

    made = CroppedMasks.from_parts(parts(), (4, 9))
    assert made.boxes.tolist() == [[n, n, n + 4, n + 1] for n in range(4)]


def test_all_masks_are_chosen_without_a_copy() -> None:
    masks = CroppedMasks.from_dense(np.eye(4, dtype=bool)[:3, None])
    for index in (slice(None), np.ones(3, bool), torch.arange(3)):
        assert masks[index] is masks
    assert masks[[0, 2, 1]].boxes[:, 0].tolist() == [0, 2, 1]


def test_masks_are_cropped_only_if_they_are_dense() -> None:
    dense = torch.ones(2, 3, 4, dtype=torch.bool)
    made = CroppedMasks.of(dense)
    assert CroppedMasks.of(made) is made and torch.equal(made.to_dense(), dense)


@given(sets(), st.data())
def test_an_index_chooses_as_that_of_a_tensor(masks: Dense, data: st.DataObject) -> None:
    made = CroppedMasks.from_dense(masks)
    chosen = []
    if len(masks):
        chosen = data.draw(st.lists(st.integers(-len(masks), len(masks) - 1), max_size=4))
    flags = data.draw(st.lists(st.booleans(), min_size=len(masks), max_size=len(masks)))
    part = data.draw(st.slices(len(masks)))
    numbers, boolean = (
        torch.tensor(chosen, dtype=torch.int64),
        torch.tensor(flags, dtype=torch.bool),
    )
    for index in (part, chosen, numbers, numbers.numpy(), boolean, boolean.numpy()):
        expected = masks[index if isinstance(index, slice) else np.asarray(index, _kind(index))]
        np.testing.assert_array_equal(made[index].to_dense(), expected)
        assert made[index].to_rle() == [encode(mask) for mask in expected]
    for one in chosen:
        np.testing.assert_array_equal(made[one].to_dense(), masks[[one]])
    with pytest.raises(IndexError):
        made[len(masks)]


def _kind(index: Any) -> type[np.generic]:
    return np.bool_ if getattr(index, "dtype", None) in (torch.bool, np.bool_) else np.int64


@given(st.lists(arrays(np.bool_, st.tuples(st.integers(0, 3), st.just(4), st.just(5))), min_size=1))
def test_parts_are_joined(parts: list[Dense]) -> None:
    joined = CroppedMasks.cat([CroppedMasks.from_dense(part) for part in parts])
    np.testing.assert_array_equal(joined.to_dense(), np.concatenate(parts))
    assert joined.to_rle() == [encode(mask) for part in parts for mask in part]


def test_masks_of_images_of_different_size_are_not_joined_or_compared() -> None:
    one, other = (CroppedMasks.from_dense(np.ones((1, 2, width), bool)) for width in (3, 4))
    for refused in (lambda: CroppedMasks.cat([one, other]), lambda: one.ious(other)):
        with pytest.raises(ValueError, match=r"images of one size, found .*2, 3.*2, 4"):
            refused()


@given(sets(), st.data())
def test_overlaps_are_those_of_the_pixels(masks: Dense, data: st.DataObject) -> None:
    shape = (data.draw(st.integers(0, 4)), *masks.shape[1:])
    others = data.draw(arrays(np.bool_, shape))
    shared = (masks[:, None] & others[None]).sum(axis=(2, 3))
    united = (masks[:, None] | others[None]).sum(axis=(2, 3))
    overlaps = CroppedMasks.from_dense(masks).ious(CroppedMasks.from_dense(others))
    assert overlaps.shape == shared.shape and overlaps.dtype == np.float64
    np.testing.assert_array_equal(overlaps, shared / np.maximum(united, 1))


@given(sets(), st.data())
def test_the_first_mask_is_on_top_of_a_label_image(masks: Dense, data: st.DataObject) -> None:
    cropped = CroppedMasks.from_dense(masks)
    labels = cropped.to_label_image()
    expected = np.zeros(masks.shape[1:], dtype=np.uint16)
    for number in range(len(masks), 0, -1):
        expected[masks[number - 1]] = number
    assert labels.dtype == np.uint16
    np.testing.assert_array_equal(labels, expected)
    top, bottom = sorted(data.draw(st.integers(0, masks.shape[1])) for _ in range(2))
    np.testing.assert_array_equal(cropped.to_label_image(top, bottom), expected[top:bottom])


def test_more_masks_than_16_bits_count_have_32() -> None:
    crops = [np.ones((1, 1), dtype=bool)] * 65_536
    corners = np.stack([np.arange(65_536) % 256, np.arange(65_536) // 256], axis=1)
    masks = CroppedMasks.from_crops(crops, corners, (256, 256))
    assert masks[:65_535].to_label_image().dtype == np.uint16
    labels = masks.to_label_image()
    assert labels.dtype == np.uint32
    np.testing.assert_array_equal(labels.ravel(), np.arange(1, 65_537))


@given(sets(), st.integers(0, 4), st.integers(0, 4), st.integers(0, 3))
def test_a_part_takes_its_place_in_the_whole_image(masks: Dense, x: int, y: int, more: int) -> None:
    height, width = masks.shape[1:]
    whole = np.zeros((len(masks), y + height + more, x + width + more), dtype=bool)
    whole[:, y : y + height, x : x + width] = masks
    moved = CroppedMasks.from_dense(masks).shifted(x, y, whole.shape[1:])
    np.testing.assert_array_equal(moved.to_dense(), whole)
    assert moved.to_rle() == [encode(mask) for mask in whole]


def test_a_mask_does_not_leave_the_image_it_is_moved_into() -> None:
    masks = CroppedMasks.from_dense(np.ones((1, 2, 3), dtype=bool))
    for x, y in ((-1, 0), (0, -1), (2, 0), (0, 3)):
        with pytest.raises(ValueError, match=f"moved by {x}, {y} leave an image of 4x4 pixels"):
            masks.shifted(x, y, (4, 4))
    assert len(CroppedMasks.from_dense(np.zeros((1, 9, 9), bool)).shifted(2, 2, (4, 4))) == 1


def test_runs_that_do_not_fill_the_image_are_refused() -> None:
    rle = encode(np.ones((2, 3), dtype=bool))
    for wrong in ({**rle, "counts": b"06"[:1]}, {**rle, "counts": "0600"}, {**rle, "counts": b""}):
        with pytest.raises(ValueError, match="do not add up to 2 x 3"):
            CroppedMasks.from_rles([rle, wrong], (2, 3))
    for damaged in (b"V", b"0\xff", b"0ooooooooo0"):
        with pytest.raises(ValueError, match="the text of a mask"):
            CroppedMasks.from_rles([{**rle, "counts": damaged}], (2, 3))


def test_an_rle_as_large_as_pycocotools_counts_is_read_without_its_pixels() -> None:
    size = (50_000, 50_000)
    rle = to_rle({"size": list(size), "counts": [2_499_999_990, 7, 3]}, *size)
    masks = CroppedMasks.from_rles([rle], size)
    assert masks.boxes.tolist() == [[49_999, 49_990, 50_000, 49_997]]
    assert masks.to_rle() == [rle]


@given(sets(max_count=9))
def test_masks_that_are_unpacked_in_groups_are_the_same(masks: Dense) -> None:
    made = CroppedMasks.from_dense(masks)
    rles = made.to_rle()
    with mock.patch.object(cropped, "_PIXELS_AT_ONCE", 16):
        assert made.to_rle() == rles
        again = CroppedMasks.from_rles(rles, made.image_size)
    np.testing.assert_array_equal(again.to_dense(), masks)


def test_they_are_a_field_of_instances() -> None:
    masks = np.arange(24).reshape(3, 2, 4) % 5 == 0
    instances = Instances((2, 4), pred_masks=CroppedMasks.from_dense(masks), scores=torch.arange(3))
    for chosen in (1, slice(1, None), torch.tensor([2, 0]), instances.scores > 1):
        index = [chosen] if isinstance(chosen, int) else chosen
        np.testing.assert_array_equal(
            instances[chosen].pred_masks.to_dense(), torch.from_numpy(masks)[index]
        )
    both = Instances.cat([instances, instances[:1]]).to("cpu")
    assert both.pred_masks.to_rle() == [encode(mask) for mask in [*masks, masks[0]]]
    for same in (pickle.loads(pickle.dumps(both)), copy.deepcopy(both)):
        assert same.pred_masks.to_rle() == both.pred_masks.to_rle()


def test_twenty_thousand_masks_take_a_bit_for_each_pixel_of_their_boxes() -> None:
    crop = np.ones((40, 40), dtype=bool)
    corners = np.random.default_rng(0).integers(0, 16_000, (20_000, 2))
    masks = CroppedMasks.from_crops([crop] * 20_000, corners, (16_384, 16_384))
    assert len(pickle.dumps(masks)) < 20_000 * (40 * 40 / 8 + 50)
    rles = masks.to_rle()
    assert CroppedMasks.from_rles(rles, masks.image_size).to_rle() == rles
    assert (masks.areas() == 1600).all()
