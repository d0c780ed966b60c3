"""Drawing predictions on images and tiling images into figures."""

from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt
import torch
from detectron2.structures import Instances
from torchvision.utils import make_grid

from instseg.masks import CroppedMasks

Pixels = npt.NDArray[np.uint8]

_GALLERY_GAP = 4


def class_name(class_names: Sequence[str] | None, index: int) -> str:
    """Name of class ``index``; ``class 3`` where there is no name for it."""
    return class_names[index] if class_names and index < len(class_names) else f"class {index}"


def at_least(instances: Instances, score: float) -> Instances:
    """Those with this score or a higher one, without a copy of their masks if they come first."""
    sure = instances.scores >= score
    count = int(sure.sum())
    return instances[:count] if bool(sure[:count].all()) else instances[sure]


def draw_instances(
    image_bgr: Pixels,
    instances: Instances,
    class_names: Sequence[str] | None = None,
    min_score: float = 0.0,
    *,
    boxes: bool = False,
    labels: bool = True,
) -> Pixels:
    """Draw masks and labels such as "person 0.87" on a copy of an image.

    Neighbouring objects of one class get different colours, as colours follow the order of the
    instances.  With tracks, a label is such as "#3 person 0.87", and a track has one colour in all
    frames; what belongs to no track is grey.

    Args:
        image_bgr: (H, W, 3) uint8 in BGR order.
        instances: with ``pred_boxes``, ``scores``, ``pred_classes`` and, if the model has masks,
            ``pred_masks`` (N, H, W); without masks the boxes are drawn.  ``track_ids`` (N,) int64,
            where there are any, are those of :class:`instseg.tracking.Tracker`.
        class_names: by ``pred_classes``; None writes ``class`` and the number.
        min_score: leaves out instances with a lower score.
        boxes: draw the boxes as well.
        labels: write the labels.
    Returns:
        (H, W, 3) uint8 in BGR order.
    """
    import supervision as sv

    scene = np.array(image_bgr, order="C")
    shown = at_least(instances, min_score).to("cpu")
    if not len(shown):
        return scene
    if shown.has("pred_masks") and isinstance(shown.pred_masks, CroppedMasks):
        shown.pred_masks = shown.pred_masks.to_dense()
    detections = sv.Detections.from_detectron2({"instances": shown})
    height, width = scene.shape[:2]
    lookup = sv.ColorLookup.INDEX
    if shown.has("track_ids"):
        detections.tracker_id, lookup = shown.track_ids.numpy(), sv.ColorLookup.TRACK
    scene = sv.MaskAnnotator(color_lookup=lookup).annotate(scene, detections)
    thickness = sv.calculate_optimal_line_thickness((width, height))
    if boxes or detections.mask is None:
        scene = sv.BoxAnnotator(thickness=thickness, color_lookup=lookup).annotate(
            scene, detections
        )
    if labels:
        texts = _labels(shown, class_names)
        annotator = sv.LabelAnnotator(
            color_lookup=lookup,
            text_color=sv.Color.BLACK,
            text_scale=sv.calculate_optimal_text_scale((width, height)),
            text_padding=3,
            smart_position=False,
        )
        scene = annotator.annotate(scene, detections, labels=texts)
    return np.asarray(scene, dtype=np.uint8)


def _labels(instances: Instances, class_names: Sequence[str] | None) -> list[str]:
    labels = []
    for index, score in enumerate(instances.scores.tolist()):
        label = f"{class_name(class_names, int(instances.pred_classes[index]))} {score:.2f}"
        if instances.has("track_ids") and (number := int(instances.track_ids[index])) >= 0:
            label = f"#{number} {label}"
        # JSON can name half of a surrogate pair, at which OpenCV crashes.
        labels.append(label.encode(errors="replace").decode())
    return labels


def gallery(images: Sequence[Pixels], columns: int) -> Pixels:
    """Tile images row by row on white.

    Args:
        images: (H, W, 3) uint8 images, possibly of different sizes; each is centred in a cell as
            large as the largest height and the largest width, and never scaled.
        columns: cells per row; fewer where there are fewer images.  One alone has no margin.
    Returns:
        (H', W', 3) uint8.
    Raises:
        ValueError: no images, or no columns.
    """
    if not len(images) or columns < 1:
        raise ValueError(f"a gallery of {len(images)} images in {columns} columns is empty")
    height = max(image.shape[0] for image in images)
    width = max(image.shape[1] for image in images)
    cells = [torch.from_numpy(_centred(image, height, width)) for image in images]
    grid = make_grid(
        torch.stack(cells).permute(0, 3, 1, 2), columns, padding=_GALLERY_GAP, pad_value=255
    )
    return np.ascontiguousarray(grid.permute(1, 2, 0).numpy())


def _centred(image: Pixels, height: int, width: int) -> Pixels:
    """``image`` in the middle of a white one of this size."""
    top, left = (height - image.shape[0]) // 2, (width - image.shape[1]) // 2
    bottom, right = height - image.shape[0] - top, width - image.shape[1] - left
    white = (255, 255, 255)
    framed = cv2.copyMakeBorder(image, top, bottom, left, right, cv2.BORDER_CONSTANT, value=white)
    return np.asarray(framed, dtype=np.uint8)
