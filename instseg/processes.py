"""Ends the processes that a program started when the program ends."""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from types import FrameType

_IS_LINUX = sys.platform.startswith("linux")
# Loaded before any fork: a child of a process with threads may not be able to.
_LIBC = ctypes.CDLL(None) if _IS_LINUX else None
_PR_SET_PDEATHSIG = 1
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def end_with(parent: int) -> None:
    """Have this process get SIGTERM when ``parent`` ends in any way, kill -9 included.

    Works on Linux only; elsewhere nothing happens.

    Args:
        parent: id of the process that started this one.  It has to come from that process, which
            may have ended before this is called.
    """
    if _LIBC is None:
        return
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def end_with_starter() -> None:
    """Have this process of ``multiprocessing`` end when the one that started it ends in any way.

    The system's parent may be another process: a server, from which the default start method of
    Linux forks.  A process that was not started by ``multiprocessing`` is left alone.
    """
    starter = multiprocessing.parent_process()
    if starter is None:
        return

    def wait() -> None:
        starter.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def end_with_make() -> None:
    """:func:`end_with` the ``make`` that runs this program, if one does."""
    if "MAKELEVEL" in os.environ:
        end_with(os.getppid())


def run(command: Sequence[str | os.PathLike[str]]) -> None:
    """Run ``command`` to its end, in the main thread.

    Forwards SIGTERM and Ctrl-C as SIGTERM and waits for the command to end: a training finishes its
    iteration and saves a checkpoint.  The command also ends if this process is killed outright, see
    :func:`end_with`.

    Raises:
        SystemExit: the command failed, with its status; or a signal came, with 128 + its number.
    """
    received: list[int] = []
    children: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for child in children:
            child.terminate()

    this_process = os.getpid()
    former = {number: signal.signal(number, forward) for number in _SIGNALS}
    try:
        begin = None if os.name == "nt" else lambda: end_with(this_process)
        children.append(subprocess.Popen(command, preexec_fn=begin))
        if received:  # while the command was being started
            children[0].terminate()
        status = children[0].wait()
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    if received:
        sys.exit(128 + received[0])
    if status:
        sys.exit(status if status > 0 else 128 - status)
