"""What ``instseg predict`` works on: files, folders and cameras, and the names of their results."""

import logging
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from detectron2.data import DatasetCatalog, MetadataCatalog

from instseg.data.datasets import check_name, reading_datasets, register_dataset
from instseg.errors import ConfigError, DatasetError, OutputError

logger = logging.getLogger(__name__)

# HEIC is listed although Pillow cannot read it: such a file gets a reason and is not passed over.
PICTURE_SUFFIXES = frozenset(
    ".avif .bmp .dib .gif .heic .heif .ico .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm "
    ".qoi .tga .tif .tiff .webp".split()
)
VIDEO_SUFFIXES = frozenset(
    ".3gp .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv".split()
)
_MEDIA_SUFFIXES = PICTURE_SUFFIXES | VIDEO_SUFFIXES
_CAMERA_DIGITS = 10
_RESERVED = frozenset(("categories", "predictions"))
"""Stems of JSON files that are not those of a video."""


@dataclass(frozen=True)
class Source:
    """A picture, a video or a camera, with the stem of the files written for it.

    Attributes:
        name: what is opened.
        stem: of the files written for it.
        kind: what it is.
        image_id: that of the data set it belongs to, None without one.
        file_name: what results call it, "" for ``name``.
    """

    name: str
    stem: str
    kind: Literal["picture", "video", "camera"]
    image_id: int | str | None = None
    file_name: str = ""


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """Files, the pictures and videos directly inside folders, and camera numbers.

    A file that does not exist, or a link to none in a folder, is kept: it becomes an error line of
    its own when its turn comes.

    Raises:
        ConfigError: nothing at all to work on, or an input that is a configuration key.
    """
    sources: list[Source] = []
    stems = set(_RESERVED)
    for item in inputs:
        if not item:
            raise ConfigError("an --input is empty; is a variable of the shell not set?")
        path = Path(item)
        if os.path.isdir(path):  # unlike Path.is_dir() also for too long a name
            names = [str(file) for file in _media_in(path)]
        elif _is_key(path):
            raise ConfigError(
                f"--input {item} is a key; put KEY VALUE pairs behind `--`, at the end"
            )
        else:
            names = [item]
        sources.extend(_source(name, stems) for name in names)
    if not any(source.kind == "camera" or os.path.lexists(source.name) for source in sources):
        raise ConfigError(f"nothing to predict on: --input {' '.join(inputs)} does not exist")
    return sources


def dataset_sources(name: str) -> list[Source]:
    """The images of a data set, with the ids and names that they have there.

    Args:
        name: as in ``DATASETS.TEST``; also ``coco:PATH.json:IMAGE_ROOT``.
    Raises:
        DatasetError: no such data set, or one that cannot be read.
    """
    register_dataset(name)
    check_name(name)
    with reading_datasets([name]):
        records = DatasetCatalog.get(name)
    root = os.path.join(MetadataCatalog.get(name).get("image_root") or "", "")
    stems = set(_RESERVED)
    sources = []
    for number, record in enumerate(records):
        file = os.fspath(record["file_name"])
        image_id = record.get("image_id", number)
        sources.append(
            Source(
                file,
                _unused(Path(file).stem, stems),
                "picture",
                image_id if isinstance(image_id, str) else int(image_id),
                file.removeprefix(root),
            )
        )
    if not sources:
        raise DatasetError(f"--images-of {name}: the data set has no images")
    return sources


def _is_key(path: Path) -> bool:
    looks_so = re.fullmatch(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)+", str(path)) is not None
    return looks_so and path.suffix.lower() not in _MEDIA_SUFFIXES and not os.path.exists(path)


def _source(name: str, stems: set[str]) -> Source:
    path = Path(name)
    if _is_camera(name) and not os.path.exists(name):
        return Source(name, _unused(f"camera_{name}", stems), "camera")
    is_video = path.suffix.lower() in VIDEO_SUFFIXES
    return Source(name, _unused(path.stem, stems), "video" if is_video else "picture")


def _is_camera(name: str) -> bool:
    """Whether it is a number that OpenCV takes; longer ones can only be names of files."""
    return name.isdecimal() and len(name) <= _CAMERA_DIGITS and int(name) < 2**31


def _media_in(folder: Path) -> list[Path]:
    try:
        files = sorted(
            file for file in folder.iterdir() if not file.is_dir() and file.name[0] != "."
        )
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


def prepare_output(output: Path, sources: Iterable[Source]) -> None:
    """Create the folder ``output``, and make sure that nothing in it is an input.

    Raises:
        OutputError: it cannot be created or written to.
        ConfigError: it is the folder of an input.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=output, prefix=".writable-"):
            pass
    except OSError as error:
        raise OutputError(
            f"--output {output} cannot be written: {error.strerror}; choose another folder"
        ) from None
    for source in sources:
        if source.kind != "camera" and os.path.realpath(output) in _folders(source.name):
            raise ConfigError(
                f"--output {output} is the folder of the input {source.name}, which an overlay "
                "could replace; choose another folder"
            )


def _folders(name: str) -> set[str]:
    """Where the file ``name`` is: a link is in one folder, and what it leads to in another."""
    paths = (os.path.dirname(name), os.path.dirname(os.path.realpath(name)))
    return {os.path.realpath(path) for path in paths}
