"""The augmentations of SSD (Liu et al., 2016, arXiv 1512.02325) as Detectron2 ``Augmentation``s.

They follow the training code of YOLACT's authors, in its order: colours, expansion, crop, mirror,
stretching to a square.  Images become float32 and are not clipped to 0..255.
"""

from collections.abc import Sequence

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from PIL import Image

from instseg.data.images import check_colour

_CROP_TRIES = 50
_SMALLEST_CROP = 0.3
"""Fraction of the image's width and height."""
_CROP_CHOICES = 6
"""SSD's choices: no crop, or one of five kinds of crop that all have the same effect here."""


def build_ssd_augmentations(cfg: CfgNode) -> list[T.Augmentation]:
    """The pipeline ``INPUT.AUGMENTATION ssd``.

    Raises:
        ConfigError: ``INPUT.SSD_COLORS`` for images of one channel.
    """
    augmentations: list[T.Augmentation] = []
    if cfg.INPUT.SSD_COLORS:
        check_colour(cfg, "INPUT.SSD_COLORS")
        augmentations.append(PhotometricDistortion(cfg.INPUT.FORMAT))
    if cfg.INPUT.SSD_EXPAND_RATIO > 1:
        color = cfg.INPUT.SSD_EXPAND_COLOR or cfg.MODEL.PIXEL_MEAN
        crop = RandomBoxCrop() if cfg.INPUT.SSD_CROP else None
        augmentations.append(RandomExpansion(color, cfg.INPUT.SSD_EXPAND_RATIO, crop))
    elif cfg.INPUT.SSD_CROP:
        augmentations.append(RandomBoxCrop())
    if cfg.INPUT.RANDOM_FLIP != "none":
        horizontal = cfg.INPUT.RANDOM_FLIP == "horizontal"
        augmentations.append(T.RandomFlip(horizontal=horizontal, vertical=not horizontal))
    return [*augmentations, Stretch(cfg.INPUT.SQUARE_SIZE)]


class PhotometricTransform(T.Transform):
    """Changes colours; coordinates and masks stay the same."""

    def __init__(
        self,
        image_format: str,
        *,
        brightness: float = 0.0,
        contrast: float = 1.0,
        saturation: float = 1.0,
        hue: float = 0.0,
        contrast_first: bool = True,
    ) -> None:
        """
        Args:
            image_format: "BGR" or "RGB".
            brightness: added to every value.
            contrast: factor on every value.
            saturation: factor on the saturation (of hue, saturation, value).
            hue: degrees to rotate the hue by.
            contrast_first: change the contrast before saturation and hue, not after them.
        """
        super().__init__()
        self.image_format = image_format
        self.brightness = brightness
        self.contrast = contrast
        self.saturation = saturation
        self.hue = hue
        self.contrast_first = contrast_first

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """(H, W, 3) of any type → the same as float32, not clipped."""
        image: np.ndarray = img.astype(np.float32)
        if self.brightness:
            image += np.float32(self.brightness)
        if self.contrast_first and self.contrast != 1:
            image *= np.float32(self.contrast)
        if self.saturation != 1 or self.hue:
            to_hsv = getattr(cv2, f"COLOR_{self.image_format}2HSV")
            from_hsv = getattr(cv2, f"COLOR_HSV2{self.image_format}")
            hsv = cv2.cvtColor(image, to_hsv)  # float32: hue in degrees
            if self.saturation != 1:
                hsv[..., 1] = hsv[..., 1] * np.float32(self.saturation)
            if self.hue:
                hsv[..., 0] = _turned(hsv[..., 0], self.hue)
            image = cv2.cvtColor(hsv, from_hsv)
        if not self.contrast_first and self.contrast != 1:
            image *= np.float32(self.contrast)
        return image

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return segmentation


def _turned(hues: np.ndarray, angle: float) -> np.ndarray:
    """(hues + angle) % 360 for float32 hues in 0 to 360; NumPy's % takes five times as long."""
    turned: np.ndarray = hues + np.float32(np.fmod(angle, 360))
    if angle < 0:
        turned += np.float32(360) * (turned < 0)
    else:
        turned -= np.float32(360) * (turned >= 360)
    return turned


class PhotometricDistortion(T.Augmentation):
    """Random brightness, contrast, saturation and hue, each in half of the images."""

    def __init__(
        self,
        image_format: str,
        brightness: float = 32.0,
        contrast: tuple[float, float] = (0.5, 1.5),
        saturation: tuple[float, float] = (0.5, 1.5),
        hue: float = 18.0,
    ) -> None:
        """
        Args:
            image_format: "BGR" or "RGB".
            brightness: largest number added or subtracted.
            contrast: smallest and largest factor.
            saturation: smallest and largest factor.
            hue: largest rotation in degrees.
        """
        super().__init__()
        self.image_format = image_format
        self.brightness = brightness
        self.contrast = contrast
        self.saturation = saturation
        self.hue = hue

    def get_transform(self, image: np.ndarray) -> T.Transform:
        return PhotometricTransform(
            self.image_format,
            brightness=self._or(0.0, -self.brightness, self.brightness),
            contrast=self._or(1.0, *self.contrast),
            saturation=self._or(1.0, *self.saturation),
            hue=self._or(0.0, -self.hue, self.hue),
            contrast_first=self._rand_range() < 0.5,
        )

    def _or(self, neutral: float, low: float, high: float) -> float:
        return float(self._rand_range(low, high)) if self._rand_range() < 0.5 else neutral


class CanvasTransform(T.Transform):
    """Places an image on a canvas without instances; what lies beyond the canvas is cut off."""

    def __init__(
        self, x: int, y: int, width: int, height: int, color: Sequence[float] = (0.0,)
    ) -> None:
        """
        Args:
            x, y: position of the image's upper left corner on the canvas, or beyond it.
            width, height: of the canvas.
            color: of the canvas, one value for each channel or for all.
        """
        super().__init__()
        self.x, self.y = x, y
        self.width, self.height = width, height
        self.color = tuple(color)

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        return self._placed(img, self.color)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return self._placed(segmentation, (0,))

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords + np.array([self.x, self.y], dtype=coords.dtype)

    def apply_flow(self, flow: np.ndarray) -> np.ndarray:
        """(H, W, 2) flow between two images → that between their canvases, NaN beside them."""
        return self._placed(flow, (np.nan,))

    def _placed(self, image: np.ndarray, color: Sequence[float]) -> np.ndarray:
        height, width = image.shape[:2]
        top, left = max(self.y, 0), max(self.x, 0)
        bottom, right = min(self.y + height, self.height), min(self.x + width, self.width)
        shape = self.height, self.width, *image.shape[2:]
        values = np.broadcast_to(np.asarray(color).astype(image.dtype), image.shape[2:] or 1)
        if top >= bottom or left >= right:
            return np.full(shape, values, image.dtype)
        # OpenCV writes each pixel once; NumPy would fill the canvas channel by channel.
        return cv2.copyMakeBorder(
            image[top - self.y : bottom - self.y, left - self.x : right - self.x],
            top,
            self.height - bottom,
            left,
            self.width - right,
            cv2.BORDER_CONSTANT | cv2.BORDER_ISOLATED,
            value=values.tolist(),
        ).reshape(shape)


class RandomExpansion(T.Augmentation):
    """Makes the instances of every second image smaller, by up to ``max_ratio``.

    Crops any image then if ``crop`` is given.
    """

    def __init__(
        self,
        color: Sequence[float],
        max_ratio: float = 4.0,
        crop: "RandomBoxCrop | None" = None,
    ) -> None:
        """
        Args:
            color: of the canvas, one value for each channel.
            max_ratio: largest factor on width and height.
            crop: follows at once, so that no canvas is filled only to be cut off; None for none.
        """
        super().__init__()
        self.color = tuple(color)
        self.max_ratio = max_ratio
        self.crop = crop

    def get_transform(self, image: np.ndarray, boxes: np.ndarray) -> T.Transform:
        """
        Args:
            image: (H, W, C).
            boxes: (N, 4) corners of the instances in pixels, for the crop.
        """
        canvas = self._canvas(*image.shape[:2])
        if canvas is None:
            return self.crop.get_transform(image, boxes) if self.crop else T.NoOpTransform()
        window = self.crop and self.crop.window(
            canvas.height, canvas.width, canvas.apply_box(boxes)
        )
        if window is None:
            return canvas
        x0, y0, x1, y1 = window
        return CanvasTransform(canvas.x - x0, canvas.y - y0, x1 - x0, y1 - y0, self.color)

    def _canvas(self, height: int, width: int) -> CanvasTransform | None:
        if self._rand_range() < 0.5:
            return None
        ratio = self._rand_range(1, self.max_ratio)
        x = self._rand_range(0, width * ratio - width)
        y = self._rand_range(0, height * ratio - height)
        return CanvasTransform(int(x), int(y), int(width * ratio), int(height * ratio), self.color)


class RandomBoxCrop(T.Augmentation):
    """Crops five of six images, and keeps the centre of at least one instance.

    A crop has 0.3 to 1 times the image's width and height, and neither side is more than twice the
    other.  SSD's minimum IoU of crop and instance is left out: the authors' code never applies it.
    """

    def get_transform(self, image: np.ndarray, boxes: np.ndarray) -> T.Transform:
        """
        Args:
            image: (H, W, C).
            boxes: see :meth:`window`.
        """
        height, width = image.shape[:2]
        window = self.window(height, width, boxes)
        if window is None:
            return T.NoOpTransform()
        x0, y0, x1, y1 = window
        return T.CropTransform(x0, y0, x1 - x0, y1 - y0, width, height)

    def window(
        self, height: int, width: int, boxes: np.ndarray
    ) -> tuple[int, int, int, int] | None:
        """Corners (x0, y0, x1, y1) of a crop; None for the whole image.

        Args:
            height, width: of the image.
            boxes: (N, 4) corners of the instances in pixels; without boxes any crop is allowed.
        """
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        while self._rand_range(0, _CROP_CHOICES) >= 1:
            for _ in range(_CROP_TRIES):
                x0, y0, x1, y1 = self._draw(height, width)
                if min(x1 - x0, y1 - y0) < 1:
                    continue
                inside = (centres > (x0, y0)) & (centres < (x1, y1))
                if not len(boxes) or inside.all(axis=1).any():
                    return x0, y0, x1, y1
        return None

    def _draw(self, height: int, width: int) -> tuple[int, int, int, int]:
        """A random window (x0, y0, x1, y1) in pixels; all zeros if its shape is not allowed."""
        w = self._rand_range(_SMALLEST_CROP * width, width)
        h = self._rand_range(_SMALLEST_CROP * height, height)
        if not 0.5 <= h / w <= 2:
            return 0, 0, 0, 0
        x, y = self._rand_range(0, width - w), self._rand_range(0, height - h)
        return int(x), int(y), int(x + w), int(y + h)


class StretchTransform(T.ResizeTransform):
    """Detectron2's, but float images go through OpenCV, as in the authors' code.

    torch, which Detectron2 uses for them, takes nine times as long.  Values of 0 to 255 differ by
    up to 0.03, since OpenCV rounds the weights of neighbours otherwise.
    """

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """(H, W) or (H, W, C) → (new_h, new_w) or (new_h, new_w, C)."""
        if img.dtype != np.float32 or interp is not None:
            resized: np.ndarray = super().apply_image(img, interp)
            return resized
        # A mirror image is an array that runs backwards: OpenCV would copy all of it first.
        forwards = tuple(slice(None, None, -1 if step < 0 else 1) for step in img.strides[:2])
        size = self.new_w, self.new_h
        stretched = cv2.resize(img[forwards], size, interpolation=cv2.INTER_LINEAR)
        return stretched.reshape(*size[::-1], *img.shape[2:])[forwards]


class Stretch(T.Augmentation):
    """Stretches images to a square."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def get_transform(self, image: np.ndarray) -> T.Transform:
        return StretchTransform(*image.shape[:2], self.side, self.side, Image.Resampling.BILINEAR)
