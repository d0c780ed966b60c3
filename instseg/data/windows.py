"""Random crops, rotations, changes of scale and symmetries of training images.

Coordinates are continuous pixels: the centre of the first pixel is at 0.5.
"""

from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt
from detectron2.config import CfgNode
from detectron2.data import transforms as T

Array = npt.NDArray[np.float64]

_TRIES = 10
"""Draws of a window around an instance."""


class WindowTransform(T.Transform):
    """Cuts a rotated and scaled rectangle out of an image, with one interpolation.

    Images are interpolated linearly; masks and semantic maps take the nearest pixel.  Outside of
    the image, images have a colour, masks and semantic maps 0, and flows NaN.

    Deviation: enlarges and reduces without a filter against aliasing, unlike Detectron2's
        ``ResizeTransform``, so it suits factors near 1.
    """

    def __init__(
        self,
        centre: Sequence[float],
        angle: float,
        scale: float,
        size: tuple[int, int],
        color: Sequence[float] = (0.0,),
    ) -> None:
        """
        Args:
            centre: x and y of the window's centre in the image.
            angle: degrees by which the content is turned counter-clockwise.
            scale: factor on the content's width and height.
            size: height and width of the window in its own pixels.
            color: outside of the image, one value for each channel.
        """
        super().__init__()
        cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
        self.linear: Array = scale * np.array([[cos, sin], [-sin, cos]])
        self.offset: Array = np.array(size[::-1]) / 2 - self.linear @ np.asarray(centre)
        self.size = size
        self.color = tuple(color)

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """(H, W, C) of up to four channels → (h, w, C)."""
        return self._cut(img, cv2.INTER_LINEAR, self.color)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """(H, W) → (h, w)."""
        return self._cut(segmentation, cv2.INTER_NEAREST, (0.0,))

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return np.asarray(coords, np.float64) @ self.linear.T + self.offset

    def apply_polygons(self, polygons: list[np.ndarray]) -> list[np.ndarray]:
        """The parts of polygons inside of the window; needs shapely."""
        height, width = self.size
        clip = T.CropTransform(0, 0, width, height)
        clipped: list[np.ndarray] = clip.apply_polygons([self.apply_coords(p) for p in polygons])
        return clipped

    def apply_flow(self, flow: np.ndarray) -> np.ndarray:
        """(H, W, 2) flow between two images → (h, w, 2) flow between their windows."""
        cut = self._cut(flow, cv2.INTER_NEAREST, (np.nan, np.nan))
        return (cut @ self.linear.T).astype(np.float32)

    def _cut(self, image: np.ndarray, interpolation: int, color: Sequence[float]) -> np.ndarray:
        # OpenCV has the centre of the first pixel at 0.
        offset = self.linear @ (0.5, 0.5) + self.offset - 0.5
        height, width = self.size
        cut = cv2.warpAffine(
            np.ascontiguousarray(image),
            np.column_stack([self.linear, offset]),
            (width, height),
            flags=interpolation,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=tuple(color),
        )
        return cut.reshape(height, width, *image.shape[2:])


class RandomWindow(T.Augmentation):
    """Crops, rotates and scales an image at once, so that a rotated crop has few empty corners.

    The window lies inside of the image where it fits, else its centre is that of the image.
    """

    def __init__(
        self,
        *,
        crop: T.RandomCrop | None = None,
        rotation: tuple[float, float] = (0.0, 0.0),
        scale: tuple[float, float] = (1.0, 1.0),
        around: float = 0.0,
        color: Sequence[float] | None = None,
        whole: bool = False,
    ) -> None:
        """
        Args:
            crop: gives the size of the window; None is the size of the image.
            rotation: smallest and largest angle in degrees, counter-clockwise.
            scale: smallest and largest factor on the content; its logarithm is drawn evenly.
            around: probability that the centre of an instance's box lies inside of the window.
            color: outside of the image, one value for each channel; None is the median of the
                image, which resembles its background.
            whole: make the window large enough for the whole image instead.
        """
        super().__init__()
        self.crop = crop
        self.whole = whole
        self.rotation, self.scale = rotation, scale
        self.around = around
        self.color = color

    def get_transform(self, image: np.ndarray, boxes: np.ndarray | None) -> T.Transform:
        """
        Args:
            image: (H, W, C).
            boxes: (N, 4) corners of the instances in pixels; None or N = 0 for no instance.
        """
        height, width = image.shape[:2]
        size = self.crop.get_crop_size((height, width)) if self.crop else (height, width)
        rows, columns = map(int, size)
        angle = float(self._rand_range(*self.rotation))
        scale = float(np.exp(self._rand_range(*np.log(self.scale))))
        linear = WindowTransform((0, 0), angle, scale, (rows, columns)).linear
        if self.whole:
            columns, rows = np.ceil(np.abs(linear) @ (width, height) - 1e-6).astype(int).tolist()
        x, y = self._centre(np.array([width, height]), np.array([columns, rows]), linear, boxes)
        if angle == 0 and scale == 1:
            left = min(max(round(x - columns / 2), 0), width - columns)
            top = min(max(round(y - rows / 2), 0), height - rows)
            return T.CropTransform(left, top, columns, rows, width, height)
        color = self.color
        if color is None:  # every fourth pixel tells as much
            color = np.median(image[::4, ::4], axis=(0, 1)).tolist()
        return WindowTransform((x, y), angle, scale, (rows, columns), color)

    def _centre(
        self, image: Array, window: Array, linear: Array, boxes: np.ndarray | None
    ) -> Array:
        """x and y of the window's centre; sizes are width and height."""
        back = np.linalg.inv(linear)
        reach = np.abs(back) @ (window / 2)
        low, high = np.minimum(reach, image / 2), np.maximum(image - reach, image / 2)
        if boxes is None or not len(boxes) or self._rand_range() >= self.around:
            return np.asarray(self._rand_range(low, high, 2), np.float64)
        box = np.asarray(boxes[np.random.randint(len(boxes))], np.float64)
        instance = (box[:2] + box[2:]) / 2
        for _ in range(_TRIES):
            offset = back @ (self._rand_range(-0.5, 0.5, 2) * window)
            centre: Array = np.clip(instance - offset, low, high)
            # Half a pixel may be lost when the window is rounded to whole pixels.
            if (np.abs(linear @ (instance - centre)) < window / 2 - 0.5).all():
                return centre
        return instance


class SymmetryTransform(T.Transform):
    """One of the eight symmetries of the square: exchanges rows and columns, then mirrors.

    In place of fvcore's flips: its ``VFlipTransform`` refuses what its ``HFlipTransform`` gives.
    """

    def __init__(
        self, size: tuple[int, int], *, transpose: bool, mirror_x: bool, mirror_y: bool
    ) -> None:
        """
        Args:
            size: height and width of the image.
            transpose: exchange rows and columns.
            mirror_x, mirror_y: reverse the columns and rows of the result.
        """
        super().__init__()
        self.transpose, self.mirror_x, self.mirror_y = transpose, mirror_x, mirror_y
        self.height, self.width = size[::-1] if transpose else size

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """(H, W) or (H, W, C) of any type."""
        image = img.swapaxes(0, 1) if self.transpose else img
        image = image[:, ::-1] if self.mirror_x else image
        return np.ascontiguousarray(image[::-1] if self.mirror_y else image)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        x, y = coords.T[::-1] if self.transpose else coords.T
        x = self.width - x if self.mirror_x else x
        return np.stack([x, self.height - y if self.mirror_y else y], axis=1)

    def apply_flow(self, flow: np.ndarray) -> np.ndarray:
        """(H, W, 2) flow between two images → that between the moved ones."""
        signs = np.array([-1.0 if x else 1.0 for x in (self.mirror_x, self.mirror_y)], np.float32)
        moved = self.apply_image(flow)
        return (moved[:, :, ::-1] if self.transpose else moved) * signs


class RandomDihedral(T.Augmentation):
    """One of the eight symmetries of the square: mirror images and rotations by 90 degrees."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        transpose, mirror_x, mirror_y = (np.random.random(3) < 0.5).tolist()
        return SymmetryTransform(
            image.shape[:2], transpose=transpose, mirror_x=mirror_x, mirror_y=mirror_y
        )


def has_windows(cfg: CfgNode) -> bool:
    """Whether the configuration needs more than Detectron2's ``RandomCrop``."""
    node = cfg.INPUT
    return (
        tuple(node.RANDOM_ROTATION) != (0, 0)
        or tuple(node.RANDOM_SCALE) != (1, 1)
        or node.CROP.AROUND_INSTANCES > 0
    )


def build_geometry(
    cfg: CfgNode,
    crop: T.RandomCrop | None = None,
    *,
    color: Sequence[float] | None = None,
    whole: bool = False,
) -> list[T.Augmentation]:
    """The steps of ``INPUT.RANDOM_ROTATION``, ``RANDOM_SCALE``, ``CROP`` and ``RANDOM_DIHEDRAL``.

    They come before all other steps.

    Args:
        crop: that of ``INPUT.CROP``; None for none.
        color: outside of the image; None is its median.
        whole: keep the whole image when it is turned, on a larger canvas.
    """
    steps: list[T.Augmentation] = [crop] if crop else []
    if has_windows(cfg):
        window = RandomWindow(
            crop=crop,
            rotation=tuple(cfg.INPUT.RANDOM_ROTATION),
            scale=tuple(cfg.INPUT.RANDOM_SCALE),
            around=cfg.INPUT.CROP.AROUND_INSTANCES,
            color=color,
            whole=whole,
        )
        steps = [window]
    if cfg.INPUT.RANDOM_DIHEDRAL:
        steps.append(RandomDihedral())
    return steps
