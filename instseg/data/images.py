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
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import log_first_n
from PIL import EpsImagePlugin, ExifTags, Image, ImageOps, UnidentifiedImageError

from instseg.data.image_headers import (
    FILE_TYPES,
    MOST_COUNTED,
    check_depth,
    check_whole,
    count_images,
    depth_of,
    first_bytes,
    what_instead,
)
from instseg.data.intensity import AS_IS, Intensity
from instseg.data.presence import file_problem
from instseg.data.synthetic.files import is_elsewhere, served
from instseg.data.tiff import STARTS, TiffImages, upright
from instseg.errors import ConfigError, ImageError

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]

# Twice Pillow's MAX_IMAGE_PIXELS; Pillow refuses larger images as decompression bombs.  At this
# size the masks of 100 instances, one byte per pixel, already need 18 GB.
MAX_PIXELS = 178_956_970

CHANNELS = {"BGR": 3, "RGB": 3, "L": 1}
"""Values of ``INPUT.FORMAT`` and their number of channels: colour in either order, or grey."""
_ORIENTED = {
    "exif",
    "Raw profile type exif",
    "XML:com.adobe.xmp",
}  # fields of a PNG that can hold it
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
# Detectron2's own readers open everything that Pillow opens; this keeps Pillow from Ghostscript.
EpsImagePlugin.gs_binary = False
# Not animations, although they hold several images: after its photograph an MPO holds a depth map
# or preview, and after its image a TIFF holds smaller copies.
_STILL = ("MPO", "TIFF")
_LABEL_MODES = ("1", "L", "P", "I", "I;16", "I;16B")
_ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")


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
        format: a key of :data:`CHANNELS`.
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
        pixels, alpha = _read_tiff(path, page)
        return intensity.apply(pixels, source=_name(path, page), format=format, alpha=alpha)
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
        return _pillow_pixels(image, str(path))


def read_labels(path: str | os.PathLike[str]) -> npt.NDArray[np.int64]:
    """Read an image file whose pixels are numbers, such as classes, not colours.

    Args:
        path: as for :func:`read_image`; a grey image of up to 32 bits, or one with a palette, whose
            colours are ignored.
    Returns:
        (H, W), upright as the EXIF orientation says.
    Raises:
        ImageError: as :func:`read_image`, except for the bits; or the image is in colour.
    """
    with _opened(path) as image:
        check_size(image.width, image.height, str(path))
        check_whole(image, str(path))
        if image.mode not in _LABEL_MODES:
            raise ImageError(
                f"{path}: has pixels of mode {image.mode}; expected one number per pixel, as in "
                "a grey image or one with a palette"
            )
        image.load()
        return np.asarray(_upright(image, str(path))).astype(np.int64)


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
        pixels, alpha = _read_tiff(path, None)
    else:
        with _opened(path) as image:
            if depth_of(image) is None:
                channels = 1 if image.mode in ("1", "L") else 3
                return ImageFacts(*image_size(path), channels, "uint8", None)
            pixels, alpha = _pillow_pixels(image, str(path)), True
    height, width, channels = pixels.shape
    limits = None if pixels.dtype == np.uint8 else (float(pixels.min()), float(pixels.max()))
    kept = 3 if channels == 4 and alpha else channels
    return ImageFacts(width, height, kept, pixels.dtype.name, limits)


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
            height, width, _ = _pillow_pixels(image, str(path)).shape
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
    return find_spec("tifffile") is not None and not _is_plain(path)


def _starts_as_tiff(path: str | os.PathLike[str]) -> bool:
    try:
        return is_tiff(path)
    except OSError:  # _opened() says why it cannot be read
        return False


def _is_plain(path: str | os.PathLike[str]) -> bool:
    """Whether a TIFF is one image of 8 bits of a kind that Pillow knows, or a very long stack."""
    try:
        with Image.open(path, formats=["TIFF"]) as image:
            return depth_of(image) is None and not 1 < count_images(image) <= MOST_COUNTED
    except Exception:  # a damaged file can make Pillow's readers raise anything
        return False


def _read_tiff(path: str | os.PathLike[str], page: int | None) -> tuple[Array, bool]:
    """(H, W, C), and whether the last of four channels is transparency."""
    with TiffImages(path) as file:
        found = file.page(page)
        check_size(found.shape[1], found.shape[0], _name(path, page))
        return file.read(found), found.alpha


def _name(path: str | os.PathLike[str], page: int | None) -> str:
    return str(path) if page is None else f"{path} page {page}"


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
        raise _as_image_error(error, str(path)) from error


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


def convert_image(
    image: Image.Image,
    *,
    source: str = "image",
    format: str = "BGR",
    intensity: Intensity = AS_IS,
) -> Array:
    """Turn a Pillow image into an array, as :func:`read_image` does with a file.

    Args:
        image: of any mode; unchanged, except that Pillow loads its pixels.
        source: name of the image in error messages.
        format: a key of :data:`CHANNELS`.
        intensity: what is done to its channels.
    Returns:
        (H, W, C) uint8, contiguous.
    Raises:
        ImageError: as :func:`read_image`.
    """
    if format not in CHANNELS:
        raise ValueError(f"format must be one of {', '.join(CHANNELS)}, found {format!r}")
    if intensity.changes:
        return intensity.apply(_pillow_pixels(image, source), source=source, format=format)
    with _decoding(source):
        check_size(image.width, image.height, source)
        check_depth(image, source)
        _check_single(image, source)
        image.load()
        image = _upright(image, source)
        if _is_transparent(image):
            log_first_n(logging.WARNING, f"{source}: transparency is ignored (said once)")
            image = image.convert("RGBA")
        image = image.convert("RGB")
        pixels = np.asarray(image if format != "L" else image.convert("L"))
    if format == "L":
        pixels = pixels[:, :, None]
    return np.array(pixels[:, :, ::-1] if format == "BGR" else pixels, order="C")


def _pillow_pixels(image: Image.Image, source: str) -> Array:
    """(H, W, C) of a Pillow image as its numbers are; see :func:`read_pixels`."""
    with _decoding(source):
        check_size(image.width, image.height, source)
        _check_single(image, source)
        content = _deep_colours(image, source)
        image.load()
        if content is not None:
            pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
            colour = cv2.COLOR_BGRA2RGBA if pixels.shape[2] == 4 else cv2.COLOR_BGR2RGB
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            return np.ascontiguousarray(upright(cv2.cvtColor(pixels, colour), orientation))
        image = _upright(image, source)
        if image.mode[0] not in "IF":
            kind = "RGBA" if _is_transparent(image) else "L" if image.mode in "1L" else "RGB"
            image = image.convert(kind)
        pixels = np.asarray(image)
    native = pixels.astype(pixels.dtype.newbyteorder("="))
    return native if native.ndim == 3 else native[:, :, None]


def _deep_colours(image: Image.Image, source: str) -> bytes | None:
    """Content of a file of 16-bit colours, which Pillow cuts to 8 bits; None for others.

    Raises:
        ImageError: OpenCV does not read them either.
    """
    if image.mode[0] in "IF" or (depth := depth_of(image)) is None:
        return None
    if image.format not in ("PNG", "PPM"):
        raise ImageError(
            f"{source}: expected 8 bits per channel, found {depth}; files of {image.format} are "
            "not read at such depth, save it as TIFF or PNG"
        )
    file = image.fp  # type: ignore[attr-defined]
    position = file.tell()
    file.seek(0)
    content: bytes = file.read()
    file.seek(position)
    return content


def _check_single(image: Image.Image, source: str) -> None:
    check_whole(image, source)
    if getattr(image, "is_animated", False) and image.format not in _STILL:
        log_first_n(
            logging.WARNING,
            f"{source}: animated; only the first frame is used (said once)",
            key="message",
        )


def _is_transparent(image: Image.Image) -> bool:
    return image.mode in _ALPHA_MODES or "transparency" in image.info


@contextmanager
def _decoding(source: str) -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except Exception as error:  # a damaged file can make Pillow's decoders raise anything
        raise _as_image_error(error, source) from error


def check_size(width: int, height: int, source: str) -> None:
    """Refuse an image without pixels or with more than ``MAX_PIXELS``."""
    if not width or not height:
        raise ImageError(f"{source} is empty: {width}x{height} pixels")
    if width * height > MAX_PIXELS:
        raise _too_large(f"{source}: {width}x{height} pixels")


def _upright(image: Image.Image, source: str) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # cameras write EXIF blocks that make Pillow's parser raise anything
        logger.warning("%s: unreadable EXIF block, orientation ignored: %s", source, error)
        return image


def _as_image_error(error: Exception, source: str) -> ImageError:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return _too_large(f"{source}: {error}".rstrip("."))
    if isinstance(error, OSError) and error.strerror:
        return ImageError(f"{source}: cannot be read: {error.strerror}")
    reason = " ".join(str(error).split()) or type(error).__name__
    return ImageError(f"{source}: cannot be decoded: {reason}")


def _too_large(what: str) -> ImageError:
    return ImageError(
        f"{what}; at most {MAX_PIXELS} pixels are accepted, and the network sees no more than "
        "INPUT.MAX_SIZE_TEST pixels a side, so shrink the image first"
    )
