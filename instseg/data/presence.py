"""Find the unreadable files of a data set before the first iteration."""

import os
import stat
from collections.abc import Iterator, Sequence

from instseg.data.synthetic.files import is_elsewhere

_MAX_CHECKED = 10_000
_ZARR = (".zarray", ".zgroup", "zarr.json")
"""Files that tell a folder to be an image in the format zarr."""


def is_zarr(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder that holds an image in the format zarr."""
    return any(os.path.isfile(os.path.join(path, name)) for name in _ZARR)


def file_problem(path: str | os.PathLike[str]) -> str | None:
    """Why ``path`` is no regular file with content; None if it is one.

    Raises:
        OSError, ValueError: the system gives no answer, or no file can have such a name.
    """
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return "is a link to a file that is not there" if os.path.islink(path) else "no such file"
    if stat.S_ISDIR(status.st_mode):
        if is_zarr(path):
            return "is a folder of zarr, which only prediction by tiles reads: use --tile 1024"
        return "is a folder"
    if not stat.S_ISREG(status.st_mode):
        return "is no regular file"
    return None if status.st_size else "the file is empty (0 bytes)"


def unusable_files(files: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The files on this disk that cannot be read, each with the reason.

    Listing their folders finds missing files, folders and dangling links at once.  Empty files and
    missing permissions take a system call per file, which is slow on a network disk, so at most
    10 000 files, evenly spread, are checked for them.
    """
    step = -(-len(files) // _MAX_CHECKED)
    folders: dict[str, dict[str, bool]] = {}
    for number, file in enumerate(files):
        if is_elsewhere(file):
            continue
        folder, name = os.path.split(file)
        if folder not in folders:
            folders[folder] = _listing(folder)
        if number % step and folders[folder].get(name):
            continue
        reason = _reason(file)
        if reason is not None:
            yield file, reason


def _listing(folder: str) -> dict[str, bool]:
    """Names in a folder, and whether each is a file; empty if it cannot be listed."""
    try:
        with os.scandir(folder or ".") as entries:
            return {entry.name: _is_file(entry) for entry in entries}
    # The folder is missing, its name is impossible, or it may be used but not listed.
    except (OSError, ValueError):
        return {}


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link to itself
        return False


def _reason(file: str) -> str | None:
    try:
        reason = file_problem(file)
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:  # a name with a null character
        return str(error)
    if reason is None and not os.access(file, os.R_OK):
        return "may not be read, for its permissions"
    return reason
