"""The work of ``instseg predict``: images and videos in, overlays, masks and JSON files out.

**Images.** ``predictions.json`` is a list with one object per instance, in the result format of
COCO, so that ``pycocotools.coco.COCO.loadRes`` reads it::

    {"image_id": 1,
     "file_name": "a/cat.jpg",
     "category_id": 17,
     "category_name": "cat",
     "bbox": [x, y, width, height],
     "area": 5310,
     "score": 0.98,
     "mask_score": 0.91,
     "segmentation": {"size": [height, width], "counts": "..."}}

``image_id`` counts images from 1, and ``file_name`` is the input as given, or FOLDER/NAME; with
``--images-of`` both are those of the data set.  ``category_id`` and ``category_name`` are those of
the data set that the model was trained on, which its weights know
(:func:`instseg.config.classes.model_categories`); if they are unknown, the class counted from 0 and
``class 0``.  A model without classes gives ``object``.  Coordinates are pixels of the upright
image.  ``area`` is the number of pixels of the mask, or the area of the box for models without
masks.  Models that score their masks give ``mask_score``.  With ``--rank-by mask``, ``score`` is
``mask_score`` and ``class_score`` is the ``score`` of the class.  ``segmentation`` is compressed
RLE, left out for models without masks.  With ``--polygons`` it is a list of polygons,
``[[x, y, x, y, ...], ...]``, along the edges of its pixels, in which holes are filled
(:func:`instseg.masks.polygons`); a mask without pixels stays an RLE.

``categories.json`` goes with that list: it is a COCO file without annotations, as COCO publishes
them for its test images::

    {"info": {"config": ..., "weights": ..., "overrides": [...], "confidence": 0.5,
              "rank_by": "class", "polygons": false, "images_of": null},
     "categories": [{"id": 17, "name": "cat"}, ...],
     "images": [{"id": 1, "file_name": "a/cat.jpg", "width": 640, "height": 480}, ...]}

It names every class of the model and every image, also those without instances, so
``COCO("categories.json").loadRes("predictions.json")`` is complete.  During a run, and after it was
killed, the two are ``predictions.jsonl`` and ``categories.jsonl``, with one line per entry of their
lists, complete after every image.  Any other end of the run joins the lines into the JSON files.

``--pages all``, ``N`` or ``A:B`` (A to B - 1) takes the pages of TIFF stacks, counted from 0:
positions in time, in depth or in the file, see :mod:`instseg.data.tiff`.  Each is an image of its
own, whose files are called ``STEM_page0003``, and whose ``"page"`` stands behind its ``file_name``.
With ``--track`` the pages of a stack are the frames of one video.

``--images-of NAME`` predicts on the images of a data set; NAME is one of ``DATASETS.TEST``, such as
``coco:PATH.json:FOLDER``.  ``image_id`` and ``file_name`` are those of its file, so pycocotools can
compare ``predictions.json`` with that file.  The frames of a video data set are images there,
numbered as in evaluation; to predict on a clip as a video, give it as ``--input``.

With ``--tile N`` images of any size are predicted by tiles of N pixels a side
(:mod:`instseg.inference.tiles`).  Until the run is over, ``NAME.tiles.jsonl`` has a line for each
tile, and ``--resume`` goes on after the last one.  The overlay, ``NAME.png``, is scaled down to at
most 4000 pixels a side.

**Formats.** ``--format NAME,NAME,...`` writes the results of images in one or more of these forms;
:mod:`instseg.predict.formats` says what each can hold:

- ``coco`` (default): ``predictions.json`` and ``categories.json``;
- ``labels``: ``STEM_labels.tif``, whose pixels are the numbers of instances, the best one 1;
- ``csv``: ``measurements.csv``, one row per instance with that number;
- ``geojson``: ``STEM.geojson``, polygons for QuPath;
- ``imagej``: ``STEM_rois.zip``, a set of ROIs for ImageJ;
- ``yolo``: ``STEM.txt``, an outline per instance.

``STEM`` is the name of the image without its extension, with ``_2`` and so on where two are alike.
``instseg results predictions.json --to NAME,NAME,...`` converts the results of a run afterwards,
also those of a run that was killed and of a video, whose frames are ``NAME_frame000012`` and so on.

**Videos** are files, cameras, streams such as ``rtsp://...``, numbered images
(``frames_%05d.png``), and with ``--track`` the images of a folder or the pages of a stack.
``NAME.json`` has the parts of a YouTube-VIS file, ``info``, ``videos`` and ``categories``, but
lists instances by frame, since YouTube-VIS's list by instance could be written only at the end::

    {"info": {"config": ..., "weights": ..., "overrides": [...], "confidence": 0.5,
              "rank_by": "class", "polygons": false, "keyframe_interval": 5, "track": false},
     "videos": [{"id": 1, "file_name": "a/street.mp4", "fps": 25.0, "length": 250}],
     "categories": [{"id": 17, "name": "cat"}, ...],
     "frames": [
    {"frame": 0, "time": 0.0, "width": 640, "height": 480, "keyframe": true, "objects": [...]},
    ...
    ], "complete": true}

``length`` is the announced number of frames, or null.  ``frame`` counts decoded frames from 0,
``time`` is in seconds since the first one.  Frames that are images have a ``file_name`` as well,
and those that are pages of a stack a ``page``.
The ``file_name`` of a stream leaves out user, password and query.  ``keyframe`` tells whether the
model computed the frame in full.  ``objects`` are as those of images, from ``category_id`` to
``segmentation``.  ``complete`` is false after an interrupt, or if a part could not be decoded.

With ``--track`` each object has a ``track_id`` as well, counted from 0 over all classes, or null if
it belongs to no track (:class:`instseg.tracking.Tracker`), and ``info`` says ``"track": true`` and
the settings of the tracker.  ``category_id`` remains what was predicted in that frame.  The overlay
shows a track in one colour, with ``#`` and its number.
:func:`instseg.predict.as_youtube_vis` turns such a file into YouTube-VIS's list by instance.

**A second run** into a folder replaces the results of an earlier one for inputs with the same
stems, even if it fails on them; with ``--resume`` videos go on.  A warning names results of other
inputs, which stay, as does every file that no run wrote; one in place of a result ends the run
before it begins.

Each frame is written as one line of ``NAME.jsonl`` as soon as it is done; the first line is the
part before the frames.  The end of the run, also by an error, joins the lines into ``NAME.json``.
A process that is killed outright leaves the lines and loses the frames in work (one, or a batch of
images on a GPU).  ``--resume`` takes either file: it keeps the frames before the last key frame,
predicts the rest as an uninterrupted run would, and draws the overlay ``NAME.mp4`` from the
beginning.  A video with ``--polygons`` cannot be resumed, since polygons do not give the same masks
again.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from instseg.categories import OBJECT, Categories
from instseg.config.classes import classes_option
from instseg.config.nodes import load_cfg
from instseg.data.categories import known_categories
from instseg.data.sequences import DEFAULT_FPS
from instseg.errors import ConfigError
from instseg.inference.layout import check_tile
from instseg.inference.predictor import Predictor, require_weights
from instseg.inference.video import VideoPredictor
from instseg.modeling.contract import architectures, gives_mask_scores
from instseg.optional import AV
from instseg.predict.earlier import remove_earlier, tell_others
from instseg.predict.formats import DEFAULT, opened, parse
from instseg.predict.images import predict_images
from instseg.predict.outputs import check_outputs
from instseg.predict.pages import Pages, take_pages
from instseg.predict.records import writing
from instseg.predict.results import Results
from instseg.predict.sources import Source, dataset_sources, find_sources, prepare_output
from instseg.predict.tiled import TileSettings, predict_tiled_images
from instseg.predict.videos import VideoRun
from instseg.predict.youtube_vis import as_youtube_vis
from instseg.tracking import Tracker
from instseg.visualize import OverlayStyle

__all__ = ["RANKINGS", "PredictOptions", "as_youtube_vis", "predict"]

logger = logging.getLogger(__name__)

RANKINGS = ("class", "mask")
"""Values of ``--rank-by``: the score of an instance is that of its class, or that of its mask."""

_HIGHEST_FPS = 1000


@dataclass(frozen=True)
class PredictOptions:
    """The command-line arguments of ``instseg predict``."""

    config_file: str
    inputs: Sequence[str]
    output: Path
    images_of: str | None = None
    classes: str | None = None
    weights: str | None = None
    confidence: float = 0.5
    overlay: bool = True
    labels: str = "auto"
    fill: float = 0.25
    instance_masks: bool = False
    allow_partial: bool = False
    dtype: str | None = None
    keyframe_interval: int | None = None
    track: bool = False
    tracker: str | None = None
    track_patience: int | None = None
    track_min_iou: float | None = None
    fps: float | None = None
    recursive: bool = False
    resume: bool = False
    tile: int | None = None
    overlap: int | None = None
    rank_by: str = "class"
    polygons: bool = False
    format: str = DEFAULT
    pages: str | None = None
    overrides: Sequence[str] = ()


def predict(options: PredictOptions) -> int:
    """Predict on ``options.inputs``, or on a data set, and write the results as they come.

    Prints one line on stderr for an image or video that cannot be used, and goes on.  SIGTERM ends
    the run as Ctrl-C does, with all files closed.

    Returns:
        0, or 1 if some input could not be used completely.
    Raises:
        ConfigError, CheckpointError, DatasetError, OutputError: the run cannot start; raised before
            the model is built where possible.
    """
    if not 0 <= options.confidence <= 1:
        raise ConfigError(f"--confidence is {options.confidence}; expected a number from 0 to 1")
    if options.rank_by not in RANKINGS:
        raise ConfigError(f"--rank-by is {options.rank_by!r}; expected {' or '.join(RANKINGS)}")
    _check_tiles(options)
    style = OverlayStyle(options.labels, options.fill)
    formats = parse(options.format, "--format")
    classes = None if options.classes is None else classes_option(options.classes)
    tracker = _tracker(options)
    inputs = _inputs(options)
    cfg = load_cfg(options.config_file, options.overrides)  # also registers built-in data sets
    require_weights(cfg, options.weights, "predict with")
    sources = inputs if options.images_of is None else dataset_sources(options.images_of)
    _check_sources(options, sources)
    if formats != (DEFAULT,) and any(source.kind != "image" for source in sources):
        logger.warning(
            "--format is for images; the results of a video are in its NAME.json, which `instseg "
            "results` converts"
        )
    prepare_output(options.output, sources)
    check_outputs(
        options.output,
        sources,
        formats,
        overlay=options.overlay,
        tiled=options.tile is not None,
        resume=options.resume,
    )
    predictor = Predictor(
        cfg,
        options.weights,
        overrides=options.overrides,
        allow_partial=options.allow_partial,
        classes=classes,
        masks="cropped",
        dtype=options.dtype,
    )
    if options.rank_by == "mask" and not gives_mask_scores(predictor.model):
        known = architectures(lambda kind: hasattr(kind, "gives_mask_scores"))
        raise ConfigError(
            f"--rank-by mask needs a model that scores its masks, such as {', '.join(known)}; "
            f"{options.config_file} does not, leave --rank-by out"
        )
    frames = VideoPredictor(predictor, keyframe_interval=options.keyframe_interval)
    if options.images_of is not None:
        _compare_categories(predictor.categories, options.images_of)
    results = Results(
        predictor,
        options.output,
        options.confidence,
        overlay=options.overlay,
        instance_masks=options.instance_masks,
        rank_by_mask=options.rank_by == "mask",
        polygons=options.polygons,
        style=style,
    )
    with writing(options.output):
        remove_earlier(options.output, sources, resume=options.resume)
        tell_others(options.output, sources)
    with _ended_by_sigterm():
        _run(options, results, frames, sources, tracker, formats)
    return 1 if results.failures else 0


def _run(
    options: PredictOptions,
    results: Results,
    frames: VideoPredictor,
    sources: Sequence[Source],
    tracker: Callable[[], Tracker] | None,
    formats: Sequence[str],
) -> None:
    info = _info(options, results.predictor)
    image_sources = [source for source in sources if source.kind == "image"]
    if image_sources:
        about = info | {"images_of": options.images_of}
        with opened(formats, options.output, results.predictor.categories, about) as writers:
            if options.tile is None:
                predict_images(results, image_sources, writers)
            else:
                tiles = TileSettings(options.tile, options.overlap, info, options.resume)
                predict_tiled_images(results, image_sources, writers, tiles)
    info |= {"keyframe_interval": frames.keyframe_interval, "track": options.track}
    info |= tracker().settings if tracker else {}
    run = VideoRun(
        results,
        frames,
        info,
        tracker=tracker,
        fps=options.fps or DEFAULT_FPS,
        resume=options.resume,
    )
    for source in sources:
        if source.kind != "image":
            run.predict(source)


def _inputs(options: PredictOptions) -> list[Source]:
    """The sources of ``--input``; none with ``--images-of``."""
    pages = None if options.pages is None else Pages.parse(options.pages)
    if options.images_of is None:
        sources = find_sources(
            options.inputs,
            recursive=options.recursive,
            sequences=options.track,
            output=options.output,
        )
        return sources if pages is None else take_pages(sources, pages, as_videos=options.track)
    if pages is not None:
        raise ConfigError("--pages goes with --input, not with --images-of; leave one of them out")
    return []


def _compare_categories(ours: Categories, name: str) -> None:
    """Warn if the results cannot be compared with the annotations of the data set ``name``."""
    theirs = known_categories(name)
    if ours != OBJECT and theirs is not None and ours != theirs:
        logger.warning(
            "the model has other categories than %s: category_id in the results is the model's; "
            "--classes FILE.json gives its classes the ids and names of a file",
            name,
        )


def _tracker(options: PredictOptions) -> Callable[[], Tracker] | None:
    """A function that makes a tracker for each video; None without ``--track``.

    Raises:
        ConfigError: options that no tracker can have, or the package that tracks is missing.
    """
    given = {
        "method": options.tracker,
        "patience": options.track_patience,
        "min_iou": options.track_min_iou,
    }
    settings: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if not options.track:
        if settings:
            raise ConfigError("--tracker, --track-patience and --track-min-iou go with --track")
        return None
    make = partial(Tracker, **settings)
    make()
    return make


def _check_tiles(options: PredictOptions) -> None:
    if options.tile is None:
        if options.overlap is not None:
            raise ConfigError("--overlap goes with --tile, the side of the tiles in pixels")
        return
    check_tile(options.tile, options.overlap or 0)
    if options.instance_masks:
        raise ConfigError(
            "--instance-masks writes an image as large as the input for each instance, which large "
            "inputs have thousands of; leave it or --tile out"
        )


def _check_sources(options: PredictOptions, sources: Sequence[Source]) -> None:
    kinds = {source.kind for source in sources}
    if options.tile is not None and kinds - {"image"}:
        other = next(source for source in sources if source.kind != "image")
        raise ConfigError(
            f"--tile divides images, and {other.name} is a {other.kind}; leave it out"
        )
    if options.fps is not None and "sequence" not in kinds:
        raise ConfigError(
            "--fps is for numbered images such as frames_%05d.png, and with --track for folders; "
            "other inputs have a rate of their own"
        )
    if options.fps is not None and not 0 < options.fps <= _HIGHEST_FPS:
        raise ConfigError(
            f"--fps is {options.fps}; expected a number above 0, at most {_HIGHEST_FPS}"
        )
    if options.overlay and kinds & {"sequence", "camera"}:
        AV.require("an overlay of several frames (without --no-overlay)")
    for source in sources:
        if options.resume and options.polygons and source.kind in ("video", "sequence"):
            raise ConfigError(
                f"--resume needs the masks found so far in {source.name}, which --polygons does "
                "not keep; leave one of them out"
            )
        if options.resume and source.kind in ("camera", "stream"):
            raise ConfigError(
                f"--resume: {source.kind} {source.name} cannot show its earlier frames again; "
                "leave --resume out, and choose another --output to keep the earlier results"
            )
        if options.track and source.kind == "image" and os.path.exists(source.name):
            raise ConfigError(
                f"--track needs videos, and {source.name} is a single image; give a folder of "
                "images, numbered ones such as frames_%05d.png, or a stack with --pages all"
            )


def _info(options: PredictOptions, predictor: Predictor) -> dict[str, object]:
    """Settings that results depend on."""
    return {
        "config": options.config_file,
        "weights": predictor.cfg.MODEL.WEIGHTS,
        "overrides": list(options.overrides),
        "confidence": options.confidence,
        "rank_by": options.rank_by,
        "polygons": options.polygons,
    } | ({} if options.pages is None else {"pages": options.pages})


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM raises KeyboardInterrupt; does nothing in threads, which get no signals."""
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
