"""Find the local file for a path or a URL."""

import difflib
import os
from pathlib import Path

from detectron2.utils.file_io import PathManager

from instseg.errors import CheckpointError, reason_of


def local_path(path: str) -> str:
    """The local file for ``path``; a URL is downloaded (once).

    Raises:
        CheckpointError: no such file, or the download failed.
    """
    local = path
    if "://" in path:
        try:
            local = PathManager.get_local_path(path)
        except Exception as error:  # every URL handler raises its own exceptions
            raise CheckpointError(
                f"weights {path} cannot be downloaded ({reason_of(error)}); "
                f'give a local path instead, or MODEL.WEIGHTS "" to train from scratch'
            ) from error
    if os.path.isfile(local):
        return local
    if os.path.isdir(local):
        raise CheckpointError(f"checkpoint {path} is a folder; name a weight file in it")
    if os.path.lexists(local):
        raise CheckpointError(f"checkpoint {path} is a device, a pipe, or a link to no file")
    raise CheckpointError(f"checkpoint {path} does not exist" + _nearest(Path(local)))


def _nearest(file: Path) -> str:
    """The end of an error about a missing file, with the most similar name in its folder."""
    if not file.parent.is_dir():
        return f": there is no folder {file.parent}"
    similar = difflib.get_close_matches(file.name, os.listdir(file.parent), n=1)
    return f"; did you mean {file.parent / similar[0]}?" if similar else f" in {file.parent}"
