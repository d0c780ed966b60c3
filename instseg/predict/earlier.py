"""Results of earlier runs in a folder, told apart from the user's own files.

Written images and videos carry a mark: PNG in its text, TIFF as its software, JPEG, MP4 and ZIP as
a comment.  JSON and CSV files begin, and text files end, as no other program's do.  A file without
the mark is never removed, nor is a link.
"""

import logging
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import TiffImagePlugin

from instseg.predict.sources import Source

logger = logging.getLogger(__name__)

MARK = "instseg predict"
TILES = ".tiles.jsonl"
"""End of the name of the file that holds what was found in the tiles of an image."""
_HEAD = 200
"""Bytes at the start of a file that hold its mark or beginning."""
_HEADER = b'{"info": {"config": '
_RESULTS = {
    ".json": (_HEADER, b'[\n{"image_id": ', b"[\n]"),
    ".jsonl": (_HEADER, b'{"image_id": '),
}
GEOJSON_START = b'{"type": "FeatureCollection", "software": "%s", "features": [' % MARK.encode()
MEASUREMENTS_START = b"image,instance,class,score,area_px"
YOLO_END = b"\t\n"
_STARTS = _RESULTS | {".geojson": (GEOJSON_START,), ".csv": (MEASUREMENTS_START,)}
_OF_IMAGES = (".png", ".jpg", "_labels.tif", ".geojson", "_rois.zip", ".txt", TILES)
"""Ends of the names of files that belong to one image."""
_OF_RUNS = (
    *("predictions.json", "predictions.jsonl", "categories.json", "categories.jsonl"),
    "measurements.csv",
)
_SOFTWARE = 305  # tag of a TIFF
_VIDEO_HEAD = 2**16
"""Bytes at the start of an MP4 in which its comment lies, as videos are written in fragments."""
_COMMENT = struct.pack(">I4sII", 16 + len(MARK), b"data", 1, 0) + MARK.encode()
"""The box of an MP4 that holds our comment: its size, its type, text, language, the text."""
_MASK = re.compile(r"(frame\d{6,}_)?\d{3,}_.*\.png")
_MOST_NAMED = 5


def marked(image: bytes) -> bytes:
    """An encoded PNG or JPEG with the mark in it; anything else as it is."""
    if image.startswith(b"\x89PNG"):
        text = b"tEXtSoftware\0" + MARK.encode()
        chunk = (len(text) - 4).to_bytes(4, "big") + text + zlib.crc32(text).to_bytes(4, "big")
        return image[:33] + chunk + image[33:]  # the signature and the header come first
    if image.startswith(b"\xff\xd8\xff\xe0"):
        end = 4 + int.from_bytes(image[4:6], "big")  # of JFIF's header
        comment = MARK.encode()
        length = (len(comment) + 2).to_bytes(2, "big")
        return image[:end] + b"\xff\xfe" + length + comment + image[end:]
    return image


def remove_earlier(output: Path, sources: Iterable[Source], *, resume: bool) -> None:
    """Remove what earlier runs wrote for these inputs, so that none of it passes for new.

    Args:
        resume: keep the results of videos, and what was found in the tiles of images.
    """
    sources = list(sources)
    for name in _OF_RUNS if any(source.kind == "image" for source in sources) else ():
        remove(output / name)
    for source in sources:
        if not resume or source.kind == "image":
            for name in _names(source):
                if not (resume and name.endswith(TILES)):
                    remove(output / name)


def remove(path: Path) -> None:
    """Remove a file or folder of masks if a run wrote it; files of others in the folder stay."""
    if path.name.endswith("_masks"):
        for mask in _masks(path):
            os.remove(mask)
        if os.path.isdir(path) and not os.path.islink(path) and not os.listdir(path):
            os.rmdir(path)
    elif is_ours(path):
        os.remove(path)


def tell_others(output: Path, sources: Sequence[Source]) -> None:
    """Log results of earlier runs for other inputs; they stay."""
    expected = {name.lower() for source in sources for name in _names(source)}
    if any(source.kind == "image" for source in sources):
        expected |= set(_OF_RUNS)
    others = []
    for name in sorted(os.listdir(output)):
        path = output / name
        if name.lower() not in expected:
            if _masks(path) if name.endswith("_masks") else is_ours(path):
                others.append(name)
    if others:
        more = f" and {len(others) - _MOST_NAMED} more" if len(others) > _MOST_NAMED else ""
        logger.warning(
            "%s holds results of inputs that are not in this run, which stay as they are: %s%s",
            *(output, ", ".join(others[:_MOST_NAMED]), more),
        )


def _names(source: Source) -> list[str]:
    """Names of the files and folders that a run may write for one input."""
    suffixes = _OF_IMAGES if source.kind == "image" else (*_RESULTS, ".mp4")
    return [f"{source.stem}{suffix}" for suffix in (*suffixes, "_masks")]


def _masks(folder: Path) -> list[Path]:
    """Masks that a run wrote into a folder; none if it is a link or no folder."""
    if not os.path.isdir(folder) or os.path.islink(folder):
        return []
    return [
        folder / name
        for name in os.listdir(folder)
        if _MASK.fullmatch(name) and is_ours(folder / name)
    ]


def is_ours(path: Path) -> bool:
    """Whether a run of ``instseg predict`` wrote this file."""
    if not os.path.isfile(path) or os.path.islink(path):
        return False
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
        if path.suffix in (".png", ".jpg"):
            return MARK.encode() in head
        if path.suffix in _STARTS:
            return head.startswith(_STARTS[path.suffix])
        if path.suffix == ".txt":
            return re.match(rb"\d+ [\d.e -]+", head) is not None and _end(path) == YOLO_END
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                return archive.comment == MARK.encode()
        if path.suffix == ".tif":
            return _software(path) == MARK
        return path.suffix == ".mp4" and _has_comment(path)
    except (OSError, zipfile.BadZipFile):  # a file of ours can be read
        return False


def _end(path: Path) -> bytes:
    """The last bytes of a file."""
    with path.open("rb") as file:
        file.seek(-min(len(YOLO_END), os.path.getsize(path)), os.SEEK_END)
        return file.read()


def _software(path: Path) -> str | None:
    """The program that a TIFF says it was written by."""
    try:
        # Image.open would refuse a large image, of which only a tag is read.
        with TiffImagePlugin.TiffImageFile(path) as image:
            software: str | None = image.getexif().get(_SOFTWARE)
            return software
    except Exception:  # a damaged file can make Pillow raise anything
        return None


def _has_comment(path: Path) -> bool:
    """Whether an MP4 has the mark as its comment."""
    with path.open("rb") as file:
        return _COMMENT in file.read(_VIDEO_HEAD)
