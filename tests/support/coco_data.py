"""A small set in COCO's format, and ways to break it."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 40, 30
SQUARE = [5, 5, 15, 5, 15, 15, 5, 15]


def content() -> dict[str, Any]:
    """Two classes in three images: a polygon, one in two parts, an RLE, a crowd."""
    images = [
        {"id": key, "file_name": f"{key}.png", "width": WIDTH, "height": HEIGHT}
        for key in (1, 2, 3)
    ]
    masks: list[Any] = [
        [list(SQUARE)],
        [[20, 5, 30, 5, 30, 20], [5, 20, 15, 20, 15, 28]],
        {"size": [HEIGHT, WIDTH], "counts": [305, 10, 20, 10, 855]},
        {"size": [HEIGHT, WIDTH], "counts": [0, 90, 1110]},
    ]
    boxes = [[5, 5, 10, 10], [5, 5, 25, 23], [10, 5, 2, 10], [0, 0, 3, 30]]
    annotations = [
        {
            "id": 11 + k,
            "image_id": image,
            "category_id": 7 + k % 2,
            "bbox": box,
            "segmentation": mask,
            "area": (100, 115, 20, 90)[k],
            "iscrowd": int(k == 3),
        }
        for k, (image, box, mask) in enumerate(zip((1, 1, 2, 2), boxes, masks, strict=True))
    ]
    categories = [{"id": 7, "name": "cat"}, {"id": 8, "name": "dog"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def changed(*path: Any, to: Any) -> dict[str, Any]:
    """The content with another value at ``path``; without the last key for KeyError."""
    broken = content()
    node: Any = broken
    for part in path[:-1]:
        node = node[part]
    if to is KeyError:
        del node[path[-1]]
    else:
        node[path[-1]] = to
    return broken


def write_set(folder: Path, given: Any) -> str:
    """Write JSON and images, no two of which are equal; return the name of the set."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(zlib.crc32(str(folder).encode()))
    for key in (1, 2, 3):
        if not (images / f"{key}.png").exists():
            pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / f"{key}.png")
    path = folder / "instances.json"
    path.write_bytes(given if isinstance(given, bytes) else json.dumps(given).encode())
    return f"coco:{path}:{images}"
