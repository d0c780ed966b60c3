"""Draw the same images under all shipped models, with the ground truth where it is known.

python tools/side_by_side.py --output side_by_side.png IMAGE [IMAGE ...]
python tools/side_by_side.py --output side_by_side.png --data nuclei_val --count 4
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.structures import Boxes, Instances

from instseg import Predictor
from instseg.data.build import register_builtin_datasets, register_dataset
from instseg.data.dataset import load
from instseg.data.images import read_image
from instseg.errors import InstsegError, one_line
from instseg.masks import CroppedMasks
from instseg.shipped import ShippedModel, shipped_models
from instseg.visualize import OverlayStyle, draw_instances, gallery

SIDE = 288
"""Pixels of a tile."""
COLUMNS = 6
STYLE = OverlayStyle(labels="none", fill=0.3)


@dataclass(frozen=True)
class Shown:
    """An image to be drawn.

    Attributes:
        pixels: (H, W, 3) uint8 in BGR order.
        ground_truth: the true instances; None if they are unknown.
    """

    pixels: np.ndarray
    ground_truth: Instances | None = None


def of_data(name: str, count: int) -> list[Shown]:
    """The first images of a data set, with their ground truth."""
    register_builtin_datasets()
    register_dataset(name)
    shown = []
    for record in load(name).records[:count]:
        rles = [entry["segmentation"] for entry in record["annotations"]]
        pixels = read_image(record["file_name"])
        shown.append(Shown(pixels, as_instances(CroppedMasks.from_rles(rles, pixels.shape[:2]))))
    return shown


def of_labels(pixels: np.ndarray, labels: np.ndarray) -> Shown:
    """An image with its label image, (H, W) numbers of instances and 0 for background."""
    numbers = np.unique(labels[labels > 0])
    masks = torch.from_numpy(labels[None] == numbers[:, None, None])
    return Shown(pixels, as_instances(CroppedMasks.of(masks)))


def as_instances(masks: CroppedMasks) -> Instances:
    """Masks as instances with the score 1."""
    count = len(masks)
    fields = {"scores": torch.ones(count), "pred_classes": torch.zeros(count, dtype=torch.int64)}
    boxes = Boxes(masks.boxes.float())
    return Instances(masks.image_size, pred_boxes=boxes, pred_masks=masks, **fields)


def side_by_side(images: Sequence[Shown], models: Sequence[ShippedModel]) -> np.ndarray:
    """One image of all: for each image its truth, and what every model finds in it.

    Args:
        images: each takes one or more whole rows.
        models: of ``zoo/``.  Instances with at least ``TEST.CONTEST_SCORE_THRESH`` are drawn; of
            those that cover each other only the best one.
    Returns:
        (H, W, 3) uint8 in BGR order.
    """
    rows = [[_truth(shown)] for shown in images]
    for model in models:
        predictor = Predictor.from_zoo(model.name, masks="cropped")
        min_score = predictor.cfg.TEST.CONTEST_SCORE_THRESH
        for shown, row in zip(images, rows, strict=True):
            predicted = predictor(shown.pixels)["instances"].to("cpu")
            predicted = disjoint(predicted[predicted.scores >= min_score])
            drawn = draw_instances(brightened(shown.pixels), predicted, style=STYLE)
            row.append(tile(drawn, f"{model.name}: {len(predicted)}"))
    blank = np.full_like(rows[0][0], 255)
    columns = min(COLUMNS, len(rows[0]))
    tiles = [tile for row in rows for tile in (*row, *[blank] * (-len(row) % columns))]
    return gallery(tiles, columns)


def disjoint(instances: Instances) -> Instances:
    """The best instances of which none covers more than half of another one."""
    order = instances.scores.argsort(descending=True, stable=True)
    instances = instances[order]
    taken = np.zeros(instances.image_size, dtype=bool)
    kept = []
    for index in range(len(instances)):
        x, y, crop = instances.pred_masks.crop(index)
        part = taken[y : y + crop.shape[0], x : x + crop.shape[1]]
        if crop.any() and 2 * (part & crop).sum() <= crop.sum():
            part |= crop
            kept.append(index)
    return instances[kept]


def _truth(shown: Shown) -> np.ndarray:
    pixels = brightened(shown.pixels)
    if shown.ground_truth is None:
        return tile(pixels, "image")
    drawn = draw_instances(pixels, shown.ground_truth, style=STYLE)
    return tile(drawn, f"ground truth: {len(shown.ground_truth)}")


def brightened(pixels: np.ndarray) -> np.ndarray:
    """An image whose brightest pixels are white; many images of nuclei look black otherwise."""
    factor = 255 / max(float(np.percentile(pixels, 99.8)), 1.0)
    return cv2.convertScaleAbs(pixels, alpha=max(factor, 1.0))


def tile(image: np.ndarray, title: str) -> np.ndarray:
    """An image scaled into a square with a title above it."""
    scale = SIDE / max(image.shape[:2])
    size = [max(1, round(side * scale)) for side in image.shape[1::-1]]
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    scaled = cv2.resize(image, size, interpolation=method)
    frame = np.full((SIDE + 26, SIDE, 3), 255, np.uint8)
    frame[26 : 26 + size[1], : size[0]] = scaled
    font = cv2.FONT_HERSHEY_SIMPLEX
    width = cv2.getTextSize(title, font, 0.5, 1)[0][0]
    factor = 0.5 * min(1.0, (SIDE - 4) / width)
    cv2.putText(frame, title, (2, 18), font, factor, (0, 0, 0), 1, cv2.LINE_AA)
    return frame


def write(file: Path, images: Sequence[Shown], models: Sequence[ShippedModel]) -> str:
    """Write the image of all; returns a sentence about the file."""
    if not models:
        return "no models are shipped, so that there is nothing to draw side by side"
    file.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(file), side_by_side(images, models))
    return f"{file}: {len(images)} images under {len(models)} shipped models"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", nargs="*", metavar="IMAGE")
    parser.add_argument("--data", metavar="NAME", help="images of a data set, with their truth")
    parser.add_argument("--count", type=int, default=4, help="of them (default %(default)s)")
    parser.add_argument("--models", default="", metavar="END", help="end of their names: _nuclei")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.png")
    args = parser.parse_args(argv)
    try:
        images = [Shown(read_image(name)) for name in args.images]
        images += of_data(args.data, args.count) if args.data else []
        if not images:
            parser.error("no images; name files, or --data NAME")
        models = [model for model in shipped_models() if model.name.endswith(args.models)]
        print(write(args.output, images, models))
    except InstsegError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
