"""Random contrast, brightness, blur and noise of training images."""

import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from detectron2.config import CfgNode
from detectron2.data import transforms as T

Image = npt.NDArray[Any]


class RandomAppearance(T.Augmentation):
    """Changes pixels by a function with one random number; coordinates and masks stay."""

    def __init__(
        self,
        change: Callable[..., Image],
        interval: tuple[float, float],
        *,
        logarithmic: bool = False,
        seeded: bool = False,
    ) -> None:
        """
        Args:
            change: takes an image (H, W, C) of any type and the number, and gives the same type.
            interval: smallest and largest number.
            logarithmic: draw the logarithm of the number evenly.
            seeded: ``change`` also takes ``seed``.
        """
        super().__init__()
        self.change = change
        self.interval = interval
        self.logarithmic = logarithmic
        self.seeded = seeded

    def get_transform(self, image: np.ndarray) -> T.Transform:
        if self.logarithmic:
            number = float(np.exp(self._rand_range(*np.log(self.interval))))
        else:
            number = float(self._rand_range(*self.interval))
        seed = {"seed": int(np.random.randint(2**31))} if self.seeded else {}
        return T.ColorTransform(partial(self.change, number, **seed))


def gamma(exponent: float, image: Image) -> Image:
    """255 (x / 255) ^ exponent for each value x; the sign of x stays."""
    scaled = image.astype(np.float32) / 255
    return _as(image, np.sign(scaled) * np.abs(scaled) ** np.float32(exponent) * 255)


def blur(sigma: float, image: Image) -> Image:
    """A Gaussian filter; ``sigma`` is its standard deviation in pixels, 0 changes nothing."""
    if sigma == 0:
        return image
    blurred = cv2.GaussianBlur(np.ascontiguousarray(image), (0, 0), sigma)
    return blurred.reshape(image.shape)


def noise(deviation: float, image: Image, *, seed: int) -> Image:
    """Adds Gaussian noise, the same to all channels, so that grey images stay grey.

    Args:
        deviation: standard deviation of the noise, in values of 0 to 255.
        seed: the noise depends on it and on the image: two frames that get the same transform get
            different noise, or their flow could be read from it.
    """
    content = zlib.crc32(image.tobytes())
    random = np.random.default_rng((seed, content))
    added = random.standard_normal((*image.shape[:2], 1), np.float32) * np.float32(deviation)
    return _as(image, image.astype(np.float32) + added)


def _as(image: Image, changed: Image) -> Image:
    """``changed`` in the type of ``image``; 8 bits are rounded and clipped, floats are not."""
    if image.dtype == np.uint8:
        return np.clip(np.rint(changed), 0, 255).astype(np.uint8)
    return changed.astype(image.dtype)


def build_appearance(cfg: CfgNode) -> list[T.Augmentation]:
    """The steps of ``INPUT.RANDOM_GAMMA``, ``_CONTRAST``, ``_BRIGHTNESS``, ``_BLUR``, ``_NOISE``.

    In this order, which is that of optics before the sensor; they come after all other steps, so
    that their pixels are those of the network's input.
    """
    node = cfg.INPUT
    steps: list[T.Augmentation] = []
    if tuple(node.RANDOM_GAMMA) != (1, 1):
        steps.append(RandomAppearance(gamma, tuple(node.RANDOM_GAMMA), logarithmic=True))
    if tuple(node.RANDOM_CONTRAST) != (1, 1):
        steps.append(T.RandomContrast(*node.RANDOM_CONTRAST))
    if tuple(node.RANDOM_BRIGHTNESS) != (1, 1):
        steps.append(T.RandomBrightness(*node.RANDOM_BRIGHTNESS))
    if tuple(node.RANDOM_BLUR) != (0, 0):
        steps.append(RandomAppearance(blur, tuple(node.RANDOM_BLUR)))
    if tuple(node.RANDOM_NOISE) != (0, 0):
        steps.append(RandomAppearance(noise, tuple(node.RANDOM_NOISE), seeded=True))
    return steps
