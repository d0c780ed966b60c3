"""Tracking of instances over successive frames, with boxes made by hand."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from instseg.errors import ConfigError
from instseg.tracking import METHODS, UNTRACKED, Tracker, vote
from instseg.visualize import OverlayStyle, draw_instances, label_texts

pytest.importorskip("trackers", reason="needs the extra 'video'")

Box = tuple[float, ...]
TOUCHING = [(6, 0), (9, 1), (11, 0), (15, 0), (8, 8), (19, -19)]
"""Pixels a frame of boxes of 20 pixels: the place of each touches the former one."""


def frame(
    *boxes: Box, classes: Sequence[int] | None = None, scores: Sequence[float] | None = None
) -> Instances:
    return Instances(
        (1000, 1000),
        pred_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)),
        scores=torch.tensor(scores or [0.9] * len(boxes)),
        pred_classes=torch.tensor(classes or [0] * len(boxes), dtype=torch.int64),
    )


def box(left: float, top: float = 10.0, width: float = 20.0, height: float = 20.0) -> Box:
    return (left, top, left + width, top + height)


def numbers(tracker: Tracker, *frames: Instances) -> list[list[int]]:
    return [tracker.update(each).tolist() for each in frames]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("visible", [1, 2, 5])
@pytest.mark.parametrize("patience", [0, 1, 2, 5, 10, 31])
def test_an_instance_keeps_its_number_for_as_many_hidden_frames_as_patience_says(
    method: str, patience: int, visible: int
) -> None:
    for hidden, expected in ((patience, 0), (patience + 1, 1)):
        tracker = Tracker(method=method, patience=patience)
        clip = [*[frame(box(10))] * visible, *[frame()] * hidden, frame(box(10))]
        assert numbers(tracker, *clip)[-1] == [expected]


def test_patience_is_ten_frames_unless_another_is_asked_for() -> None:
    clip = [frame(box(10)), *[frame()] * 10, frame(box(10)), *[frame()] * 11, frame(box(10))]
    track_ids = numbers(Tracker(), *clip)
    assert [track_ids[0], track_ids[11], track_ids[-1]] == [[0], [0], [1]]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("velocity", [*TOUCHING, (20, 0), (-25, 25), (0, 40), (50, -50)])
def test_an_instance_of_constant_velocity_keeps_its_number(
    method: str, velocity: tuple[float, float]
) -> None:
    x, y = velocity
    clip = [frame(box(500 + x * step, 500 + y * step)) for step in range(12)]
    assert numbers(Tracker(method=method), *clip) == [[0]] * 12


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("speed", [11, 15, 17, 19])
def test_instances_in_a_row_that_move_by_most_of_their_width_keep_their_numbers(
    method: str, speed: int
) -> None:
    """Each comes to touch the former place of the one ahead."""
    clip = [frame(*(box(speed * step + 40 * column) for column in range(4))) for step in range(8)]
    assert numbers(Tracker(method=method), *clip) == [[0, 1, 2, 3]] * 8


@pytest.mark.parametrize("method", METHODS)
def test_an_instance_that_moves_by_more_than_its_width_is_found_again_behind_something(
    method: str,
) -> None:
    lefts = [25.0 * step for step in range(20)]
    clip = [frame() if 8 <= step < 13 else frame(box(lefts[step])) for step in range(20)]
    assert numbers(Tracker(method=method), *clip)[13:] == [[0]] * 7


@pytest.mark.parametrize("method", METHODS)
def test_an_instance_that_gathers_speed_keeps_its_number(method: str) -> None:
    clip = [frame(box(0.6 * step**2)) for step in range(30)]  # at last 35 pixels a frame
    assert numbers(Tracker(method=method), *clip) == [[0]] * 30


@pytest.mark.parametrize("method", METHODS)
def test_instances_that_cross_keep_their_numbers(method: str) -> None:
    clip = [
        frame(box(100 + 6 * step, 100 + 2 * step), box(280 - 6 * step, 100 + 2 * step))
        for step in range(30)
    ]
    assert numbers(Tracker(method=method), *clip) == [[0, 1]] * 30


@pytest.mark.parametrize(
    "other",
    [
        {"boxes": box(40), "classes": [1]},
        {"boxes": box(40, width=60)},
        {"boxes": box(200)},
        {"boxes": box(40), "beside": box(12)},
    ],
    ids=["class", "size", "place", "seen"],
)
def test_a_detection_apart_is_another_instance_unless_it_may_be_the_same(
    other: dict[str, Any],
) -> None:
    boxes = [other["boxes"], *([other["beside"]] if "beside" in other else [])]
    tracker = Tracker()
    tracker.update(frame(box(10)))
    assert tracker.update(frame(*boxes, classes=other.get("classes"))).tolist()[0] == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_class_that_flickers_does_not_split_a_track(method: str) -> None:
    clip = [frame(box(10 + 3 * step), classes=[step % 2]) for step in range(10)]
    assert numbers(Tracker(method=method), *clip) == [[0]] * 10


@pytest.mark.parametrize("method", METHODS)
def test_two_classes_in_one_place_keep_a_track_each(method: str) -> None:
    tracker = Tracker(method=method)
    both = [box(10), box(10)]
    for step in range(6):
        classes = [0, 1] if step % 2 else [1, 0]
        scores = [0.9, 0.8] if step % 3 else [0.65, 0.55] if step else [0.9, 0.8]
        track_ids = tracker.update(frame(*both, classes=classes, scores=scores)).tolist()
        assert dict(zip(classes, track_ids, strict=True)) == {1: 0, 0: 1}
    assert tracker.update(frame(box(10), classes=[0])).tolist() == [1]
    assert tracker.update(frame(box(10), classes=[1])).tolist() == [0]


def test_a_number_is_given_at_first_sight_and_numbers_count_on_over_all_classes() -> None:
    clip = [frame(), frame(box(10)), frame(), frame(box(11), box(300), classes=[0, 5])]
    assert numbers(Tracker(), *clip) == [[], [0], [], [0, 1]]


@pytest.mark.parametrize(("min_iou", "expected"), [(None, 0), (0.3, 0), (0.6, 1), (1.0, 1)])
def test_a_detection_that_overlaps_too_little_begins_a_track(
    min_iou: float | None, expected: int
) -> None:
    """The boxes have an IoU of 3 / 7."""
    track_ids = numbers(Tracker(min_iou=min_iou), frame(box(10)), frame(box(18)))
    assert track_ids == [[0], [expected]]


def test_bytetrack_begins_no_track_with_a_low_score_and_continues_one() -> None:
    clip = [frame(box(10), scores=[0.5]), frame(box(10), scores=[0.9])]
    clip += [frame(box(200), box(10), scores=[0.8, 0.3]), frame(box(10), scores=[0.3])]
    track_ids = numbers(Tracker(method="bytetrack"), *clip)
    assert track_ids == [[UNTRACKED], [0], [1, 0], [0]]


@pytest.mark.parametrize("method", METHODS)
def test_the_library_sees_every_frame_once(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Tracker(method=method)
    shown: list[int] = []
    update = tracker._library.update

    def counted(detections: Sequence[object]) -> object:
        shown.append(len(detections))
        return update(detections)

    monkeypatch.setattr(tracker._library, "update", counted)
    numbers(tracker, frame(box(10)), frame(), frame(box(10), box(90)))
    assert shown == [1, 0, 2]


@pytest.mark.parametrize("method", METHODS)
def test_random_boxes_get_each_number_once_a_frame(method: str) -> None:
    random = np.random.default_rng(0)
    tracker = Tracker(method=method, patience=3)
    for _ in range(60):
        corners = random.uniform(0, 300, (random.integers(0, 30), 2))
        sides = random.uniform(-2, 80, (len(corners), 2))
        boxes = np.concatenate([corners, corners + sides], axis=1).astype(np.float32)
        count = len(boxes)
        scores, classes = random.uniform(0, 1, count).tolist(), random.integers(0, 3, count)
        track_ids = tracker.update(
            frame(*boxes.tolist(), classes=[*classes], scores=scores)
        ).numpy()
        flat = (boxes[:, 2:] <= boxes[:, :2]).any(axis=1)
        assert (track_ids[flat] == UNTRACKED).all()
        tracked = track_ids[track_ids != UNTRACKED]
        assert len(set(tracked)) == len(tracked)
        assert method == "bytetrack" or len(tracked) == (~flat).sum()


def test_boxes_too_large_to_have_an_area_are_no_error() -> None:
    huge = (-3e38, -3e38, 3e38, 3e38)
    assert len(numbers(Tracker(), *[frame(huge, box(10))] * 4)) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"patience": -1},
            "the patience of tracks is -1; expected a whole number of frames from 0",
        ),
        ({"patience": 10**9}, "the patience of tracks is 1000000000; expected"),
        ({"patience": 2.5}, "the patience of tracks is 2.5; expected a whole number"),
        ({"patience": True}, "the patience of tracks is True; expected a whole number"),
        ({"min_iou": 0}, "the least IoU of a track is 0; expected a number above 0, at most 1"),
        ({"min_iou": 1.5}, "the least IoU of a track is 1.5; expected"),
        ({"min_iou": float("nan")}, "the least IoU of a track is nan; expected"),
        ({"method": "deep"}, "the tracker is 'deep'; expected one of sort, bytetrack"),
    ],
)
def test_a_setting_that_no_tracker_can_have_is_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Tracker(**settings)


def test_the_class_of_a_track_is_that_with_the_most_score() -> None:
    assert vote(Counter({3: 0.9, 7: 1.2})) == 7
    assert vote(Counter({3: 1.0, 7: 1.0})) == 3


def test_a_track_has_one_colour_in_all_frames_and_what_is_in_none_is_grey() -> None:
    black = np.zeros((60, 60, 3), np.uint8)
    lefts = [5, 25, 45]

    def colours(tracks: list[int]) -> dict[int, tuple[int, ...]]:
        instances = frame(*[box(left, 10, 10, 30) for left in lefts])
        instances.track_ids = torch.tensor(tracks)
        drawn = draw_instances(black, instances, style=OverlayStyle(labels="none"))
        return {track: tuple(drawn[25, left]) for track, left in zip(tracks, lefts, strict=True)}

    first, later = colours([0, 7, UNTRACKED]), colours([7, UNTRACKED, 0])
    assert first == later and len(set(first.values())) == 3
    assert len(set(first[UNTRACKED])) == 1


def test_the_label_of_a_track_begins_with_its_number() -> None:
    instances = frame(box(5), box(30))
    instances.track_ids = torch.tensor([12, UNTRACKED])
    assert label_texts(instances, ["cat", "dog"]) == ["#12 cat 0.90", "cat 0.90"]
    assert label_texts(instances, ["cat"]) == ["#12 0.90", "0.90"]
