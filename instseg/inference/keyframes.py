"""Video models in prediction and evaluation: key frames in full, others with their help."""

import logging
from typing import Any

from torch import Tensor

from instseg.modeling import VideoModel

logger = logging.getLogger(__name__)


class KeyFrames:
    """Runs a video model on frames in their order: decides which are key frames, keeps the state.

    Key frames are the first frame, every ``interval``-th frame, and a frame of another size than
    the one before it, from which counting starts again.  A frame at which the network fails is not
    counted.

    Attributes:
        model: the video model.
        interval: frames from one key frame to the next.
        offset: number of the first key frame of a video; those before it are computed in full too.
    """

    def __init__(self, model: VideoModel, interval: int, offset: int = 0) -> None:
        self.model = model
        self.interval = interval
        self.offset = offset
        self._size = (0, 0)
        self.reset()

    def reset(self, number: int = 0) -> None:
        """Forget the frames so far: the next one is a key frame with this number in its video."""
        self._state: tuple[Tensor, ...] | None = None
        self._number = number

    def __call__(self, frame: dict[str, Any], name: str) -> tuple[dict[str, Any], bool]:
        """Predict on the next frame.

        Args:
            frame: as Detectron2's models take it.
            name: its name in messages.
        Returns:
            Detectron2's result, and whether the frame was computed in full.
        """
        height, width = frame["image"].shape[-2:]
        size = (frame.get("height", height), frame.get("width", width))
        state, number = self._state, self._number
        if state is not None and size != self._size:
            logger.warning(
                "%s is a key frame: it has %dx%d pixels and those before it %dx%d",
                *(name, *reversed(size), *reversed(self._size)),
            )
            state, number = None, 0
        images = self.model.preprocess([frame])
        full = number < self.offset or (number - self.offset) % self.interval == 0
        if full or state is None:
            full = True
            outputs, state = self.model.keyframe(images)
        else:
            outputs = self.model.between(images, state)
        self._state, self._number, self._size = state, number + 1, size
        (result,) = self.model.postprocess(outputs, [frame])
        return result, full
