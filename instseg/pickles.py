"""Read pickles of arrays without executing anything they contain.

Stand-ins replace the few NumPy names that pickled arrays need.
"""

import io
import pickle
import re
from functools import partial
from typing import Any, BinaryIO, ClassVar

import numpy as np

from instseg.downloads import local_path
from instseg.errors import CheckpointError, reason_of

_LARGEST = 2**62
"""Largest number of bytes that the read methods of files accept."""


class BlockedGlobal(Exception):
    """A pickle asked for a class or function that plain weights do not need."""


def read_array_pickle(path: str) -> Any:
    """Read numbers, texts, arrays, and lists and dicts of them, from a pickle; nothing is executed.

    Raises:
        CheckpointError: the file is missing or damaged, or holds anything else.
    """
    local = local_path(path)
    try:
        with open(local, "rb") as file:
            return load_arrays(file)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except BlockedGlobal as error:
        raise CheckpointError(
            f"{path} asks for {error}, which could execute code; expected arrays alone"
        ) from None
    except Exception as error:  # a damaged file can make the parser raise anything
        raise CheckpointError(
            f"{path} is no pickle of arrays, or damaged: {reason_of(error)}"
        ) from error


def load_arrays(file: BinaryIO) -> Any:
    """Read numbers, texts, arrays, and lists and dicts of them, from a pickle.

    Claimed sizes and repeated references take no memory.

    Raises:
        BlockedGlobal: it asks for anything else.
        Exception: of any class, since a damaged file can make the parser raise anything.
    """
    content = file.read()
    # From memory: a read from a file would allocate as many bytes as the pickle claims.
    value = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    return _Filler(len(content)).filled(value)


class _Filler:
    """Replaces stand-ins by the arrays and bytes that they stand for.

    Makes each object once, however often the pickle refers to it; otherwise a few nested lists
    could grow without end.
    """

    def __init__(self, size: int) -> None:
        """
        Args:
            size: bytes of the file; all arrays together may not take more.
        """
        self._left = size
        self._made: dict[int, Any] = {}

    def filled(self, value: Any) -> Any:
        """``value`` with its stand-ins replaced."""
        key = id(value)
        if key in self._made:
            return self._made[key]
        if isinstance(value, _Array | _Bytes):
            self._made[key] = self._taken(value.content())
        elif isinstance(value, dict):
            entries: dict[Any, Any] = {}
            self._made[key] = entries
            entries.update((name, self.filled(item)) for name, item in value.items())
        elif isinstance(value, list):
            items: list[Any] = []
            self._made[key] = items
            items.extend(map(self.filled, value))
        else:
            return value
        return self._made[key]

    def _taken(self, content: np.ndarray | bytes) -> np.ndarray | bytes:
        self._left -= len(content) if isinstance(content, bytes) else content.nbytes
        if self._left < 0:
            raise pickle.UnpicklingError("its arrays are larger than the file")
        if isinstance(content, bytes):
            return content
        return content.astype(content.dtype.newbyteorder("="))


class _StandIn:
    """Base of the stand-ins for pickled names; a pickle cannot set attributes on it."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"{type(self).__name__} takes no state")


class _DType(_StandIn):
    """``numpy.dtype``, numbers only: a crafted structured type could turn bytes into pointers."""

    __slots__ = ("dtype",)

    def __init__(self, code: str, *_: Any) -> None:
        if not re.fullmatch(r"[biufc]\d{1,2}", code):
            raise pickle.UnpicklingError(f"it has an array of type {code!r}; expected numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(_StandIn):
    """``numpy.ndarray``, and ``_reconstruct``, which makes an empty array that gets its state."""

    __slots__ = ("parts",)

    def __init__(self, *_: Any) -> None:
        self.parts: tuple[Any, ...] = ((0,), np.dtype(float), False, b"")

    def __setstate__(self, state: Any) -> None:
        shape, stored, fortran, data = state[-4:]
        self.parts = shape, stored.dtype, fortran, data

    def content(self) -> np.ndarray:
        """The array, in the memory of the pickle if possible."""
        shape, dtype, fortran, data = self.parts
        data = data.content() if isinstance(data, _Bytes) else data
        raw = data.encode("latin1") if isinstance(data, str) else data  # str: written by Python 2
        return np.frombuffer(raw, dtype).reshape(shape, order="F" if fortran else "C")


class _Buffered(_Array):
    """``numpy.core.numeric._frombuffer``, which pickle protocol 5 uses for arrays."""

    __slots__ = ()

    def __init__(self, data: Any, stored: _DType, shape: Any, order: str) -> None:
        self.__setstate__((shape, stored, order == "F", data))


class _Scalar(_Array):
    """``numpy.core.multiarray.scalar``."""

    __slots__ = ()

    def __init__(self, stored: _DType, data: Any) -> None:
        self.__setstate__(((), stored, False, data))


def _plain_scalar(stored: _DType, data: bytes) -> Any:
    """``numpy.core.multiarray.scalar`` as a number of Python.

    Raises:
        Exception: of any class, for a damaged file.
    """
    (value,) = np.frombuffer(data, stored.dtype)
    return value.item()


SCALARS: list[Any] = [
    *((_plain_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    (_DType, "numpy.dtype"),
]
"""Stand-ins that let PyTorch's reader accept NumPy scalars, such as a metric beside weights."""


class _Dict(dict[Any, Any]):
    """``collections.OrderedDict`` without attributes (PyTorch stores module versions there)."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Ignore the attributes."""


class _Bytes(_StandIn):
    """``_codecs.encode``, with which pickle protocol 2 writes bytes, always as Latin-1."""

    __slots__ = ("text",)

    def __init__(self, text: str, *_: Any) -> None:
        self.text = text

    def content(self) -> bytes:
        """The bytes."""
        return self.text.encode("latin1")


class _Tuple(tuple[Any, ...]):
    """A tuple that cannot be a key: hashing nested tuples can take endless time."""

    __slots__ = ()
    __hash__ = None  # type: ignore[assignment]


def _load_tuple(unpickler: Any, code: int) -> None:
    pickle._Unpickler.dispatch[code](unpickler)
    unpickler.stack[-1] = _Tuple(unpickler.stack[-1])


def _load_bytearray(unpickler: Any) -> None:
    """Read bytes instead; pickle would allocate a bytearray of the claimed size before reading."""
    size = int.from_bytes(unpickler.read(8), "little")
    data = unpickler.read(min(size, _LARGEST))
    if len(data) != size:
        raise pickle.UnpicklingError(f"it claims {size} bytes, but only {len(data)} follow")
    unpickler.append(data)


def _refuse(_: Any, code: int) -> None:
    raise pickle.UnpicklingError(f"it has a set (code {code}), which no array needs")


class _ArrayUnpickler(pickle._Unpickler):
    """Knows only the names that pickled arrays use, each as a harmless stand-in.

    Based on the Python variant, since a few bytes make the C one allocate gigabytes for its memo.
    """

    _KNOWN: ClassVar[dict[str, type]] = {
        "numpy.core.multiarray._reconstruct": _Array,
        "numpy.core.multiarray.scalar": _Scalar,
        "numpy.core.numeric._frombuffer": _Buffered,
        "numpy.ndarray": _Array,
        "numpy.dtype": _DType,
        "collections.OrderedDict": _Dict,
        "_codecs.encode": _Bytes,
    }

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        **{
            code: partial(_load_tuple, code=code)
            for code in b"".join((pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3))
        },
        pickle.BYTEARRAY8[0]: _load_bytearray,
        **{
            code: partial(_refuse, code=code)
            for code in b"".join((pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET))
        },
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._KNOWN[f"{module.replace('numpy._core', 'numpy.core')}.{name}"]
        except KeyError:
            raise BlockedGlobal(f"{module}.{name}") from None
