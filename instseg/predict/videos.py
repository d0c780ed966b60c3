"""Prediction on the frames of videos and cameras."""

import math
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import cv2
from tqdm import tqdm

from instseg.data.images import Array
from instseg.errors import ImageError, OutputError
from instseg.predict.results import AddRecords, Results
from instseg.predict.sources import Source

# For cameras and files that do not tell theirs.
_DEFAULT_FPS = 25.0


def predict_video(
    results: Results, source: Source, add_records: AddRecords, image_ids: Iterator[int]
) -> None:
    """Predict on the frames of a video file or camera."""
    capture = cv2.VideoCapture(int(source.name) if source.kind == "camera" else source.name)
    try:
        _frames(capture, results, source, add_records, image_ids)
    except ImageError as error:
        results.fail(error)
    finally:
        capture.release()


def _frames(
    capture: cv2.VideoCapture,
    results: Results,
    source: Source,
    add_records: AddRecords,
    image_ids: Iterator[int],
) -> None:
    if not capture.isOpened():
        raise ImageError(_why_no_video(source))
    pending: deque[Array] = deque()

    def decodable() -> Iterator[Array]:
        total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        with tqdm(total=max(total, 0) or None, unit="frame", disable=None) as bar:
            while True:
                ok, frame = capture.read()
                if not ok:
                    return
                pending.append(frame)
                yield frame
                bar.update()

    writer = None
    number = -1
    try:
        for number, result in enumerate(results.predictor.stream(decodable())):
            frame = pending.popleft()
            kept = results.keep(result["instances"])
            head = {"image_id": next(image_ids), "file_name": source.name, "frame": number}
            described = results.describe(kept, source.stem, f"frame{number:06d}_")
            add_records(head | record for record in described)
            if results.overlay:
                path = results.output / f"{source.stem}.mp4"
                writer = writer or _open_writer(path, capture.get(cv2.CAP_PROP_FPS), frame)
                writer.write(results.draw(frame, kept))
    finally:
        if writer is not None:
            writer.release()
    if number < 0:
        raise ImageError(f"{source.name}: no frame can be decoded")


def _why_no_video(source: Source) -> str:
    if source.kind == "camera":
        return f"camera {source.name}: there is no such camera, or it is in use"
    if not Path(source.name).exists():
        return f"{source.name}: no such file"
    size = os.path.getsize(source.name)
    return f"{source.name}: is not a video that OpenCV can decode ({size} bytes)"


def _open_writer(path: Path, fps: float, frame: Array) -> cv2.VideoWriter:
    usable = fps if math.isfinite(fps) and fps > 0 else _DEFAULT_FPS
    size = (frame.shape[1], frame.shape[0])
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), usable, size)
    if not writer.isOpened():
        raise OutputError(
            f"{path} cannot be written: OpenCV cannot open a video of {size[0]}x{size[1]} pixels "
            "there"
        )
    return writer
