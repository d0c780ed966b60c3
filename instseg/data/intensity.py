"""Turn the numbers of an image into the 0 to 255 that networks take (``INPUT.NORMALIZE``).

A microscope writes 12 or 16 bits, of which a cell may use a hundredth.  ``percentile`` stretches
the values of each channel of each image to 0 to 255; ``range`` stretches the same interval in all
images.

The result has 8 bits, so a 16-bit file gives exactly the input that its 8-bit copy gives:
``MODEL.PIXEL_MEAN`` and trained weights expect 0 to 255, and resizing and augmentations treat 8
bits and floats differently.  Rounding to 8 bits loses steps of 1/255 of the interval, far less than
``MODEL.PIXEL_STD``.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from detectron2.config import CfgNode
from detectron2.utils.logger import log_first_n
from PIL import Image

from instseg.errors import ImageError

Array = npt.NDArray[Any]
Pixels = npt.NDArray[np.uint8]

CHANNELS = {"BGR": 3, "RGB": 3, "L": 1}
"""Values of ``INPUT.FORMAT`` and their number of channels: colour in either order, or grey."""
NORMALIZATIONS = ("none", "percentile", "range")
"""Values of ``INPUT.NORMALIZE``."""
_BLOCK = 2**22
"""Pixels that are converted at a time, so that copies of other types stay small."""


@dataclass(frozen=True)
class ModelImage:
    """An image on which ``INPUT.NORMALIZE`` and ``INPUT.CHANNELS`` have acted already.

    Attributes:
        pixels: (H, W, 3) in BGR order or (H, W, 1), values of 0 to 255.
    """

    pixels: Array


@dataclass(frozen=True)
class Scaling:
    """What is done to the channels of one image.

    Attributes:
        channels: those that become red, green and blue, or the one that is grey.
        limits: channel → the values that become 0 and 255; None leaves all as they are.
    """

    channels: tuple[int, ...]
    limits: dict[int, tuple[float, float]] | None = None

    def apply(self, pixels: Array, *, format: str = "BGR") -> Pixels:
        """Give the image, or a part of it, the form that a model takes.

        Args:
            pixels: (H, W, C) as read.
            format: a key of :data:`CHANNELS`.
        Returns:
            (H, W, 3), or (H, W, 1) for ``L``; contiguous.
        """
        if self.limits is None:
            scaled = {i: pixels[:, :, i] for i in set(self.channels)}
        else:
            scaled = {i: _scaled(pixels[:, :, i], *ends) for i, ends in self.limits.items()}
        if len(self.channels) == 1:
            grey = scaled[self.channels[0]]
            return np.stack([grey] * (1 if format == "L" else 3), axis=2)
        if format == "L":
            colour = np.stack([scaled[i] for i in self.channels], axis=2)
            return np.array(Image.fromarray(colour).convert("L"))[:, :, None]
        order = self.channels[::-1] if format == "BGR" else self.channels
        return np.stack([scaled[i] for i in order], axis=2)


@dataclass(frozen=True)
class Intensity:
    """The keys ``INPUT.NORMALIZE``, ``INPUT.NORMALIZE_RANGE`` and ``INPUT.CHANNELS``.

    Attributes:
        normalize: one of :data:`NORMALIZATIONS`.
        interval: percentiles, or values of pixels for ``range``, that become 0 and 255.
        channels: of the file, counted from 0, in the places of red, green and blue, or of grey;
            () takes them as they are.
    """

    normalize: str = "none"
    interval: tuple[float, float] = (1.0, 99.8)
    channels: tuple[int, ...] = ()

    @classmethod
    def of(cls, cfg: CfgNode) -> "Intensity":
        """That of a configuration; a stock one of Detectron2 leaves images as they are."""
        node = cfg.INPUT
        if "NORMALIZE" not in node:
            return cls()
        return cls(node.NORMALIZE, tuple(node.NORMALIZE_RANGE), tuple(node.CHANNELS))

    @property
    def changes(self) -> bool:
        """Whether any image is changed."""
        return self.normalize != "none" or bool(self.channels)

    def apply(self, pixels: Array, *, source: str, format: str, alpha: bool = True) -> Pixels:
        """Give a whole image the form that a model takes.

        Args:
            pixels: (H, W, C): red, green and blue, or one grey, or the channels of a file.
            source: name of the image in messages.
            format: a key of :data:`CHANNELS`.
            alpha: the last of four channels is transparency.
        Returns:
            (H, W, 3), or (H, W, 1) for ``L``; contiguous.
        Raises:
            ImageError: see :meth:`scaling`.
        """
        scaling = self.scaling(pixels, source=source, alpha=alpha)
        return scaling.apply(pixels, format=format)

    def scaling(self, pixels: Array, *, source: str, alpha: bool = True) -> Scaling:
        """Measure what becomes 0 and 255 in each channel.

        Percentiles are exact, interpolated as ``numpy.percentile`` does.  A channel of one value
        becomes 0, said once.

        Args:
            pixels: (H, W, C), or a sample of them.
            source: name of the image in messages.
            alpha: the last of four channels is transparency.
        Raises:
            ImageError: the channels do not fit; more than 8 bits with ``none``; or values that are
                not finite.
        """
        channels = self._chosen(pixels.shape[2], source, alpha)
        if self.normalize == "none":
            if pixels.dtype != np.uint8:
                raise too_deep(source, _range_of(pixels))
            return Scaling(channels)
        if pixels.dtype.kind not in "buif":
            raise ImageError(f"{source}: has pixels of type {pixels.dtype}; expected numbers")
        return Scaling(channels, {i: self._ends(pixels[:, :, i], i, source) for i in channels})

    def _chosen(self, count: int, source: str, alpha: bool) -> tuple[int, ...]:
        if self.channels:
            if max(self.channels) >= count:
                raise ImageError(
                    f"{source}: has {count} channel{'s' * (count > 1)}, counted from 0; "
                    f"INPUT.CHANNELS {self.channels} asks for channel {max(self.channels)}"
                )
            return self.channels
        if count == 4 and alpha:
            log_first_n(logging.WARNING, f"{source}: transparency is ignored (said once)")
            return (0, 1, 2)
        if count not in (1, 3):
            raise other_channels(source, f"{count} channels")
        return tuple(range(count))

    def _ends(self, channel: Array, number: int, source: str) -> tuple[float, float]:
        low, high = finite_limits(channel, source)
        if self.normalize == "range":
            return self.interval
        if low == high:
            log_first_n(
                logging.WARNING,
                f"{source}: channel {number} is {low:g} everywhere; INPUT.NORMALIZE percentile "
                "makes it 0 (said once)",
            )
            return low, high
        return percentiles(channel, self.interval)


AS_IS = Intensity()
"""Images of 8 bits, unchanged."""


def finite_limits(channel: Array, source: str) -> tuple[float, float]:
    """The least and the greatest value of a channel.

    Raises:
        ImageError: values that are not finite.
    """
    low, high = float(channel.min()), float(channel.max())
    if not np.isfinite(low) or not np.isfinite(high):
        raise ImageError(f"{source}: contains non-finite values (NaN or infinity)")
    return low, high


def too_deep(source: str, depth: str) -> ImageError:
    """The refusal of an image of more than 8 bits.

    Args:
        depth: kind of its pixels.
    """
    return ImageError(
        f"{source}: expected 8 bits per channel, found {depth}; set INPUT.NORMALIZE percentile, or "
        "range with INPUT.NORMALIZE_RANGE, to scale it to 0 to 255"
    )


def other_channels(source: str, channels: str) -> ImageError:
    """The refusal of an image whose ``channels`` are neither grey nor colours."""
    return ImageError(
        f"{source}: has {channels}; expected 1 or 3: set INPUT.CHANNELS to those in the places of "
        "red, green and blue, such as (0, 0, 1)"
    )


def _range_of(pixels: Array) -> str:
    return f"{pixels.dtype.name} with values of {pixels.min():g} to {pixels.max():g}"


def percentiles(channel: Array, percents: Sequence[float]) -> tuple[float, float]:
    """Two percentiles of an array of any shape, as ``numpy.percentile`` gives them.

    Counts the values of 8 and 16-bit integers, which takes a fraction of the time and no copy.
    """
    if channel.dtype.kind not in "iu" or channel.dtype.itemsize > 2:
        if channel.dtype in (np.float16, np.float32):
            low, high = np.percentile(channel.astype(np.float32), percents, overwrite_input=True)
        else:
            low, high = np.percentile(channel.astype(np.float64), percents, overwrite_input=True)
        return float(low), float(high)
    least = int(np.iinfo(channel.dtype).min)
    counts = np.zeros(256**channel.dtype.itemsize, dtype=np.int64)
    for block in _blocks(channel):
        counts += np.bincount((block.astype(np.int64) - least).ravel(), minlength=len(counts))
    ends = counts.cumsum()
    ranks = np.asarray(percents) / 100 * (channel.size - 1)
    before = np.floor(ranks)
    after = np.minimum(before + 1, channel.size - 1)
    first, second = (ends.searchsorted(rank, side="right") + least for rank in (before, after))
    low, high = first + (second - first) * (ranks - before)
    return float(low), float(high)


def _scaled(channel: Array, low: float, high: float) -> Pixels:
    """``low`` → 0, ``high`` → 255, rounded; if they are equal, what is above → 255."""
    if channel.dtype.kind in "iu" and channel.dtype.itemsize <= 2:
        native = np.asarray(channel, dtype=channel.dtype.newbyteorder("="))
        unsigned = np.dtype(f"u{native.dtype.itemsize}")
        values = np.arange(256**native.dtype.itemsize, dtype=unsigned).view(native.dtype)
        table: Pixels = _to_8_bits(values, low, high)[native.view(unsigned)]
        return table
    result = np.empty(channel.shape, dtype=np.uint8)
    for block, part in zip(_blocks(channel), _blocks(result), strict=True):
        part[:] = _to_8_bits(block, low, high)
    return result


def _to_8_bits(values: Array, low: float, high: float) -> Pixels:
    if high <= low:
        return np.where(values > high, 255, 0).astype(np.uint8)
    scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    return np.floor(scaled.clip(0, 255) + 0.5).astype(np.uint8)


def _blocks(channel: Array) -> list[Array]:
    """Views of some rows each."""
    rows = max(_BLOCK // max(channel[:1].size, 1), 1)
    return [channel[start : start + rows] for start in range(0, len(channel), rows)]
