"""Make a large image of those of a data set, with its ground truth, and score predictions on it.

    python tools/mosaic.py make mosaic.tif --side 16384
    instseg predict --model mask_rcnn_nuclei --input mosaic.tif --output out --tile 1024
        INPUT.NORMALIZE none
    python tools/mosaic.py score mosaic.json out/predictions.json

``make`` writes a tiled TIFF and beside it a file in COCO's format, whose ``cells`` say where each
image lies.  Rows are filled with whole images of one height in random order, as wide as they are;
the right and the lower border of the mosaic cut those that do not fit.  A mosaic looks like one
exposure: each image is stretched as ``INPUT.NORMALIZE percentile`` stretches it (predict with
``INPUT.NORMALIZE none``), and has a margin as bright as its background.  Without these, a step in
brightness looks like the border of a nucleus, and a nucleus that an image cuts touches one of the
next image.

``score`` gives the contest's metric (TP / (TP + FP + FN), ``instseg.evaluation.contest``) of each
whole cell, for the predictions that have their centre in it.  The mean over the cells of an image,
and over the images then, compares with evaluation on the single images.  With ``--tile`` and
``--overlap`` it also counts instances with a straight edge on a line where tiles end.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from instseg.benchmark.tiles import f1
from instseg.config.nodes import get_cfg
from instseg.data.build import register_dataset
from instseg.data.dataset import load
from instseg.data.images import read_image
from instseg.data.intensity import Intensity
from instseg.evaluation.contest import image_scores
from instseg.files import atomic_write
from instseg.inference.layout import Layout, Rect
from instseg.masks import CroppedMasks, coco_annotation_of, to_rle


def make(output: Path, side: int, name: str, seed: int, margin: int) -> int:
    """Write ``output`` and the ground truth beside it; returns the number of instances."""
    import tifffile

    get_cfg()  # registers the built-in data sets
    register_dataset(name)
    dataset = load(name)
    generator = np.random.default_rng(seed)
    mosaic = np.zeros((side, side, 3), np.uint8)
    heights = defaultdict(list)
    for record in dataset.records:
        heights[record["height"]].append(record)
    cells: list[dict[str, Any]] = []
    masks: list[CroppedMasks] = []
    classes: list[int] = []
    top = 0
    with tqdm(total=side, unit="row", disable=None) as bar:
        while top < side:
            height = dataset.records[int(generator.integers(len(dataset.records)))]["height"]
            left = 0
            while left < side:
                record = heights[height][int(generator.integers(len(heights[height])))]
                image = framed_image(record, margin)[: side - top, : side - left]
                mosaic[top : top + image.shape[0], left : left + image.shape[1]] = image
                x, y = left + margin, top + margin
                placed, kinds = placed_instances(record, x, y, side)
                masks.append(placed)
                classes += kinds
                if x + record["width"] <= side and y + height <= side:
                    cell = {"x": x, "y": y, "width": record["width"], "height": height}
                    cells.append({"file_name": Path(record["file_name"]).name, **cell})
                left += record["width"] + 2 * margin
            top += height + 2 * margin
            bar.update(height + 2 * margin)
    grey = (mosaic == mosaic[:, :, :1]).all()
    tifffile.imwrite(
        output,
        mosaic[:, :, 0] if grey else mosaic,
        tile=(256, 256),
        photometric="minisblack" if grey else "rgb",
    )
    instances = CroppedMasks.cat(masks)
    ids = dataset.category_ids or dict(enumerate(range(len(dataset.classes))))
    rles = instances.to_rle()
    content = {
        "images": [{"id": 1, "file_name": output.name, "width": side, "height": side}],
        "categories": dataset.categories.as_coco() if dataset.categories else [],
        "annotations": [
            {"id": number, "image_id": 1, **coco_annotation_of(rle, ids[kind])}
            for number, (rle, kind) in enumerate(zip(rles, classes, strict=True), start=1)
        ],
        "cells": cells,
    }
    text = json.dumps(content).encode()
    atomic_write(output.with_suffix(".json"), lambda file: file.write(text))
    return len(instances)


def framed_image(record: dict[str, Any], margin: int) -> np.ndarray:
    """(h + 2 margin, w + 2 margin, 3) uint8: an image stretched, its margin like its background."""
    image = read_image(record["file_name"], format="RGB", intensity=Intensity("percentile"))
    background = masks_of(record["annotations"], *image.shape[:2]).to_label_image() == 0
    framed = np.empty((image.shape[0] + 2 * margin, image.shape[1] + 2 * margin, 3), np.uint8)
    framed[:] = np.median(image[background], axis=0) if background.any() else 0
    framed[margin : margin + image.shape[0], margin : margin + image.shape[1]] = image
    return framed


def masks_of(annotations: list[dict[str, Any]], height: int, width: int) -> CroppedMasks:
    rles = [to_rle(item["segmentation"], height, width) for item in annotations]
    return CroppedMasks.from_rles(rles, (height, width))


def placed_instances(
    record: dict[str, Any], left: int, top: int, side: int
) -> tuple[CroppedMasks, list[int]]:
    """Instances of an image at its place in the mosaic, cut by its border, and their classes."""
    masks = masks_of(record["annotations"], record["height"], record["width"])
    crops = [masks.crop(index) for index in range(len(masks))]
    corners = np.array([(x + left, y + top) for x, y, _ in crops]).reshape(-1, 2)
    placed = CroppedMasks.from_crops([crop for _, _, crop in crops], corners, (side, side))
    kept_rows = np.flatnonzero(placed.boxes[:, 2].numpy() > 0)
    return placed[kept_rows], [record["annotations"][index]["category_id"] for index in kept_rows]


def score(ground_truth_file: Path, predictions: Path, confidence: float) -> dict[str, float]:
    """F1 of the whole mosaic, and the contest's metric by images."""
    content = json.loads(ground_truth_file.read_text())
    size = content["images"][0]["height"], content["images"][0]["width"]
    ground_truth = CroppedMasks.from_rles(
        [item["segmentation"] for item in content["annotations"]], size
    )
    records = json.loads(predictions.read_text())
    records = sorted(
        (item for item in records if item["score"] >= confidence), key=lambda item: -item["score"]
    )
    predicted = CroppedMasks.from_rles([item["segmentation"] for item in records], size)
    by_image = defaultdict(list)
    for cell in content["cells"]:
        rect = Rect(cell["x"], cell["y"], cell["x"] + cell["width"], cell["y"] + cell["height"])
        # In the contest a pixel belongs to the prediction with the best score.
        scores = image_scores(label_map(ground_truth, rect), label_map(predicted, rect))
        by_image[cell["file_name"]].append(scores)
    means = 100 * np.mean([np.mean(scores, axis=0) for scores in by_image.values()], axis=0)
    return {
        "instances": len(predicted),
        "truth": len(ground_truth),
        "F1": 100 * f1(predicted, ground_truth),
        "AP50": float(means[0]),
        "AP": float(means.mean()),
    }


def label_map(masks: CroppedMasks, rect: Rect) -> np.ndarray:
    """(h, w) int32 of a part of the image: 0, or 1 + the number of an instance, the first on top.

    Only instances with the centre of their box in ``rect`` count.
    """
    boxes = masks.boxes.numpy()
    x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    inside = (rect.x0 <= x) & (x < rect.x1) & (rect.y0 <= y) & (y < rect.y1)
    labels = np.zeros((rect.y1 - rect.y0, rect.x1 - rect.x0), np.int32)
    chosen = np.flatnonzero(inside)
    for number, index in reversed(list(enumerate(chosen.tolist(), start=1))):
        left, top, crop = masks.crop(index)
        box = Rect(left, top, left + crop.shape[1], top + crop.shape[0])
        part = box.intersection(rect)
        mask = crop[part.y0 - top : part.y1 - top, part.x0 - left : part.x1 - left]
        labels[part.y0 - rect.y0 : part.y1 - rect.y0, part.x0 - rect.x0 : part.x1 - rect.x0][
            mask
        ] = number
    return labels


def straight_edges(masks: CroppedMasks, layout: Layout, length: int = 6) -> int:
    """Instances with ``length`` pixels in a row that end at an inner edge of a tile."""
    return sum(
        any(longest_run(edge) >= length for edge in edges_at_seams(*masks.crop(index), layout))
        for index in range(len(masks))
    )


def edges_at_seams(x: int, y: int, mask: np.ndarray, layout: Layout) -> list[np.ndarray]:
    """For each line where tiles end, which pixels of an instance end at it."""
    framed = np.pad(mask, 1)
    edges = []
    for ends, first, axis in ((layout.rows, y, 0), (layout.columns, x, 1)):
        lines = np.unique(ends)[1:-1] - first
        for before in lines[(lines >= 0) & (lines + 1 < framed.shape[axis])].tolist():
            one, other = framed.take(before, axis), framed.take(before + 1, axis)
            edges += [one & ~other, other & ~one]
    return edges


def longest_run(line: np.ndarray) -> int:
    changes = np.flatnonzero(np.diff(np.pad(line.astype(np.int8), 1)))
    return int((changes[1::2] - changes[::2]).max(initial=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("make").add_argument
    add("output", type=Path, metavar="FILE.tif")
    add("--side", type=int, default=16384, metavar="N", help="pixels (default %(default)s)")
    add("--dataset", default="nuclei_val", metavar="NAME", help="default %(default)s")
    add("--seed", type=int, default=0, metavar="N")
    add("--margin", type=int, default=8, metavar="N", help="around images (default %(default)s)")
    add = commands.add_parser("score").add_argument
    add("truth", type=Path, metavar="FILE.json")
    add("predictions", type=Path, metavar="predictions.json")
    add("--confidence", type=float, default=0.5, metavar="SCORE", help="default %(default)s")
    add("--tile", type=int, metavar="N", help="count straight edges at the ends of such tiles")
    add("--overlap", type=int, default=128, metavar="N", help="of these tiles")
    args = parser.parse_args()
    if args.command == "make":
        if args.margin < 0:
            parser.error(f"--margin is {args.margin}; expected 0 or more")
        count = make(args.output, args.side, args.dataset, args.seed, args.margin)
        print(f"{args.output}: {args.side}x{args.side} pixels, {count} instances")
        return
    for name, value in score(args.truth, args.predictions, args.confidence).items():
        print(f"{name}: {value:.2f}")
    if args.tile:
        content = json.loads(args.truth.read_text())
        size = content["images"][0]["height"], content["images"][0]["width"]
        layout = Layout(*size, args.tile, args.overlap)
        for file, records in (
            (args.truth, content["annotations"]),
            (args.predictions, json.loads(args.predictions.read_text())),
        ):
            masks = CroppedMasks.from_rles([item["segmentation"] for item in records], size)
            print(f"{file}: {straight_edges(masks, layout)} straight edges at the ends of tiles")


if __name__ == "__main__":
    main()
