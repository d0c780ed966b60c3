"""Files of results: those of ``instseg predict``, and lists in COCO's form of any program."""

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.structures import BoxMode

from instseg.categories import Categories
from instseg.data.annotations import Fault, standard_annotation
from instseg.errors import ConfigError, short
from instseg.masks import RLE, to_rle

logger = logging.getLogger(__name__)

_LIST = b"["
_FRAMES, _VIDEOS = b'"frames": [', b'"videos": ['
"""Keys in the first line of a video's file; that of a run that was killed has only the second."""
_UNUSABLE = (OSError, ValueError, RecursionError)


@dataclass(frozen=True)
class ResultFile:
    """A file of results, read from its beginning as often as need be.

    Attributes:
        path: ``predictions.json`` or ``.jsonl``, ``NAME.json`` or ``.jsonl`` of a video, or any
            list of results in COCO's form.
        head: the part before the list, that of a video's file or of ``categories.json``; empty if
            there is none.
        is_video: whether its entries are frames.
    """

    path: Path
    head: dict[str, Any]
    is_video: bool

    def entries(self) -> Iterator[dict[str, Any]]:
        """Its entries: instances of images, or the frames of a video."""
        for number, entry in enumerate(_entries(self.path, "frames" if self.is_video else "")):
            if not isinstance(entry, dict):
                raise ConfigError(f"{self.path}: entry {number} is {short(entry)}, no JSON object")
            if not self.is_video and type(entry.get("image_id")) not in (int, str):
                image_id = short(entry.get("image_id"))
                raise ConfigError(f"{self.path}: entry {number} has the image_id {image_id}")
            yield entry

    def categories(self) -> Categories:
        """The classes; those of the instances, in the order of their ids, if no file lists them."""
        listed = self.head.get("categories")
        if listed is None:
            names: dict[int, object] = {}
            for entry in self.entries():
                key = entry.get("category_id")
                if type(key) is int:
                    names.setdefault(key, entry.get("category_name", f"class {key}"))
            listed = [{"id": key, "name": str(names[key])} for key in sorted(names)]
        try:
            return Categories.of_coco(listed or [{"id": 0, "name": "class 0"}])
        except ValueError as error:
            raise ConfigError(f"{self.path}: its list of classes cannot be used: {error}") from None


def open_results(path: Path) -> ResultFile:
    """Look what kind of results a file holds.

    Raises:
        ConfigError: it is missing, or holds none.
    """
    try:
        with path.open("rb") as file:
            first = file.readline(2**24)
            if _FRAMES in first:  # a file in one line can be longer
                first += file.readline() if not first.endswith(b"\n") else b""
            first = first.strip()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    lines_of_video = first.startswith(b"{") and _VIDEOS in first and path.suffix == ".jsonl"
    if _FRAMES in first or lines_of_video:
        head = first if first.endswith(b"}") else first + b"]}"
        try:
            return ResultFile(path, as_object(path, json.loads(head)), is_video=True)
        except _UNUSABLE as error:
            raise ConfigError(f"{path} is no file of results: {error}") from None
    if not first.startswith((_LIST, b'{"image_id"')):
        raise ConfigError(
            f"{path} holds no results; expected predictions.json or the NAME.json of a video of "
            "`instseg predict`, or a list of results in COCO's form"
        )
    for suffix in (".json", ".jsonl"):
        categories = path.with_name(f"categories{suffix}")
        if categories.is_file():
            try:
                return ResultFile(path, _head(categories), is_video=False)
            except _UNUSABLE as error:
                raise ConfigError(f"{categories} cannot be read: {error}") from None
    return ResultFile(path, {}, is_video=False)


def checked_mask(
    path: Path, name: str, record: dict[str, Any], height: int, width: int
) -> RLE | None:
    """The mask of an instance as compressed RLE, None without one; checks its score and box, too.

    Args:
        path, name: of the file and the image, for messages.
        record: of the instance, in COCO's form.
        height, width: of the image.
    Raises:
        ConfigError: the score is no finite number, or the mask, the box or the class is malformed.
    """
    score: Any = record.get("score")
    if type(score) not in (int, float) or not math.isfinite(score):
        raise ConfigError(f"{path}: an instance of {name} has the score {short(score)}")
    given = {key: record.get(key) for key in ("category_id", "bbox", "segmentation")}
    given["bbox_mode"] = BoxMode.XYWH_ABS
    if given["segmentation"] is None and given["bbox"] is None:
        return None
    try:
        mask = standard_annotation(given, height, width, None)[0].get("segmentation")
    except Fault as fault:
        raise ConfigError(f"{path}: an instance of {name}: {fault}") from None
    return None if mask is None else to_rle(mask, height, width)


def _entries(path: Path, key: str) -> Iterator[Any]:
    """The entries of a list, line by line where a run of ours wrote it.

    Args:
        key: of the list in an object; "" for a list alone.
    """
    with path.open("rb") as file:
        first = file.readline().strip() if key else b""
        if _FRAMES in first and first.endswith(b"}"):  # the whole file in one line
            yield from _list(path, json.loads(first), key)
            return
        numbered = 0
        for line in file:
            text = line.strip().rstrip(b",")
            if text in (_LIST, b"]", b"]}", b"") or text.startswith(b"], "):
                continue
            try:
                entry = json.loads(text)
            except _UNUSABLE:
                break
            if isinstance(entry, list):  # the whole file in one line
                break
            yield entry
            numbered += 1
        else:
            return
    if (numbered or key) and path.suffix == ".jsonl":
        # The last line of a process that was killed; what comes before it is complete.
        logger.warning("%s: entry %d is incomplete and left out", path, numbered + 1)
        return
    if numbered:
        raise ConfigError(f"{path} is damaged behind its first {numbered} entries")
    try:
        content = json.loads(path.read_bytes())
    except _UNUSABLE as error:
        raise ConfigError(f"{path} is no JSON: {error}") from None
    yield from _list(path, content, key)


def _list(path: Path, content: Any, key: str) -> list[Any]:
    """The entries in the whole content of a file."""
    entries = content.get(key) if key and isinstance(content, dict) else content
    if not isinstance(entries, list):
        raise ConfigError(f"{path} is damaged: expected a list, found {short(entries)}")
    return entries


def _head(path: Path) -> dict[str, Any]:
    """Content of ``categories.json`` or ``categories.jsonl``."""
    content = path.read_bytes()
    if path.suffix == ".json":
        return as_object(path, json.loads(content))
    first, *lines = content.splitlines()
    return as_object(path, json.loads(first)) | {"images": [json.loads(line) for line in lines]}


def as_object(path: Path, value: Any) -> dict[str, Any]:
    """``value``; a ConfigError if it is no JSON object."""
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {short(value)}")
    return value
