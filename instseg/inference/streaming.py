"""Evaluation of video models on clips as on a stream: key frames in full, others with their help.

Switched on by ``TEST.VIDEO``; without it every frame is computed in full.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from instseg.data.datasets import reading_datasets
from instseg.errors import ConfigError
from instseg.modeling import VideoModel, as_video


class Stream(nn.Module):
    """A video model as one that predicts on single frames, which come in the order of their clips.

    It keeps the state from frame to frame and computes in full the first frame of a clip, every
    ``interval``-th, and a frame that does not follow the one before it (another clip, a gap,
    another size).  What it is given needs ``video_id`` and ``frame_index``.

    Where several processes share a data set, a clip that two of them share begins once more in the
    second.
    """

    def __init__(self, model: VideoModel, *, interval: int, offset: int = 0) -> None:
        """
        Args:
            model: also a module.
            interval: frames from one key frame to the next.
            offset: index of the first key frame; those before it are computed in full as well.
        """
        super().__init__()
        self.model = model
        self.interval = interval
        self.offset = offset
        self._state: tuple[Tensor, ...] = ()
        self._last: tuple[Any, ...] = ()

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """One result per frame, as the model's ``postprocess`` gives it."""
        return [self._predict(frame) for frame in batched_inputs]

    def _predict(self, frame: dict[str, Any]) -> dict[str, Any]:
        images = self.model.preprocess([frame])
        clip, index = frame["video_id"], frame["frame_index"]
        follows = self._last == (clip, index - 1, images.shape, frame["image"].shape)
        due = index < self.offset or (index - self.offset) % self.interval == 0
        if due or not follows:
            outputs, self._state = self.model.keyframe(images)
        else:
            outputs = self.model.between(images, self._state)
        self._last = (clip, index, images.shape, frame["image"].shape)
        (result,) = self.model.postprocess(outputs, [frame])
        return result


def build_streams(cfg: CfgNode, model: nn.Module) -> list[Stream]:
    """``model`` for each pass of ``TEST.KEYFRAME_PASSES`` over the clips; their key frames differ.

    Raises:
        ConfigError: a model whose frames share no work, ``DATASETS.TEST`` without videos, or
            numbers that cannot be.
    """
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    video = as_video(bare)
    if video is None:
        raise ConfigError(
            f"TEST.VIDEO is on, but {type(bare).__name__} sees every frame alone; set TEST.VIDEO "
            "False, or take a model whose frames share work, such as YolactEdge"
        )
    interval = cfg.TEST.KEYFRAME_INTERVAL or video.keyframe_interval
    passes = cfg.TEST.KEYFRAME_PASSES
    if interval < 1:
        raise ConfigError(f"TEST.KEYFRAME_INTERVAL is {interval}; expected at least 1, 0 for auto")
    if not 1 <= passes <= interval:
        raise ConfigError(
            f"TEST.KEYFRAME_PASSES is {passes}; expected 1 to {interval}, the interval between key "
            "frames: a further pass would repeat the first"
        )
    for name in cfg.DATASETS.TEST:
        with reading_datasets([name]):
            records = DatasetCatalog.get(name)
        if not all("video_id" in record and "frame_index" in record for record in records):
            raise ConfigError(
                f"TEST.VIDEO is on, but the data set {name} holds still pictures; set TEST.VIDEO "
                "False, or evaluate on e.g. shapes_video_val"
            )
    return [Stream(video, interval=interval, offset=offset) for offset in range(passes)]


def mean_result(results: Sequence[Any]) -> Any:
    """The mean of every number in ``results``, dicts of dicts of the same keys."""
    first = results[0]
    if isinstance(first, dict):
        return {key: mean_result([result[key] for result in results]) for key in first}
    return float(np.mean(results)) if isinstance(first, float) else first
