"""Evaluation of video models on streams of frames: key frames in full, others with their help.

``TEST.VIDEO`` switches it on; without it every frame is computed in full.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from instseg.data.dataset import DataSet
from instseg.errors import ConfigError
from instseg.inference.keyframes import KeyFrames
from instseg.modeling import VideoModel, as_video
from instseg.modeling.contract import architectures


class Stream(nn.Module):
    """Lets a video model predict on single frames that come in the order of their clips.

    Computes frames as :class:`instseg.VideoPredictor` does, and begins anew at a frame that does
    not follow the one before it (another clip, a gap).  Inputs need ``video_id`` and
    ``frame_index``; the latter decides which are key frames.

    If a clip is split between two processes, it begins anew in the second.
    """

    def __init__(self, model: VideoModel, *, interval: int, offset: int = 0) -> None:
        """
        Args:
            model: also a module.
            interval, offset: see :class:`instseg.inference.keyframes.KeyFrames`.
        """
        super().__init__()
        self.model = model
        self.keyframes = KeyFrames(model, interval, offset)
        self._expected: tuple[Any, int] | None = None

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """One result per frame, as the model's ``postprocess`` gives it."""
        return [self._predict(frame) for frame in batched_inputs]

    def _predict(self, frame: dict[str, Any]) -> dict[str, Any]:
        clip, index = frame["video_id"], frame["frame_index"]
        if self._expected != (clip, index):
            self.keyframes.reset(index)
        self._expected = (clip, index + 1)
        result, _ = self.keyframes(frame, f"frame {index} of clip {clip}")
        return result


def build_streams(cfg: CfgNode, model: nn.Module, datasets: Sequence[DataSet]) -> list[Stream]:
    """A stream for each of ``TEST.KEYFRAME_PASSES`` passes over the clips; key frames differ.

    Args:
        datasets: those of ``DATASETS.TEST``.
    Raises:
        ConfigError: a model whose frames share no work, a data set without videos, or an impossible
            number of passes.
    """
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    video = as_video(bare)
    if video is None:
        known = architectures(lambda kind: hasattr(kind, "keyframe"))
        raise ConfigError(
            f"TEST.VIDEO is on, but {type(bare).__name__} sees every frame alone; set TEST.VIDEO "
            f"False, or take a model whose frames share work, such as {', '.join(known)}"
        )
    interval = cfg.TEST.KEYFRAME_INTERVAL or video.keyframe_interval
    passes = cfg.TEST.KEYFRAME_PASSES
    if not 1 <= passes <= interval:
        raise ConfigError(
            f"TEST.KEYFRAME_PASSES is {passes}; expected 1 to {interval}, the interval between key "
            "frames: a further pass would repeat the first"
        )
    for dataset in datasets:
        if not all("video_id" in record and "frame_index" in record for record in dataset.records):
            raise ConfigError(
                f"TEST.VIDEO is on, but the data set {dataset.name} holds still images; set "
                "TEST.VIDEO False, or evaluate on e.g. shapes_video_val"
            )
    return [Stream(video, interval=interval, offset=offset) for offset in range(passes)]


def mean_result(results: Sequence[Any]) -> Any:
    """The mean of every number in ``results``, dicts of dicts of the same keys."""
    first = results[0]
    if isinstance(first, dict):
        return {key: mean_result([result[key] for result in results]) for key in first}
    return float(np.mean(results)) if isinstance(first, float) else first
