"""Pictures from files and arrays, turned into what a model takes or refused with a reason.

OpenCV and Detectron2 accept much that no model can use (16-bit, floats in 0..1, channels first) and
then return nonsense or fail deep inside a layer.  Here a picture is either 8-bit colour or an error
that names it.
"""

import io
import logging
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from detectron2.utils.logger import log_first_n
from PIL import EpsImagePlugin, ExifTags, Image, ImageOps, UnidentifiedImageError

from instseg.data.synthetic import served
from instseg.errors import ImageError

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]

# Pillow refuses twice its MAX_IMAGE_PIXELS, which is this number, as a decompression bomb.  Beyond
# it the masks, which have the size of the picture and one byte per pixel, also need 18 GB for 100
# objects.
MAX_PIXELS = 178_956_970

# Named one by one because Pillow would also run Ghostscript on an EPS file, that is, execute it.
_FORMATS = tuple("AVIF BMP DIB GIF ICO JPEG JPEG2000 PNG PPM QOI TGA TIFF WEBP".split())
_LAYOUT = "expected a NumPy array of shape (H, W, 3) with 8-bit values (uint8) in BGR order"
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_TAIL_BYTES = 64  # some programs pad files
_ORIENTED = {"exif", "Raw profile type exif", "XML:com.adobe.xmp"}  # what can tell it in a PNG
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
# Detectron2's own readers open whatever Pillow does; for them it is told to have no Ghostscript.
EpsImagePlugin.gs_binary = False
_ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")


def read_image(path: str | os.PathLike[str], *, format: str = "BGR") -> Array:
    """Read a picture file, upright as its EXIF orientation says, as 8-bit colour.

    Grey, 1-bit, palette and CMYK pictures are converted, transparency is dropped, of an animation
    the first frame is taken.  The size is checked before the pixels are decoded.

    Args:
        path: a picture file of a format that Pillow decodes itself, or one of the synthetic
            pictures, such as ``shapes://shapes_val/128/0``.
        format: order of the channels, ``"BGR"`` or ``"RGB"``.
    Returns:
        (H, W, 3) uint8, contiguous.
    Raises:
        ImageError: the file is missing, no picture, truncated, larger than ``MAX_PIXELS`` or has
            more than 8 bits per channel; the message names the file.
    """
    try:
        content = served(os.fspath(path))
    except ValueError as error:
        raise ImageError(f"{path}: there is no such synthetic picture: {error}") from None
    if content is not None:
        with Image.open(io.BytesIO(content)) as picture:
            return convert_picture(picture, source=str(path), format=format)
    with _opened(Path(path)) as picture:
        return convert_picture(picture, source=str(path), format=format)


def picture_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Width and height of a picture file, upright as its EXIF orientation says, from its header.

    The pixels are decoded only if the file is no JPEG or PNG, or does not end as one: it may be
    cut off.

    Raises:
        ImageError: as :func:`read_image`.
    """
    path = Path(path)
    with _opened(path) as picture:
        _check_size(picture.width, picture.height, str(path))
        _check_depth(picture, str(path))
        if picture.format not in _ENDS or _ENDS[picture.format] not in _tail(path):
            height, width, _ = convert_picture(picture, source=str(path)).shape
            return width, height
        # Pillow decodes a PNG to look for an orientation that is not in its header.
        if picture.format == "JPEG" or _ORIENTED & picture.info.keys():
            turned = picture.getexif().get(ExifTags.Base.Orientation, 1) in _TURNED
            return picture.size[::-1] if turned else picture.size
        return picture.size


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The file opened by Pillow; whatever goes wrong with it is an ImageError that names it."""
    try:
        if not path.exists():
            raise ImageError(f"{path}: no such file")
        if not path.is_file():
            raise ImageError(f"{path}: is {'a folder' if path.is_dir() else 'no regular file'}")
        if path.stat().st_size == 0:
            raise ImageError(f"{path}: the file is empty (0 bytes)")
        Image.init()
        with Image.open(path, formats=[name for name in _FORMATS if name in Image.OPEN]) as picture:
            yield picture
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{path}: {_what_instead(path)}") from error
    except Exception as error:  # a damaged file can make Pillow's readers raise anything
        raise _as_image_error(error, str(path)) from error


def _tail(path: Path) -> bytes:
    with open(path, "rb") as file:
        file.seek(-min(_TAIL_BYTES, path.stat().st_size), os.SEEK_END)
        return file.read()


def convert_picture(picture: Image.Image, *, source: str = "image", format: str = "BGR") -> Array:
    """Turn a Pillow picture into an array, as :func:`read_image` does with a file.

    Args:
        picture: of any mode; it is not modified, except that Pillow loads its pixels.
        source: what error messages call it.
        format: order of the channels, ``"BGR"`` or ``"RGB"``.
    Returns:
        (H, W, 3) uint8, contiguous.
    Raises:
        ImageError: as :func:`read_image`.
    """
    if format not in ("BGR", "RGB"):
        raise ValueError(f'format must be "BGR" or "RGB", found {format!r}')
    try:
        _check_size(picture.width, picture.height, source)
        _check_depth(picture, source)
        # An MPO is a JPEG photograph with a depth map or a preview behind it, no animation.
        if getattr(picture, "is_animated", False) and picture.format != "MPO":
            logger.warning("%s: animated; only the first frame is used", source)
        picture.load()
        picture = _upright(picture, source)
        if picture.mode in _ALPHA_MODES or "transparency" in picture.info:
            log_first_n(logging.WARNING, f"{source}: transparency is ignored (said once)")
            picture = picture.convert("RGBA")
        pixels = np.asarray(picture.convert("RGB"))
    except ImageError:
        raise
    except Exception as error:  # a damaged file can make Pillow's decoders raise anything
        raise _as_image_error(error, source) from error
    return np.array(pixels[:, :, ::-1] if format == "BGR" else pixels, order="C")


def check_image(image: Any, *, source: str = "image") -> Array:
    """Check an array and bring it to three channels.

    Args:
        image: (H, W, 3) uint8 in BGR order.  (H, W) and (H, W, 1) are replicated to three channels,
            of (H, W, 4) the alpha channel is dropped, floats are taken as they are if they span 0
            to 255.
        source: what error messages call it.
    Returns:
        (H, W, 3) uint8 or float; the array itself where nothing had to be changed.
    Raises:
        ImageError: None, empty, too large, more than 8 bits, floats in 0 to 1, or values that are
            not finite.
        TypeError: no NumPy array, or not height by width by channels.
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
    image = np.asarray(image)  # of masked values the network would see what is below the mask
    _check_layout(image.shape, source)
    _check_size(image.shape[1], image.shape[0], source)
    _check_values(image, source)
    if image.ndim == 2:
        image = image[:, :, None]
    if image.shape[2] == 1:
        log_first_n(logging.WARNING, f"{source}: grey, replicated to three channels (said once)")
        return np.repeat(image, 3, axis=2)
    if image.shape[2] == 4:
        log_first_n(logging.WARNING, f"{source}: the fourth channel (alpha) is dropped (said once)")
        return image[:, :, :3]
    return image


def _check_layout(shape: tuple[int, ...], source: str) -> None:
    if len(shape) not in (2, 3):
        hint = "; several pictures are passed as a list" if len(shape) == 4 else ""
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
    """Refuse number types and ranges that are not those of 8-bit pixels."""
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
    # All zero is black by either convention.
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


def _check_depth(picture: Image.Image, source: str) -> None:
    """Refuse more than 8 bits per channel, also where Pillow would cut them to 8 without a word."""
    if picture.mode[0] in "IF":
        found = f"mode {picture.mode}, values up to {np.asarray(picture).max()}"
    elif _stores_16_bits(picture):
        found = f"{picture.mode} with 16 bits per channel"
    else:
        return
    raise ImageError(
        f"{source}: expected 8 bits per channel, found {found}; scale it to 0 to 255 and save it "
        "as an 8-bit picture"
    )


def _stores_16_bits(picture: Image.Image) -> bool:
    for tile in getattr(picture, "tile", ()):
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if ";16" in str(arguments[0]) and not str(arguments[0]).startswith("BGR;16"):
            return True
        if tile[0].startswith("ppm") and isinstance(arguments[-1], int) and arguments[-1] > 255:
            return True
        if tile[0] == "jpeg2k" and _jpeg2000_bits(picture.fp) > 8:  # type: ignore[attr-defined]
            return True
    return False


def _jpeg2000_bits(file: BinaryIO) -> int:
    """Most bits of a channel in a JPEG 2000 file (ISO 15444-1, A.5.1)."""
    file.seek(_jpeg2000_stream(file) + 40)
    channels = file.read(3 * int.from_bytes(file.read(2), "big"))
    return max((1 + (bits & 127) for bits in channels[::3]), default=0)


def _jpeg2000_stream(file: BinaryIO) -> int:
    """Where the picture proper begins: with the file, or in one of its boxes (ISO 15444-1, I.4)."""
    file.seek(0)
    if file.read(2) == b"\xff\x4f":
        return 0
    place = 0
    while True:
        file.seek(place)
        head = file.read(16)
        length, kind = struct.unpack(">I4s", head[:8])
        header = 8
        if length == 1:  # the length proper follows
            length, header = int.from_bytes(head[8:], "big"), 16
        if kind == b"jp2c":
            return place + header
        if length < header:
            raise ValueError(f"its box {kind!r} is of {length} bytes")
        place += length


def _upright(picture: Image.Image, source: str) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception as error:  # cameras write EXIF blocks that make Pillow's parser raise anything
        logger.warning("%s: unreadable EXIF block, orientation ignored: %s", source, error)
        return picture


def _what_instead(path: Path) -> str:
    with open(path, "rb") as file:
        start = file.read(64).lstrip().lower()
    if start.startswith(b"<"):
        return "is HTML or XML text, not a picture; did a download fail?"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not a picture; fetch it with `git lfs pull`"
    return (
        f"is not a picture in a known format ({', '.join(_FORMATS)}), or is cut off in its header"
    )


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
        "INPUT.MAX_SIZE_TEST pixels a side, so shrink the picture first"
    )
