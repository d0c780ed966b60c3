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
    """What is wrong with a file; :func:`opened` adds its path."""


@contextmanager
def opened(path: str | os.PathLike[str], kind: str) -> Iterator[BinaryIO]:
    """Open a file to read its content inside.

    Args:
        path: local path or URL.
        kind: of file, in messages, such as "Torch7 file".
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

    def _room(self, count: int, size: int, what: str) -> int:
        """``count``, once that many things of ``size`` bytes fit into the rest of the file."""
        if count < 0 or count * size > self._left:
            raise Malformed(f"it claims {count} {what}, but only {self._left} bytes follow")
        return count

    def _unpack(self, code: str, what: str = "a value") -> tuple[Any, ...]:
        return struct.unpack(code, self._take(struct.calcsize(code), what))

    def _take(self, length: int, what: str = "a value") -> bytearray:
        """The next bytes, in memory of their own."""
        if length > self._left:
            raise Malformed(f"{what} should take {length} bytes, {self._left} are left")
        data = bytearray(length)
        if self._file.readinto(data) != length:  # type: ignore[attr-defined]
            raise Malformed(f"the file became shorter while {what} was read")
        self._left -= length
        return data

    def _end(self) -> None:
        if self._left:
            raise Malformed(f"{self._left} bytes follow its content")
