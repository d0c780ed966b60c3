"""The emulated operators, and how their threads run."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.emulate.build import LIBRARY, Build


class Traffic(NamedTuple):
    """What one kernel moved; see traffic.cpp.

    Attributes:
        kernel: its name, or "cooperative".
        launches: of it.
        requests: reads and writes by a warp.
        sectors: of 32 bytes, that these requests touched.
        read: bytes from DRAM.
        written: bytes to DRAM.
    """

    kernel: str
    launches: int
    requests: int
    sectors: int
    read: int
    written: int


class Emulated:
    """A loaded library.  A process can load one, as operators have global names."""

    def __init__(self, library: Path) -> None:
        torch.ops.load_library(library)
        self.operators = getattr(torch.ops, LIBRARY)
        self._library = ctypes.CDLL(str(library))

    @cached_property
    def _synchronisations(self) -> Any:
        function = self._library.cuda_on_cpu_synchronisations
        function.restype = ctypes.c_int64
        return function

    def synchronisations(self) -> int:
        """How often the host waited for the device since the last call."""
        return int(self._synchronisations())

    @contextmanager
    def threads(self, order: int = 0, most_blocks: int = 0, skipped: str = "") -> Iterator[None]:
        """Choose how kernels run.

        Args:
            order: of threads and blocks: 0 ascending, 1 descending, others shuffle.
            most_blocks: of a grid, so that kernels loop over the rest; 0 for any number.
            skipped: ``file:line`` of a barrier that does nothing.
        """
        configure = self._library.cuda_on_cpu_configure
        configure.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_char_p]
        configure(order, most_blocks, skipped.encode())
        try:
            yield
        finally:
            configure(0, 0, b"")

    def traffic(self) -> list[Traffic]:
        """Counts of the kernels since the last call; the library is of the kind "traffic"."""
        text = ctypes.create_string_buffer(1 << 16)
        self._library.cuda_on_cpu_traffic(text, ctypes.c_int64(len(text)))
        rows = [line.split() for line in text.value.decode().splitlines()]
        return [Traffic(name, *map(int, numbers)) for name, *numbers in rows]


def load(kind: str = "plain") -> Emulated:
    """Build and load all operators."""
    return Emulated(Build(kind).library())
