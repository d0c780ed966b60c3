"""Name files, tell devices from files, write files atomically, and lock folders."""

import errno
import hashlib
import logging
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from instseg.errors import OutputError

logger = logging.getLogger(__name__)

TEMPORARY = ".instseg-tmp"
"""End of the names of temporary files; marks the leftovers of a killed process."""
_LOCK = ".lock"
_LOCKS_UNKNOWN = {errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}
"""Errors of network file systems that cannot lock."""
_locked: dict[str, FileLock] = {}
"""Path of the lock file → lock, held until the process ends."""


def is_device(path: str | os.PathLike[str]) -> bool:
    """Whether a path exists but is neither file nor folder: a device, a pipe, a socket.

    Reading one may wait for ever; replacing one by a file takes it from every other program.
    """
    return os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))


def stamp(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Size in bytes and time of the last change in ns; -1, -1 if there is no such file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return -1, -1
    return status.st_size, status.st_mtime_ns


def file_name(text: str) -> str:
    """A name for a file or folder made from ``text``, which may be a path or anything else.

    A text of at most 100 letters, digits, ``_``, ``.`` and ``-`` is the name itself.  Any other
    text gives its end, which tells most paths apart, and a hash of the whole.
    """
    if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", text):
        return text
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    words = re.sub(r"[^A-Za-z0-9.-]+", "_", text)[-80:].lstrip("_.-")
    return f"{words}-{digest[:8]}".lstrip("-")


def atomic_write(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Have ``write`` fill the file ``path`` so that nobody sees it half-written.

    Writes a temporary file in the same folder (created if missing) and moves it to ``path`` once it
    is on the disk.  A device or pipe, such as ``/dev/stdout``, is written to directly: replacing it
    by a file would take it from every other program.

    Raises:
        OutputError: the system refused; ``path`` is unchanged and the temporary file is removed.
    """
    path = Path(path)
    # Not tempfile: its files are private to the user, but these need the usual permissions.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        if is_device(path):
            with open(path, "wb") as device:
                write(device)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save hides the OSError of a full disk behind a RuntimeError about file positions.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        raise OutputError(f"cannot write {path}: {cause} ({_free(path)})") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    with suppress(OSError):  # some file systems cannot sync a folder; the file itself is complete
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def lock_folder(folder: str | os.PathLike[str]) -> None:
    """Lock ``folder`` for this process, until it ends in whatever way.

    The operating system holds the lock, so the lock file of a killed process stops nobody.  Forked
    worker processes give the lock up, so a worker that outlives a killed training does not stop
    the next one.

    Raises:
        OutputError: another process has locked it; the message says which and what to do.
    """
    path = Path(folder, _LOCK).resolve()
    if str(path) in _locked and _locked[str(path)].is_locked:  # not in a forked process
        return
    holder = "another process"
    lock = FileLock(path, blocking=False, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        with suppress(OSError):
            holder = path.read_bytes()[:300].decode(errors="replace").strip() or holder
        raise OutputError(
            f"OUTPUT_DIR {folder} is in use by {holder}; wait for its end, stop it (SIGTERM has a "
            "training save a checkpoint first), or choose another OUTPUT_DIR"
        ) from None
    except OSError as error:
        if error.errno not in _LOCKS_UNKNOWN:
            raise OutputError(f"OUTPUT_DIR {folder} cannot be locked: {error}") from None
        logger.warning(f"{path} cannot be locked ({error}): take care that no other run uses it")
        return
    _locked[str(path)] = lock
    with suppress(PermissionError):  # Windows keeps everybody from a locked file
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")


def _free(path: Path) -> str:
    try:
        return f"{shutil.disk_usage(path.parent).free} bytes free in {path.parent}"
    except OSError:
        return f"{path.parent} is no folder that can be used"
