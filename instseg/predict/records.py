"""The files of ``instseg predict``: lines while they grow, joined into JSON at the end."""

import errno
import json
import os
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import cv2

from instseg.data.images import Array
from instseg.errors import ConfigError, ImageError, OutputError
from instseg.masks import check_rle
from instseg.predict.earlier import is_ours, marked

_LARGEST = 1e12
_UNUSABLE = (ValueError, KeyError, TypeError, RecursionError)

_LONGEST_NAME = 255
"""Bytes of the name of a file."""


class JsonLines:
    """A JSON file whose list grows: one line per record in ``NAME.jsonl``, joined at the end.

    Each line is handed to the operating system as a whole.  A process that is killed leaves
    ``NAME.jsonl`` and no ``NAME.json``; any other end makes ``NAME.json`` and removes the lines.

    Attributes:
        path: ``NAME.json``; that of an earlier run is removed at the beginning.
        lines: ``NAME.jsonl``: the head, if any, and the records.
        tail: entries of the file after the list; set it before leaving.
    """

    def __init__(self, path: Path, head: dict[str, Any] | None = None, key: str = "") -> None:
        """
        Args:
            path: of the file that is made.
            head: the file is this object with the list as its last value; None: only the list.
            key: of the list in that object.
        """
        self.path = path
        # That of a name as long as names can be is a character shorter.
        stem = os.fsdecode(os.fsencode(path.stem)[: _LONGEST_NAME - len(".jsonl")])
        self.lines = path.with_name(f"{stem}.jsonl")
        self.tail: dict[str, Any] = {}
        self._head = head
        self._key = key

    def __enter__(self) -> "JsonLines":
        """
        Raises:
            OutputError: a file cannot be written, or is one of the user.
        """
        check_free(self.path)
        with writing(self.lines):
            has_lines(self.lines)
            self._begin()
            self._file = self.lines.open("ab")
        with writing(self.path):
            self.path.unlink(missing_ok=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with writing(self.lines):
            self._file.close()
        with writing(self.path):
            self._join()
            self.lines.unlink()

    def add(self, *records: dict[str, Any]) -> None:
        """Append records.

        Raises:
            OutputError: the disk is full, or the like.
        """
        with writing(self.lines):
            self._file.write("".join(f"{json.dumps(record)}\n" for record in records).encode())
            self._file.flush()

    def _begin(self) -> None:
        """Write the file of lines as it is before the first record is added."""
        head = "" if self._head is None else f"{json.dumps(self._head)}\n"
        with self.lines.open("wb") as file:
            file.write(head.encode())

    def _join(self) -> None:
        """Join the lines into the JSON file, all or nothing."""
        begin, end = "[", "\n]\n"
        if self._head is not None:
            begin, end = json.dumps({**self._head, self._key: [], **self.tail}).rsplit("[]", 1)
            begin, end = f"{begin}[", f"\n]{end}\n"
        with self.lines.open("rb") as lines, replacing(self.path) as file:
            if self._head is not None:
                lines.readline()
            file.write(begin.encode())
            separator = b"\n"
            for line in lines:
                file.write(separator + line[:-1])
                separator = b",\n"
            file.write(end.encode())


class VideoRecords(JsonLines):
    """The file of a video: a header and one record per frame.

    The layout is in the documentation of :mod:`instseg.predict`.  The file of a run that was killed
    (``NAME.jsonl``) or that ended (``NAME.json``) can be continued.

    Attributes:
        kept: number of frames taken over from an earlier run.
        complete: whether the whole video is in the file; set it before leaving.
    """

    def __init__(self, path: Path, header: dict[str, Any], *, resume: bool) -> None:
        """
        Args:
            path: of the file that is made.
            header: the part before the frames; JSON.
            resume: continue an existing file.  It is cut before its last key frame, from which a
                video model has to start.
        Raises:
            ConfigError: the existing file has another header.
            OutputError: it is no regular file.
        """
        super().__init__(path, header, "frames")
        self.kept, self.complete = 0, False
        self._earlier = self.lines if self.lines.exists() else path
        if resume and self._earlier.exists():
            with writing(self._earlier):
                self._scan(header)

    def __exit__(self, *error: Any) -> None:
        self.tail = {"complete": self.complete}
        super().__exit__(*error)

    def earlier(self) -> Iterator[dict[str, Any]]:
        """The records that were kept, one at a time."""
        with self.lines.open("rb") as file:
            file.readline()
            for _ in range(self.kept):
                yield json.loads(file.readline())

    def _begin(self) -> None:
        if not self.kept:
            super()._begin()
            return
        with self._earlier.open("rb") as earlier, replacing(self.lines) as file:
            earlier.readline()
            file.write(f"{json.dumps(self._head)}\n".encode())
            for _ in range(self.kept):
                file.write(earlier.readline().rstrip(b",\n") + b"\n")

    def _scan(self, header: dict[str, Any]) -> None:
        """Count the frames of an earlier run that can be kept."""
        ids = {category["id"] for category in header["categories"]}
        with self._earlier.open("rb") as file:
            first = file.readline().rstrip()
            if first.endswith(b"["):  # in a joined file
                first += b"]}"
            try:
                old_header = json.loads(first)
            except (ValueError, RecursionError):  # killed before the header was written
                return
            if not isinstance(old_header, dict):
                old_header = {}
            if {**header, "frames": []} != {**old_header, "frames": []}:
                raise ConfigError(
                    f"{self._earlier} was written with {_difference(old_header, header)}; it "
                    "cannot be resumed: use the old setting, or choose another --output"
                )
            for number, line in enumerate(file):
                try:
                    record = _record(line, number, ids)
                except _UNUSABLE:  # the line that closes the file, or an incomplete one
                    self.complete = line.startswith(b'], "complete": true')
                    return
                if record["keyframe"]:
                    self.kept = number


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``path`` once it is complete.

    Raises:
        OutputError: see :func:`check_free`.
    """
    check_free(path)
    # A short name: that of ``path`` may be as long as names can be.
    temporary = path.with_name(f".{secrets.token_hex(4)}{path.suffix}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_free(path: Path) -> None:
    """Make sure that a file can be written without replacing one of the user.

    An empty file, which a killed process may leave, is free.

    Raises:
        OutputError: there is something that no run of ours wrote.
    """
    if os.path.lexists(path) and path.lstat().st_size and not is_ours(path):
        raise _in_the_way(path)


def has_lines(path: Path) -> bool:
    """Whether a run of ours wrote something into a file of lines.

    Raises:
        OutputError: somebody else did, or it is a link.
    """
    filled = os.path.lexists(path) and path.lstat().st_size > 0
    if filled and not is_ours(path):
        raise _in_the_way(path)
    return filled


def _in_the_way(path: Path) -> OutputError:
    return OutputError(
        f"{path} is in the way, and no run of instseg predict wrote it; move it, or choose another "
        "--output"
    )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the operating system's errors while ``path`` is written into OutputError.

    A name that is too long is an ImageError: it comes from one input, and the others can be done.
    """
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        kind = ImageError if error.errno == errno.ENAMETOOLONG else OutputError
        raise kind(f"{path} cannot be written: {error.strerror or error}") from error


def write_image(path: Path, image: Array) -> None:
    """Write an image, (H, W, 3) in BGR order or (H, W), in the format of the file's extension.

    Raises:
        OutputError: the disk is full, or the like; or there is a file of the user.
        ImageError: the format has no room for an image of this size, or the name is too long.
    """
    check_free(path)
    # cv2.imwrite would only return False on a full disk, and fails on non-ASCII paths under
    # Windows.
    try:
        ok, encoded = cv2.imencode(path.suffix, image)
    except cv2.error:  # some versions raise it instead of returning False
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
    masks = {"segmentation" in entry for entry in objects}
    if record["frame"] != number or type(record["keyframe"]) is not bool or len(masks) > 1:
        raise ValueError("another frame")
    for entry in objects:
        category = entry["category_id"]
        numbers = [*entry["bbox"], entry["score"], 0 if category in category_ids else category]
        if len(numbers) != 6 or not all(-_LARGEST < value < _LARGEST for value in numbers):
            raise ValueError("no object")
        if masks == {True}:  # runs that do not fit make pycocotools write beyond its memory
            check_rle(entry["segmentation"], height, width)
    return record


def _difference(old_header: dict[str, Any], new_header: dict[str, Any]) -> str:
    """The first setting in which two headers differ, with the value that each has."""
    info = old_header.get("info")
    old = {**(info if isinstance(info, dict) else {}), "video": old_header.get("videos")}
    new = {**new_header["info"], "video": new_header["videos"]}
    for key, value in new.items():
        if old.get(key) != value:
            return f"{key} {str(old.get(key)):.200}, not {value}"
    return "other categories"
