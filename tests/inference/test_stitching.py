"""Instances of tiles become those of the image: each once, none cut, none lost."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instseg.inference.layout import Layout, Rect
from instseg.inference.stitching import EDGE, Piece, Stitched, Stitcher
from tests.support.tiles import (
    Change,
    Instance,
    as_set,
    clipped,
    exact,
    moved,
    stitched,
    straight_edges,
    trimmed,
)

CELL = 14


def box_of(instance: Instance) -> Rect:
    x, y, mask = instance
    return Rect(x, y, x + mask.shape[1], y + mask.shape[0])


def square(x: int, y: int, width: int, height: int | None = None) -> Instance:
    return x, y, np.ones((height or width, width), bool)


def blob(generator: np.random.Generator, x: int, y: int, width: int, height: int) -> Instance:
    """An ellipse with some bites out of it, of this size at most."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    inside = (rows / height - 0.5) ** 2 + (columns / width - 0.5) ** 2 <= 0.25
    inside &= generator.random((height, width)) < 0.97
    inside[height // 2, width // 2] = True
    instance = trimmed(x, y, inside)
    assert instance is not None
    return instance


def scattered(seed: int, height: int, width: int, least: int = 3) -> list[Instance]:
    """Blobs that do not overlap; many touch."""
    generator = np.random.default_rng(seed)
    ground_truth = []
    for y in range(0, height, CELL):
        for x in range(0, width, CELL):
            sides = [min(CELL, end) for end in (width - x, height - y)]
            if min(sides) < least or generator.random() < 0.2:
                continue
            ground_truth.append(
                blob(generator, x, y, *(int(generator.integers(least, s + 1)) for s in sides))
            )
    return ground_truth


@st.composite
def scenes(draw: st.DrawFn, least: int = 3) -> tuple[list[Instance], Layout]:
    """Blobs, and tiles that overlap by one and what makes it complete."""
    height, width = draw(st.integers(20, 130)), draw(st.integers(20, 130))
    overlap = draw(st.integers(CELL + 4 * EDGE, 30))
    layout = Layout(height, width, draw(st.integers(overlap + 8, 70)), overlap)
    return scattered(draw(st.integers(0, 1000)), height, width, least), layout


@settings(deadline=None, max_examples=20)
@given(scenes())
def test_exact_tiles_give_the_ground_truth(scene: tuple[list[Instance], Layout]) -> None:
    ground_truth, layout = scene
    results = stitched(ground_truth, layout)
    assert as_set(results) == as_set(ground_truth)
    assert straight_edges(results, layout) == straight_edges(ground_truth, layout)


@settings(deadline=None, max_examples=20)
@given(scenes(), st.integers(0, 1000))
def test_what_is_missed_in_some_tiles_and_seen_whole_in_one_stays(
    scene: tuple[list[Instance], Layout], seed: int
) -> None:
    ground_truth, layout = scene

    generator, missed = np.random.default_rng(seed), []
    for instance in ground_truth:
        box = box_of(instance)
        absent = generator.random(len(layout)) < 0.5
        whole = [n for n in range(len(layout)) if layout.is_complete(box, n, 2 * EDGE)]
        absent[int(generator.choice(whole))] = False
        missed.append(absent)

    def missing(tile: int, index: int, instance: Instance) -> Sequence[Instance]:
        return [] if missed[index][tile] else [instance]

    assert as_set(stitched(ground_truth, layout, missing)) == as_set(ground_truth)


@settings(deadline=None, max_examples=20)
@given(scenes(), st.integers(0, 1000))
def test_fragments_and_shrunken_doubles_of_other_tiles_are_left_out(
    scene: tuple[list[Instance], Layout], seed: int
) -> None:
    """Tiles that see only a part take it for one or two instances, or for a smaller one."""
    ground_truth, layout = scene

    def broken(tile: int, index: int, instance: Instance) -> Sequence[Instance]:
        generator = np.random.default_rng([seed, index, tile])
        box = box_of(instance)
        part = clipped(instance, layout.rects[tile])
        if part is None or layout.is_complete(box, tile, 0):
            return [instance]
        x, y, mask = part
        split = int(generator.integers(0, mask.shape[1] + 1))
        halves = [trimmed(x, y, mask[:, :split]), trimmed(x + split, y, mask[:, split:])]
        kept = [half for half in halves if half is not None]
        return kept[: int(generator.integers(1, 3))]

    assert as_set(stitched(ground_truth, layout, broken)) == as_set(ground_truth)


@settings(deadline=None, max_examples=20)
@given(scenes(least=9), st.integers(0, 1000))
def test_two_tiles_that_see_an_instance_a_pixel_apart_give_it_once(
    scene: tuple[list[Instance], Layout], seed: int
) -> None:
    ground_truth, layout = scene
    image = Rect(0, 0, layout.width, layout.height)

    def jittered(tile: int, index: int, instance: Instance) -> Sequence[Instance]:
        x, y = np.random.default_rng([seed, index, tile]).integers(-1, 2, 2).tolist()
        part = clipped(moved(instance, x, y), image)
        assert part is not None
        return [part]

    results = stitched(ground_truth, layout, jittered)
    left = list(ground_truth)
    for result in results:
        versions = [
            (index, clipped(moved(instance, x, y), image))
            for index, instance in enumerate(left)
            for x in (-1, 0, 1)
            for y in (-1, 0, 1)
        ]
        matches = [
            i for i, version in versions if version and as_set([version]) == as_set([result])
        ]
        assert matches, "a result is no version of an instance that is left"
        del left[matches[0]]
    assert not left, f"{len(left)} instances are lost"


@st.composite
def large_scenes(draw: st.DrawFn) -> tuple[list[Instance], Layout]:
    """Blobs of any size, up to the whole image, each in a part of the image of its own."""
    height, width = draw(st.integers(30, 150)), draw(st.integers(30, 150))
    generator = np.random.default_rng(draw(st.integers(0, 1000)))
    split = int(generator.integers(10, width - 9))
    ground_truth = [
        blob(generator, 0, 0, split, height),
        blob(generator, split, 0, width - split, height),
    ]
    tile = draw(st.integers(12, 60))
    return ground_truth, Layout(height, width, tile, draw(st.integers(2 * EDGE + 1, tile - 5)))


@settings(deadline=None, max_examples=20)
@given(large_scenes())
def test_pieces_of_an_instance_larger_than_the_overlap_are_joined(
    scene: tuple[list[Instance], Layout],
) -> None:
    ground_truth, layout = scene
    results = stitched(ground_truth, layout)
    whole = np.zeros((2, layout.height, layout.width), bool)
    for group, items in zip(whole, (results, ground_truth), strict=True):
        for item in items:
            x, y, mask = (
                (item.box.x0, item.box.y0, item.mask) if isinstance(item, Stitched) else item
            )
            group[y : y + mask.shape[0], x : x + mask.shape[1]] |= mask
    assert (whole[0] == whole[1]).all()
    assert as_set(results) == as_set(ground_truth)


def test_pieces_that_two_tiles_see_a_pixel_apart_are_joined() -> None:
    layout = Layout(40, 60, 40, 20)
    [joined] = stitched(
        [square(2, 10, 56, 12)], layout, lambda tile, _, instance: [moved(instance, 0, tile)]
    )
    assert joined.joined and joined.box == Rect(2, 10, 58, 23)


def test_the_version_of_the_tile_that_has_an_instance_in_its_core_stands_for_it() -> None:
    layout = Layout(40, 60, 40, 20)  # the cores meet at 30
    for x, best in ((23, 0), (27, 1)):
        views = [square(x, 10, 10), square(x, 10, 10, 9)]
        results = stitched([views[0]], layout, lambda tile, _, __, v=views: [v[tile]])
        assert as_set(results) == as_set([views[best]])


def test_a_nested_instance_stays_beside_the_one_around_it() -> None:
    ground_truth = [square(20, 20, 20), square(24, 24, 5), square(33, 33, 6)]
    layout = Layout(60, 60, 45, 30)
    assert as_set(stitched(ground_truth, layout)) == as_set(ground_truth)


def test_where_tiles_divide_the_pixels_otherwise_the_clearer_one_is_believed() -> None:
    """One sees two halves, the other one both as one instance; both see all of it."""
    layout = Layout(40, 60, 40, 20)
    left, right = square(21, 10, 6, 12), square(27, 10, 6, 12)
    both = square(21, 10, 12)
    views: dict[bool, list[Instance]] = {True: [both], False: [left, right]}
    for first_joins in (True, False):
        change = _one_joins(views, first_joins)
        # The middle of all is at 27, in the core of the first tile, which ends at 30.
        assert as_set(stitched([both], layout, change)) == as_set(views[first_joins])


def _one_joins(views: dict[bool, list[Instance]], first_joins: bool) -> Change:
    return lambda tile, index, instance: views[(tile == 0) == first_joins]


def test_instances_of_two_classes_are_not_compared() -> None:
    layout = Layout(40, 60, 40, 20)
    stitcher = Stitcher(layout)
    x, y, mask = square(25, 10, 10)
    pieces = [Piece(n, n, 0.9, Rect(x, y, x + 10, y + 10), mask) for n in (0, 1)]
    results = [*stitcher.add(0, pieces[:1]), *stitcher.add(1, pieces[1:])]
    assert sorted(result.kind for result in results) == [0, 1]


def test_instances_of_one_tile_are_what_the_model_told_apart() -> None:
    ground_truth = [square(10, 10, 10), square(10, 10, 10), square(10, 10, 9)]
    layout = Layout(40, 60, 40, 20)
    assert as_set(stitched(ground_truth, layout)) == as_set(ground_truth)
    shared = [moved(instance, 15, 0) for instance in ground_truth]
    assert as_set(stitched(shared, layout)) == as_set(shared)


def test_a_cut_piece_without_the_whole_is_left_out() -> None:
    """The neighbour sees all of it and finds nothing: it is responsible."""
    layout = Layout(40, 60, 40, 20)
    ground_truth = [square(15, 10, 10)]  # the second tile begins at 20

    def only_second(tile: int, index: int, instance: Instance) -> Sequence[Instance]:
        return [instance] if tile == 1 else []

    assert stitched(ground_truth, layout, only_second) == []


def test_only_instances_near_an_open_seam_are_held() -> None:
    layout = Layout(400, 400, 60, 20)
    ground_truth = scattered(0, 400, 400)
    stitcher, number, most_held = Stitcher(layout), 0, 0
    for tile, rect in enumerate(layout.rects):
        pieces = []
        for instance in ground_truth:
            if (part := clipped(instance, rect)) is not None:
                pieces.append(Piece(number, 0, 1.0, box_of(part), part[2]))
                number += 1
        list(stitcher.add(tile, pieces))
        most_held = max(most_held, stitcher.held)
    assert stitcher.held == 0
    row_of_tiles = sum(instance[1] < 60 for instance in ground_truth)
    assert 0 < most_held <= row_of_tiles, f"{most_held} held, {row_of_tiles} in a row of tiles"


@pytest.mark.parametrize("length", [5, 6])
def test_the_count_of_straight_edges_sees_a_cut(length: int) -> None:
    layout = Layout(40, 60, 40, 20)
    cut = [square(20, 10, 8, length), square(12, 30, 8, length), square(22, 30, 8)]
    assert straight_edges(cut, layout) == (2 if length == 6 else 0)
    assert stitched(cut, layout, exact)
