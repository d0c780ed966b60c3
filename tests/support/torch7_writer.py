"""A small writer of Torch7 files, by the format's description alone."""

import struct
from pathlib import Path
from typing import Any

import numpy as np

KINDS = {
    np.dtype("u1"): "Byte",
    np.dtype("i8"): "Long",
    np.dtype("f2"): "Half",
    np.dtype("f4"): "Float",
    np.dtype("f8"): "Double",
}


class Obj:
    """A Lua object; the same one written twice becomes a reference."""

    def __init__(self, class_name: str, **fields: Any) -> None:
        self.class_name = class_name
        self.fields = fields


class Cuda:
    """A float tensor of a GPU."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array


def listed(*values: Any) -> dict[int, Any]:
    """A Lua list, which is a table with keys from 1."""
    return dict(enumerate(values, start=1))


class Writer:
    """Collects the bytes of one value."""

    def __init__(self, versions: bool = True) -> None:
        self.parts: list[bytes] = []
        self.numbers: dict[int, tuple[int, Any]] = {}
        self.last = 0
        self.versions = versions

    def write(self, value: Any) -> "Writer":
        if value is None:
            self.ints(0)
        elif isinstance(value, bool):
            self.ints(5, int(value))
        elif isinstance(value, int | float):
            self.ints(1)
            self.parts.append(struct.pack("<d", value))
        elif isinstance(value, str):
            self.ints(2)
            self.text(value)
        elif isinstance(value, dict):
            if self.begin(3, value):
                self.ints(len(value))
                for key, item in value.items():
                    self.write(key).write(item)
        elif isinstance(value, Obj):
            if self.begin(4, value):
                self.head(value.class_name)
                self.write(value.fields)
        else:
            array = value.array if isinstance(value, Cuda) else value
            kind = "Cuda" if isinstance(value, Cuda) else KINDS[array.dtype]
            if self.begin(4, value):
                self.tensor(array, kind)
        return self

    def tensor(self, array: np.ndarray, kind: str) -> None:
        strides = [x // array.itemsize for x in array.strides]
        self.head(f"torch.{kind}Tensor")
        self.ints(array.ndim)
        self.longs(*array.shape, *strides, 1)
        self.storage(np.ravel(array, order="K"), kind)

    def storage(self, flat: np.ndarray, kind: str) -> None:
        self.last += 1
        self.ints(4, self.last)
        self.head(f"torch.{kind}Storage")
        self.longs(flat.size)
        self.parts.append(flat.tobytes())

    def begin(self, kind: int, value: Any) -> bool:
        """Write the number of ``value``; return whether its content has to follow."""
        known = id(value) in self.numbers
        if not known:
            self.last += 1
            self.numbers[id(value)] = self.last, value
        self.ints(kind, self.numbers[id(value)][0])
        return not known

    def head(self, class_name: str) -> None:
        if self.versions:
            self.text("V 1")
        self.text(class_name)

    def ints(self, *values: int) -> None:
        self.parts.append(struct.pack(f"<{len(values)}i", *values))

    def longs(self, *values: int) -> None:
        self.parts.append(struct.pack(f"<{len(values)}q", *values))

    def text(self, value: str) -> None:
        raw = value.encode()
        self.ints(len(raw))
        self.parts.append(raw)

    @property
    def content(self) -> bytes:
        return b"".join(self.parts)


def save(path: Path, value: Any, versions: bool = True) -> Path:
    """Write ``value`` to ``path``."""
    path.write_bytes(Writer(versions).write(value).content)
    return path
