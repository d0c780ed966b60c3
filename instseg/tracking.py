"""Links the detections of an instance in successive frames."""

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from detectron2.structures import Instances

from instseg.errors import ConfigError, short
from instseg.optional import require

UNTRACKED = -1
"""Number of a detection that belongs to no track."""
METHODS = ("sort", "bytetrack")
DEFAULT_PATIENCE = 10
_LONGEST_PATIENCE = 1_000_000
_FRAME_RATE = 30.0  # at which the library counts patience in frames
_SAME_CLASS = 0.2
"""Overlap that a common class is worth where two tracks compete for a detection."""
_REACH = 3.0
"""How far an instance may move to its second detection, in lengths of its longer side."""
_GROWTH = 1.5
"""Factor by which its width and height may change on this way."""

Boxes = npt.NDArray[np.float64]


class Tracker:
    """Numbers the instances of one video, frame after frame, by motion and the overlap of boxes.

    The package ``trackers`` does the work: a Kalman filter predicts where a box goes, and
    predictions and detections are matched by IoU.  ``sort`` (Bewley et al., ICIP 2016) takes all
    detections alike; ``bytetrack`` (Zhang et al., ECCV 2022) begins tracks with scores of at least
    0.7 only, and continues them with any.  Two settings differ from the library's: a track counts
    from its first detection on, and ``sort`` leaves out no score.

    A class that flickers does not split a track: classes count only where two tracks compete for a
    detection, and a track has the class with the highest total score (:func:`vote`).

    A track with one detection has no velocity yet, so nothing tells where a fast instance goes.  If
    no box in the next frame overlaps it enough to be matched, the track takes a detection of its
    class and size that no track accounts for and that lies within three of its longer sides.  Here
    the method's least IoU is enough, even if ``min_iou`` is higher: a detection between the two
    begins a track.
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
                takes the method's, 0.3 for ``sort`` and 0.1 for ``bytetrack``.
            patience: frames without its instance after which a track can still go on; one more
                ends it.
        Raises:
            ConfigError: a value that cannot be used, or the package ``trackers`` is not installed.
        """
        _check(method, min_iou, patience)
        check_installed()
        self._library = _library(method, min_iou, patience)
        method_iou = _library(method, None, patience).minimum_iou_threshold
        self._enough = min(method_iou, self._library.minimum_iou_threshold)
        self._affinity = _Affinity(self._library)
        self._library.iou = self._affinity
        self._votes = self._affinity.votes
        self._count = 0

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that track numbers depend on, as JSON values."""
        library = self._library
        return {
            "tracker": library.tracker_id,
            "track_min_iou": library.minimum_iou_threshold,
            "track_patience": library.maximum_frames_without_update,
        }

    def update(self, instances: Instances) -> torch.Tensor:
        """Take the detections of the next frame, of which there may be none.

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
        tracked = self._library.update(
            supervision.Detections(
                xyxy=boxes, confidence=scores, data={"row": np.arange(len(rows))}
            )
        )
        numbers = np.full(len(rows), UNTRACKED)
        if len(tracked):  # ByteTrack changes their order
            numbers[tracked.data["row"]] = tracked.tracker_id
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
        """Number the tracks that begin in this frame; the library would do it in the next frame.

        The library begins tracks in the order of their detections.
        """
        begun = [track for track in self._library.tracks if track.tracker_id == UNTRACKED]
        least = self._library.track_activation_threshold
        (rows,) = np.nonzero((numbers == UNTRACKED) & (scores >= least))
        for track, row in zip(begun, rows, strict=True):
            track.tracker_id = numbers[row] = self._count
            self._count += 1

    def _begin_to_move(self, boxes: Boxes, classes: npt.NDArray[np.int64]) -> None:
        """Give tracks with one detection the velocity that leads to their second."""
        tracks = [track for track in self._library.tracks if track.age == 0]
        if not tracks or not len(boxes):
            return
        states = np.stack(
            [track.state_estimator.kf.state.ravel() for track in self._library.tracks]
        )
        expected = states[:, :4] + states[:, 4:]
        (free,) = np.nonzero((_iou(expected, boxes) < self._enough).all(axis=0))
        old_boxes = np.stack([track.get_state_bbox() for track in tracks])
        unmatched = (_iou(old_boxes, boxes) < self._enough).all(axis=1)
        pairs: list[tuple[float, int, int]] = []
        for index in np.flatnonzero(unmatched).tolist():
            low, high = old_boxes[index, :2], old_boxes[index, 2:]
            growth = (boxes[free, 2:] - boxes[free, :2]) / (high - low)
            moves = (boxes[free, 2:] + boxes[free, :2] - high - low) / 2
            fits = (abs(np.log(growth)) <= np.log(_GROWTH)).all(axis=1)
            fits &= (abs(moves) <= _REACH * (high - low).max()).all(axis=1)
            fits &= classes[free] == vote(self._votes[tracks[index].tracker_id])
            distances = np.hypot(*moves.T)
            fitting_rows = np.flatnonzero(fits).tolist()
            pairs += [(float(distances[row]), index, int(free[row])) for row in fitting_rows]
        free_tracks, free_boxes = set(range(len(tracks))), set(free.tolist())
        for _, index, row in sorted(pairs):
            if index in free_tracks and row in free_boxes:
                free_tracks.remove(index)
                free_boxes.remove(row)
                state = tracks[index].state_estimator.kf.state
                state[4:, 0] = boxes[row] - state[:4, 0]

    def _forget(self) -> None:
        """Drop the votes of tracks that have ended, so that memory stays flat over any video."""
        waiting = {track.tracker_id for track in self._library.tracks}
        for number in [number for number in self._votes if number not in waiting]:
            del self._votes[number]


class _Affinity:
    """Replaces the plain IoU by which the library matches: classes count a little too.

    Otherwise two instances at one spot, such as a rider and a horse, would swap their tracks.
    """

    def __init__(self, library: Any) -> None:
        self.votes: dict[int, Counter[int]] = {}
        self._library = library
        self._groups: list[tuple[Boxes, npt.NDArray[np.int64]]] = []

    def expect(self, boxes: Boxes, classes: npt.NDArray[np.int64], scores: Boxes) -> None:
        """Take the detections of the next frame, in the groups that the library matches."""
        from trackers import ByteTrackTracker

        is_confident = np.ones(len(boxes), dtype=bool)
        if isinstance(self._library, ByteTrackTracker):
            is_confident = scores >= self._library.high_conf_det_threshold
        self._groups = [(boxes[group], classes[group]) for group in (is_confident, ~is_confident)]

    def compute(self, predicted: Boxes, boxes: Boxes) -> Boxes:
        """(N, M) affinity of predicted boxes (N, 4) and those of a group of detections (M, 4)."""
        if not len(predicted) or not len(boxes):
            return np.zeros((len(predicted), len(boxes)))
        while not np.array_equal(self._groups[0][0], boxes):
            del self._groups[0]
        classes = self._groups.pop(0)[1]
        # The other tracks have their detection: the library matches one group after the other.
        waiting = [track for track in self._library.tracks if track.time_since_update > 0]
        kinds = np.array([vote(self.votes[track.tracker_id]) for track in waiting])
        overlap = _iou(predicted, boxes)
        overlaps_enough = overlap >= self._library.minimum_iou_threshold
        same_class = kinds[:, None] == classes
        return np.where(overlaps_enough, overlap + _SAME_CLASS * same_class, 0.0)


def vote(scores: Counter[int]) -> int:
    """The class of a track: the one with the highest total score, of equals the earlier one.

    Args:
        scores: class → sum of the scores of its detections.
    """
    return max(scores, key=scores.__getitem__)


def check_installed() -> None:
    """Raise a ConfigError if the package that tracks is missing."""
    require("trackers", "video", "linking detections to tracks")


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
