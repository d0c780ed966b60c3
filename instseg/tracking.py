"""Which detections of successive frames are the same instance."""

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from detectron2.structures import Instances

from instseg.errors import ConfigError, short

UNTRACKED = -1
"""Number of a detection that belongs to no track."""
METHODS = ("sort", "bytetrack")
DEFAULT_PATIENCE = 10
_LONGEST_PATIENCE = 1_000_000
_FRAME_RATE = 30.0  # at which the library counts patience in frames
_SAME_CLASS = 0.2
"""Overlap that a class in common is worth where two tracks compete for a detection."""
_REACH = 3.0
"""Longest sides that an instance seen once may have moved."""
_GROWTH = 1.5
"""Factor by which its width and height may have changed then."""

Boxes = npt.NDArray[np.float64]


class Tracker:
    """Numbers the instances of one video, frame after frame, by motion and the overlap of boxes.

    The package ``trackers`` does the work: a Kalman filter predicts where a box goes, and
    predictions and detections are matched by IoU.  ``sort`` (Bewley et al., ICIP 2016) takes all
    detections alike; ``bytetrack`` (Zhang et al., ECCV 2022) begins tracks with scores of at least
    0.7 only, and continues them with any.  Settings are the library's own, but two: a track counts
    from its first detection on, and ``sort`` leaves out no score.

    A class that flickers does not split a track: classes count where two tracks compete for a
    detection, and the class of a track is that with the most score (:func:`vote`).

    A track seen once has no velocity yet, so nothing tells where a fast instance goes.  If nothing
    in the next frame overlaps its box enough to be matched, and a detection of its class and size
    that no track accounts for lies within three of its longer sides, that one is taken for its
    second.  Overlap is enough at the method's own least IoU there, also where a higher one is asked
    for: what lies between the two begins a track.
    """

    def __init__(
        self,
        *,
        method: str = "sort",
        min_iou: float | None = None,
        patience: int = DEFAULT_PATIENCE,
    ) -> None:
        """
        Args:
            method: one of ``METHODS``.
            min_iou: least overlap of a detection and the box that is predicted for its track; None
                is that of the method, 0.3 for ``sort`` and 0.1 for ``bytetrack``.
            patience: frames without its instance after which a track can still go on; one more
                ends it.
        Raises:
            ConfigError: a value that cannot be used, or the package ``trackers`` is not installed.
        """
        _check(method, min_iou, patience)
        check_installed()
        self._library = _library(method, min_iou, patience)
        own = _library(method, None, patience).minimum_iou_threshold
        self._enough = min(own, self._library.minimum_iou_threshold)
        self._affinity = _Affinity(self._library)
        self._library.iou = self._affinity
        self._votes = self._affinity.votes
        self._count = 0

    @property
    def settings(self) -> dict[str, Any]:
        """What numbers depend on; JSON."""
        library = self._library
        return {
            "tracker": library.tracker_id,
            "track_min_iou": library.minimum_iou_threshold,
            "track_patience": library.maximum_frames_without_update,
        }

    def update(self, instances: Instances) -> torch.Tensor:
        """Take the detections of the next frame, none of them included.

        Args:
            instances: with ``pred_boxes``, ``scores`` and ``pred_classes``.
        Returns:
            (N,) int64 number of each detection's track; they count from 0 over all classes.
            ``UNTRACKED`` where a box has no area or is not finite, and where ``bytetrack`` finds no
            track for a low score.
        """
        import supervision

        boxes = instances.pred_boxes.tensor.cpu().double().numpy()
        usable = np.isfinite(boxes).all(axis=1) & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        (rows,) = np.nonzero(usable)
        boxes = boxes[rows]
        classes = instances.pred_classes.cpu().numpy()[rows]
        scores = instances.scores.cpu().double().numpy()[rows]
        self._affinity.expect(boxes, classes, scores)
        self._begin_to_move(boxes, classes)
        found = self._library.update(
            supervision.Detections(
                xyxy=boxes, confidence=scores, data={"row": np.arange(len(rows))}
            )
        )
        numbers = np.full(len(rows), UNTRACKED)
        if len(found):  # ByteTrack gives them in another order
            numbers[found.data["row"]] = found.tracker_id
        self._number_new(numbers, scores)
        for number, kind, score in zip(numbers.tolist(), classes.tolist(), scores, strict=True):
            if number != UNTRACKED:
                votes = self._votes.setdefault(number, Counter())
                votes[kind] += float(score)  # type: ignore[assignment]
        self._forget()
        result = torch.full((len(instances),), UNTRACKED)
        result[rows] = torch.from_numpy(numbers)
        return result

    def _number_new(self, numbers: npt.NDArray[np.int64], scores: Boxes) -> None:
        """Number the tracks of this frame at once; the library would in the next frame.

        It begins them in the order of their detections.
        """
        begun = [track for track in self._library.tracks if track.tracker_id == UNTRACKED]
        least = self._library.track_activation_threshold
        (rows,) = np.nonzero((numbers == UNTRACKED) & (scores >= least))
        for track, row in zip(begun, rows, strict=True):
            track.tracker_id = numbers[row] = self._count
            self._count += 1

    def _begin_to_move(self, boxes: Boxes, classes: npt.NDArray[np.int64]) -> None:
        """Give tracks seen once the velocity that leads to their second detection."""
        tracks = [track for track in self._library.tracks if track.age == 0]
        if not tracks or not len(boxes):
            return
        states = np.stack(
            [track.state_estimator.kf.state.ravel() for track in self._library.tracks]
        )
        expected = states[:, :4] + states[:, 4:]
        (free,) = np.nonzero((_iou(expected, boxes) < self._enough).all(axis=0))
        old = np.stack([track.get_state_bbox() for track in tracks])
        pairs: list[tuple[float, int, int]] = []
        for place in np.flatnonzero((_iou(old, boxes) < self._enough).all(axis=1)).tolist():
            sides = old[place, 2:] - old[place, :2]
            growth = (boxes[free, 2:] - boxes[free, :2]) / sides
            way = (boxes[free, 2:] + boxes[free, :2] - old[place, 2:] - old[place, :2]) / 2
            fits = (abs(np.log(growth)) <= np.log(_GROWTH)).all(axis=1)
            fits &= (abs(way) <= _REACH * sides.max()).all(axis=1)
            fits &= classes[free] == vote(self._votes[tracks[place].tracker_id])
            distances = np.hypot(*way.T)
            found = np.flatnonzero(fits).tolist()
            pairs += [(float(distances[index]), place, int(free[index])) for index in found]
        left, taken = set(range(len(tracks))), set(free.tolist())
        for _, place, index in sorted(pairs):
            if place in left and index in taken:
                left.remove(place)
                taken.remove(index)
                state = tracks[place].state_estimator.kf.state
                state[4:, 0] = boxes[index] - state[:4, 0]

    def _forget(self) -> None:
        """Tracks that wait no longer, so that memory is flat over any video."""
        waiting = {track.tracker_id for track in self._library.tracks}
        for number in [number for number in self._votes if number not in waiting]:
            del self._votes[number]


class _Affinity:
    """What the library matches by in place of the plain IoU: classes count a little too.

    Without that, two instances in one place, such as a rider and a horse, would swap their tracks.
    """

    def __init__(self, library: Any) -> None:
        self.votes: dict[int, Counter[int]] = {}
        self._library = library
        self._groups: list[tuple[Boxes, npt.NDArray[np.int64]]] = []

    def expect(self, boxes: Boxes, classes: npt.NDArray[np.int64], scores: Boxes) -> None:
        """Take the detections of the next frame, in the groups that the library matches."""
        from trackers import ByteTrackTracker

        sure = np.ones(len(boxes), dtype=bool)
        if isinstance(self._library, ByteTrackTracker):
            sure = scores >= self._library.high_conf_det_threshold
        self._groups = [(boxes[group], classes[group]) for group in (sure, ~sure)]

    def compute(self, predicted: Boxes, boxes: Boxes) -> Boxes:
        """(N, M) affinity of predicted boxes (N, 4) and those of a group of detections (M, 4)."""
        if not len(predicted) or not len(boxes):
            return np.zeros((len(predicted), len(boxes)))
        while not np.array_equal(self._groups[0][0], boxes):
            del self._groups[0]
        classes = self._groups.pop(0)[1]
        # The others have their detection: the library matches one group after the other.
        waiting = [track for track in self._library.tracks if track.time_since_update > 0]
        kinds = np.array([vote(self.votes[track.tracker_id]) for track in waiting])
        overlap = _iou(predicted, boxes)
        enough = overlap >= self._library.minimum_iou_threshold
        same = kinds[:, None] == classes
        return np.where(enough, overlap + _SAME_CLASS * same, 0.0)


def vote(scores: Counter[int]) -> int:
    """The class of a track: that with the most score in all; the earlier one of equals.

    Args:
        scores: class → sum of the scores of its detections.
    """
    return max(scores, key=scores.__getitem__)


def check_installed() -> None:
    """Raise a ConfigError if the package that tracks is missing."""
    try:
        import trackers  # noqa: F401
    except ImportError:
        raise ConfigError(
            "linking detections to tracks needs the package trackers, which is not installed; "
            "type: pip install 'instseg[video]'"
        ) from None


def _check(method: str, min_iou: float | None, patience: int) -> None:
    if method not in METHODS:
        raise ConfigError(f"the tracker is {short(method)}; expected one of {', '.join(METHODS)}")
    if min_iou is not None and not 0 < min_iou <= 1:
        raise ConfigError(
            f"the least IoU of a track is {short(min_iou)}; expected a number above 0, at most 1"
        )
    if type(patience) is not int or not 0 <= patience <= _LONGEST_PATIENCE:
        raise ConfigError(
            f"the patience of tracks is {short(patience)}; expected a whole number of frames from "
            f"0 to {_LONGEST_PATIENCE}"
        )


def _library(method: str, min_iou: float | None, patience: int) -> Any:
    from trackers import ByteTrackTracker, SORTTracker

    settings: dict[str, Any] = {
        "lost_track_buffer": patience,
        "frame_rate": _FRAME_RATE,
        "minimum_consecutive_frames": 1,
    }
    if min_iou is not None:
        settings["minimum_iou_threshold"] = min_iou
    if method == "sort":
        return SORTTracker(track_activation_threshold=-np.inf, **settings)
    return ByteTrackTracker(**settings)


def _iou(first: Boxes, second: Boxes) -> Boxes:
    """(N, M) IoU of boxes (N, 4) and (M, 4); 0 where it is no number."""
    import supervision

    with np.errstate(all="ignore"):
        overlap = supervision.box_iou_batch(first, second)
    return np.nan_to_num(np.asarray(overlap, dtype=np.float64), posinf=0.0, neginf=0.0)
