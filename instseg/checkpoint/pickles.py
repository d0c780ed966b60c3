"""Pickles of arrays, read without executing anything they contain.

They are rebuilt from stand-ins for the few NumPy names that arrays need.
"""

import pickle
import re
from typing import Any, BinaryIO, ClassVar

import numpy as np


class BlockedGlobal(Exception):
    """A pickle asked for a class or function that plain weights do not need."""


def load_arrays(file: BinaryIO) -> Any:
    """Numbers, texts, arrays, and lists and dicts of them, from a pickle.

    Raises:
        BlockedGlobal: it asks for more.
        Exception: of any kind, about a damaged file.
    """
    return _plain(_ArrayUnpickler(file, encoding="latin1").load())


def _plain(value: Any) -> Any:
    """``value`` with arrays in place of what stands for them."""
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


class _StandIn:
    """Base of what pickled names become; a pickle that tries to set attributes on a class fails."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"{type(self).__name__} takes no state")


class _DType(_StandIn):
    """``numpy.dtype``, numbers only: a crafted structured type could make bytes object pointers."""

    __slots__ = ("dtype",)

    def __init__(self, code: str, *_: Any) -> None:
        if not re.fullmatch(r"[biufc]\d{1,2}", code):
            raise pickle.UnpicklingError(f"array of type {code!r}; expected numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(_StandIn):
    """``numpy.ndarray`` and ``_reconstruct``, which makes an empty one for its state to follow."""

    __slots__ = ("value",)

    def __init__(self, *_: Any) -> None:
        self.value = np.zeros(0)

    def __setstate__(self, state: Any) -> None:
        shape, stored, fortran, data = state[-4:]
        raw = data.encode("latin1") if isinstance(data, str) else data  # str: written by Python 2
        array = np.frombuffer(raw, stored.dtype).reshape(shape, order="F" if fortran else "C")
        self.value = np.array(array, dtype=stored.dtype.newbyteorder("="))


class _Scalar(_Array):
    """``numpy.core.multiarray.scalar``."""

    __slots__ = ()

    def __init__(self, stored: _DType, data: Any) -> None:
        self.__setstate__(((), stored, False, data))


class _Dict(dict[Any, Any]):
    """``collections.OrderedDict`` without attributes (PyTorch hangs module versions on it)."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Ignore them."""


class _Bytes(_StandIn):
    """``_codecs.encode``, by which pickle protocol 2 writes bytes, always as Latin-1."""

    __slots__ = ()

    def __new__(cls, text: str, encoding: str) -> bytes:  # type: ignore[misc]
        return text.encode("latin1")


class _ArrayUnpickler(pickle._Unpickler):
    """Knows the names that pickled arrays use, each as a harmless stand-in, and nothing else.

    Based on the variant in Python, since a few bytes make the one in C take gigabytes for its memo.
    """

    _KNOWN: ClassVar[dict[str, type]] = {
        "numpy.core.multiarray._reconstruct": _Array,
        "numpy.core.multiarray.scalar": _Scalar,
        "numpy.ndarray": _Array,
        "numpy.dtype": _DType,
        "collections.OrderedDict": _Dict,
        "_codecs.encode": _Bytes,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._KNOWN[f"{module.replace('numpy._core', 'numpy.core')}.{name}"]
        except KeyError:
            raise BlockedGlobal(f"{module}.{name}") from None
