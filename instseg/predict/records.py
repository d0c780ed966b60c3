"""The files of ``instseg predict``, complete up to the last result if it is interrupted."""

import errno
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2

from instseg.data.images import Array
from instseg.errors import ConfigError, ImageError, OutputError
from instseg.masks import check_rle
from instseg.predict.earlier import marked

_LARGEST = 1e12
_UNUSABLE = (ValueError, KeyError, TypeError, RecursionError)

AddRecords = Callable[[Iterable[dict[str, Any]]], None]


@contextmanager
def json_list(
    path: Path, head: dict[str, Any] | None = None, key: str = ""
) -> Iterator[AddRecords]:
    """A JSON list in the file ``path``, closed anew whenever it grows.

    What a process leaves that is interrupted or killed is valid JSON.

    Args:
        path: of the file.
        head: the file is this object, with the list as its last value; None: it is the list.
        key: of the list in that object.
    Yields:
        the function that appends records and hands them to the operating system.
    """
    begin, close = ("[", "\n]\n")
    if head is not None:
        begin = f"{json.dumps(head)[:-1]}{', ' if head else ''}{json.dumps(key)}: ["
        close = "\n]}\n"
    with writing(path):
        file = path.open("wb")
        end = file.write(begin.encode())
        file.write(close.encode())
        file.flush()
    separator = "\n"

    def add(records: Iterable[dict[str, Any]]) -> None:
        nonlocal end, separator
        text = ",\n".join(map(json.dumps, records))
        if not text:
            return
        with writing(path):
            file.seek(end)
            end += file.write((separator + text).encode())
            file.write(close.encode())
            file.flush()
        separator = ",\n"

    try:
        yield add
    finally:
        with writing(path):
            file.close()


class VideoRecords:
    """The file of a video: a header and one record per frame, written as they come.

    The layout is in the documentation of :mod:`instseg.predict`.  Every frame is one line, handed
    to the operating system as a whole, so that a process that is killed loses the frame in work
    and leaves a file without its last line, which :class:`VideoRecords` can continue.

    Attributes:
        kept: number of frames taken over from an earlier run.
        complete: whether the whole video is in the file; to be set before leaving.
    """

    def __init__(self, path: Path, header: dict[str, Any], *, resume: bool) -> None:
        """
        Args:
            path: of the file.
            header: what stands before the frames; JSON.
            resume: continue the file if there is one.  It is cut before its last key frame, from
                which a video model has to start.
        Raises:
            ConfigError: the file to be continued has another header.
            OutputError: it is no file.
        """
        self._path = path
        self._header = json.dumps(header)[:-1] + ', "frames": ['
        self.kept, self._size, self.complete = 0, 0, False
        if resume and os.path.exists(path):
            with writing(path):
                self._scan(header)

    def __enter__(self) -> "VideoRecords":
        with writing(self._path):
            self._file = self._path.open("r+b" if self._size else "wb")
            self._file.truncate(self._size)
            self._file.seek(self._size)
            if not self._size:
                self._file.write(self._header.encode())
        self._separator = ",\n" if self.kept else "\n"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with writing(self._path), self._file:
            self._file.write(f'\n], "complete": {json.dumps(self.complete)}}}\n'.encode())

    def earlier(self) -> Iterator[dict[str, Any]]:
        """The records that were kept, one at a time."""
        with self._path.open("rb") as file:
            file.readline()
            for _ in range(self.kept):
                yield json.loads(file.readline().rstrip(b",\n"))

    def add(self, record: dict[str, Any]) -> None:
        """Append the record of a frame.

        Raises:
            OutputError: the disk is full, or the like.
        """
        with writing(self._path):
            self._file.write((self._separator + json.dumps(record)).encode())
            self._file.flush()
        self._separator = ",\n"

    def _scan(self, header: dict[str, Any]) -> None:
        """Find what of the file can be kept."""
        ids = {category["id"] for category in header["categories"]}
        with self._path.open("rb") as file:
            first = file.readline()
            try:
                found = json.loads(first.rstrip() + b"]}")
            except (ValueError, RecursionError):  # killed before the header was written
                return
            if {**header, "frames": []} != found:
                raise ConfigError(
                    f"{self._path} was written with {_difference(found, header)}; it cannot be "
                    "resumed: repeat that, or choose another --output"
                )
            end, position, number = len(first.rstrip()), len(first), 0
            self._size = end
            for line in file:
                try:
                    record = _record(line, number, ids)
                except _UNUSABLE:  # the line that closes the file, or one that was torn
                    self.complete = line.startswith(b'], "complete": true')
                    return
                if record["keyframe"]:
                    self.kept, self._size = number, end
                end = position + len(line.rstrip(b",\n"))
                position += len(line)
                number += 1


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the operating system's errors while ``path`` is written into OutputError.

    That the name is too long is an ImageError: it is made of the name of an input, and other inputs
    can be done.
    """
    try:
        yield
    except OSError as error:
        kind = ImageError if error.errno == errno.ENAMETOOLONG else OutputError
        raise kind(f"{path} cannot be written: {error.strerror or error}") from error


def write_picture(path: Path, image: Array) -> None:
    """Write a picture, (H, W, 3) in BGR order or (H, W), in the format of the file's extension.

    Raises:
        OutputError: the disk is full, or the like.
        ImageError: the format has no room for a picture of this size, or the name is too long.
    """
    # cv2.imwrite would only return False on a full disk, and fails on non-ASCII paths under
    # Windows.
    try:
        ok, encoded = cv2.imencode(path.suffix, image)
    except cv2.error:  # as some of its versions do in place of returning False
        ok = False
    if not ok:
        height, width = image.shape[:2]
        raise ImageError(
            f"{path} cannot be written: {width}x{height} pixels are too many for {path.suffix}"
        )
    with writing(path):
        path.write_bytes(marked(encoded.tobytes()))


def _record(line: bytes, number: int, category_ids: Collection[Any]) -> dict[str, Any]:
    """One line of a file.

    Raises:
        ValueError, KeyError, TypeError, RecursionError: it is not the record of frame ``number``.
    """
    record: dict[str, Any] = json.loads(line.rstrip(b",\n"))
    height, width, objects = record["height"], record["width"], record["objects"]
    masks = {"segmentation" in found for found in objects}
    if record["frame"] != number or type(record["keyframe"]) is not bool or len(masks) > 1:
        raise ValueError("another frame")
    for found in objects:
        category = found["category_id"]
        numbers = [*found["bbox"], found["score"], 0 if category in category_ids else category]
        if len(numbers) != 6 or not all(-_LARGEST < value < _LARGEST for value in numbers):
            raise ValueError("no object")
        if masks == {True}:  # pycocotools writes beyond its memory at runs that do not fit
            check_rle(found["segmentation"], height, width)
    return record


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The first setting that two headers differ in, as they are in ``found`` and ``wanted``."""
    info = found.get("info")
    old = {**(info if isinstance(info, dict) else {}), "video": found.get("videos")}
    new = {**wanted["info"], "video": wanted["videos"]}
    for key, value in new.items():
        if old.get(key) != value:
            return f"{key} {str(old.get(key)):.200}, not {value}"
    return "other categories"
