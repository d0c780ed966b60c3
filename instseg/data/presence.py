"""Which files of a data set no image can be read from, told before the first iteration."""

import os
import stat
from collections.abc import Iterator, Sequence

from instseg.data.synthetic.files import is_elsewhere

_ASKED = 10_000


def file_problem(path: str | os.PathLike[str]) -> str | None:
    """Why ``path`` is no regular file with something in it, if so.

    Raises:
        OSError, ValueError: the system does not answer, or no file can have such a name.
    """
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return "is a link to a file that is not there" if os.path.islink(path) else "no such file"
    if stat.S_ISDIR(found.st_mode):
        return "is a folder"
    if not stat.S_ISREG(found.st_mode):
        return "is no regular file"
    return None if found.st_size else "the file is empty (0 bytes)"


def unusable_files(files: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Those that are on this disk and cannot be read, each with the reason.

    Folders are listed, which tells missing files, folders and dangling links at once.  Whether a
    file is empty or may not be read is asked of 10 000 files at most, evenly spread: that takes a
    question for each, and long on a network disk.
    """
    step = -(-len(files) // _ASKED)
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
    """Names in a folder, and whether each is a file; none where it cannot be listed."""
    try:
        with os.scandir(folder or ".") as entries:
            return {entry.name: _is_file(entry) for entry in entries}
    # Not there, no name of a folder, or one that may be used but not listed.
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
