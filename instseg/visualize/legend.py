"""A legend below an image."""

from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt

from instseg.visualize.texts import Font, Rectangle

Pixels = npt.NDArray[np.uint8]
_BLACK = (0, 0, 0)


def with_legend(image: Pixels, entries: Sequence[tuple[str, Sequence[int]]]) -> Pixels:
    """A copy of an image with a line of texts on grounds of their colours below it.

    Args:
        image: (H, W, 3) in BGR order; a narrow one gets a white margin at its right.
        entries: text and colour in BGR order, bright enough for black text.
    Returns:
        (H', W', 3) uint8 in BGR order.
    """
    font = Font((image.shape[0], image.shape[1]))
    sizes = [font.size(text) for text, _ in entries]
    gap = font.padding
    width = sum(size[0] + gap for size in sizes)
    height = max(size[1] for size in sizes) + gap
    right = max(0, width - image.shape[1])
    white = (255, 255, 255)
    framed = cv2.copyMakeBorder(image, 0, height, 0, right, cv2.BORDER_CONSTANT, value=white)
    scene: Pixels = np.asarray(framed, dtype=np.uint8)
    x = 0
    for (text, colour), size in zip(entries, sizes, strict=True):
        rectangle = Rectangle(x, image.shape[0] + gap, *size)
        rectangle.of(scene)[:] = colour
        font.write(scene, text, rectangle, _BLACK)
        x += size[0] + gap
    return scene
