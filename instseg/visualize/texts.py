"""Texts of overlays: their size, and places where they cover nothing."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from instseg.masks import CroppedMasks

Pixels = npt.NDArray[np.uint8]
Colour = Sequence[int] | npt.NDArray[np.uint8]

_FONT = cv2.FONT_HERSHEY_SIMPLEX
_SMALLEST_SCALE = 0.4
"""Smaller letters cannot be read."""
_PIXELS_PER_SCALE = 1400
"""Shorter side of an image whose letters have scale 1, which is 22 pixels high."""
_LARGEST_PART_WITHIN = 1 / 9
"""Largest share of an instance's pixels that its label may cover."""
_LARGEST_PART_OF_IMAGE = 1 / 8
"""Largest share of an image that the counts may cover."""
_LITTLE = 0.02
"""A corner counts as free if instances cover at most this share of it."""
_LONGEST_NAME = 24
_WHITE = (255, 255, 255)


@dataclass(frozen=True)
class Rectangle:
    """Pixels from (x, y) on, right and down."""

    x: int
    y: int
    width: int
    height: int

    @property
    def area(self) -> int:
        """In pixels."""
        return self.width * self.height

    def of(self, image: Pixels) -> Pixels:
        """These pixels of an image that holds them, as a view."""
        return image[self.y : self.y + self.height, self.x : self.x + self.width]

    def is_inside(self, image: Pixels) -> bool:
        """Whether the image holds all these pixels."""
        return (
            min(self.x, self.y) >= 0
            and self.x + self.width <= image.shape[1]
            and self.y + self.height <= image.shape[0]
        )


class Font:
    """Letters in proportion to an image.

    Attributes:
        padding: pixels between letters and the edge of their ground.
    """

    def __init__(self, image_size: tuple[int, int]) -> None:
        """
        Args:
            image_size: height and width.
        """
        self._scale = max(_SMALLEST_SCALE, min(image_size) / _PIXELS_PER_SCALE)
        self._thickness = max(1, round(1.5 * self._scale))
        self.padding = max(2, round(4 * self._scale))
        # The same for all texts, so that lines stand at equal distances.
        (_, self._ascent), self._descent = self._measure("Ag#")

    def size(self, text: str) -> tuple[int, int]:
        """Width and height of a text with its ground, in pixels."""
        (width, _), _ = self._measure(text)
        return width + 2 * self.padding, self._ascent + self._descent + 2 * self.padding

    def write(self, image: Pixels, text: str, rectangle: Rectangle, colour: Colour) -> None:
        """Write a text into ``rectangle``, which has its :meth:`size`, and into no other pixel."""
        ground = np.ascontiguousarray(rectangle.of(image))
        origin = (self.padding, self.padding + self._ascent)
        colour_bgr = tuple(map(int, colour))
        cv2.putText(
            ground, text, origin, _FONT, self._scale, colour_bgr, self._thickness, cv2.LINE_AA
        )
        rectangle.of(image)[:] = ground

    def _measure(self, text: str) -> tuple[tuple[int, int], int]:
        (width, height), baseline = cv2.getTextSize(text, _FONT, self._scale, self._thickness)
        return (width, height), baseline


class Layout:
    """Finds places for texts on an image, where they cover no other instance and no other text."""

    def __init__(self, masks: CroppedMasks) -> None:
        """
        Args:
            masks: of all instances that are drawn on the image.
        """
        self._masks = masks
        self._areas = masks.areas()
        # Number of instances and texts on each pixel; 255 also stands for more.
        self._covered = np.zeros(masks.image_size, dtype=np.uint8)
        for index in range(len(masks)):
            x, y, crop = masks.crop(index)
            region = Rectangle(x, y, crop.shape[1], crop.shape[0]).of(self._covered)
            region[:] = cv2.add(np.ascontiguousarray(region), _bytes(crop)) if crop.size else region

    def take(self, rectangle: Rectangle) -> Rectangle:
        """``rectangle``, now covered by a text."""
        region = rectangle.of(self._covered)
        region[:] = np.maximum(region, 254) + 1
        return rectangle

    def corner(self, width: int, height: int, margin: int) -> Rectangle:
        """The first corner, from the upper left on, that is nearly free; else the freest."""
        rows, columns = self._masks.image_size
        right, bottom = columns - width - margin, rows - height - margin
        corners = [
            Rectangle(x, y, width, height) for y in (margin, bottom) for x in (margin, right)
        ]
        parts = [np.count_nonzero(corner.of(self._covered)) / corner.area for corner in corners]
        return corners[int(np.argmin([max(part, _LITTLE) for part in parts]))]

    def beside(self, index: int, width: int, height: int, largest_part: float) -> Rectangle | None:
        """A place for the text of an instance, within it or at one of its sides; None if all are
        covered.

        Args:
            index: of the instance.
            width, height: of the text.
            largest_part: None for a text with more than this share of the instance's pixels.
        """
        area = self._areas[index]
        if not area or width * height / largest_part > area:
            return None
        for rectangle in self._candidates(index, width, height):
            if rectangle.is_inside(self._covered) and self._is_free(rectangle, index):
                return rectangle
        return None

    def _candidates(self, index: int, width: int, height: int) -> Iterator[Rectangle]:
        x, y, crop = self._masks.crop(index)
        rows, columns = crop.shape
        if width * height <= self._areas[index] * _LARGEST_PART_WITHIN:
            region = Rectangle(x, y, columns, rows).of(self._covered)
            corner = _corner_in_widest_part(crop & (region == 1), width, height)
            if corner is not None:
                yield Rectangle(x + corner[0], y + corner[1], width, height)
        middle_x, middle_y = x + (columns - width) // 2, y + (rows - height) // 2
        yield Rectangle(middle_x, y - height, width, height)
        yield Rectangle(middle_x, y + rows, width, height)
        yield Rectangle(x + columns, middle_y, width, height)
        yield Rectangle(x - width, middle_y, width, height)

    def _is_free(self, rectangle: Rectangle, index: int) -> bool:
        """Whether nothing but one instance covers ``rectangle``."""
        x, y, crop = self._masks.crop(index)
        left, top = max(rectangle.x - x, 0), max(rectangle.y - y, 0)
        right, bottom = rectangle.x + rectangle.width - x, rectangle.y + rectangle.height - y
        instance_pixels = np.count_nonzero(crop[top : max(bottom, 0), left : max(right, 0)])
        return int(rectangle.of(self._covered).sum(dtype=np.int64)) == instance_pixels


def write_counts(image: Pixels, lines: Sequence[str], font: Font, layout: Layout) -> None:
    """Write lines on a dark ground in a corner, where they are small in proportion to the image.

    Args:
        image: changed in place.
        lines: the most important first; the last ones are left out if there are too many.
        font: of the image.
        layout: notes the place that the lines cover.
    """
    rows = max(1, image.shape[0] // 2 // font.size("")[1])
    if len(lines) > rows:
        lines = [*lines[: rows - 1], f"+{len(lines) - rows + 1} more"]
    sizes = [font.size(line) for line in lines]
    width, height = max(size[0] for size in sizes), sum(size[1] for size in sizes)
    margin = font.padding
    fits = width + 2 * margin <= image.shape[1] and height + 2 * margin <= image.shape[0]
    if not fits or width * height > image.shape[0] * image.shape[1] * _LARGEST_PART_OF_IMAGE:
        return
    rectangle = layout.take(layout.corner(width, height, margin))
    ground = rectangle.of(image)
    ground[:] = ground // 4
    y = rectangle.y
    for line, size in zip(lines, sizes, strict=True):
        font.write(image, line, Rectangle(rectangle.x, y, *size), _WHITE)
        y += size[1]


def shortened(name: str) -> str:
    """A name that fits in a line, as text that OpenCV can write."""
    # JSON can name half of a surrogate pair, at which OpenCV crashes.
    text = name.encode(errors="replace").decode()
    return text if len(text) <= _LONGEST_NAME else f"{text[: _LONGEST_NAME - 3]}..."


def _corner_in_widest_part(
    mask: npt.NDArray[np.bool_], width: int, height: int
) -> tuple[int, int] | None:
    """x and y of a rectangle of this size in a mask, about its widest part; None if none fits."""
    inside = cv2.copyMakeBorder(_bytes(mask), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    kernel = np.ones((height, width), dtype=np.uint8)
    centres = cv2.erode(inside, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    distances = cv2.distanceTransform(inside, cv2.DIST_L2, 3) * centres
    y, x = np.unravel_index(distances.argmax(), distances.shape)
    # The anchor of an OpenCV kernel is its middle, rounded down; less the border of one pixel.
    return (int(x) - width // 2 - 1, int(y) - height // 2 - 1) if centres[y, x] else None


def _bytes(mask: npt.NDArray[np.bool_]) -> Pixels:
    return np.ascontiguousarray(mask).view(np.uint8)
