"""Check arrays that a user gives as images, and give them the form that a model takes."""

import logging
from typing import Any

import numpy as np
import torch
from detectron2.utils.logger import log_first_n
from PIL import Image

from instseg.data.image_headers import check_size
from instseg.data.intensity import AS_IS, Array, Intensity, ModelImage
from instseg.errors import ImageError

_LAYOUT = "expected a NumPy array of shape (H, W, 3) with 8-bit values (uint8) in BGR order"
_MOST_CHANNELS = 64


def check_image(
    image: Any, *, source: str = "image", format: str = "BGR", intensity: Intensity = AS_IS
) -> Array:
    """Check an array and convert it to the channels that a model takes.

    Args:
        image: (H, W, 3) uint8 in BGR order.  (H, W) and (H, W, 1) mean grey, (H, W, 4) loses its
            alpha channel, and floats in 0 to 255 stay as they are.  With ``INPUT.NORMALIZE`` other
            types are taken too, and with ``INPUT.CHANNELS`` any number of channels.  It counts
            three as red, green and blue, as in a file, and others as they lie in the array.
        source: name of the image in error messages.
        format: a key of :data:`instseg.data.intensity.CHANNELS`.
        intensity: what is done to its channels; nothing more to a :class:`ModelImage`.
    Returns:
        (H, W, C) uint8 or float; the array itself if nothing had to be changed.
    Raises:
        ImageError: it is None, empty or too large, has more than 8 bits, floats in 0 to 1, or
            values that are not finite.
        TypeError: it is no NumPy array, or not height by width by channels.
    """
    if isinstance(image, ModelImage):
        image, intensity = image.pixels, AS_IS
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
    _check_layout(image.shape, source, several=bool(intensity.channels))
    check_size(image.shape[1], image.shape[0], source)
    if intensity.changes:
        pixels = _as_in_files(image, bool(intensity.channels))
        return intensity.apply(pixels, source=source, format=format)
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


def _as_in_files(image: Array, chosen: bool) -> Array:
    """An array with colours in BGR order → (H, W, C) in the order of files.

    Args:
        chosen: ``INPUT.CHANNELS`` is set, so that four channels need not be colours.
    """
    if image.ndim == 2:
        return image[:, :, None]
    if image.shape[2] != 3 and (image.shape[2] != 4 or chosen):
        return image
    return np.concatenate([image[:, :, 2::-1], image[:, :, 3:]], axis=2)


def _check_layout(shape: tuple[int, ...], source: str, *, several: bool) -> None:
    """Refuse arrays that are no images; ``several`` allows any number of channels."""
    if len(shape) not in (2, 3):
        hint = "; several images are passed as a list" if len(shape) == 4 else ""
        raise TypeError(f"{source} has shape {shape}; {_LAYOUT}{hint}")
    if len(shape) == 2 or shape[2] in (1, 3, 4):
        return
    if several and 0 < shape[2] <= _MOST_CHANNELS:
        return
    if shape[0] in (1, 3, 4):
        raise TypeError(
            f"{source} has shape {shape}, channels first; {_LAYOUT}: pass image.transpose(1, 2, 0)"
        )
    raise ImageError(f"{source} has {shape[2]} channels (shape {shape}); {_LAYOUT}")


def _check_values(image: Array, source: str) -> None:
    """Refuse types and ranges other than those of 8-bit pixels."""
    if image.dtype == np.uint8:
        return
    if image.dtype.kind in "iu":
        raise ImageError(
            f"{source}: expected uint8 in 0 to 255, found {image.dtype} with min={image.min()}, "
            f"max={image.max()}; scale it to 0 to 255 and convert it with .astype('uint8'), or set "
            "INPUT.NORMALIZE percentile"
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
