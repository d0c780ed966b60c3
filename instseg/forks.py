"""Keeps forked processes from waiting for threads that they do not have.

A forked process is a copy of its parent with one thread.  GNU's OpenMP, on which PyTorch and our
operators run on Linux, keeps its threads from one call to the next.  A forked process would wait
for ever for threads that it does not have, and would outlive a parent that is killed.  Therefore
OpenMP ends its threads before every fork; parent and child start new ones when they need them.
"""

import ctypes
import os
import sys

import torch

from instseg.errors import ProcessError

_SOFT = 1
"""``omp_pause_soft``: settings stay."""

_kept = False
"""Whether the threads could not be ended before the last fork."""
_lost = False
"""Whether such a fork made this process."""


def check_threads() -> None:
    """Raise a ProcessError if operators would wait for threads that a fork has not copied."""
    if _lost and torch.get_num_threads() > 1:
        raise ProcessError(
            "this process was forked from one whose operators run on several threads, which a fork "
            "does not copy: start it by multiprocessing.get_context('spawn'), or call "
            "torch.set_num_threads(1) at its beginning"
        )


def _before() -> None:
    global _kept
    extensions = [sys.modules.get(name) for name in ("torch._C", "instseg._C")]
    files = [extension.__file__ for extension in extensions if extension is not None]
    _kept = not all(_give_up_threads(file) for file in files if file)


def _in_child() -> None:
    global _lost
    _lost = _lost or _kept
    if torch.get_num_threads() > 1:
        # Replaces PyTorch's other pool now; later its threads would race to do so.
        torch.set_num_threads(torch.get_num_threads())


def _give_up_threads(file: str) -> bool:
    """End the OpenMP threads of a loaded extension; False if they cannot be ended."""
    # Looks functions up in the libraries that the extension was linked to.
    library = ctypes.CDLL(file)
    try:
        return library.omp_pause_resource_all(_SOFT) == 0
    except AttributeError:  # before GCC 9, or another OpenMP, or none
        return not hasattr(library, "GOMP_parallel")


if sys.platform == "linux":  # elsewhere OpenMP is LLVM's, which looks after forks itself
    os.register_at_fork(before=_before, after_in_child=_in_child)
