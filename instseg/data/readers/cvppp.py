"""Plant leaves of the CVPPP leaf segmentation challenge, folder A1, as data sets.

Layout under ``$DETECTRON2_DATASETS``, as the challenge's training archive unpacks::

    cvppp/A1/plant001_rgb.png  plant001_label.png  plant001_fg.png  plant002_rgb.png  ...

``cvppp_a1_trainval`` has all 128 images, ``cvppp_a1_val`` 28 of them and ``cvppp_a1_train`` the
others.  The order of ``sha256("cvppp/" + name)`` decides which.

Sources: Minervini et al., Pattern Recognition Letters 2016; Scharr et al., MVA 2016.
"""

import hashlib
from pathlib import Path
from typing import Any

from instseg.data.images import image_size, read_labels
from instseg.data.label_images import Labels, label_rles
from instseg.errors import DatasetError, ImageError
from instseg.masks import annotation_of

EVALUATOR_TYPE = "leaves"
"""Value in the metadata; adds the challenge's metrics to COCO's."""
SPLITS = ("train", "val", "trainval")

_VAL_SHARE = 28 / 128


def load(name: str, folder: str, split: str) -> list[dict[str, Any]]:
    """Records in Detectron2's standard format, masks as RLE, ``image_id`` as ``plant001``.

    Each number in ``_label.png`` is a leaf; 0 is the background.

    Args:
        name: of the data set, for messages.
        folder: ``A1``.
        split: one of ``SPLITS``.
    Raises:
        DatasetError: files are missing, damaged or contradict each other.
    """
    images = sorted(Path(folder).glob("*_rgb.png"))
    if not images:
        raise DatasetError(
            f"data set {name}: there is no file {folder}/plant*_rgb.png; set DETECTRON2_DATASETS "
            "to the folder that holds cvppp"
        )
    shuffled = sorted(
        images, key=lambda path: hashlib.sha256(f"cvppp/{_id(path)}".encode()).digest()
    )
    held_out = set(shuffled[: round(len(shuffled) * _VAL_SHARE)])
    chosen = {
        "trainval": images,
        "val": [path for path in images if path in held_out],
        "train": [path for path in images if path not in held_out],
    }
    return [_record(name, path) for path in chosen[split]]


def _id(image: Path) -> str:
    return image.name.removesuffix("_rgb.png")


def _record(name: str, image: Path) -> dict[str, Any]:
    file = image.with_name(f"{_id(image)}_label.png")
    labels = _read_labels(name, file)
    try:
        width, height = image_size(image)
    except ImageError as error:
        raise DatasetError(f"data set {name}: {error}") from error
    if labels.shape != (height, width):
        raise DatasetError(
            f"data set {name}: {file} is {labels.shape}, {image} {(height, width)} (height, width)"
        )
    return {
        "file_name": str(image),
        "image_id": _id(image),
        "height": height,
        "width": width,
        "annotations": [annotation_of(rle, 0) for rle in label_rles(labels).values()],
    }


def _read_labels(name: str, file: Path) -> Labels:
    """(H, W) number of the leaf at each pixel."""
    if not file.is_file():
        raise DatasetError(
            f"data set {name}: there is no file {file}; every plant###_rgb.png needs its "
            "plant###_label.png, which the challenge's testing archive does not have"
        )
    try:
        return read_labels(file)
    except ImageError as error:
        raise DatasetError(f"data set {name}: {error}") from error
