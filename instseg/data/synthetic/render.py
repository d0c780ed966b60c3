"""Pixels of the synthetic images: textures, colours, light and noise for given masks."""

from collections.abc import Sequence
from typing import Protocol

import cv2
import numpy as np


class HasMask(Protocol):
    """An instance, as :func:`render` needs it."""

    @property
    def mask(self) -> np.ndarray: ...


_MIN_CONTRAST = 45.0  # grey levels between an instance and everything painted before it
_GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def render(
    shapes: Sequence[HasMask], size: int, rng: np.random.Generator, clutter: bool
) -> np.ndarray:
    """Paint ``shapes`` back to front on a textured ground.

    Args:
        shapes: instances with ``mask`` (size, size) bool, disjoint.
        size: side of the image in pixels.
        rng: source of every random choice.
        clutter: strew lines and specks over the ground that belong to no instance.
    Returns:
        (size, size, 3) uint8 RGB; two images in five are grey.
    """
    grey = rng.random() < 0.4
    colours = [colour_of(rng, [], grey)]
    canvas = texture(rng, colours[0], size, size, size)
    if clutter:
        _strew(canvas, rng, size, grey)
    for shape in shapes:
        colours.append(colour_of(rng, colours, grey))
        x, y, width, height = cv2.boundingRect(shape.mask.view(np.uint8))
        window = np.s_[y : y + height, x : x + width]
        mask = shape.mask[window]
        paint = texture(rng, colours[-1], height, width, size)
        canvas[window] = np.where(mask[:, :, None], paint, canvas[window])
    light = rng.random(2) * 60 - 30
    ramp = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    canvas += (light[0] * ramp[:, None] + light[1] * ramp)[:, :, None]
    canvas += rng.standard_normal((size, size, 1 if grey else 3), dtype=np.float32) * (
        rng.random() * 8
    )
    return np.clip(canvas, 0, 255).astype(np.uint8)


def colour_of(rng: np.random.Generator, others: Sequence[np.ndarray], grey: bool) -> np.ndarray:
    """(3,) RGB that stands out from ``others``, or the best of twenty draws."""
    draws = (20 + 215 * rng.random((20, 3))).astype(np.float32)
    if grey:
        draws[:, 1:] = draws[:, :1]
    if not others:
        return draws[0]
    # Grey levels between two colours, with a third of what they differ in hue.
    difference = draws[:, None] - np.stack(others)
    hue = difference - difference.mean(axis=2, keepdims=True)
    contrast = (np.abs(difference @ _GREY) + np.abs(hue).mean(axis=2) / 3).min(axis=1)
    stands_out = contrast >= _MIN_CONTRAST
    return draws[int(stands_out.argmax() if stands_out.any() else contrast.argmax())]


def texture(
    rng: np.random.Generator, colour: np.ndarray, height: int, width: int, size: int
) -> np.ndarray:
    """(height, width, 3) float32: ``colour`` under a gradient, stripes, noise or a dome's shade."""
    y = np.arange(height, dtype=np.float32)[:, None]
    x = np.arange(width, dtype=np.float32)
    strength = np.float32(8 + 26 * rng.random())
    angle = 2 * np.pi * rng.random()
    along = np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y
    kind = int(rng.random() * 4)
    if kind == 0:
        pattern = 2 * along / np.float32(max(height, width)) - 0.5
    elif kind == 1:
        period = (4 + 10 * rng.random()) * size / 128
        pattern = np.sign(np.sin(along * np.float32(2 * np.pi / period)))
    elif kind == 2:
        # Coarse and fine noise together look like grain, cloth or relief.
        coarse = rng.standard_normal((height // 4 + 1, width // 4 + 1), dtype=np.float32)
        fine = rng.standard_normal((height, width), dtype=np.float32)
        pattern = 0.7 * coarse.repeat(4, axis=0).repeat(4, axis=1)[:height, :width] + 0.4 * fine
    else:
        dome = ((2 * x / max(width, 1) - 1) ** 2 + (2 * y / max(height, 1) - 1) ** 2) / 2
        pattern = 0.7 - 2 * dome
    return colour + (strength * pattern)[:, :, None]


def _strew(canvas: np.ndarray, rng: np.random.Generator, size: int, grey: bool) -> None:
    """Draw 4 to 12 lines and specks, each under 5 pixels wide, into ``canvas`` (size, size, 3)."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) * np.float32(128 / size)
    for _ in range(4 + int(rng.random() * 9)):
        cx, cy = rng.random(2) * 128
        angle = rng.random() * np.pi
        half_length = 2 + 40 * rng.random() ** 3
        half_width = 0.6 + 1.6 * rng.random()
        along = (x - cx) * np.float32(np.cos(angle)) + (y - cy) * np.float32(np.sin(angle))
        across = (y - cy) * np.float32(np.cos(angle)) - (x - cx) * np.float32(np.sin(angle))
        canvas[(np.abs(along) < half_length) & (np.abs(across) < half_width)] = colour_of(
            rng, [], grey
        )
