"""What was found in the tiles of an image, kept until the run is over."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.structures import Boxes, Instances

from instseg.errors import ConfigError
from instseg.inference.layout import Layout
from instseg.masks import CroppedMasks, as_text
from instseg.predict.earlier import TILES
from instseg.predict.records import has_lines, writing

_LONGEST_NAME = 255
"""Bytes of the name of a file."""
_TYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "bool")
_UNUSABLE = (ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError)


def tiles_file(output: Path, stem: str) -> Path:
    """The file that holds the tiles of an image while a run is not over.

    Args:
        output: folder of the run.
        stem: of the files written for the image.
    """
    short = os.fsdecode(os.fsencode(stem)[: _LONGEST_NAME - len(TILES)])
    return output / f"{short}{TILES}"


class TileRecords:
    """The tiles of an image, one line each in ``NAME.tiles.jsonl``, after a line of settings.

    The lines hold every number exactly, so a run that is resumed ends with the same result.  The
    file stays until it is removed.
    """

    def __init__(self, path: Path, header: dict[str, Any], layout: Layout, *, resume: bool) -> None:
        """
        Args:
            path: of the file.
            header: all that the results of tiles depend on, beginning with ``info``; JSON.
            layout: the tiles.
            resume: go on with an existing file.
        """
        self._path, self._header, self._layout, self._resume = path, header, layout, resume

    def __enter__(self) -> "TileRecords":
        """
        Raises:
            ConfigError: the existing file was written with other settings.
            OutputError: it cannot be written, or is no file of ours.
        """
        with writing(self._path):
            filled = has_lines(self._path)
            end = self._end_of_earlier() if self._resume and filled else 0
            self._file = self._path.open("r+b" if end else "wb")
            self._file.truncate(end)
            self._file.seek(end)
            if not end:
                self._write(self._header)
        return self

    def __exit__(self, *error: object) -> None:
        with writing(self._path):
            self._file.close()

    def earlier(self) -> Iterator[Instances]:
        """What an earlier run found in the first tiles."""
        with writing(self._path), self._path.open("rb") as file:
            file.readline()
            for number, line in enumerate(file):
                yield self._instances(json.loads(line), number)

    def add(self, instances: Instances) -> None:
        """Keep what was found in the next tile.

        Raises:
            OutputError: the disk is full, or the like.
        """
        fields = {}
        for name, value in instances.get_fields().items():
            if name != "pred_masks":
                tensor = value.tensor if isinstance(value, Boxes) else value
                fields[name] = [str(tensor.dtype).removeprefix("torch."), tensor.tolist()]
        counts = [as_text(rle)["counts"] for rle in instances.pred_masks.to_rle()]
        with writing(self._path):
            self._write({"fields": fields, "masks": counts})

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(f"{json.dumps(record)}\n".encode())
        self._file.flush()

    def _instances(self, record: dict[str, Any], tile: int) -> Instances:
        """
        Raises:
            ValueError, KeyError, TypeError, ...: it is not the record of a tile.
        """
        rect = self._layout.rects[tile]
        size = (rect.y1 - rect.y0, rect.x1 - rect.x0)
        instances = Instances(size)
        for name, (kind, values) in record["fields"].items():
            tensor = torch.tensor(values, dtype=getattr(torch, _TYPES[_TYPES.index(kind)]))
            is_boxes = name == "pred_boxes"
            instances.set(name, Boxes(tensor.reshape(-1, 4)) if is_boxes else tensor)
        for name in ("pred_boxes", "scores", "pred_classes"):
            instances.get(name)
        rles = [{"size": list(size), "counts": text} for text in record["masks"]]
        instances.pred_masks = CroppedMasks.from_rles(rles, size)
        return instances

    def _end_of_earlier(self) -> int:
        """Where the last complete line of an earlier run ends; 0 if there is none.

        Raises:
            ConfigError: its settings were others.
        """
        with self._path.open("rb") as file:
            first = file.readline()
            if not first.endswith(b"\n"):  # killed before the header was written
                return 0
            try:
                header = json.loads(first)
            except ValueError:
                header = {}
            if header != self._header:
                raise ConfigError(
                    f"{self._path} was written with {_difference(header, self._header)}; it cannot "
                    "be resumed: use the old setting, or leave --resume out"
                )
            end = file.tell()
            for number, line in enumerate(file):
                try:
                    if not line.endswith(b"\n"):
                        break
                    self._instances(json.loads(line), number)
                except _UNUSABLE:  # the last line of a run that was killed
                    break
                end += len(line)
        return end


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The first setting in which two headers differ, with the value that each has."""
    for part, settings in new.items():
        earlier = old.get(part)
        earlier = earlier if isinstance(earlier, dict) else {}
        for key, value in settings.items():
            if earlier.get(key) != value:
                return f"{key} {str(earlier.get(key)):.200}, not {value}"
    return "other settings"
