"""Serve the synthetic images and videos as files that exist only in memory."""

import io
import re
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler

from instseg.errors import DatasetError


def encode_ppm(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 RGB → a PPM file, which takes no time to decompress."""
    return b"P6\n%d %d\n255\n" % (pixels.shape[1], pixels.shape[0]) + pixels.tobytes()


SIZES = range(16, 4097)
"""Sides of the images: smaller ones have no room for instances, larger ones take gigabytes."""


def check_size(size: int) -> None:
    """Raise a DatasetError if there are no images of that size."""
    if size not in SIZES:
        raise DatasetError(
            f"no synthetic image is {size} pixels wide; expected {SIZES[0]} to {SIZES[-1]}"
        )


def check_member(kind: str, split: str, index: int, sizes: Mapping[str, int]) -> None:
    """Raise a DatasetError if a split is unknown or has no image or clip with that number.

    Args:
        kind: what a split holds, for the message.
        sizes: names of the splits and how many each holds.
    """
    if split not in sizes or not 0 <= index < sizes[split]:
        raise DatasetError(
            f"no {kind} {index} in {split!r}; the built-in splits are "
            + ", ".join(f"{name} (0..{count - 1})" for name, count in sizes.items())
        )


IMAGES = "shapes://"
VIDEOS = "shapes-video://"
_MAKERS = {
    IMAGES: "instseg.data.synthetic.shapes",
    VIDEOS: "instseg.data.synthetic.shapes_video",
}
"""Prefix → module whose ``content_of`` makes the file; a process that opens one imports it."""


def served(path: str) -> bytes | None:
    """Content of a file that exists only in memory; None for any other path."""
    for prefix, module in _MAKERS.items():
        if path.startswith(prefix):
            content: bytes = import_module(module).content_of(path.removeprefix(prefix))
            return content
    return None


def is_elsewhere(path: str) -> bool:
    """Whether ``path`` begins like a URL, so that Detectron2 does not look for it on this disk."""
    return re.match(r"[A-Za-z][\w+.-]*://", path) is not None


class _Handler(PathHandler):
    def _get_supported_prefixes(self) -> list[str]:
        return list(_MAKERS)

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return True

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return True

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> io.BytesIO:
        if mode != "rb":
            raise DatasetError(f"{path} can only be read, in mode 'rb', not {mode!r}")
        return io.BytesIO(served(path) or b"")


# Here, since every reader of images imports this module: a data loader's process that was not
# forked has imported nothing else.
PathManager.register_handler(_Handler(), allow_override=True)
