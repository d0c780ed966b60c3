"""One run at a time in an output folder."""

import fcntl
import logging
import os
import socket
from pathlib import Path

from instseg.errors import OutputError

logger = logging.getLogger(__name__)

_NAME = ".lock"


def lock_folder(folder: str | os.PathLike[str]) -> None:
    """Claim ``folder`` for this process, until it ends in whatever way.

    The operating system keeps the claim, not the file: what a killed process leaves behind stops
    nobody.  Worker processes that this one starts do not inherit it, so that one of them which
    outlives a killed training does not stop the next.

    Raises:
        OutputError: another process has claimed it; the message says which and what to do.
    """
    path = Path(folder, _NAME)
    try:
        # Never closed: a POSIX lock ends with any descriptor of its file in this process.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise OutputError(f"OUTPUT_DIR {folder} cannot be locked: {error}") from None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = os.read(descriptor, 300).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        raise OutputError(
            f"OUTPUT_DIR {folder} is in use by {holder}; wait for its end, stop it (SIGTERM has a "
            "training save a checkpoint first), or choose another OUTPUT_DIR"
        ) from None
    except OSError as error:  # some network file systems know no locks
        logger.warning(f"{path} cannot be locked ({error}): take care that no other run uses it")
        return
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
