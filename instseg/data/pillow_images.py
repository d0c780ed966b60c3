"""Turn images that Pillow opened into arrays."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from detectron2.utils.logger import log_first_n
from PIL import ExifTags, Image, ImageOps

from instseg.data.image_headers import check_depth, check_size, check_whole, depth_of, too_large
from instseg.data.intensity import AS_IS, CHANNELS, Intensity
from instseg.data.tiff import upright
from instseg.errors import ImageError

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]

# Not animations, although they hold several images: after its photograph an MPO holds a depth map
# or preview, and after its image a TIFF holds smaller copies.
_STILL = ("MPO", "TIFF")
_ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")


def convert_image(
    image: Image.Image,
    *,
    source: str = "image",
    format: str = "BGR",
    intensity: Intensity = AS_IS,
) -> Array:
    """Turn a Pillow image into an array, as :func:`instseg.data.images.read_image` a file.

    Args:
        image: of any mode; unchanged, except that Pillow loads its pixels.
        source: name of the image in error messages.
        format: a key of :data:`instseg.data.intensity.CHANNELS`.
        intensity: what is done to its channels.
    Returns:
        (H, W, C) uint8, contiguous.
    Raises:
        ImageError: as :func:`instseg.data.images.read_image`.
    """
    if format not in CHANNELS:
        raise ValueError(f"format must be one of {', '.join(CHANNELS)}, found {format!r}")
    if intensity.changes:
        return intensity.apply(pillow_pixels(image, source), source=source, format=format)
    with _decoding(source):
        check_size(image.width, image.height, source)
        check_depth(image, source)
        _check_single(image, source)
        image.load()
        image = upright_image(image, source)
        if _is_transparent(image):
            log_first_n(logging.WARNING, f"{source}: transparency is ignored (said once)")
            image = image.convert("RGBA")
        image = image if image.mode == "RGB" else image.convert("RGB")
        pixels = np.asarray(image if format != "L" else image.convert("L"))
    if format == "L":
        pixels = pixels[:, :, None]
    if format == "BGR":
        return cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    return np.array(pixels, order="C")


def pillow_pixels(image: Image.Image, source: str) -> Array:
    """(H, W, C) of a Pillow image as its numbers are; see ``read_pixels()``."""
    with _decoding(source):
        check_size(image.width, image.height, source)
        _check_single(image, source)
        content = _deep_colours(image, source)
        image.load()
        if content is not None:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            return np.ascontiguousarray(upright(_decoded_by_opencv(content), orientation))
        image = upright_image(image, source)
        if image.mode[0] not in "IF":
            kind = "RGBA" if _is_transparent(image) else "L" if image.mode in "1L" else "RGB"
            image = image.convert(kind)
        pixels = np.asarray(image)
    native = pixels.astype(pixels.dtype.newbyteorder("="))
    return native if native.ndim == 3 else native[:, :, None]


def _decoded_by_opencv(content: bytes) -> Array:
    """(H, W, C) uint16 of a file of 16-bit colours."""
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.ndim != 3 or pixels.dtype != np.uint16:
        raise ValueError("OpenCV does not read its 16-bit colours")
    return cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGBA if pixels.shape[2] == 4 else cv2.COLOR_BGR2RGB)


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
        raise as_image_error(error, source) from error


def upright_image(image: Image.Image, source: str) -> Image.Image:
    """Turn an image as its EXIF orientation says."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # cameras write EXIF blocks that make Pillow's parser raise anything
        logger.warning("%s: unreadable EXIF block, orientation ignored: %s", source, error)
        return image


def as_image_error(error: Exception, source: str) -> ImageError:
    """What Pillow raised, as an error that names the image."""
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return too_large(f"{source}: {error}".rstrip("."))
    if isinstance(error, OSError) and error.strerror:
        return ImageError(f"{source}: cannot be read: {error.strerror}")
    reason = " ".join(str(error).split()) or type(error).__name__
    return ImageError(f"{source}: cannot be decoded: {reason}")
