"""What a fork does to threads, and what is done about it.

A forked process is a copy of its parent with one thread.  GNU's OpenMP, on which PyTorch and our
operators run on Linux, keeps its threads from one call to the next; the copy would wait for ever
for threads that it does not have, and outlive a parent that is killed, since nothing ends it.
Therefore they are given up before every fork; parent and child start others when they need them.
"""

import ctypes
import os
import sys

import torch

from instseg.errors import ProcessError

_SOFT = 1
"""``omp_pause_soft``: settings stay."""

_kept = False
"""Whether the last fork was made although threads could not be given up."""
_lost = False
"""Whether this process was made by such a fork."""


def check_threads() -> None:
    """Raise a ProcessError where operators would wait for threads that a fork has not copied."""
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
        # Replaces another pool of PyTorch's, which its threads would race to do later.
        torch.set_num_threads(torch.get_num_threads())


def _give_up_threads(file: str) -> bool:
    """End the OpenMP threads behind a loaded extension; False if it has some and they go on."""
    # Asks for functions of the libraries that the extension was linked to.
    library = ctypes.CDLL(file)
    try:
        return library.omp_pause_resource_all(_SOFT) == 0
    except AttributeError:  # before GCC 9, or another OpenMP, or none
        return not hasattr(library, "GOMP_parallel")


if sys.platform == "linux":  # elsewhere OpenMP is LLVM's, which looks after forks itself
    os.register_at_fork(before=_before, after_in_child=_in_child)
