"""Build the nuclei data set from the public download of image set BBBC038v1.

BBBC038v1 (2018 Data Science Bowl, CC0; Caicedo et al., Nature Methods 2019) unpacks into
``stage1_train/ID/images/ID.png`` and ``stage1_train/ID/masks/*.png``, one mask per nucleus.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from instseg.data.images import Array, read_image, read_labels
from instseg.data.label_images import Labels, label_rles
from instseg.errors import DatasetError
from instseg.files import atomic_write
from instseg.masks import coco_annotation_of

# First eight characters of the names of images with labelling errors: nuclei that later corrections
# added or removed, overlapping or broken masks, bright spots without a mask.
LEFT_OUT = frozenset(
    """
    02903040 08151b19 0a7d30b2 1609b1b8 1bd0f2b3 1f000806 2bf594e9 3a22fe59 4ee5850b 547ef286
    58c593bc 5ddbfba2 6b61ab2e 72e8c49d 777f7c42 8d29c5a0 98c5ead8 9bb6e39d 9facc652 a0afead3
    a1777737 ac782d2c ac8169a0 b1eb0123 b3b1626f b4de1e3e d4d88391 f0c9f135 f113626a f26f4c2c
    175dbb36 139946af 1a75e9f1 220b37f4 40b00d70 5cc036b6 6c85029f a6515d73 c0c4a829 cb4df20a
    d1dbc6ee d2815f2f f4c4db3d fa73f245 f6863b83
    """.split()
)


def build(source: Path, output: Path, num_train: int = 400, num_val: int = 60) -> dict[str, int]:
    """Write ``OUTPUT/images`` and ``OUTPUT/instances_{train,val}.json`` (COCO, RLE masks).

    Uses fluorescence images only: all channels equal, nuclei brighter than the background on
    average, and not in ``LEFT_OUT``.  In the order of ``sha256("nuclei/" + name)``, the first
    ``num_train`` images train and the next ``num_val`` validate.  A pixel that two masks claim
    belongs to the first of them by file name.

    Args:
        source: the folder ``stage1_train``.
        output: created if it does not exist.
    Returns:
        number of images per split.
    Raises:
        DatasetError: the folder has another layout or too few images for the split, or a mask has
            another size than its image.
        ImageError: an image cannot be read.
    """
    if min(num_train, num_val) < 0 or not num_train + num_val:
        raise DatasetError(
            f"{num_train} training and {num_val} validation images are wanted; expected one or "
            "more in all, and no negative number"
        )
    folders = sorted(folder for folder in source.glob("*") if (folder / "images").is_dir())
    if not folders:
        raise DatasetError(f"{source} holds no ID/images folders; expected BBBC038's stage1_train")
    folders = [folder for folder in folders if folder.name[:8] not in LEFT_OUT]
    folders.sort(key=lambda folder: hashlib.sha256(f"nuclei/{folder.name}".encode()).digest())
    (output / "images").mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for folder in tqdm(folders, unit="image", disable=None):
        image = read_image(folder / "images" / f"{folder.name}.png")
        labels = _labels(folder, image.shape[:2])
        if not _is_fluorescence(image, labels > 0):
            continue
        image_id = len(images) + 1
        name = f"{folder.name}.png"
        Image.fromarray(image[:, :, 0]).save(output / "images" / name)
        height, width = image.shape[:2]
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        rles = label_rles(labels).values()
        annotations += [{"image_id": image_id, **coco_annotation_of(rle, 1)} for rle in rles]
        if len(images) == num_train + num_val:
            break
    if len(images) < num_train + num_val:
        raise DatasetError(
            f"{source} holds {len(images)} usable fluorescence images, {num_train} + {num_val} "
            "are wanted; ask for fewer"
        )
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    _write(output / "instances_train.json", images[:num_train], annotations)
    _write(output / "instances_val.json", images[num_train:], annotations)
    return {"train": num_train, "val": num_val}


def _labels(folder: Path, size: tuple[int, ...]) -> Labels:
    """(H, W) number of the first mask, by file name, that has each pixel; 0 for none."""
    labels: Labels = np.zeros(size, dtype=np.int64)
    for number, path in enumerate(sorted((folder / "masks").glob("*.png")), start=1):
        mask = read_labels(path) > 0
        if mask.shape != size:
            raise DatasetError(f"{path} is {mask.shape}, its image {size} (height, width)")
        labels[mask & (labels == 0)] = number
    return labels


def _is_fluorescence(image: Array, nuclei: npt.NDArray[np.bool_]) -> bool:
    if not nuclei.any() or nuclei.all() or np.ptp(image, axis=2).any():
        return False
    return bool(image[nuclei].mean() > image[~nuclei].mean())


def _write(path: Path, images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> None:
    ids = {image["id"] for image in images}
    content = {
        "images": images,
        "annotations": [a for a in annotations if a["image_id"] in ids],
        "categories": [{"id": 1, "name": "nucleus"}],
    }
    atomic_write(str(path), lambda file: file.write(json.dumps(content).encode()))
