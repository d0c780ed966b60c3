"""Packages that read TIFF and zarr: whether they are there, and what they raise and log."""

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from instseg.errors import ImageError

INSTALL = "pip install tifffile imagecodecs zarr (the extra 'microscopy')"


def import_package(name: str, source: str) -> Any:
    """An optional package that reads images.

    Args:
        source: name of the image in the message.
    Raises:
        ImageError: the package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImageError(
            f"{source}: reading it needs the package {name}, which is not installed; type: "
            f"{INSTALL}"
        ) from error


@contextmanager
def reporting(source: str) -> Iterator[None]:
    """Turn what tifffile and zarr raise into an ImageError that names the image."""
    try:
        yield
    except (ImageError, KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:  # a damaged file makes them raise anything
        raise _as_image_error(error, source) from error


class TiffLog(logging.Handler):
    """Collects what tifffile logs, which goes nowhere else meanwhile: errors here are one line."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def has(self, text: str) -> bool:
        """Whether a line holds ``text``."""
        return any(text in line for line in self.lines)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Collect what is logged inside."""
        logger = logging.getLogger("tifffile")
        before = logger.propagate
        logger.propagate = False
        logger.addHandler(self)
        try:
            yield
        finally:
            logger.removeHandler(self)
            logger.propagate = before


def _as_image_error(error: Exception, source: str) -> ImageError:
    text = " ".join(str(error).split()) or type(error).__name__
    if "requires the 'imagecodecs' package" in text or isinstance(error, ImportError):
        return ImageError(
            f"{source}: its compression needs the package imagecodecs ({text}); type: {INSTALL}"
        )
    if isinstance(error, OSError) and error.strerror:
        return ImageError(f"{source}: cannot be read: {error.strerror}")
    return ImageError(f"{source}: cannot be decoded: {text}")
