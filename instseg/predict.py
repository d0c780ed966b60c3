"""The work of ``instseg predict``: pictures and videos in, overlays, masks and one JSON file out.

``predictions.json`` is a list with one object per instance, in the result format of COCO, so that
``pycocotools.coco.COCO.loadRes`` reads it::

    {"image_id": 1,
     "file_name": "a/cat.jpg",
     "frame": 0,
     "category_id": 17,
     "category_name": "cat",
     "bbox": [x, y, width, height],
     "score": 0.98,
     "segmentation": {"size": [height, width], "counts": "..."}}

``image_id`` counts pictures, and after them the frames of videos, from 1.  ``file_name`` is the
input as given, or FOLDER/NAME.  ``frame`` counts from 0 and is there for videos and cameras only.
``category_id`` is the id in the data set ``DATASETS.TEST[0]`` where Detectron2 knows its ids, else
the class counted from 0; ``category_name`` is that number as text where no names are known.
Coordinates are pixels of the upright picture.  ``segmentation`` is compressed RLE, left out for
models without masks.
"""

import json
import logging
import math
import os
import re
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.structures import Instances
from pycocotools import mask as mask_util
from tqdm import tqdm

from instseg.config import load_cfg
from instseg.data.images import Array, read_image
from instseg.engine.predictor import Predictor
from instseg.errors import ConfigError, ImageError, OutputError
from instseg.visualize import class_name, draw_instances

logger = logging.getLogger(__name__)

# HEIC is listed although Pillow cannot read it: such a file gets a reason and is not passed over.
PICTURE_SUFFIXES = frozenset(
    ".avif .bmp .dib .gif .heic .heif .ico .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm "
    ".qoi .tga .tif .tiff .webp".split()
)
VIDEO_SUFFIXES = frozenset(".avi .m4v .mkv .mov .mp4 .mpeg .mpg .webm .wmv".split())
_MEDIA_SUFFIXES = PICTURE_SUFFIXES | VIDEO_SUFFIXES
_JPEG_SUFFIXES = frozenset((".jfif", ".jpe", ".jpeg", ".jpg"))
# For cameras and files that do not tell theirs.
_DEFAULT_FPS = 25.0

AddRecords = Callable[[Iterable[dict[str, Any]]], None]


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
    overrides: Sequence[str] = ()


@dataclass(frozen=True)
class Source:
    """A picture, a video or a camera, with the stem of the files written for it."""

    name: str
    stem: str
    kind: Literal["picture", "video", "camera"]


def predict(options: PredictOptions) -> int:
    """Predict on everything in ``options.inputs`` and write the results as they come.

    A picture or video that cannot be used is one line on stderr, and the rest is done.

    Returns:
        0, or 1 if some input could not be used.
    Raises:
        ConfigError, CheckpointError, OutputError: nothing can be done; found before the model is
            built where it can be.
    """
    if not 0 <= options.confidence <= 1:
        raise ConfigError(f"--confidence is {options.confidence}; expected a number from 0 to 1")
    sources = find_sources(options.inputs)
    _prepare_output(options.output, sources)
    cfg = load_cfg(options.config_file, options.overrides)
    if not (options.weights or cfg.MODEL.WEIGHTS):
        raise ConfigError("no weights to predict with; pass --weights FILE or MODEL.WEIGHTS FILE")
    predictor = Predictor(
        cfg, options.weights, overrides=options.overrides, allow_partial=options.allow_partial
    )
    with json_list(options.output / "predictions.json") as add_records:
        run = _Run(predictor, options, add_records)
        run.pictures([source for source in sources if source.kind == "picture"])
        for source in sources:
            if source.kind != "picture":
                run.video(source)
    return 1 if run.failures else 0


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """Files, the pictures and videos directly inside folders, and camera numbers.

    A file that does not exist is kept: it becomes an error line of its own when its turn comes.

    Raises:
        ConfigError: nothing at all to work on, or an input that is a configuration key.
    """
    sources: list[Source] = []
    stems: set[str] = set()
    for item in inputs:
        path = Path(item)
        if path.is_dir():
            names = [str(file) for file in _media_in(path)]
        elif _is_key(path):
            raise ConfigError(
                f"--input {item} is a key; put KEY VALUE pairs behind `--`, at the end"
            )
        else:
            names = [item]
        sources.extend(_source(name, stems) for name in names)
    if not any(source.kind == "camera" or Path(source.name).exists() for source in sources):
        raise ConfigError(f"nothing to predict on: --input {' '.join(inputs)} does not exist")
    return sources


def _is_key(path: Path) -> bool:
    looks_so = re.fullmatch(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)+", str(path)) is not None
    return looks_so and path.suffix.lower() not in _MEDIA_SUFFIXES and not path.exists()


def _source(name: str, stems: set[str]) -> Source:
    path = Path(name)
    if name.isdecimal() and not path.exists():
        return Source(name, _unused(f"camera_{name}", stems), "camera")
    is_video = path.suffix.lower() in VIDEO_SUFFIXES
    return Source(name, _unused(path.stem, stems), "video" if is_video else "picture")


def _media_in(folder: Path) -> list[Path]:
    try:
        files = sorted(file for file in folder.iterdir() if file.is_file() and file.name[0] != ".")
    except OSError as error:
        raise ConfigError(f"--input {folder} cannot be read: {error.strerror}") from None
    media = [file for file in files if file.suffix.lower() in _MEDIA_SUFFIXES]
    if not media:
        raise ConfigError(
            f"--input {folder}: none of the {len(files)} files in it has the extension of a "
            "picture or video; folders inside it are not searched"
        )
    if len(media) < len(files):
        logger.info("%s: %d other files passed over", folder, len(files) - len(media))
    return media


def _unused(stem: str, taken: set[str]) -> str:
    """``stem`` or ``stem_2``, ``stem_3``, ...: compared without case, as some file systems do."""
    candidate, number = stem, 1
    while candidate.lower() in taken:
        number += 1
        candidate = f"{stem}_{number}"
    taken.add(candidate.lower())
    return candidate


def _prepare_output(output: Path, sources: Iterable[Source]) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=output, prefix=".writable-"):
            pass
    except OSError as error:
        raise OutputError(
            f"--output {output} cannot be written: {error.strerror}; choose another folder"
        ) from None
    for source in sources:
        if source.kind != "camera" and Path(source.name).parent.resolve() == output.resolve():
            raise ConfigError(
                f"--output {output} is the folder of the input {source.name}, which an overlay "
                "could replace; choose another folder"
            )


@contextmanager
def json_list(path: Path) -> Iterator[AddRecords]:
    """A JSON list in the file ``path``, written as it grows and closed also after an interrupt.

    Yields:
        the function that appends records and hands them to the operating system.
    """
    separator = "\n"

    def add(records: Iterable[dict[str, Any]]) -> None:
        nonlocal separator
        with _writing(path):
            for record in records:
                # One write for separator and record, so that an interrupt finds whole elements.
                file.write(separator + json.dumps(record))
                separator = ",\n"
            file.flush()

    with _writing(path):
        file = path.open("w", encoding="utf-8")
    try:
        file.write("[")
        yield add
    finally:
        with _writing(path), file:
            file.write("\n]\n")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns the operating system's errors while ``path`` is written into OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


class _Run:
    """One run over all sources: counts failures and writes what belongs to each result."""

    def __init__(self, predictor: Predictor, options: PredictOptions, add: AddRecords) -> None:
        self.failures = 0
        self._predictor = predictor
        self._options = options
        self._add_records = add
        self._image_id = 0
        self._category_ids = _category_ids(predictor)

    def pictures(self, sources: Sequence[Source]) -> None:
        """Predict on picture files, batched as the predictor does."""
        pending: deque[tuple[Source, Array]] = deque()

        def readable() -> Iterator[Array]:
            for source in tqdm(sources, unit="picture", disable=None if sources else True):
                try:
                    image = read_image(source.name)
                except ImageError as error:
                    self._fail(error)
                    continue
                pending.append((source, image))
                yield image

        for result in self._predictor.stream(readable()):
            source, image = pending.popleft()
            kept = self._keep(result["instances"])
            self._record(kept, source)
            if self._options.overlay:
                suffix = ".jpg" if Path(source.name).suffix.lower() in _JPEG_SUFFIXES else ".png"
                path = self._options.output / f"{source.stem}{suffix}"
                _write_picture(path, self._draw(image, kept))

    def video(self, source: Source) -> None:
        """Predict on the frames of a video file or camera."""
        capture = cv2.VideoCapture(int(source.name) if source.kind == "camera" else source.name)
        try:
            self._frames(capture, source)
        except ImageError as error:
            self._fail(error)
        finally:
            capture.release()

    def _frames(self, capture: cv2.VideoCapture, source: Source) -> None:
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
            for number, result in enumerate(self._predictor.stream(decodable())):
                frame = pending.popleft()
                kept = self._keep(result["instances"])
                self._record(kept, source, number)
                if self._options.overlay:
                    path = self._options.output / f"{source.stem}.mp4"
                    writer = writer or _open_writer(path, capture.get(cv2.CAP_PROP_FPS), frame)
                    writer.write(self._draw(frame, kept))
        finally:
            if writer is not None:
                writer.release()
        if number < 0:
            raise ImageError(f"{source.name}: no frame can be decoded")

    def _fail(self, error: ImageError) -> None:
        self.failures += 1
        tqdm.write(str(error), file=sys.stderr)

    def _keep(self, instances: Instances) -> Instances:
        return instances[instances.scores >= self._options.confidence].to("cpu")

    def _draw(self, image: Array, instances: Instances) -> Array:
        return draw_instances(image, instances, self._predictor.class_names)

    def _record(self, instances: Instances, source: Source, frame: int | None = None) -> None:
        self._image_id += 1
        records = []
        for index in range(len(instances)):
            number = int(instances.pred_classes[index])
            left, top, right, bottom = instances.pred_boxes.tensor[index].tolist()
            record: dict[str, Any] = {"image_id": self._image_id, "file_name": source.name}
            if frame is not None:
                record["frame"] = frame
            record["category_id"] = self._category_ids.get(number, number)
            record["category_name"] = class_name(self._predictor.class_names, number)
            record["bbox"] = [left, top, right - left, bottom - top]
            record["score"] = float(instances.scores[index])
            if instances.has("pred_masks"):
                # One at a time: all masks of a large picture as bytes in Fortran order would double
                # the memory.
                mask = np.asfortranarray(instances.pred_masks[index].numpy(), dtype=np.uint8)
                rle = mask_util.encode(mask)
                record["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
                if self._options.instance_masks:
                    self._write_mask(mask, source, frame, index, record["category_name"])
            records.append(record)
        self._add_records(records)

    def _write_mask(
        self, mask: Array, source: Source, frame: int | None, index: int, name: str
    ) -> None:
        folder = self._options.output / f"{source.stem}_masks"
        with _writing(folder):
            folder.mkdir(exist_ok=True)
        prefix = "" if frame is None else f"frame{frame:06d}_"
        safe_name = re.sub(r"[^\w-]+", "_", name)
        _write_picture(folder / f"{prefix}{index:03d}_{safe_name}.png", mask * 255)


def _category_ids(predictor: Predictor) -> dict[int, int]:
    """Class number -> category id of the data set, empty where it is of other classes."""
    names = predictor.cfg.DATASETS.TEST
    if not names or names[0] not in MetadataCatalog:
        return {}
    metadata = MetadataCatalog.get(names[0])
    if metadata.get("thing_classes") != predictor.class_names:
        return {}
    mapping = metadata.get("thing_dataset_id_to_contiguous_id") or {}
    return {number: category_id for category_id, number in mapping.items()}


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


def _write_picture(path: Path, image: Array) -> None:
    # cv2.imwrite would only return False on a full disk, and fails on non-ASCII paths under
    # Windows.
    ok, encoded = cv2.imencode(path.suffix, image)
    if not ok:
        raise OutputError(f"{path} cannot be written: OpenCV cannot encode it")
    with _writing(path):
        path.write_bytes(encoded.tobytes())
