"""The built-in synthetic data set: textured shapes on textured backgrounds, rendered on the fly.

Four splits: ``shapes_train`` (2000 images), ``shapes_val`` (200) and the harder
``shapes_hard_train``, ``shapes_hard_val``.  ``shapes_val_touching`` and ``shapes_val_apart`` are
the images of ``shapes_val`` where instances of one class touch, and the others.  An image depends
only on its split, index and size, so nothing is stored: its ``file_name`` is
``shapes://SPLIT/SIZE/INDEX``, a path that Detectron2's ``PathManager`` opens like a file, so every
reader and mapper works on it unchanged.

Coordinates are pixels, a pixel's centre lies at +0.5.  Lengths below are for an image of 128
pixels and scale with the size.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from instseg.data.synthetic.files import IMAGES, check_member, check_size, encode_ppm
from instseg.data.synthetic.outlines import KINDS, generator, outline_of, polygon_area, rasterise
from instseg.data.synthetic.render import render
from instseg.errors import DatasetError
from instseg.files import atomic_write
from instseg.masks import annotation_of, coco_annotation_of

SPLITS = {
    "shapes_train": 2000,
    "shapes_val": 200,
    "shapes_hard_train": 2000,
    "shapes_hard_val": 200,
}
SUBSETS = {
    "shapes_val_touching": ("shapes_val", range(0, 200, 2)),
    "shapes_val_apart": ("shapes_val", range(1, 200, 2)),
}
"""The even and the odd images of a split: name -> split, indices."""
DEFAULT_SIZE = 128
MIN_VISIBLE = 0.4  # an instance with less of its area in sight is not placed
_TRIES = 20  # positions tried for one instance before it is given up


@dataclass(frozen=True)
class Shape:
    """One instance: index into ``KINDS``, outline (P, 2) as x, y, and visible mask (S, S) bool."""

    kind: int
    outline: np.ndarray
    mask: np.ndarray


def class_names(split: str) -> list[str]:
    """Classes of ``split``; the hard splits have stars as well."""
    return list(KINDS if "hard" in split else KINDS[:3])


def scene(split: str, index: int, size: int) -> list[Shape]:
    """Instances of one image, from the back to the front.

    Even images hold two touching or overlapping instances of one class at least, odd ones hold
    none that touch.  Any instance may be covered in part by one of another class; each keeps
    ``MIN_VISIBLE`` of its area.

    Args:
        split: a key of ``SPLITS``.
        index: 0 .. number of images - 1.
        size: side of the square image in pixels.
    Raises:
        DatasetError: unknown split, an index outside it, or a size outside ``SIZES``.
    """
    check_size(size)
    check_member("image", split, index, SPLITS)
    rng = generator(split, index, 0)
    hard = "hard" in split
    smallest, max_shapes = (14, 8) if hard else (20, 6)
    num_shapes = 2 + int(rng.random() * (max_shapes - 1))
    crowded = index % 2 == 0
    shapes: list[Shape] = []
    while len(shapes) < num_shapes:
        # The first two are insisted on; a later instance that finds no place is left out.
        insist = len(shapes) < 2
        partner = shapes[0] if crowded and len(shapes) == 1 else None
        placed = None
        while placed is None:
            for _ in range(_TRIES):
                placed = _place(
                    rng, shapes, partner, crowded, smallest, size, len(class_names(split))
                )
                if placed is not None:
                    break
            if not insist:
                break
        if placed is None:
            num_shapes -= 1
        else:
            shapes = placed
    return shapes


def _place(
    rng: np.random.Generator,
    shapes: list[Shape],
    partner: Shape | None,
    crowded: bool,
    smallest: int,
    size: int,
    num_kinds: int,
) -> list[Shape] | None:
    """``shapes`` with one more on top at a random place, or None if it does not fit there."""
    kind = int(rng.random() * num_kinds) if partner is None else partner.kind
    extent = (smallest + (64 - smallest) * rng.random()) * size / 128
    angle, x, y = rng.random() * 2 * np.pi, rng.random(), rng.random()
    centre = np.array([0.08 + 0.84 * x, 0.08 + 0.84 * y]) * size
    if partner is not None:
        partner_centre, partner_extent = _centre_and_extent(partner.outline)
        distance = (0.55 + 0.4 * x) * (extent + partner_extent) / 2
        centre = partner_centre + distance * np.array(
            [np.cos(2 * np.pi * y), np.sin(2 * np.pi * y)]
        )
    outline = outline_of(kind, extent, angle) + centre
    full = rasterise(outline, size)
    if full.sum() < MIN_VISIBLE * polygon_area(outline) or full.sum() == 0:
        return None
    behind = [Shape(s.kind, s.outline, s.mask & ~full) for s in shapes]
    if any(s.mask.sum() < MIN_VISIBLE * polygon_area(s.outline) for s in behind):
        return None
    grown = _grow(full)
    touched = [s for s in shapes if s.kind == kind and (s.mask & grown).any()]
    if (touched and not crowded) or (partner is not None and not touched):
        return None
    return [*behind, Shape(kind, outline, full)]


def _centre_and_extent(outline: np.ndarray) -> tuple[np.ndarray, float]:
    low, high = outline.min(axis=0), outline.max(axis=0)
    return (low + high) / 2, float((high - low).max())


def _grow(mask: np.ndarray) -> np.ndarray:
    """``mask`` and its 8-connected rim, one pixel wide."""
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    rows = grown.copy()
    grown[:, 1:] |= rows[:, :-1]
    grown[:, :-1] |= rows[:, 1:]
    return grown


def image(split: str, index: int, size: int) -> np.ndarray:
    """(size, size, 3) uint8 RGB image of :func:`scene`."""
    return render(
        scene(split, index, size), size, generator(split, index, 1), clutter="hard" in split
    )


def load(split: str, size: int, indices: Iterable[int] | None = None) -> list[dict[str, Any]]:
    """Records of ``split`` in Detectron2's standard data set format, masks as compressed RLE."""
    records = []
    for index in range(SPLITS[split]) if indices is None else indices:
        annotations = [annotation_of(s.mask, s.kind) for s in scene(split, index, size)]
        records.append(
            {
                "file_name": f"{IMAGES}{split}/{size}/{index}",
                "image_id": index,
                "height": size,
                "width": size,
                "annotations": annotations,
            }
        )
    return records


def export(split: str, directory: Path, size: int = DEFAULT_SIZE, limit: int | None = None) -> Path:
    """Write ``split`` as files: ``DIRECTORY/SPLIT.json`` (COCO), ``DIRECTORY/SPLIT/INDEX.png``.

    Returns:
        the path of the JSON file; category ids count from 1.
    Raises:
        DatasetError: unknown split.
    """
    if split not in SPLITS:
        raise DatasetError(f"no built-in data set {split!r}; there are {', '.join(SPLITS)}")
    folder = directory / split
    folder.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for record in load(split, size, range(min(SPLITS[split], limit or SPLITS[split]))):
        index = record["image_id"]
        name = f"{index:06d}.png"
        Image.fromarray(image(split, index, size)).save(folder / name)
        images.append({"id": index, "file_name": name, "height": size, "width": size})
        for annotation in record["annotations"]:
            entry = coco_annotation_of(annotation["segmentation"], annotation["category_id"] + 1)
            annotations.append({"id": len(annotations) + 1, "image_id": index, **entry})
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(class_names(split))]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path = directory / f"{split}.json"
    atomic_write(str(path), lambda file: file.write(json.dumps(content).encode()))
    return path


def content_of(path: str) -> bytes:
    """Content of the file that :mod:`instseg.data.synthetic.files` serves under ``path``."""
    split, size, index = path.split("/")
    return encode_ppm(image(split, int(index), int(size)))
