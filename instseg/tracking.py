"""Which detections of successive frames are the same object."""

from typing import Any

import numpy as np
import torch
from detectron2.structures import Instances

from instseg.errors import ConfigError

UNTRACKED = -1
"""Number of a detection that belongs to no track."""
_FRAME_RATE = 30.0  # in whose frames the library counts
_PAUSE = 0.01  # of a frame, between the two times that the tracker sees one


class Tracker:
    """Numbers the objects of one video, frame after frame, by the overlap of their boxes.

    Objects of different classes are never linked: each class has a SORT tracker (Bewley et al.,
    ICIP 2016; of the package ``trackers``), which predicts where a box goes and matches predictions
    and detections by IoU.  A track that loses its object picks it up again within ``patience``
    frames.
    """

    def __init__(self, *, min_iou: float = 0.3, patience: int = 10) -> None:
        """
        Args:
            min_iou: least overlap of a detection and the box that is predicted for its track.
            patience: frames that a track waits for its object.
        Raises:
            ConfigError: the package ``trackers`` is not installed.
        """
        check_installed()
        self._min_iou = min_iou
        self._patience = patience
        self._trackers: dict[int, Any] = {}
        # (class, the library's number) → our number and the last frame of the track.
        self._numbers: dict[tuple[int, int], tuple[int, int]] = {}
        self._count = 0
        self._frame = 0

    def update(self, instances: Instances) -> torch.Tensor:
        """Take the detections of the next frame, none of them included.

        Args:
            instances: with ``pred_boxes``, ``scores`` and ``pred_classes``.
        Returns:
            (N,) int64 number of each detection's track; they count from 0 over all classes.
            ``UNTRACKED`` where a box has no area or is not finite.
        """
        import supervision
        from trackers import SORTTracker

        boxes = instances.pred_boxes.tensor.cpu().double().numpy()
        classes = instances.pred_classes.cpu().numpy()
        usable = np.isfinite(boxes).all(axis=1) & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        numbers = np.full(len(boxes), UNTRACKED)
        for kind in sorted({*self._trackers, *classes[usable].tolist()}):
            if kind not in self._trackers:
                self._trackers[kind] = SORTTracker(
                    frame_rate=_FRAME_RATE,
                    track_activation_threshold=0.0,
                    minimum_consecutive_frames=1,
                    minimum_iou_threshold=self._min_iou,
                    lost_track_buffer=self._patience,
                )
            (own,) = np.nonzero(usable & (classes == kind))
            scores = instances.scores.cpu().numpy()[own]
            detections = supervision.Detections(xyxy=boxes[own], confidence=scores)
            # The library numbers an object when it sees it for the second time, so it is shown
            # every frame twice, a moment apart.
            for moment in (self._frame, self._frame + _PAUSE):
                found = self._trackers[kind].update(detections, timestamp=moment / _FRAME_RATE)
            for index, track in zip(own, found.tracker_id, strict=True):
                if track >= 0:
                    numbers[index] = self._number((kind, int(track)))
        # Of the tracks that wait no longer, so that memory is flat over any video.
        oldest = self._frame - self._patience - 2
        self._numbers = {key: value for key, value in self._numbers.items() if value[1] >= oldest}
        self._frame += 1
        return torch.from_numpy(numbers)

    def _number(self, key: tuple[int, int]) -> int:
        number, _ = self._numbers.get(key, (self._count, 0))
        self._count = max(self._count, number + 1)
        self._numbers[key] = number, self._frame
        return number


def check_installed() -> None:
    """Raise a ConfigError if the package that tracks is missing."""
    try:
        import trackers  # noqa: F401
    except ImportError:
        raise ConfigError(
            "linking detections to tracks needs the package trackers, which is not installed; "
            "type: pip install 'instseg[video]'"
        ) from None
