"""Reads weights that MXNet saved (``PREFIX-EPOCH.params``), without MXNet.

The file is little endian: a magic number, a reserved zero, the number of arrays, the arrays, the
number of names, the names.  Three layouts of an array exist, those of MXNet 1.x, 0.12 and older;
its first four bytes tell them apart.  The format holds numbers and names only, so nothing can be
executed.  The reader checks every claimed size against the file.
"""

import math
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from instseg.checkpoint.binary import ByteReader, Malformed, opened

_MAGIC = 0x112
_TAG_WITH_STORAGE = 0xF993FAC9
_TAG_WITH_LONG_DIMS = 0xF993FAC8
_DENSE = 0
_STORAGE_NAMES = {1: "row-sparse", 2: "compressed sparse row"}
_MAX_AXES = 32
_DTYPES: dict[int, np.dtype[Any]] = {
    0: np.dtype("<f4"),
    1: np.dtype("<f8"),
    2: np.dtype("<f2"),
    3: np.dtype("u1"),
    4: np.dtype("<i4"),
    5: np.dtype("i1"),
    6: np.dtype("<i8"),
}
_LEAST_ARRAY = 21
"""Bytes of the smallest array: number of axes, one size, device, device id, type, one byte."""
_LEAST_NAME = 8


def read_params(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read every array of a file.

    Args:
        path: local path or URL.
    Returns:
        {name as in the file, e.g. ``arg:conv1_weight`` or ``aux:bn_conv1_moving_mean``: CPU tensor
        of the file's number type}, in the file's order.  Convolution weights are
        (out, in, height, width).
    Raises:
        CheckpointError: a missing, damaged or truncated file, sparse arrays, unknown number types,
            or arrays without names; the message says which.
    """
    with opened(path, "MXNet parameter file") as file:
        return _Reader(file).arrays()


class _Reader(ByteReader):
    def arrays(self) -> dict[str, Tensor]:
        """Read the whole file; nothing may follow the last name."""
        magic, reserved = self._unpack("<QQ", "the magic number")
        if (magic, reserved) != (_MAGIC, 0):
            raise Malformed(f"it starts with {magic:#x}, {reserved:#x}; expected {_MAGIC:#x} and 0")
        count = self._count("arrays", _LEAST_ARRAY)
        values = [self._array(f"array {i + 1} of {count}") for i in range(count)]
        num_names = self._count("names", _LEAST_NAME)
        if num_names != count:
            raise Malformed(f"it has {count} arrays and {num_names} names")
        named: dict[str, Tensor] = {}
        for i, value in enumerate(values):
            name = self._name(f"name {i + 1} of {count}")
            if name in named:
                raise Malformed(f"it holds {name!r} twice")
            named[name] = value
        self._end()
        return named

    def _array(self, part: str) -> Tensor:
        tag = self._number("<I", f"the tag of {part}")
        if tag == _TAG_WITH_STORAGE:
            storage = self._number("<i", f"the storage type of {part}")
            if storage != _DENSE:
                kind = _STORAGE_NAMES.get(storage, "of unknown storage")
                raise Malformed(f"{part} is {kind} (type {storage}); expected dense arrays")
        if tag in (_TAG_WITH_STORAGE, _TAG_WITH_LONG_DIMS):
            axes, code = self._number("<I", f"the number of axes of {part}"), "q"
        else:  # the oldest layout has no tag
            axes, code = tag, "I"
        if not 1 <= axes <= _MAX_AXES:
            raise Malformed(f"{part} has {axes} ({axes:#x}) axes; expected 1 to {_MAX_AXES}")
        shape = self._unpack(f"<{axes}{code}", f"the shape of {part}")
        if min(shape) < 1:
            raise Malformed(f"{part} has shape {shape}; expected positive sizes")
        *_, type_code = self._unpack("<iii", f"device and type of {part}")
        dtype = _DTYPES.get(type_code)
        if dtype is None:
            known = ", ".join(f"{key} {value.name}" for key, value in _DTYPES.items())
            raise Malformed(f"{part} has the unknown number type {type_code}; known are {known}")
        label = f"the data of {part}, {dtype.name} of shape {shape}"
        data = self._take(math.prod(shape) * dtype.itemsize, label)
        return torch.from_numpy(np.frombuffer(data, dtype).reshape(shape))

    def _name(self, part: str) -> str:
        length = self._number("<Q", f"the length of {part}")
        raw = self._take(length, part)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise Malformed(f"{part} is {bytes(raw[:40])!r}; expected UTF-8 text") from None

    def _count(self, things: str, least_size: int) -> int:
        return self._room(self._number("<Q", f"the number of {things}"), least_size, things)

    def _number(self, code: str, part: str) -> Any:
        return self._unpack(code, part)[0]
