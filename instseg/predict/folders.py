"""The images and videos in folders."""

import logging
import os
from pathlib import Path

from instseg.data.suffixes import MEDIA_SUFFIXES
from instseg.errors import ConfigError

logger = logging.getLogger(__name__)


def media_in(
    folder: Path, *, recursive: bool, output: Path | None = None
) -> list[tuple[Path, list[Path]]]:
    """The images and videos in a folder, and in those inside it, by folder.

    Logs what it passes over: other files, folders inside it, and links to folders, which could lead
    in circles.  Names that begin with a dot are hidden, and not logged.

    Args:
        recursive: search the folders inside it as well.
        output: a folder that is not searched and does not count.
    Returns:
        folders in the order of their names, each before those inside it, and their files in order.
    Raises:
        ConfigError: the folder cannot be read, or has no images or videos.
    """
    media: list[tuple[Path, list[Path]]] = []
    others = folders = links = 0
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        try:
            files, inner = _entries(current, output)
        except OSError as error:
            if current == folder:
                raise ConfigError(f"--input {folder} cannot be read: {error.strerror}") from None
            logger.warning("%s cannot be read: %s; passed over", current, error.strerror)
            continue
        media_files = [file for file in files if file.suffix.lower() in MEDIA_SUFFIXES]
        others += len(files) - len(media_files)
        if media_files:
            media.append((current, media_files))
        if recursive:
            real_folders = [path for path in inner if not path.is_symlink()]
            links += len(inner) - len(real_folders)
            waiting.extend(reversed(real_folders))
        else:
            folders = len(inner)
    hint = f"; it holds {folders} folders, which --recursive searches" if folders else ""
    if not media:
        raise ConfigError(
            f"--input {folder}: none of the {others} files in it has the extension of an image or "
            f"video{hint}"
        )
    if others:
        logger.info("%s: %d other files passed over", folder, others)
    if folders:
        logger.info("%s: %d folders in it passed over; --recursive searches them", folder, folders)
    if links:
        logger.info("%s: %d links to folders in it passed over", folder, links)
    return media


def _entries(folder: Path, output: Path | None) -> tuple[list[Path], list[Path]]:
    """Files and folders that are not hidden, each in order."""
    files: list[Path] = []
    folders: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.name[0] == ".":
            continue
        if not os.path.isdir(path):  # unlike Path.is_dir() without errors
            files.append(path)
        elif output is None or os.path.realpath(path) != os.path.realpath(output):
            folders.append(path)
    return files, folders
