"""Overlays: what is drawn, where, and in which colours; instances made by hand."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st

from instseg.errors import ConfigError
from instseg.masks import CroppedMasks
from instseg.tracking import UNTRACKED
from instseg.visualize import OverlayStyle, draw_instances, gallery, label_texts
from instseg.visualize.colours import neighbour_colours
from instseg.visualize.texts import Layout

NO_TEXT = OverlayStyle(labels="none")
Masks = np.ndarray


def disc(size: tuple[int, int], x: float, y: float, radius: float) -> Masks:
    rows, columns = np.mgrid[: size[0], : size[1]]
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


def instances_of(masks: Masks, classes: Sequence[int] | None = None) -> Instances:
    """Instances with these (N, H, W) masks, with falling scores."""
    cropped = CroppedMasks.from_dense(masks)
    return Instances(
        cropped.image_size,
        pred_masks=cropped,
        pred_boxes=Boxes(cropped.boxes.float()),
        scores=torch.linspace(0.99, 0.5, len(cropped)),
        pred_classes=torch.tensor(classes or [0] * len(cropped), dtype=torch.int64),
    )


def photograph(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 200, (height, width, 3), dtype=np.uint8)


def cells(height: int = 300, width: int = 400, pitch: int = 50, radius: int = 20) -> Masks:
    """Discs side by side that fill an image, without the upper left corner."""
    middles = [
        (x, y)
        for y in range(pitch // 2, height, pitch)
        for x in range(pitch // 2, width, pitch)
        if x + y > 3 * pitch
    ]
    return np.stack([disc((height, width), x, y, radius) for x, y in middles])


def outline_colour(drawn: np.ndarray, mask: Masks) -> tuple[int, ...]:
    """Of the uppermost pixel of a mask."""
    y, x = np.argwhere(mask)[0]
    return tuple(drawn[y, x].tolist())


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("fill", [0.0, 0.25, 1.0])
def test_only_pixels_of_masks_change_and_all_within_the_outline_by_the_fill(
    dense: bool, fill: float
) -> None:
    image = photograph(90, 120)
    masks = np.stack([disc((90, 120), 40, 40, 20), disc((90, 120), 80, 45, 15)])
    instances = instances_of(masks)
    if dense:
        instances.pred_masks = torch.from_numpy(masks)
    before = image.copy()
    drawn = draw_instances(image, instances, ["a"], style=OverlayStyle("none", fill))
    assert np.array_equal(image, before)
    assert np.array_equal(drawn[~masks.any(axis=0)], image[~masks.any(axis=0)])
    colour = np.array(outline_colour(drawn, masks[0]))
    expected = np.rint((1 - fill) * image[40, 40] + fill * colour)
    assert np.array_equal(drawn[40, 40], expected)
    assert tuple(drawn[40, 20].tolist()) == tuple(colour.tolist())


def test_neighbours_differ_and_the_same_instances_have_the_same_colours() -> None:
    masks = cells()
    drawn = draw_instances(photograph(300, 400), instances_of(masks), ["a"], style=NO_TEXT)
    colours = [outline_colour(drawn, mask) for mask in masks]
    middles = np.array([np.argwhere(mask).mean(axis=0) for mask in masks])
    for index, middle in enumerate(middles):
        near = np.abs(middles - middle).max(axis=1) <= 50
        near[index] = False
        assert colours[index] not in [colours[other] for other in np.flatnonzero(near)]
    assert len(set(colours)) > 4
    again = draw_instances(photograph(300, 400), instances_of(masks), ["a"], style=NO_TEXT)
    assert np.array_equal(drawn, again)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_boxes_that_touch_differ_unless_there_are_more_neighbours_than_colours(
    seed: int, count: int
) -> None:
    corners = np.random.default_rng(seed).integers(0, 200, (count, 2)).astype(float)
    boxes = np.concatenate([corners, corners + 20], axis=1)
    colours = neighbour_colours(boxes)
    gaps = np.abs(corners[:, None] - corners).max(axis=2) - 20
    near = (gaps <= 10) & ~np.eye(count, dtype=bool)
    for first, second in np.argwhere(near):
        if near[first].sum() < 10 and near[second].sum() < 10:
            assert (colours[first] != colours[second]).any()


def test_a_track_keeps_its_colour_whatever_is_beside_it() -> None:
    masks = np.stack([disc((60, 120), x, 30, 12) for x in (20, 60, 100)])
    image = photograph(60, 120)

    def colours(tracks: list[int]) -> dict[int, tuple[int, ...]]:
        instances = instances_of(masks[: len(tracks)])
        instances.track_ids = torch.tensor(tracks)
        drawn = draw_instances(image, instances, ["a"], style=NO_TEXT)
        pairs = zip(tracks, masks, strict=False)
        return {track: outline_colour(drawn, mask) for track, mask in pairs}

    first, second = colours([5, 0, UNTRACKED]), colours([UNTRACKED, 5, 0])
    assert first == second
    assert colours([5])[5] == first[5]
    assert len(set(first.values())) == 3
    assert len(set(first[UNTRACKED])) == 1


def test_labels_cover_no_other_instance_and_no_other_text() -> None:
    size = (300, 400)
    middles = [(60, 150, 50), (150, 150, 38), (270, 150, 60), (360, 60, 30), (200, 250, 20)]
    masks = np.stack([disc(size, *middle) for middle in middles])
    texts = np.zeros(size, dtype=int)
    layout = Layout(CroppedMasks.from_dense(masks))
    written = 0
    for index in range(len(masks)):
        if (label_box := layout.beside(index, 60, 16, 1.0)) is None:
            continue
        layout.take(label_box)
        rows = slice(label_box.y, label_box.y + label_box.height)
        columns = slice(label_box.x, label_box.x + label_box.width)
        assert label_box.is_inside(texts)
        assert not np.delete(masks, index, axis=0)[:, rows, columns].any()
        texts[rows, columns] += 1
        written += 1
    assert texts.max() == 1
    assert written >= 4


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_in_auto_an_instance_changes_no_pixel_of_another_and_all_writes_more(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = (200, 240)
    masks = np.stack(
        [
            disc(size, *rng.integers(0, 200, 2), int(rng.integers(5, 60)))
            for _ in range(int(rng.integers(1, 8)))
        ]
    )
    instances = instances_of(masks, list(range(len(masks))))
    image, names = photograph(*size), [f"kind {number}" for number in range(len(masks))]
    cropped = CroppedMasks.from_dense(masks)
    layout = Layout(cropped)
    for index in range(len(masks)):
        if label_box := layout.beside(index, 50, 12, 1.0):
            others = np.delete(masks, index, axis=0)
            assert not any(label_box.of(other).any() for other in others)
    plain, auto, every = (
        draw_instances(image, instances, names, style=OverlayStyle(labels))
        for labels in ("none", "auto", "all")
    )
    assert (auto != plain).any(axis=2).sum() <= (every != plain).any(axis=2).sum()


def test_small_instances_have_no_scores_beside_them_but_a_count_in_a_corner() -> None:
    masks = cells(pitch=40, radius=9)
    image = photograph(300, 400)
    plain = draw_instances(image, instances_of(masks), ["nucleus"], style=NO_TEXT)
    drawn = draw_instances(image, instances_of(masks), ["nucleus"])
    rows, columns = np.nonzero((drawn != plain).any(axis=2))
    assert rows.max() < 40 and columns.max() < 120
    every = draw_instances(image, instances_of(masks), ["nucleus"], style=OverlayStyle("all"))
    assert (every != plain).any(axis=2).sum() > 10 * len(rows)


def test_the_counts_go_where_no_instance_is() -> None:
    size = (200, 300)
    masks = np.stack([disc(size, x, y, 60) for x, y in [(0, 0), (300, 0), (0, 200)]])
    image = photograph(*size)
    plain = draw_instances(image, instances_of(masks), ["cell"], style=NO_TEXT)
    changed = (draw_instances(image, instances_of(masks), ["cell"]) != plain).any(axis=2)
    assert changed[150:, 200:].any()
    assert not changed[:20, :40].any()


def test_the_counts_name_each_class_and_the_most_frequent_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: list[str] = []
    monkeypatch.setattr(
        "instseg.visualize.texts.Font.write", lambda font, image, text, *_: written.append(text)
    )
    masks = cells(pitch=50)[:7]
    classes = [0, 1, 1, 1, 2, 2, 7]
    draw_instances(photograph(300, 400), instances_of(masks, classes), ["cat", "dog", "cow"])
    assert written[:4] == ["dog 3", "cow 2", "cat 1", "class 7 1"]
    written.clear()
    many = instances_of(cells(300, 400, 20, 4), None)
    many.pred_classes = torch.arange(len(many))
    draw_instances(photograph(300, 400), many, None)
    assert written[0] == "class 0 1"
    assert written[-1].endswith(" more")
    assert int(written[-1][1:-5]) == len(many) - len(written) + 1


def test_one_class_has_no_name_in_labels() -> None:
    instances = instances_of(cells()[:2], [0, 0])
    assert label_texts(instances, ["cat"]) == ["0.99", "0.50"]
    assert label_texts(instances, ["cat", "dog"]) == ["cat 0.99", "cat 0.50"]
    assert label_texts(instances, None) == ["class 0 0.99", "class 0 0.50"]


def test_an_image_that_is_too_small_for_text_has_none() -> None:
    masks = np.stack([disc((40, 40), 20, 20, 15)])
    plain = draw_instances(photograph(40, 40), instances_of(masks), ["nucleus"], style=NO_TEXT)
    assert np.array_equal(
        draw_instances(photograph(40, 40), instances_of(masks), ["nucleus"]), plain
    )


@pytest.mark.parametrize("labels", ["auto", "all"])
@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (7, 9), (30, 300)])
def test_thin_and_empty_masks_in_images_of_any_size_are_drawn(
    size: tuple[int, int], labels: str
) -> None:
    masks = np.zeros((4, *size), dtype=bool)
    masks[1, -1, :] = masks[2, :, 0] = masks[3] = True
    image = photograph(*size)
    drawn = draw_instances(image, instances_of(masks), ["a"], style=OverlayStyle(labels))
    assert drawn.shape == image.shape
    assert (drawn[-1] != image[-1]).any()
    drawn = draw_instances(image, instances_of(masks[:1]), ["a"], style=NO_TEXT)
    assert np.array_equal(drawn, image)


def test_drawing_nothing_gives_an_equal_copy() -> None:
    image, instances = photograph(90, 120), instances_of(disc((90, 120), 40, 40, 20)[None])
    for shown in (
        draw_instances(image, instances[:0]),
        draw_instances(image, instances, None, 2.0),
    ):
        assert np.array_equal(shown, image)
        assert shown is not image


@pytest.mark.parametrize("shape", [(90, 120), (90, 120, 1)])
def test_a_grey_image_becomes_one_in_colour(shape: tuple[int, ...]) -> None:
    grey = np.full(shape, 100, dtype=np.uint8)
    mask = disc((90, 120), 40, 40, 20)
    drawn = draw_instances(grey, instances_of(mask[None]), ["a"], style=NO_TEXT)
    assert drawn.shape == (90, 120, 3)
    assert (drawn[~mask] == 100).all()
    assert (drawn[mask] != 100).any()


def test_instances_without_masks_are_drawn_as_boxes() -> None:
    image = photograph(90, 120)
    instances = instances_of(disc((90, 120), 40, 40, 20)[None])
    instances.pred_boxes = Boxes(torch.tensor([[20.2, 10.0, 70.0, 60.0]]))
    on_top = draw_instances(image, instances, ["a"], style=OverlayStyle("none", boxes=True))
    instances.remove("pred_masks")
    drawn = draw_instances(image, instances, ["a"], style=NO_TEXT)
    rows, columns = np.nonzero((drawn != image).any(axis=2))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (10, 59, 20, 69)
    assert np.array_equal(drawn[30, 30], image[30, 30])
    assert tuple(on_top[10, 40].tolist()) == tuple(drawn[10, 40].tolist())
    outside = Boxes(torch.tensor([[-50.0, -50.0, -10.0, -10.0]]))
    instances.pred_boxes = outside
    assert np.array_equal(draw_instances(image, instances, ["a"], style=NO_TEXT), image)


def test_a_name_that_is_no_text_in_any_encoding_is_drawn() -> None:
    instances = instances_of(cells()[:3], [0, 1, 2])
    image = photograph(300, 400)
    plain = draw_instances(image, instances, style=NO_TEXT)
    drawn = draw_instances(
        image, instances, ["\ud83d", "\udc80", "å" * 900], style=OverlayStyle("all")
    )
    assert (drawn != plain).any()


@pytest.mark.parametrize("fill", [-0.01, 1.01, float("nan"), float("inf")])
def test_a_fill_that_is_no_opacity_is_refused(fill: float) -> None:
    with pytest.raises(ConfigError, match=f"the fill of overlays is {fill}; expected a number"):
        OverlayStyle(fill=fill)


def test_unknown_labels_are_refused() -> None:
    with pytest.raises(ConfigError, match="are 'some'; expected auto, all or none"):
        OverlayStyle(labels="some")


def test_thousands_of_instances_take_no_memory_of_full_size_masks() -> None:
    import tracemalloc

    size, radius = (900, 1100), 8
    crop = disc((2 * radius + 1,) * 2, radius, radius, radius)
    corners = [(x, y) for y in range(0, 880, 20) for x in range(0, 1080, 20)]
    masks = CroppedMasks.from_crops([crop] * len(corners), corners, size)
    instances = Instances(size, pred_masks=masks, pred_boxes=Boxes(masks.boxes.float()))
    instances.scores, instances.pred_classes = (
        torch.ones(len(masks)),
        torch.zeros(len(masks)).long(),
    )
    image = np.zeros((*size, 3), dtype=np.uint8)
    draw_instances(image[:50, :50], instances[:0])
    tracemalloc.start()
    draw_instances(image, instances, ["nucleus"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(instances) > 2000
    assert peak < 4 * image.nbytes


def test_a_gallery_centres_each_image_in_its_cell_on_white() -> None:
    small, large = np.full((2, 3, 3), 10, np.uint8), np.full((6, 7, 3), 20, np.uint8)
    tiles = gallery([large, small, large], columns=2)
    assert tiles.shape == (2 * (6 + 4) + 4, 2 * (7 + 4) + 4, 3)
    assert (tiles[4:10, 4:11] == 20).all()
    assert (tiles[6:8, 17:20] == 10).all()
    assert (tiles == 10).sum() == small.size
    assert (tiles[14:, 11:] == 255).all()


def test_a_gallery_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="0 images"):
        gallery([], 3)
