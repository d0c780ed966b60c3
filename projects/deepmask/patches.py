"""Training windows of DeepMask: which there are, and how they are cut out (section 3.3).

Lengths are pixels of the image unless said otherwise; the centre of its first pixel is at 0.5.
The scale of a window is in octaves: at scale s the image is resized by 2^s before a window of the
network's size is taken from it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]

_KEY_STEP = 0.25
"""Canonical scales are multiples of it."""
_MAX_KEY = 8.0
_NEGATIVE_OCTAVES = (-3.0, 2.0)
_NEAR_OCTAVES = 2.5
"""A negative window ignores instances whose canonical scale is farther than this from its own."""
_NEAR_SHIFTS = 3
"""Negatives keep this many times ``Rules.shift`` away from instances."""
_TRIES = 100
_LEAST_SIDE = 10.0
_LEAST_AREA = 100.0
_LEAST_INSTANCE_SIDE = 5.0


@dataclass(frozen=True)
class Rules:
    """Sizes in pixels of the network's input.

    Attributes:
        patch_size: side of the window to segment.
        context: margin around it that the network sees as well.
        object_size: longest side of an instance that fits the window best.
        mask_size: side of a mask.
        shift: largest displacement of a mask's window, in either direction.
        scale_jitter: largest change of its scale, in octaves.
    """

    patch_size: int
    context: int
    object_size: int
    mask_size: int
    shift: float
    scale_jitter: float

    @property
    def input_size(self) -> int:
        """Side of the network's input."""
        return self.patch_size + 2 * self.context


@dataclass(frozen=True)
class Window:
    """A square of an image, possibly reaching outside: its centre and side."""

    x: float
    y: float
    side: float


def is_learnable(box: Sequence[float], area: float) -> bool:
    """Whether an instance is large enough to learn its mask.

    Args:
        box: (4,) corners.
        area: of its mask.
    """
    width, height = box[2] - box[0], box[3] - box[1]
    return area >= _LEAST_AREA and min(width, height) >= _LEAST_INSTANCE_SIDE


def canonical_scale(longest_side: float, object_size: float) -> float | None:
    """The scale at which an instance is ``object_size`` pixels long, or up to 2^(1/4) longer.

    Returns:
        a multiple of 1/4; None for an instance without size or more than 2^8 times too large.
    """
    if not 0 < longest_side < math.inf:
        return None
    step = math.ceil(math.log2(longest_side / object_size) / _KEY_STEP - 1)
    key = -step * _KEY_STEP
    return key if abs(key) <= _MAX_KEY else None


def mask_window(box: Sequence[float], rules: Rules, rng: np.random.Generator) -> Window:
    """A window roughly centred on the instance in ``box``, to learn its mask."""
    scale = math.log2(rules.object_size / _longest_side(box))
    scale += rng.uniform(-rules.scale_jitter, rules.scale_jitter)
    x, y = _centre(box) + rng.uniform(-rules.shift, rules.shift, 2) / 2**scale
    return Window(x, y, rules.input_size / 2**scale)


def positive_window(
    boxes: Sequence[Sequence[float]], rules: Rules, rng: np.random.Generator
) -> Window:
    """A window in canonical position around one of the instances, drawn evenly over their scales.

    Args:
        boxes: (N, 4) corners, all of which have a canonical scale.
    """
    scales = canonical_scales(boxes, rules)
    scale = rng.choice(np.unique(scales))
    box = boxes[rng.choice(np.flatnonzero(scales == scale))]
    x, y = _centre(box)
    return Window(x, y, _window_side(scale, rules))


def negative_window(
    size: tuple[int, int],
    boxes: Sequence[Sequence[float]],
    rules: Rules,
    rng: np.random.Generator,
) -> Window | None:
    """A window far from all instances in canonical position; None if a hundred tries fail.

    Args:
        size: height and width of the image.
        boxes: (N, 4) corners; each has a canonical scale.
    Deviation: the released code compares the centre of a window in one scale with those of
        instances in another, and takes the last try in any case.
    """
    height, width = size
    keys = canonical_scales(boxes, rules)
    centres = np.array([_centre(box) for box in boxes])
    low, high = (int(octaves / _KEY_STEP) for octaves in _NEGATIVE_OCTAVES)
    for _ in range(_TRIES):
        scale = _KEY_STEP * rng.integers(low, high, endpoint=True)
        zoom = 2.0**scale
        centre = rng.integers([max(int(width * zoom), 1), max(int(height * zoom), 1)])
        distances = np.hypot(*(centres * zoom - centre).T)
        is_near = (abs(keys - scale) <= _NEAR_OCTAVES) & (distances < _NEAR_SHIFTS * rules.shift)
        if not is_near.any():
            x, y = centre / zoom
            return Window(x, y, _window_side(scale, rules))
    return None


def canonical_scales(boxes: Sequence[Sequence[float]], rules: Rules) -> Array:
    """(N,) of :func:`canonical_scale`; NaN for None."""
    scales = [canonical_scale(_longest_side(box), rules.object_size) for box in boxes]
    return np.array(scales, dtype=np.float64)


def crop(image: npt.NDArray[np.uint8], window: Window, size: int, fill: float) -> Tensor:
    """The content of ``window``, resized to a square.

    Where a new pixel is larger than an old one, it is the average over its area; elsewhere it is
    interpolated linearly between the centres of pixels.

    Args:
        image: (H, W, C) or (H, W).
        window: the square to cut out; its sides may lie anywhere.
        size: side of the result.
        fill: value outside the image.
    Returns:
        (C, size, size) float32, C = 1 for an image without channels.
    Deviation: the released code rounds windows to whole pixels and, enlarging, puts the corner
        pixels of both on each other, which moves the content by up to half a pixel.
    """
    height, width = image.shape[:2]
    step = window.side / size
    rows, above = _weights(window.y - window.side / 2, step, size, height)
    columns, left = _weights(window.x - window.side / 2, step, size, width)
    part = np.atleast_3d(image)[above, left].transpose(2, 0, 1).astype(np.float32)
    inside = rows.sum(1)[:, None] * columns.sum(1)
    return rows @ torch.from_numpy(part) @ columns.T + fill * (1 - inside)


def _weights(start: float, step: float, count: int, length: int) -> tuple[Tensor, slice]:
    """How much each old pixel counts in each new one, along one axis.

    Args:
        start: where the first new pixel begins.
        step: length of a new pixel in old ones.
        count: new pixels.
        length: old pixels.
    Returns:
        (count, n) float32 and the n old pixels that count; rows sum to less than 1 where a new
        pixel lies outside.
    """
    first = min(max(math.floor(start) - 1, 0), length)
    last = min(max(math.ceil(start + count * step) + 1, first), length)
    new = start + step * np.arange(count)[:, None]
    old = np.arange(first, last)
    if step >= 1:
        overlap = np.minimum(new + step, old + 1) - np.maximum(new, old)
        weights = overlap.clip(min=0) / step
    else:
        weights = (1 - abs(new + step / 2 - (old + 0.5))).clip(min=0)
    return torch.from_numpy(weights).float(), slice(first, last)


def _window_side(scale: float, rules: Rules) -> float:
    return max(rules.input_size / 2.0**scale, _LEAST_SIDE)


def _longest_side(box: Sequence[float]) -> float:
    return max(box[2] - box[0], box[3] - box[1])


def _centre(box: Sequence[float]) -> Array:
    return np.array([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2])
