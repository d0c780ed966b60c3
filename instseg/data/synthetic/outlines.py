"""Outlines of the synthetic shapes, the pixels inside them, and their random numbers.

Coordinates are pixels, a pixel's centre lies at +0.5.
"""

import zlib

import numpy as np

KINDS = ("circle", "square", "triangle", "star")


def outline_of(kind: int, extent: float, angle: float) -> np.ndarray:
    """(P, 2) rotated corners around the origin; the upright bounding box is ``extent`` long."""
    if KINDS[kind] == "circle":
        turns, radii = np.arange(64) / 64, np.ones(64)
    elif KINDS[kind] == "star":
        turns, radii = np.arange(10) / 10, np.where(np.arange(10) % 2, 0.45, 1.0)
    else:
        corners = 4 if KINDS[kind] == "square" else 3
        turns, radii = np.arange(corners) / corners, np.ones(corners)
    phi = 2 * np.pi * turns + angle
    points = radii[:, None] * np.stack([np.cos(phi), np.sin(phi)], axis=1)
    low, high = points.min(axis=0), points.max(axis=0)
    return (points - (low + high) / 2) * extent / (high - low).max()


def polygon_area(outline: np.ndarray) -> float:
    """Area of the polygon in pixels, parts outside the image included (shoelace formula)."""
    (ax, ay), (bx, by) = outline.T, _next(outline).T
    return float(abs(np.dot(ax, by) - np.dot(ay, bx)) / 2)


def _next(outline: np.ndarray) -> np.ndarray:
    """The corner that follows each corner."""
    return np.concatenate([outline[1:], outline[:1]])


def rasterise(outline: np.ndarray, size: int) -> np.ndarray:
    """(size, size) bool: pixels whose centre lies inside the polygon (even-odd rule).

    Written out in NumPy, not left to a drawing library, so that the masks never change with its
    version.
    """
    mask = np.zeros((size, size), dtype=bool)
    x0, y0 = np.clip(np.floor(outline.min(axis=0)), 0, size).astype(int)
    x1, y1 = np.clip(np.ceil(outline.max(axis=0)), 0, size).astype(int)
    ys = np.arange(y0, y1) + 0.5
    xs = np.arange(x0, x1) + 0.5
    (ax, ay), (bx, by) = outline.T, _next(outline).T
    spans = (ay[:, None] <= ys) != (by[:, None] <= ys)
    slope = (bx - ax) / np.where(by == ay, 1.0, by - ay)
    crossing = np.where(spans, ax[:, None] + slope[:, None] * (ys - ay[:, None]), np.inf)
    mask[y0:y1, x0:x1] = (crossing[:, :, None] <= xs).sum(axis=0) % 2 == 1
    return mask


def generator(split: str, index: int, stream: int) -> np.random.Generator:
    """Random numbers that depend only on the split, the image and their purpose (``stream``)."""
    key = zlib.crc32(split.encode()) + (index << 32) + (stream << 60)
    return np.random.Generator(np.random.Philox(key=key))
