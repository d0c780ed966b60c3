"""Prediction on the frames of videos of any kind."""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from itertools import count
from typing import Any

from tqdm import tqdm

from instseg.data.images import Array
from instseg.data.intensity import ModelImage
from instseg.data.sequences import DEFAULT_FPS, ImageSequence
from instseg.data.streams import Stream
from instseg.data.videos import Camera, Frame, FrameSource, VideoFile, VideoWriter
from instseg.errors import ConfigError, ImageError
from instseg.inference.video import VideoPredictor
from instseg.predict.earlier import MARK, remove
from instseg.predict.outputs import overlay_name
from instseg.predict.records import VideoRecords, check_free, writing
from instseg.predict.results import Results
from instseg.predict.sources import Source
from instseg.tracking import UNTRACKED, Tracker

logger = logging.getLogger(__name__)


class VideoRun:
    """Predicts on videos one after the other, and writes the results of each."""

    def __init__(
        self,
        results: Results,
        predictor: VideoPredictor,
        info: dict[str, Any],
        *,
        tracker: Callable[[], Tracker] | None = None,
        fps: float = DEFAULT_FPS,
        resume: bool = False,
    ) -> None:
        """
        Args:
            results: counts videos that cannot be used completely.
            predictor: of the frames; reset before each video.
            info: settings that the results depend on; JSON, written to each file.
            tracker: makes a tracker for each video.
            fps: frames per second of image sequences.
            resume: continue files of an earlier run with the same settings.
        """
        self._results = results
        self._predictor = predictor
        self._info = info
        self._tracker = tracker
        self._fps = fps
        self._resume = resume

    def predict(self, source: Source) -> None:
        """Predict on a video, to its end.

        Args:
            source: of any kind but an image.

        Raises:
            ConfigError: an earlier run to be resumed had other settings.
            OutputError: a result cannot be written.
        """
        try:
            with closing(self._open(source)) as video:
                self._predict(video, source)
        except ImageError as error:
            self._results.fail(error)

    def _open(self, source: Source) -> FrameSource:
        if source.kind == "camera":
            return Camera(int(source.name))
        if source.kind == "stream":
            return Stream(source.url)
        if source.kind == "sequence":
            intensity, pages = self._predictor.predictor.intensity, source.pages
            return ImageSequence(
                source.name, source.files, self._fps, pages=pages, intensity=intensity
            )
        return VideoFile(source.name)

    def _predict(self, video: FrameSource, source: Source) -> None:
        header = {
            "info": self._info,
            "videos": [
                {"id": 1, "file_name": source.name, "fps": video.fps, "length": video.length}
            ],
            "categories": self._results.categories(),
        }
        stem = self._results.output / source.stem
        records = VideoRecords(stem.with_name(f"{stem.name}.json"), header, resume=self._resume)
        path = self._results.output / overlay_name(source)
        if records.complete and (path.exists() or not self._results.overlay):
            logger.info("%s: complete in an earlier run", source.name)
            return
        records.complete = False
        if self._results.overlay:
            check_free(path)
        overlay = VideoWriter(path, video.fps, comment=MARK)
        with (
            records,
            overlay if self._results.overlay else nullcontext() as writer,
            tqdm(video, total=video.length, unit="frame", disable=None) as bar,
        ):
            frames = iter(bar)
            tracker = self._tracker() if self._tracker else None
            self._repeat(frames, source, records, writer, tracker)
            if writer is None:  # the overlay of the earlier run lacks the frames to come
                with writing(path):
                    remove(path)
            self._go_on(frames, source, records, writer, tracker)
            records.complete = True

    def _repeat(
        self,
        frames: Iterator[Frame],
        source: Source,
        records: VideoRecords,
        writer: VideoWriter | None,
        tracker: Tracker | None,
    ) -> None:
        """Draw and track the results of an earlier run; both have to start at the first frame."""
        for record, frame in zip(records.earlier(), frames, strict=False):
            if frame.image.shape[:2] != (record["height"], record["width"]):
                raise ConfigError(
                    f"frame {record['frame']} of {source.name} is not of {record['width']}x"
                    f"{record['height']} pixels as in the run to be resumed: it is another video; "
                    "choose another --output"
                )
            instances = self._results.restore(record["objects"], record["height"], record["width"])
            if tracker is not None:
                instances.track_ids = tracker.update(instances)
            if writer is not None:
                writer.write(frame._replace(image=self._results.draw(frame.image, instances)))

    def _go_on(
        self,
        frames: Iterator[Frame],
        source: Source,
        records: VideoRecords,
        writer: VideoWriter | None,
        tracker: Tracker | None,
    ) -> None:
        pending: deque[Frame] = deque()
        problem: ImageError | None = None

        ready = source.kind == "sequence"  # read as INPUT.NORMALIZE says

        def images() -> Iterator[Array | ModelImage]:
            nonlocal problem
            try:
                for frame in frames:
                    pending.append(frame)
                    yield ModelImage(frame.image) if ready else frame.image
            except ImageError as error:  # raised below, when all frames before it are done
                problem = error

        self._predictor.reset()
        numbers = count(records.kept)  # enumerate() would keep a result in memory
        for result in self._predictor.stream(images()):
            number = next(numbers)
            frame = pending.popleft()
            instances = self._results.keep(result["instances"])
            height, width = frame.image.shape[:2]
            objects = self._results.describe(instances, source.stem, f"frame{number:06d}_")
            if tracker is not None:
                instances.track_ids = tracker.update(instances)
                for entry, track in zip(objects, instances.track_ids.tolist(), strict=True):
                    entry["track_id"] = None if track == UNTRACKED else track
            records.add(
                {
                    "frame": number,
                    **({} if frame.file is None else {"file_name": frame.file}),
                    **({} if frame.page is None else {"page": frame.page}),
                    "time": round(frame.time, 6),
                    "width": width,
                    "height": height,
                    "keyframe": result["keyframe"],
                    "objects": objects,
                }
            )
            if writer is not None:
                writer.write(frame._replace(image=self._results.draw(frame.image, instances)))
            del result, instances  # frees the memory of the masks before the next frame
        if problem is not None:
            raise problem
