"""Time and memory of COCO's metrics on synthetic results of many instances, without a network.

Each back end (TEST.COCO_EVAL) encodes and scores the same results in a process of its own.  Time is
that of the processor, all threads together; needs /proc (Linux) for the peak of memory.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.structures import Boxes, Instances

import instseg
from instseg.benchmark.rows import forget_peak, in_fresh_process, peak_resident
from instseg.data.dataset import load
from instseg.evaluation import build_evaluator
from instseg.masks import coco_annotation_of, tight_boxes

HEIGHT, WIDTH = 480, 640
CLASSES = 80
GT_INSTANCES = 7
"""Instances of the ground truth per image, as in COCO."""


def drawn(generator: np.random.Generator, count: int) -> np.ndarray:
    """(count, H, W) bool: ellipses with waves in their outlines, small and large ones."""
    masks = np.zeros((count, HEIGHT, WIDTH), dtype=np.uint8)
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    for mask in masks:
        waves = 1 + 0.15 * np.sin(generator.integers(2, 7) * angles + generator.random() * 6)
        radii = 4 * 2 ** (5 * generator.random(2)) / 2
        centre = generator.random(2) * (WIDTH, HEIGHT)
        points = centre + radii * (waves * [np.cos(angles), np.sin(angles)]).T
        cv2.fillPoly(mask, [points.round().astype(np.int32)], 1)
    return masks.view(np.bool_)


def results(images: int, instances: int) -> Iterator[tuple[np.ndarray, Instances]]:
    """Masks of the ground truth and the result of each image."""
    generator = np.random.default_rng(0)
    for _ in range(images):
        masks = drawn(generator, instances)
        gt_masks = masks[:GT_INSTANCES].copy()
        shifts = generator.integers(-2, 3, (len(gt_masks), 2))
        for mask, shift in zip(masks, shifts, strict=False):
            mask[:] = np.roll(mask, shift, (0, 1))
        classes = np.arange(instances) * 7 % CLASSES
        yield (
            gt_masks,
            Instances(
                (HEIGHT, WIDTH),
                pred_boxes=Boxes(tight_boxes(torch.from_numpy(masks))),
                scores=torch.from_numpy(generator.random(instances)),
                pred_classes=torch.from_numpy(classes),
                pred_masks=torch.from_numpy(masks),
            ),
        )


def write_ground_truth(path: Path, images: int, instances: int) -> None:
    entries: list[dict[str, Any]] = []
    for image_id, (gt_masks, _) in enumerate(results(images, instances)):
        for number, mask in enumerate(gt_masks):
            entry = coco_annotation_of(mask, number * 7 % CLASSES)
            entries.append({**entry, "id": len(entries) + 1, "image_id": image_id})
    content = {
        "images": [
            {"id": n, "file_name": f"{n}.png", "height": HEIGHT, "width": WIDTH}
            for n in range(images)
        ],
        "categories": [{"id": number, "name": str(number)} for number in range(CLASSES)],
        "annotations": entries,
    }
    path.write_text(json.dumps(content))


def measure(kind: str, path: str, images: int, instances: int) -> bool:
    """Encode and score the results, and print a line; True."""
    with tempfile.TemporaryDirectory() as folder:
        name = f"coco:{path}"
        words = ["DATASETS.TEST", (name,), "OUTPUT_DIR", folder, "TEST.COCO_EVAL", kind]
        cfg = instseg.load_cfg("mask_rcnn/mask_rcnn_shapes.yaml", words)
        evaluator = build_evaluator(cfg, load(name))
        evaluator.reset()
        forget_peak()
        before, encoding = peak_resident(), 0.0
        for image_id, (_, result) in enumerate(results(images, instances)):
            start = time.process_time()
            evaluator.process([{"image_id": image_id}], [{"instances": result}])
            encoding += time.process_time() - start
        start = time.process_time()
        numbers = evaluator.evaluate()
        scoring, peak = time.process_time() - start, peak_resident()
    memory = "-" if before is None or peak is None else f"{peak - before:.0f} MiB"
    aps = ", ".join(f"{task} {values['AP']:.6f}" for task, values in numbers.items())
    parts = (kind, f"{encoding:.1f} s", f"{scoring:.1f} s", memory, aps)
    print(f"| {' | '.join(parts)} |", flush=True)
    return True


def main(words: Sequence[str] | None = None) -> int:
    """1 if a process ended with an error, which it has printed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=5000, metavar="N")
    parser.add_argument("--instances", type=int, default=100, metavar="N", help="of each image")
    args = parser.parse_args(words)
    for name in ("images", "instances"):
        if (count := getattr(args, name)) < 1:
            parser.error(f"--{name} is {count}; expected at least 1")
    kinds = ["standard"]
    if importlib.util.find_spec("faster_coco_eval") is not None:
        kinds.append("fast")
    print("| TEST.COCO_EVAL | encoding | scoring | memory | AP |")
    print("|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "instances.json")
        write_ground_truth(path, args.images, args.instances)
        counts = args.images, args.instances
        done = [in_fresh_process(measure, kind, str(path), *counts) for kind in kinds]
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
