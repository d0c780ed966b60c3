"""Reads files that Torch7 wrote (``torch.save``, binary, 64 bit) without Torch.

The format is a tree of Lua values in which tables and objects are numbered, so that they can appear
again.  Objects are a class name and their fields.  The reader constructs and calls nothing, and
skips compiled Lua functions.  It checks every count and length against the size of the file and
every tensor against its storage, and limits the depth and number of values.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from instseg.checkpoint.binary import ByteReader, Malformed, opened

Array = npt.NDArray[Any]

_NIL, _NUMBER, _STRING, _TABLE, _OBJECT, _BOOLEAN = range(6)
_FUNCTIONS = (6, 7, 8)
_KINDS = {
    "Byte": "u1",
    "Char": "i1",
    "Short": "<i2",
    "Int": "<i4",
    "Long": "<i8",
    "Half": "<f2",
    "Float": "<f4",
    "Double": "<f8",
    "Cuda": "<f4",
    **{
        f"Cuda{name}": code
        for name, code in zip(
            ("Byte", "Char", "Short", "Int", "Long", "Half", "Double"),
            ("u1", "i1", "<i2", "<i4", "<i8", "<f2", "<f8"),
            strict=True,
        )
    },
}
_MAX_AXES = 16
_MAX_DEPTH = 100
_MAX_VALUES = 1_000_000
"""Limit of all values of a file; released networks have some thousands."""
_LEAST_PAIR = 8
"""Bytes of the smallest entry of a table."""


@dataclass
class Torch7Object:
    """A Lua object.

    Attributes:
        class_name: such as ``nn.Sequential``.
        fields: by name.
    """

    class_name: str
    fields: dict[Any, Any] = field(default_factory=dict)


def read_torch7(path: str) -> Any:
    """Read the value that a file holds.

    Args:
        path: local path or URL.
    Returns:
        None, bool, str (bytes that are no UTF-8 as Latin-1), int or float, dict for a table (keys
        as in Lua, counted from 1), :class:`Torch7Object`, or a NumPy array for a tensor.  A value
        that appears several times is the same object each time.
    Raises:
        CheckpointError: a missing, damaged, truncated or hostile file.
    """
    with opened(path, "Torch7 file") as file:
        return _Reader(file).whole()


class _Reader(ByteReader):
    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._known: dict[int, Any] = {}
        self._count = 0
        self._depth = 0

    def whole(self) -> Any:
        """Read the value of the file; nothing may follow it."""
        value = self._value()
        self._end()
        return value

    def _value(self) -> Any:
        self._count += 1
        if self._count > _MAX_VALUES:
            raise Malformed(f"it has more than {_MAX_VALUES} values")
        kind = self._int()
        if kind == _NIL:
            return None
        if kind == _NUMBER:
            number = self._number("<d")
            return int(number) if number.is_integer() else number
        if kind == _STRING:
            return self._text()
        if kind == _BOOLEAN:
            return self._int() == 1
        if kind not in (_TABLE, _OBJECT, *_FUNCTIONS):
            raise Malformed(f"it has a value of the unknown kind {kind}")
        index = self._int()
        if index in self._known:
            return self._known[index]
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise Malformed(f"its values are nested more than {_MAX_DEPTH} times")
        if kind == _TABLE:
            value: Any = self._known.setdefault(index, {})
            value.update(self._pairs())
        elif kind == _OBJECT:
            value = self._object(index)
        else:
            self._text()
            value = self._known[index] = None
            self._value()  # the function's upvalues
        self._depth -= 1
        return value

    def _pairs(self) -> Iterator[tuple[Any, Any]]:
        for _ in range(self._room(self._int(), _LEAST_PAIR, "entries of a table")):
            key, value = self._value(), self._value()
            if not isinstance(key, str | int | float):
                raise Malformed(f"a table has a key of type {type(key).__name__}")
            yield key, value

    def _object(self, index: int) -> Any:
        name = self._text()
        if name.startswith("V "):  # older files have no version
            name = self._text()
        package, _, rest = name.partition(".")
        if package == "torch" and rest.endswith("Storage") and rest[:-7] in _KINDS:
            value: Any = self._storage(np.dtype(_KINDS[rest[:-7]]))
        elif package == "torch" and rest.endswith("Tensor") and rest[:-6] in _KINDS:
            value = self._tensor(np.dtype(_KINDS[rest[:-6]]), name)
        else:
            value = self._known[index] = Torch7Object(name)
            content = self._value()
            if not isinstance(content, dict):
                raise Malformed(f"an object of class {name!r} is no table of fields")
            value.fields = content
        self._known[index] = value
        return value

    def _storage(self, dtype: np.dtype[Any]) -> Array:
        count = self._room(self._number("<q"), dtype.itemsize, "numbers of a storage")
        return np.frombuffer(self._take(count * dtype.itemsize), dtype)

    def _tensor(self, dtype: np.dtype[Any], name: str) -> Array:
        axes = self._int()
        if not 0 <= axes <= _MAX_AXES:
            raise Malformed(f"a {name} has {axes} axes; expected 0 to {_MAX_AXES}")
        shape = [self._number("<q") for _ in range(axes)]
        strides = [self._number("<q") for _ in range(axes)]
        start = self._number("<q") - 1
        storage = self._value()
        if storage is None or not axes:
            return np.zeros(0, dtype)
        if not isinstance(storage, np.ndarray) or storage.ndim != 1 or storage.dtype != dtype:
            raise Malformed(f"a {name} has no storage of its kind")
        # No element may repeat or lie outside the storage: as_strided checks nothing.
        end = start + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if (
            min(shape) < 1
            or min(strides) < 0
            or start < 0
            or end >= len(storage)
            or math.prod(shape) > len(storage)
        ):
            raise Malformed(
                f"a {name} of shape {tuple(shape)}, strides {tuple(strides)} and offset {start} "
                f"does not lie within its storage of {len(storage)} numbers"
            )
        # No copy: many tensors on one storage would take many times the memory of the file.
        bytes_apart = [stride * dtype.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(storage[start:], shape, bytes_apart)

    def _text(self) -> str:
        raw = bytes(self._take(self._room(self._int(), 1, "characters of a text")))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return raw.decode("latin1")

    def _int(self) -> int:
        return int(self._number("<i"))

    def _number(self, code: str) -> Any:
        return self._unpack(code)[0]
