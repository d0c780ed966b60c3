"""Drawing predictions on images."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
from detectron2.structures import Instances

from instseg.errors import ConfigError
from instseg.masks import CroppedMasks
from instseg.visualize.colours import Colours, neighbour_colours, track_colours
from instseg.visualize.texts import Font, Layout, Rectangle, shortened, write_counts

Pixels = npt.NDArray[np.uint8]

LABELS = ("auto", "all", "none")
"""Which labels are written: those that cover no other instance, all of them, or no text at all."""

_PIXELS_PER_LINE = 400
"""Shorter side of an image per pixel of the width of its outlines."""
_EXTENT_PER_LINE = 12
"""Square root of the pixels of a mask per pixel of the width of its outline."""
_LARGEST_LABEL = 1.0
"""Largest label beside an instance, as a share of the instance's pixels."""
_LARGEST_SCORE = 0.25
"""The same for a label that is a score alone, which tells less."""
_BLACK = (0, 0, 0)


@dataclass(frozen=True)
class OverlayStyle:
    """How instances are drawn.

    Attributes:
        labels: one of :data:`LABELS`.
        fill: opacity of the colour inside outlines, from 0 (outlines alone) to 1 (opaque).
        boxes: draw the boxes as well.
    """

    labels: str = "auto"
    fill: float = 0.25
    boxes: bool = False

    def __post_init__(self) -> None:
        if self.labels not in LABELS:
            raise ConfigError(
                f"the labels of overlays are {self.labels!r}; expected {', '.join(LABELS[:-1])} or "
                f"{LABELS[-1]}"
            )
        if not 0 <= self.fill <= 1:
            raise ConfigError(
                f"the fill of overlays is {self.fill}; expected a number from 0 (outlines alone) "
                "to 1 (opaque)"
            )


_DEFAULT_STYLE = OverlayStyle()


def class_name(class_names: Sequence[str] | None, index: int) -> str:
    """Name of class ``index``; ``class 3`` where there is no name for it."""
    return class_names[index] if class_names and index < len(class_names) else f"class {index}"


def at_least(instances: Instances, score: float) -> Instances:
    """Instances with this score or more; if they come first, their masks are not copied."""
    is_scored = instances.scores >= score
    count = int(is_scored.sum())
    return instances[:count] if bool(is_scored[:count].all()) else instances[is_scored]


def draw_instances(
    image_bgr: Pixels,
    instances: Instances,
    class_names: Sequence[str] | None = None,
    min_score: float = 0.0,
    style: OverlayStyle = _DEFAULT_STYLE,
) -> Pixels:
    """Draw masks, labels such as "person 0.87" and the number of each class on a copy of an image.

    A mask is an outline and a light fill; without text no other pixel changes.  Neighbours have
    different colours.  With tracks, a label is such as "#3 person 0.87", and a track has one colour
    in all frames; instances without a track are grey.  The counts stand in the freest corner of the
    image, unless they would cover too much of it.

    supervision's mask annotator is not used: it blends full-size masks, thousands of which on a
    large image take gigabytes.

    Args:
        image_bgr: (H, W, 3) uint8 in BGR order, or grey, (H, W) or (H, W, 1).
        instances: with ``pred_boxes``, ``scores``, ``pred_classes`` and, if the model has masks,
            ``pred_masks``, (N, H, W) bool or :class:`instseg.masks.CroppedMasks`; without masks the
            boxes are drawn.  ``track_ids`` (N,) int64, where there are any, are those of
            :class:`instseg.tracking.Tracker`.  ``colours`` (N, 3) uint8 in BGR order, where there
            are any, replace those of neighbours and tracks.
        class_names: by ``pred_classes``; None writes ``class`` and the number.  The name of a model
            with one class stands in the counts, not in every label.
        min_score: leaves out instances with a lower score.
        style: what is drawn.
    Returns:
        (H, W, 3) uint8 in BGR order.
    """
    grey = image_bgr.ndim == 2 or image_bgr.shape[2] == 1
    image = cv2.cvtColor(image_bgr, cv2.COLOR_GRAY2BGR) if grey else image_bgr
    scene: Pixels = np.array(image, dtype=np.uint8, order="C")
    shown = at_least(instances, min_score).to("cpu")
    if not len(shown):
        return scene
    has_masks = shown.has("pred_masks")
    size = (scene.shape[0], scene.shape[1])
    masks = CroppedMasks.of(shown.pred_masks) if has_masks else _filled_boxes(shown, size)
    colours = _colours(shown, masks)
    if has_masks:
        _draw_masks(scene, masks, colours, style.fill)
    if style.boxes or not has_masks:
        _draw_boxes(scene, shown, colours)
    if style.labels != "none":
        _write_texts(scene, shown, masks, colours, class_names, keep_all=style.labels == "all")
    return scene


def label_texts(instances: Instances, class_names: Sequence[str] | None) -> list[str]:
    """The label of each instance: track, class where there are several, and score."""
    labels = []
    for index, score in enumerate(instances.scores.tolist()):
        words = [f"{score:.2f}"]
        if class_names is None or len(class_names) != 1:
            words.insert(0, shortened(class_name(class_names, int(instances.pred_classes[index]))))
        if instances.has("track_ids") and (number := int(instances.track_ids[index])) >= 0:
            words.insert(0, f"#{number}")
        labels.append(" ".join(words))
    return labels


def _line_width(image_size: tuple[int, int]) -> int:
    return max(1, round(min(image_size) / _PIXELS_PER_LINE))


def _filled_boxes(instances: Instances, image_size: tuple[int, int]) -> CroppedMasks:
    """The pixels of each box, of instances without masks."""
    height, width = image_size
    boxes = instances.pred_boxes.tensor.round().numpy().clip(0, (width, height) * 2).astype(int)
    sizes = (boxes[:, 2:] - boxes[:, :2]).clip(0)
    crops = (np.ones((rows, columns), dtype=np.bool_) for columns, rows in sizes.tolist())
    return CroppedMasks.from_crops(crops, boxes[:, :2], image_size)


def _colours(instances: Instances, masks: CroppedMasks) -> Colours:
    if instances.has("colours"):
        return np.asarray(instances.colours, dtype=np.uint8)
    if instances.has("track_ids"):
        return track_colours(instances.track_ids.numpy())
    return neighbour_colours(masks.boxes.double().numpy())


def _draw_masks(scene: Pixels, masks: CroppedMasks, colours: Colours, fill: float) -> None:
    """Blend every mask with its colour and draw its outline inside it, smaller masks on top."""
    areas = masks.areas()
    order = np.argsort(-areas, kind="stable").tolist()
    values = np.arange(256)[:, None]
    for index in order if fill else ():
        x, y, crop = masks.crop(index)
        region = Rectangle(x, y, crop.shape[1], crop.shape[0]).of(scene)
        blended = np.rint((1 - fill) * values + fill * colours[index]).astype(np.uint8)
        if region.size:
            np.copyto(region, cv2.LUT(region, blended[None]), where=crop[:, :, None])
    widest = _line_width(masks.image_size)
    for index in order:
        x, y, crop = masks.crop(index)
        width = min(widest, max(1, int(math.sqrt(areas[index]) / _EXTENT_PER_LINE)))
        outline = _outline(crop, width)
        Rectangle(x, y, crop.shape[1], crop.shape[0]).of(scene)[outline] = colours[index]


def _outline(mask: npt.NDArray[np.bool_], width: int) -> npt.NDArray[np.bool_]:
    """The pixels of a mask that lie at most ``width`` pixels from its edge, also that of holes."""
    if not mask.size:
        return mask
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * width + 1, 2 * width + 1))
    pixels = np.ascontiguousarray(mask).view(np.uint8)
    inner = cv2.erode(pixels, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    outline: npt.NDArray[np.bool_] = mask & (inner == 0)
    return outline


def _draw_boxes(scene: Pixels, instances: Instances, colours: Colours) -> None:
    boxes = instances.pred_boxes.tensor.round().int().tolist()
    width = _line_width((scene.shape[0], scene.shape[1]))
    for (x1, y1, x2, y2), colour in zip(boxes, colours.tolist(), strict=True):
        cv2.rectangle(scene, (x1, y1), (x2 - 1, y2 - 1), colour, width)


def _write_texts(
    scene: Pixels,
    instances: Instances,
    masks: CroppedMasks,
    colours: Colours,
    class_names: Sequence[str] | None,
    *,
    keep_all: bool,
) -> None:
    """Write the counts into a corner, and the labels where they fit, or all of them."""
    font, layout = Font(masks.image_size), Layout(masks)
    counts = Counter(instances.pred_classes.tolist())
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    lines = [f"{shortened(class_name(class_names, number))} {count}" for number, count in ranked]
    write_counts(scene, lines, font, layout)
    tops = instances.pred_boxes.tensor[:, :2].round().int().tolist()
    for index, text in enumerate(label_texts(instances, class_names)):
        width, height = font.size(text)
        largest = _LARGEST_LABEL if " " in text else _LARGEST_SCORE
        rectangle = layout.beside(index, width, height, math.inf if keep_all else largest)
        if rectangle is None and keep_all:
            x = max(0, min(tops[index][0], scene.shape[1] - width))
            y = max(0, min(tops[index][1] - height, scene.shape[0] - height))
            rectangle = Rectangle(x, y, min(width, scene.shape[1]), min(height, scene.shape[0]))
        if rectangle is not None:
            layout.take(rectangle)
            rectangle.of(scene)[:] = colours[index]
            font.write(scene, text, rectangle, _BLACK)
