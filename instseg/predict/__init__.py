"""The work of ``instseg predict``: pictures and videos in, overlays, masks and JSON files out.

**Pictures.** ``predictions.json`` is a list with one object per instance, in the result format of
COCO, so that ``pycocotools.coco.COCO.loadRes`` reads it::

    {"image_id": 1,
     "file_name": "a/cat.jpg",
     "category_id": 17,
     "category_name": "cat",
     "bbox": [x, y, width, height],
     "score": 0.98,
     "segmentation": {"size": [height, width], "counts": "..."}}

``image_id`` counts pictures from 1.  ``file_name`` is the input as given, or FOLDER/NAME.
``category_id`` is the id in the data set ``DATASETS.TEST[0]`` where Detectron2 knows its ids, else
the class counted from 0; ``category_name`` is that number as text where no names are known.
Coordinates are pixels of the upright picture.  ``segmentation`` is compressed RLE, left out for
models without masks.  The file is complete after every picture.

**Videos and cameras.** ``NAME.json`` has the parts of a YouTube-VIS file, ``info``, ``videos`` and
``categories``, but lists objects by frame: a list by object, as YouTube-VIS has it, could be
written only at the end::

    {"info": {"config": ..., "weights": ..., "overrides": [...], "confidence": 0.5,
              "keyframe_interval": 5, "track": false},
     "videos": [{"id": 1, "file_name": "a/street.mp4", "fps": 25.0, "length": 250}],
     "categories": [{"id": 17, "name": "cat"}, ...],
     "frames": [
    {"frame": 0, "time": 0.0, "width": 640, "height": 480, "keyframe": true, "objects": [...]},
    ...
    ], "complete": true}

``length`` is the announced number of frames, null where nothing is announced.  ``frame`` counts
decoded frames from 0, ``time`` is in seconds since the first one.  ``keyframe`` tells whether the
model computed the frame in full.  ``objects`` are as those of pictures, from ``category_id`` to
``segmentation``.  ``complete`` is false after an interrupt, and where a part could not be decoded.

With ``--track`` each object has a ``track_id`` as well, counted from 0 over all classes, null where
its box has no area (:class:`instseg.tracking.Tracker`), and ``info`` says ``"track": true``.
:func:`instseg.predict.as_youtube_vis` turns such a file into YouTube-VIS's list by object.

Every frame is one line, written as soon as it is done.  A process that is killed outright loses
the frames in work (one, or a batch of pictures on a GPU) and leaves the file without its last
line.  ``--resume`` mends it: frames before the last key frame of the file are kept, prediction
goes on from there with what an uninterrupted run gives, and the overlay ``NAME.mp4`` is drawn anew
from the file's records, from the beginning.
"""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from instseg.config import load_cfg
from instseg.engine.predictor import Predictor, require_weights
from instseg.engine.video import VideoPredictor
from instseg.errors import ConfigError
from instseg.predict.pictures import predict_pictures
from instseg.predict.records import json_list
from instseg.predict.results import Results
from instseg.predict.sources import Source, find_sources, prepare_output
from instseg.predict.videos import VideoRun
from instseg.predict.youtube_vis import as_youtube_vis
from instseg.tracking import check_installed

__all__ = ["PredictOptions", "as_youtube_vis", "predict"]


@dataclass(frozen=True)
class PredictOptions:
    """What ``instseg predict`` is asked to do; the fields are its command-line arguments."""

    config_file: str
    inputs: Sequence[str]
    output: Path
    weights: str | None = None
    confidence: float = 0.5
    overlay: bool = True
    instance_masks: bool = False
    allow_partial: bool = False
    keyframe_interval: int | None = None
    track: bool = False
    resume: bool = False
    overrides: Sequence[str] = ()


def predict(options: PredictOptions) -> int:
    """Predict on everything in ``options.inputs`` and write the results as they come.

    A picture or video that cannot be used is one line on stderr, and the rest is done.  SIGTERM
    ends the run as Ctrl-C does: the files are closed.

    Returns:
        0, or 1 if some input could not be used, or not completely.
    Raises:
        ConfigError, CheckpointError, OutputError: nothing can be done; found before the model is
            built where it can be.
    """
    if not 0 <= options.confidence <= 1:
        raise ConfigError(f"--confidence is {options.confidence}; expected a number from 0 to 1")
    if options.track:
        check_installed()
    sources = find_sources(options.inputs)
    if options.resume:
        _check_resumable(sources)
    prepare_output(options.output, sources)
    cfg = load_cfg(options.config_file, options.overrides)
    require_weights(cfg, options.weights, "predict with")
    predictor = Predictor(
        cfg, options.weights, overrides=options.overrides, allow_partial=options.allow_partial
    )
    frames = VideoPredictor(predictor, keyframe_interval=options.keyframe_interval)
    results = Results(
        predictor,
        options.output,
        options.confidence,
        overlay=options.overlay,
        instance_masks=options.instance_masks,
    )
    with _ended_by_sigterm():
        pictures = [source for source in sources if source.kind == "picture"]
        if pictures:
            with json_list(options.output / "predictions.json") as add_records:
                predict_pictures(results, pictures, add_records)
        info = _info(options, frames)
        run = VideoRun(results, frames, info, track=options.track, resume=options.resume)
        for source in sources:
            if source.kind != "picture":
                run.predict(source)
    return 1 if results.failures else 0


def _check_resumable(sources: Sequence[Source]) -> None:
    for source in sources:
        if source.kind == "camera":
            raise ConfigError(
                f"--resume: what camera {source.name} has shown is gone; leave --resume out, and "
                "choose another --output if the earlier results are to be kept"
            )


def _info(options: PredictOptions, predictor: VideoPredictor) -> dict[str, object]:
    """Settings that the results of a video depend on."""
    return {
        "config": options.config_file,
        "weights": predictor.predictor.cfg.MODEL.WEIGHTS,
        "overrides": list(options.overrides),
        "confidence": options.confidence,
        "keyframe_interval": predictor.keyframe_interval,
        "track": options.track,
    }


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt inside; does nothing in threads, which get no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
