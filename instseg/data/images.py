"""Turn images from files and arrays into arrays that a model takes, or refuse them with a reason.

OpenCV and Detectron2 accept much that no model can use (16-bit, floats in 0..1, channels first) and
then return nonsense or fail deep inside a layer.  Here an image has 8 bits per channel or raises an
error that names it, in training, evaluation and prediction alike.
"""

import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import log_first_n
from PIL import EpsImagePlugin, ExifTags, Image, ImageOps, UnidentifiedImageError

from instseg.data.image_headers import (
    FILE_TYPES,
    check_depth,
    check_whole,
    first_bytes,
    what_instead,
)
from instseg.data.label_images import as_labels, colour_error, pillow_labels, tiff_labels
from instseg.data.presence import file_problem
from instseg.data.synthetic.files import is_elsewhere, served
from instseg.errors import ConfigError, ImageError

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]

# Twice Pillow's MAX_IMAGE_PIXELS; Pillow refuses larger images as decompression bombs.  At this
# size the masks of 100 instances, one byte per pixel, already need 18 GB.
MAX_PIXELS = 178_956_970

CHANNELS = {"BGR": 3, "RGB": 3, "L": 1}
"""Values of ``INPUT.FORMAT`` and their number of channels: colour in either order, or grey."""
_LAYOUT = "expected a NumPy array of shape (H, W, 3) with 8-bit values (uint8) in BGR order"
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
_LABEL_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "F")
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


def read_image(path: str | os.PathLike[str], *, format: str = "BGR") -> Array:
    """Read an image file, upright as its EXIF orientation says, with 8 bits per channel.

    Converts grey, 1-bit, palette and CMYK images, drops transparency, and takes the first frame of
    an animation.  The size is checked before the pixels are decoded.

    Args:
        path: an image file of a format that Pillow decodes itself, or a name that Detectron2's
            ``PathManager`` opens, such as the synthetic ``shapes://shapes_val/128/0``.
        format: a key of :data:`CHANNELS`.
    Returns:
        (H, W, C) uint8, contiguous.
    Raises:
        ImageError: the file is missing, no image, damaged, larger than ``MAX_PIXELS``, of more
            than 8 bits per channel or a TIFF of several images; the message names the file.
    """
    with _opened(path) as image:
        return convert_image(image, source=str(path), format=format)


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
    name = os.fspath(path)
    content = _content(name)
    pixels = tiff_labels(name if content is None else content, name, MAX_PIXELS)
    if pixels is None:
        with _opened(path) as image:
            _check_size(image.width, image.height, name)
            check_whole(image, name)
            if image.mode not in _LABEL_MODES:
                raise colour_error(name, f"pixels of mode {image.mode}")
            image.load()
            pixels = pillow_labels(image, np.asarray(_upright(image, name)))
    return as_labels(pixels, name)


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Width and height of an image file from its header, upright as its EXIF orientation says.

    Decodes the pixels only if the file is no JPEG or PNG, or lacks the end of one and may be cut
    off.

    Raises:
        ImageError: as :func:`read_image`.
    """
    with _opened(path) as image:
        _check_size(image.width, image.height, str(path))
        check_depth(image, str(path))
        if not check_whole(image, str(path)):
            height, width, _ = convert_image(image, source=str(path)).shape
            return width, height
        # To look for an orientation outside a PNG's header, Pillow would decode the PNG.
        if image.format == "JPEG" or _ORIENTED & image.info.keys():
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in _TURNED
            return image.size[::-1] if turned else image.size
        return image.size


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


def convert_image(image: Image.Image, *, source: str = "image", format: str = "BGR") -> Array:
    """Turn a Pillow image into an array, as :func:`read_image` does with a file.

    Args:
        image: of any mode; unchanged, except that Pillow loads its pixels.
        source: name of the image in error messages.
        format: a key of :data:`CHANNELS`.
    Returns:
        (H, W, C) uint8, contiguous.
    Raises:
        ImageError: as :func:`read_image`.
    """
    if format not in CHANNELS:
        raise ValueError(f"format must be one of {', '.join(CHANNELS)}, found {format!r}")
    try:
        _check_size(image.width, image.height, source)
        check_depth(image, source)
        check_whole(image, source)
        if getattr(image, "is_animated", False) and image.format not in _STILL:
            log_first_n(
                logging.WARNING,
                f"{source}: animated; only the first frame is used (said once)",
                key="message",
            )
        image.load()
        image = _upright(image, source)
        if image.mode in _ALPHA_MODES or "transparency" in image.info:
            log_first_n(logging.WARNING, f"{source}: transparency is ignored (said once)")
            image = image.convert("RGBA")
        image = image.convert("RGB")
        pixels = np.asarray(image if format != "L" else image.convert("L"))
    except ImageError:
        raise
    except Exception as error:  # a damaged file can make Pillow's decoders raise anything
        raise _as_image_error(error, source) from error
    if format == "L":
        pixels = pixels[:, :, None]
    return np.array(pixels[:, :, ::-1] if format == "BGR" else pixels, order="C")


def check_image(image: Any, *, source: str = "image", format: str = "BGR") -> Array:
    """Check an array and convert it to the channels that a model takes.

    Args:
        image: (H, W, 3) uint8 in BGR order.  (H, W) and (H, W, 1) mean grey, (H, W, 4) loses its
            alpha channel, and floats in 0 to 255 stay as they are.
        source: name of the image in error messages.
        format: a key of :data:`CHANNELS`.
    Returns:
        (H, W, C) uint8 or float; the array itself if nothing had to be changed.
    Raises:
        ImageError: it is None, empty or too large, has more than 8 bits, floats in 0 to 1, or
            values that are not finite.
        TypeError: it is no NumPy array, or not height by width by channels.
    """
    if image is None:
        raise ImageError(f"{source} is None — file missing or unreadable?")
    if isinstance(image, torch.Tensor):
        raise TypeError(
            f"{source} is a torch.Tensor of shape {tuple(image.shape)}; {_LAYOUT}: "
            "for one in (3, H, W) pass image.permute(1, 2, 0).byte().cpu().numpy()"
        )
    if not isinstance(image, np.ndarray):
        raise TypeError(f"{source} is a {type(image).__name__}; {_LAYOUT}")
    image = np.asarray(image)  # a masked array becomes its data, which is what the network sees
    _check_layout(image.shape, source)
    _check_size(image.shape[1], image.shape[0], source)
    _check_values(image, source)
    if image.ndim == 2:
        image = image[:, :, None]
    if image.shape[2] == 1:
        if format == "L":
            return image
        log_first_n(logging.WARNING, f"{source}: grey, replicated to three channels (said once)")
        return np.repeat(image, 3, axis=2)
    if image.shape[2] == 4:
        log_first_n(logging.WARNING, f"{source}: the fourth channel (alpha) is dropped (said once)")
        image = image[:, :, :3]
    if format == "L":
        return _grey(image)
    return image[:, :, ::-1] if format == "RGB" else image


def _grey(image: Array) -> Array:
    """(H, W, 3) in BGR order → (H, W, 1), with Pillow's weights of the channels."""
    if image.dtype == np.uint8:
        pillow_image = Image.fromarray(np.ascontiguousarray(image[:, :, ::-1]))
        return np.array(pillow_image.convert("L"))[:, :, None]
    weights = np.array([0.114, 0.587, 0.299], dtype=image.dtype)
    grey: Array = (image * weights).sum(axis=2, keepdims=True)
    return grey


def _check_layout(shape: tuple[int, ...], source: str) -> None:
    if len(shape) not in (2, 3):
        hint = "; several images are passed as a list" if len(shape) == 4 else ""
        raise TypeError(f"{source} has shape {shape}; {_LAYOUT}{hint}")
    if len(shape) == 2 or shape[2] in (1, 3, 4):
        return
    if shape[0] in (1, 3, 4):
        raise TypeError(
            f"{source} has shape {shape}, channels first; {_LAYOUT}: pass image.transpose(1, 2, 0)"
        )
    raise ImageError(f"{source} has {shape[2]} channels (shape {shape}); {_LAYOUT}")


def _check_size(width: int, height: int, source: str) -> None:
    if not width or not height:
        raise ImageError(f"{source} is empty: {width}x{height} pixels")
    if width * height > MAX_PIXELS:
        raise _too_large(f"{source}: {width}x{height} pixels")


def _check_values(image: Array, source: str) -> None:
    """Refuse types and ranges other than those of 8-bit pixels."""
    if image.dtype == np.uint8:
        return
    if image.dtype.kind in "iu":
        raise ImageError(
            f"{source}: expected uint8 in 0 to 255, found {image.dtype} with min={image.min()}, "
            f"max={image.max()}; scale it to 0 to 255 and convert it with .astype('uint8')"
        )
    if image.dtype not in (np.float16, np.float32, np.float64):
        raise ImageError(f"{source}: expected uint8 in 0 to 255, found {image.dtype}")
    low, high = float(image.min()), float(image.max())
    if not np.isfinite(low) or not np.isfinite(high):
        raise ImageError(f"{source} contains non-finite values (NaN or infinity)")
    # All zeros are black in 0 to 1 and in 0 to 255.
    if 0 < high <= 1 and low >= 0:
        raise ImageError(
            f"{source}: {image.dtype} values in 0 to 1 (max={high:g}), expected 0 to 255; multiply "
            "by 255"
        )
    if low < 0 or high > 255:
        raise ImageError(
            f"{source}: expected values in 0 to 255, found {image.dtype} with min={low:g}, "
            f"max={high:g}; undo any normalisation, the model does its own"
        )


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
