"""Tiny video files for tests, and a model whose frames share work."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn


def images(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """A bright square that moves over a gradient, so that no two frames are equal."""
    columns = np.linspace(0, 120, width, dtype=np.uint8)
    frames = []
    for number in range(count):
        image = np.repeat(columns[None, :, None], height, axis=0).repeat(3, axis=2)
        left = number * 3 % max(width - 8, 1)
        image[height // 4 : height // 2, left : left + 8] = (40, 200, 255)
        frames.append(image)
    return frames


def write_clip(
    path: Path,
    frames: Sequence[np.ndarray],
    times: Sequence[float] | None = None,
    *,
    codec: str = "mpeg4",
    options: dict[str, str] | None = None,
) -> Path:
    """Write images as video, at ``times`` in seconds or ten a second; each 5th is a key frame."""
    ticks = 1000 if times else 10
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, 10)
        stream.codec_context.time_base = Fraction(1, ticks)
        stream.codec_context.gop_size = 5
        stream.bit_rate = 4_000_000
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = {"ffv1": "yuv444p", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="bgr24")
            frame.pts = round(times[number] * ticks) if times else number
            frame.time_base = Fraction(1, ticks)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def turned(path: Path, degrees: int) -> Path:
    """Rewrite the display matrix of an MP4 file, so that it is shown turned by ``degrees``."""
    one, minus, zero = (number.to_bytes(4, "big", signed=True) for number in (1 << 16, -1 << 16, 0))
    matrices = {
        0: one + zero * 3 + one,
        90: zero + one + zero + minus + zero,
        180: minus + zero * 3 + minus,
        270: zero + minus + zero + one + zero,
    }
    data = path.read_bytes()
    start = data.index(matrices[0], data.index(b"tkhd"))
    path.write_bytes(data[:start] + matrices[degrees] + data[start + 20 :])
    return path


class VideoStub(nn.Module):
    """A model that finds one instance; its score tells the means of the frame and its key frame.

    Attributes:
        calls: "K" for each key frame, "B" for each frame between.
    """

    keyframe_interval = 3

    def __init__(self) -> None:
        super().__init__()
        self.calls = ""
        self.weight = nn.Parameter(torch.ones(()))

    def preprocess(self, batched_inputs: Sequence[dict[str, Any]]) -> Tensor:
        return torch.stack([item["image"] for item in batched_inputs])

    def keyframe(self, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        self.calls += "K"
        mean = images.mean(dim=(1, 2, 3)) / 255 * self.weight
        return (mean,), (mean,)

    def between(self, images: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.calls += "B"
        return ((images.mean(dim=(1, 2, 3)) / 255 + 2 * state[0]) / 3,)

    def postprocess(
        self, outputs: Sequence[Tensor], batched_inputs: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        results = []
        for score, item in zip(outputs[0], batched_inputs, strict=True):
            height, width = item["height"], item["width"]
            masks = torch.zeros(1, height, width, dtype=torch.bool)
            masks[:, : height // 2] = True
            instances = Instances((height, width))
            instances.pred_boxes = Boxes(torch.tensor([[0.0, 0, width, height // 2]]))
            instances.scores = score[None]
            instances.pred_classes = torch.zeros(1, dtype=torch.int64)
            instances.pred_masks = masks
            results.append({"instances": instances})
        return results
