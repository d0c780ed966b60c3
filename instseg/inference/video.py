"""Prediction on the frames of a video, in which later frames may reuse work on earlier ones."""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from detectron2.config import CfgNode
from PIL import Image

from instseg.data.images import Array
from instseg.errors import ConfigError
from instseg.inference.keyframes import KeyFrames
from instseg.inference.predictor import Predictor
from instseg.modeling import VideoModel
from instseg.modeling.contract import architectures


class VideoPredictor:
    """Runs a model on frames in their order.

    A model whose frames share work (:class:`instseg.modeling.VideoModel`) computes every
    ``keyframe_interval``-th frame in full and the others with its help.  Any other model sees each
    frame alone.  Takes frames and gives results as :class:`instseg.Predictor` does.

    Attributes:
        predictor: prepares frames, and holds ``cfg``, ``model`` and ``categories``.
        keyframe_interval: frames from one key frame to the next; 1 where every frame is one.

    Example::

        predictor = VideoPredictor("yolact_edge/yolact_edge_shapes_video.yaml", "model_final.pth")
        for frame in VideoFile("clip.mp4"):
            masks = predictor(frame.image)["instances"].pred_masks
    """

    def __init__(
        self,
        config: CfgNode | str | os.PathLike[str] | Predictor,
        weights: str | os.PathLike[str] | None = None,
        *,
        keyframe_interval: int | None = None,
        overrides: Sequence[Any] = (),
        allow_partial: bool = False,
        masks: str | None = None,
    ) -> None:
        """Build the model and load its weights.

        Args:
            config: a configuration, the path of a YAML file, or a predictor (exported ones too),
                whose model is used as it is.  A video model never runs compiled.
            weights: a checkpoint, as for :class:`instseg.Predictor`; not with a predictor.
            keyframe_interval: None takes the model's own.
            overrides: ``[KEY, VALUE, ...]``, applied last; not with a predictor.
            allow_partial: as for :class:`instseg.Predictor`; ignored with a predictor.
            masks: as for :class:`instseg.Predictor`; not with a predictor.
        Raises:
            ConfigError: a configuration that cannot be used, an interval below 1, or one above 1
                for a model whose frames share no work.
            CheckpointError: weights that cannot be used, or a part of an exported model is missing.
        """
        if isinstance(config, Predictor):
            if weights is not None or overrides or masks is not None:
                raise ConfigError("a predictor has its weights, overrides and masks already")
            self.predictor = config
        else:
            self.predictor = Predictor(
                config, weights, overrides=overrides, allow_partial=allow_partial, masks=masks
            )
        model = self.predictor.video()
        self.keyframe_interval = self._interval(model, keyframe_interval)
        self._keyframes = None if model is None else KeyFrames(model, self.keyframe_interval)

    def _interval(self, model: VideoModel | None, wanted: int | None) -> int:
        if wanted is not None and wanted < 1:
            raise ConfigError(f"the key frame interval is {wanted}, expected at least 1")
        if model is not None:
            return model.keyframe_interval if wanted is None else wanted
        if wanted is not None and wanted > 1:
            known = architectures(lambda kind: hasattr(kind, "keyframe"))
            raise ConfigError(
                f"{type(self.predictor.model).__name__} sees every frame alone; a key frame "
                f"interval of {wanted} needs a video model such as {', '.join(known)}"
            )
        return 1

    def reset(self) -> None:
        """Forget the frames so far: the next one is a key frame, the first of another video."""
        if self._keyframes is not None:
            self._keyframes.reset()

    def __call__(
        self, frame: Array | str | os.PathLike[str] | Image.Image, *, name: str = "frame"
    ) -> dict[str, Any]:
        """Predict on the next frame.

        A frame of another size than the one before it is a key frame.  A refused frame is as if it
        had not been there.

        Args:
            frame: an (H, W, 3) uint8 array in BGR order, or anything else that a predictor takes.
            name: its name in messages.
        Returns:
            a dict with ``"instances"`` as :class:`instseg.Predictor` gives them, and with
            ``"keyframe"``, whether the frame was computed in full.
        Raises:
            ImageError, TypeError: a frame that cannot be used.
        """
        keyframes = self._keyframes
        if keyframes is None:
            return self.predictor.predict_with(None, frame, name) | {"keyframe": True}
        full = False

        def infer(inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
            nonlocal full
            result, full = keyframes(inputs[0], name)
            return [result]

        result = self.predictor.predict_with(infer, frame, name)
        return result | {"keyframe": full}

    def stream(self, frames: Iterable[Any]) -> Iterator[dict[str, Any]]:
        """Predict on any number of frames, lazily and in order.

        A model that sees every frame alone takes its predictor's ``batch_size`` frames at a time,
        any other model one.

        Args:
            frames: see :meth:`__call__`.
        Yields:
            one dict per frame, as :meth:`__call__` gives it.
        Raises:
            ImageError, TypeError: a frame that cannot be used, after the results of those before
                it.
        """
        if self._keyframes is None:
            # The variable of a loop would keep a result in memory while the next is made.
            results = self.predictor.stream(frames)
            yield from map(lambda result: result | {"keyframe": True}, results)
            return
        for number, frame in enumerate(frames):
            yield self(frame, name=f"frame {number}")
