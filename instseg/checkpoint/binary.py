"""Base of the readers of foreign binary files; it checks every claimed size against the file.

The formats hold numbers and names; nothing in them can be executed.
"""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from instseg.downloads import local_path
from instseg.errors import CheckpointError


class Malformed(Exception):
    """The content of a file is wrong; :func:`opened` adds the path to the message."""


@contextmanager
def opened(path: str | os.PathLike[str], kind: str) -> Iterator[BinaryIO]:
    """Open a file for reading inside the ``with`` block.

    Args:
        path: local path or URL.
        kind: what messages call such a file, e.g. "Torch7 file".
    Raises:
        CheckpointError: the file cannot be opened or read, or is :class:`Malformed`.
    """
    path = os.fspath(path)
    try:
        with open(local_path(path), "rb") as file:
            yield file
    except OSError as error:
        raise CheckpointError(f"weights {path} cannot be read: {error}") from error
    except Malformed as error:
        raise CheckpointError(f"{path} is no {kind}, or damaged: {error}") from error


class ByteReader:
    """Reads a file from front to back."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._left = os.fstat(file.fileno()).st_size

    def _room(self, count: int, size: int, things: str) -> int:
        """Return ``count``; refuse it if that many things of ``size`` bytes exceed the file."""
        if count < 0 or count * size > self._left:
            raise Malformed(f"it claims {count} {things}, but only {self._left} bytes follow")
        return count

    def _unpack(self, code: str, part: str = "a value") -> tuple[Any, ...]:
        return struct.unpack(code, self._take(struct.calcsize(code), part))

    def _take(self, length: int, part: str = "a value") -> bytearray:
        """Read the next bytes into new memory."""
        if length > self._left:
            raise Malformed(f"{part} should take {length} bytes, {self._left} are left")
        data = bytearray(length)
        if self._file.readinto(data) != length:  # type: ignore[attr-defined]
            raise Malformed(f"the file became shorter while {part} was read")
        self._left -= length
        return data

    def _end(self) -> None:
        if self._left:
            raise Malformed(f"{self._left} bytes follow its content")
