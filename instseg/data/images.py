"""Turn images from files into arrays that a model takes, or refuse them with a reason.

OpenCV and Detectron2 accept much that no model can use (16-bit, floats in 0..1, channels first) and
then return nonsense or fail deep inside a layer.  Here an image has 8 bits per channel, is scaled
to 8 bits as ``INPUT.NORMALIZE`` says (:mod:`instseg.data.intensity`), or raises an error that names
it, in training, evaluation and prediction alike.

Pillow reads every format, except for TIFFs that it cannot read or reads wrongly: those of more than
8 bits, of several images or of other channels than colours.  They need the package tifffile
(:mod:`instseg.data.tiff`), and so do the pages of a stack.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from PIL import EpsImagePlugin, ExifTags, Image, UnidentifiedImageError

from instseg.data.image_headers import (
    FILE_TYPES,
    MOST_COUNTED,
    check_bytes,
    check_size,
    check_whole,
    count_images,
    depth_of,
    first_bytes,
    hides_images,
    what_instead,
)
from instseg.data.intensity import AS_IS, CHANNELS, Intensity
from instseg.data.label_images import as_labels, colour_error, signed_pixels
from instseg.data.pillow_images import as_image_error, convert_image, pillow_pixels, upright_image
from instseg.data.presence import file_problem
from instseg.data.synthetic.files import is_elsewhere, served
from instseg.data.tiff import STARTS, Page, TiffImages
from instseg.errors import ConfigError, ImageError

Array = npt.NDArray[Any]

_ORIENTED = {
    "exif",
    "Raw profile type exif",
    "XML:com.adobe.xmp",
}  # fields of a PNG that can hold it
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
# Detectron2's own readers open everything that Pillow opens; this keeps Pillow from Ghostscript.
EpsImagePlugin.gs_binary = False
_SAMPLES = 277  # tag of a TIFF: samples per pixel
_PILLOW_COLOURS = ("CMYK", "LA", "PA", "RGBX")
_LABEL_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "F")


def check_colour(cfg: CfgNode, what: str) -> None:
    """Refuse a grey ``INPUT.FORMAT`` for a part that needs three channels.

    Args:
        what: that part, the subject of the message.
    Raises:
        ConfigError: ``INPUT.FORMAT`` is not a colour format.
    """
    if CHANNELS.get(cfg.INPUT.FORMAT) != 3:
        colour = " or ".join(name for name, channels in CHANNELS.items() if channels == 3)
        raise ConfigError(f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}; {what} needs {colour}")


def read_image(
    path: str | os.PathLike[str],
    *,
    format: str = "BGR",
    intensity: Intensity = AS_IS,
    page: int | None = None,
) -> Array:
    """Read an image file, upright as its EXIF orientation says, with 8 bits per channel.

    Converts grey, 1-bit, palette and CMYK images, drops transparency, and takes the first frame of
    an animation.  The size is checked before the pixels are decoded.

    Args:
        path: an image file of a format that Pillow decodes itself, a TIFF, or a name that
            Detectron2's ``PathManager`` opens, such as the synthetic ``shapes://shapes_val/128/0``.
        format: a key of :data:`instseg.data.intensity.CHANNELS`.
        intensity: what is done to its channels.
        page: of a TIFF with several images, counted from 0.
    Returns:
        (H, W, C) uint8, contiguous.
    Raises:
        ImageError: the file is missing, no image, damaged, larger than ``MAX_PIXELS``, of more
            than 8 bits per channel or other channels than ``intensity`` allows, or a TIFF of
            several images; the message names the file.
    """
    if _needs_tifffile(path, page):
        pixels, tiff_page = _read_tiff(path, page)
        return intensity.apply(
            pixels, source=tiff_page.source, format=format, alpha=tiff_page.alpha
        )
    with _opened(path) as image:
        return convert_image(image, source=str(path), format=format, intensity=intensity)


def read_pixels(path: str | os.PathLike[str], *, page: int | None = None) -> Array:
    """Read an image file of any depth and number of channels, upright, as its numbers are.

    Args:
        path, page: as for :func:`read_image`.
    Returns:
        (H, W, C), contiguous: grey, or red, green, blue and perhaps transparency, or the channels
        of a TIFF in their order.  Palettes are looked up.
    Raises:
        ImageError: as :func:`read_image`, except for depth and channels.
    """
    if _needs_tifffile(path, page):
        return _read_tiff(path, page)[0]
    with _opened(path) as image:
        return pillow_pixels(image, str(path))


def read_labels(path: str | os.PathLike[str]) -> npt.NDArray[np.int64]:
    """Read an image file whose pixels are numbers, such as classes, not colours.

    Args:
        path: as for :func:`read_image`; a grey image of up to 32 bits, or one with a palette, whose
            colours are ignored.  Where tifffile is installed, a TIFF of any depth.
    Returns:
        (H, W), from 0 on, upright as the EXIF orientation says.
    Raises:
        ImageError: as :func:`read_image`, except for the bits; or the image is in colour, or has
            negative numbers or fractions.
    """
    name = str(path)
    if _needs_tifffile(path, None):
        pixels, page = _read_tiff(path, None)
        if pixels.shape[2] > 1:
            raise colour_error(name, f"{pixels.shape[2]} values per pixel")
        return as_labels(np.invert(pixels[:, :, 0]) if page.inverted else pixels[:, :, 0], name)
    with _opened(path) as image:
        check_size(image.width, image.height, name)
        check_whole(image, name)
        if image.mode not in _LABEL_MODES:
            raise colour_error(name, f"pixels of mode {image.mode}")
        image.load()
        return as_labels(signed_pixels(image, upright_image(image, name)), name)


@dataclass(frozen=True)
class ImageFacts:
    """What :func:`describe_image` tells about an image file.

    Attributes:
        width, height: in pixels, upright.
        channels: in each pixel, without transparency.
        depth: name of the type of its numbers.
        limits: least and greatest of them; None for 8 bits.
    """

    width: int
    height: int
    channels: int
    depth: str
    limits: tuple[float, float] | None


def describe_image(path: str | os.PathLike[str]) -> ImageFacts:
    """Size, depth and channels of an image file; decodes it where it has more than 8 bits.

    Raises:
        ImageError: as :func:`read_pixels`.
    """
    if _needs_tifffile(path, None):
        pixels, tiff_page = _read_tiff(path, None)
        alpha = tiff_page.alpha
    else:
        with _opened(path) as image:
            if depth_of(image) is None:
                channels = 1 if image.mode in ("1", "L") else 3
                return ImageFacts(*image_size(path), channels, "uint8", None)
            pixels, alpha = pillow_pixels(image, str(path)), True
    height, width, channels = pixels.shape
    limits = None if pixels.dtype == np.uint8 else (float(pixels.min()), float(pixels.max()))
    num_channels = 3 if channels == 4 and alpha else channels
    return ImageFacts(width, height, num_channels, pixels.dtype.name, limits)


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Width and height of an image file from its header, upright as its EXIF orientation says.

    Decodes the pixels only if the file is no JPEG or PNG, or lacks the end of one and may be cut
    off.

    Raises:
        ImageError: as :func:`read_pixels`.
    """
    if _needs_tifffile(path, None):
        height, width, _ = _read_tiff(path, None)[0].shape
        return width, height
    with _opened(path) as image:
        check_size(image.width, image.height, str(path))
        if not check_whole(image, str(path)):
            height, width, _ = pillow_pixels(image, str(path)).shape
            return width, height
        # To look for an orientation outside a PNG's header, Pillow would decode the PNG.
        if image.format == "JPEG" or _ORIENTED & image.info.keys():
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in _TURNED
            return image.size[::-1] if turned else image.size
        return image.size


def is_tiff(path: str | os.PathLike[str]) -> bool:
    """Whether a file on this disk begins as a TIFF does."""
    return os.path.isfile(path) and first_bytes(Path(path))[:4] in STARTS


def _needs_tifffile(path: str | os.PathLike[str], page: int | None) -> bool:
    """Whether Pillow does not read the image, or not all of it.

    Raises:
        ImageError: a page is asked for of a file that has no pages.
    """
    if is_elsewhere(os.fspath(path)) or not _starts_as_tiff(path):
        if page:
            raise ImageError(f"{path}: there is no page {page}; only TIFFs have several")
        return False
    if page is not None:
        return True
    try:
        with Image.open(path, formats=["TIFF"]) as image:
            if _is_garbled(image):
                return True
            is_plain = _is_plain(image)
    except Exception:  # a damaged file can make Pillow's readers raise anything
        is_plain = False
    return not is_plain and find_spec("tifffile") is not None


def has_pillow_colours(path: str | os.PathLike[str], page: int | None) -> bool:
    """Whether Pillow reads a TIFF of colours that tifffile leaves as they are."""
    if _needs_tifffile(path, page):
        return False
    try:
        with Image.open(path, formats=["TIFF"]) as image:
            unspecified = image.mode == "RGB" and image.tag_v2.get(_SAMPLES, 3) > 3  # type: ignore[attr-defined]
            return bool(unspecified) or image.mode in _PILLOW_COLOURS
    except Exception:  # a damaged file can make Pillow's readers raise anything
        return False


def _starts_as_tiff(path: str | os.PathLike[str]) -> bool:
    try:
        return is_tiff(path)
    except OSError:  # _opened() says why it cannot be read
        return False


def _is_garbled(image: Any) -> bool:
    """Whether Pillow mixes up the pixels of a TIFF, whose uncompressed rows it turns wrongly."""
    turned = image.tag_v2.get(ExifTags.Base.Orientation) in _TURNED
    return turned and any(tile[0] != "libtiff" for tile in image.tile)


def _is_plain(image: Any) -> bool:
    """Whether a TIFF is one image of 8 bits of a kind that Pillow knows, or a very long stack."""
    if depth_of(image) is not None or hides_images(image):
        return False
    return not 1 < count_images(image) <= MOST_COUNTED


def _read_tiff(path: str | os.PathLike[str], page: int | None) -> tuple[Array, Page]:
    """(H, W, C), and what is known about the image."""
    with TiffImages(path) as file:
        return _read_page(file, page)


def _read_page(file: TiffImages, number: int | None) -> tuple[Array, Page]:
    page = file.page(number)
    check_size(page.shape[1], page.shape[0], page.source)
    check_bytes(page.shape, page.dtype, page.source)
    return file.read(page), page


class PageReader:
    """Reads images one after the other, and keeps a stack open as long as its pages are read.

    Opening a stack takes as long as it has pages.
    """

    def __init__(self, intensity: Intensity = AS_IS) -> None:
        """
        Args:
            intensity: what is done to the channels of images.
        """
        self._intensity = intensity
        self._path = ""
        self._file: TiffImages | None = None

    def read(self, path: str, page: int | None) -> Array:
        """(H, W, 3) in BGR order, as :func:`read_image` gives it; it raises the same."""
        if page is None or not _needs_tifffile(path, page):
            return read_image(path, intensity=self._intensity, page=page)
        if self._file is None or self._path != path:
            self.close()
            self._file, self._path = TiffImages(path), path
        pixels, tiff_page = _read_page(self._file, page)
        return self._intensity.apply(
            pixels, source=tiff_page.source, format="BGR", alpha=tiff_page.alpha
        )

    def close(self) -> None:
        """Close the stack."""
        if self._file is not None:
            self._file.close()
            self._file = None


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Open a file with Pillow; any error becomes an ImageError that names the file."""
    name = os.fspath(path)
    try:
        content = _content(name)
        if content is None and (problem := file_problem(path)) is not None:
            raise ImageError(f"{path}: {problem}")
        Image.init()
        types = [name for name in FILE_TYPES if name in Image.OPEN]
        with Image.open(path if content is None else io.BytesIO(content), formats=types) as image:
            yield image
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        start = first_bytes(Path(path)) if content is None else content[:64]
        raise ImageError(f"{path}: {what_instead(start)}") from error
    except Exception as error:  # a damaged file can make Pillow's readers raise anything
        raise as_image_error(error, str(path)) from error


def _content(path: str) -> bytes | None:
    """Bytes that Detectron2 finds under a name that is no path on this disk; None for a path."""
    if not is_elsewhere(path):
        return None
    try:
        if (content := served(path)) is not None:
            return content
    except ValueError as error:
        raise ImageError(f"{path}: there is no such synthetic image: {error}") from None
    try:
        with PathManager.open(path, "rb") as file:
            read: bytes = file.read()
    except Exception as error:  # a store may raise anything
        raise ImageError(f"{path}: cannot be read: {error}") from error
    return read
