"""Read instances of PASCAL VOC as released: the 2012 segmentation set and SBD.

Layout under ``$DETECTRON2_DATASETS``::

    VOC2012/   JPEGImages/*.jpg  SegmentationObject/*.png  SegmentationClass/*.png
               ImageSets/Segmentation/{train,val}.txt
    sbd/       img/*.jpg  inst/*.mat  {train,val}.txt     (``dataset`` of benchmark_RELEASE)

You may replace SBD's lists: papers after SDS, such as FCIS, use other lists than the release, with
5623 images to train and 5732 to test on.

Sources: Everingham et al., IJCV 2010 (VOC); Hariharan et al., ICCV 2011 (SBD), ECCV 2014 (SDS).
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.io import loadmat

from instseg.data.images import read_labels
from instseg.errors import DatasetError, ImageError
from instseg.masks import annotation_of

CLASSES = tuple(
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor".split()
)
EVALUATOR_TYPE = "voc_instances"
"""Value in the metadata; adds VOC's metric to COCO's."""

_VOID = 255
_MAX_MAT_BYTES = 2**22
"""Files of SBD have some 10 kB; this also bounds what a file unpacks to, a thousandfold at most."""

Labels = npt.NDArray[np.integer[Any]]
Annotation = dict[str, Any]


def load_voc(name: str, folder: str, split: str) -> list[dict[str, Any]]:
    """Records in Detectron2's standard format, masks as RLE, ``image_id`` the name of the image.

    Each number in ``SegmentationObject`` is an instance.  Its class is the commonest class of its
    pixels in ``SegmentationClass``.  The boundaries (255) belong to no instance.

    Args:
        name: of the data set, for messages.
        folder: ``VOC2012``.
        split: of ``ImageSets/Segmentation``.
    Raises:
        DatasetError: files are missing, damaged or contradict each other.
    """
    root = Path(folder)

    def annotate(image: str) -> tuple[tuple[int, ...], list[Annotation]]:
        object_file = root / "SegmentationObject" / f"{image}.png"
        class_file = root / "SegmentationClass" / f"{image}.png"
        numbers, classes = _read_labels(name, object_file), _read_labels(name, class_file)
        if numbers.shape != classes.shape:
            raise DatasetError(
                f"data set {name}: {object_file} is {numbers.shape}, {class_file} {classes.shape} "
                "(height, width)"
            )
        annotations = []
        for number in np.setdiff1d(numbers, (0, _VOID)):
            mask = numbers == number
            counts = np.bincount(classes[mask], minlength=256)
            counts[[0, _VOID]] = 0
            kind = int(counts.argmax())
            if not counts[kind] or kind > len(CLASSES):
                raise DatasetError(
                    f"data set {name}: {class_file} has {f'class {kind}' if kind else 'no class'} "
                    f"where {object_file} has instance {number}; expected 1 to {len(CLASSES)}"
                )
            annotations.append(annotation_of(mask, kind - 1))
        return numbers.shape, annotations

    listing = root / "ImageSets/Segmentation" / f"{split}.txt"
    return _records(name, listing, root / "JPEGImages", annotate)


def load_sbd(name: str, folder: str, split: str) -> list[dict[str, Any]]:
    """Records as :func:`load_voc` gives them, from ``inst/*.mat``.

    Args:
        name: of the data set, for messages.
        folder: ``dataset`` of the release.
        split: ``train`` or ``val``.
    Raises:
        DatasetError: files are missing, damaged or contradict each other.
    """
    root = Path(folder)

    def annotate(image: str) -> tuple[tuple[int, ...], list[Annotation]]:
        file = root / "inst" / f"{image}.mat"
        labels, kinds = _read_mat(name, file)
        annotations = [
            annotation_of(mask, int(kind) - 1)
            for number, kind in enumerate(kinds, start=1)
            if (mask := labels == number).any()
        ]
        return labels.shape, annotations

    return _records(name, root / f"{split}.txt", root / "img", annotate)


def _records(
    name: str,
    listing: Path,
    images: Path,
    annotate: Callable[[str], tuple[tuple[int, ...], list[Annotation]]],
) -> list[dict[str, Any]]:
    """One record for every name in the file ``listing``."""
    _check_there(name, listing)
    try:
        names = listing.read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"data set {name}: {listing} is no list of names: {error}") from None
    if not names:
        raise DatasetError(f"data set {name}: {listing} is empty; expected names of images")
    strange = [image for image in names if Path(image).name != image]
    repeated = len(names) - len(set(names))
    if strange or repeated:
        reason = f"has {strange[0]!r}" if strange else f"repeats {repeated} names"
        raise DatasetError(
            f"data set {name}: {listing} {reason}; expected each image once, as 2007_000027"
        )
    # One listing is faster than a look at each image on a network disk.
    existing_files = {entry.name for entry in os.scandir(images)} if images.is_dir() else set()
    records = []
    for image in names:
        if f"{image}.jpg" not in existing_files:
            _missing(name, images / f"{image}.jpg")
        (height, width), annotations = annotate(image)
        records.append(
            {
                "file_name": str(images / f"{image}.jpg"),
                "image_id": image,
                "height": height,
                "width": width,
                "annotations": annotations,
            }
        )
    return records


def _read_labels(name: str, file: Path) -> Labels:
    """(H, W) uint8 palette indices of an indexed PNG, not its colours."""
    _check_there(name, file)
    try:
        labels = read_labels(file)
    except ImageError as error:
        raise DatasetError(f"data set {name}: {error}") from error
    if labels.min() < 0 or labels.max() > _VOID:
        raise DatasetError(
            f"data set {name}: {file} has numbers from {labels.min()} to {labels.max()}; expected "
            f"0 to {_VOID}"
        )
    return labels.astype(np.uint8)


def _read_mat(name: str, file: Path) -> tuple[Labels, Labels]:
    """``GTinst``: (H, W) number of the instance at each pixel, 0 for none, and (N,) classes."""
    _check_there(name, file)
    size = file.stat().st_size
    if size > _MAX_MAT_BYTES:
        raise DatasetError(
            f"data set {name}: {file} has {size} bytes; expected some kilobytes of labels"
        )
    try:
        with open(file, "rb") as stream:
            content = loadmat(stream, variable_names=["GTinst"], struct_as_record=True)
        fields = content["GTinst"][0, 0]
        labels, kinds = fields["Segmentation"], fields["Categories"]
    except Exception as error:  # a damaged file can make the reader raise anything
        reason = " ".join(repr(error).split())[:200]
        raise DatasetError(
            f"data set {name}: {file} is damaged or has no structure GTinst with Segmentation and "
            f"Categories: {reason}"
        ) from error
    for field, value in (("Segmentation", labels), ("Categories", kinds)):
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "uif" or value.ndim != 2:
            raise DatasetError(f"data set {name}: {file}: {field} is no matrix of numbers")
    kinds = kinds.ravel()
    if not labels.size or not np.isin(labels, np.arange(kinds.size + 1)).all():
        raise DatasetError(
            f"data set {name}: {file}: Segmentation, of shape {labels.shape}, is empty or has "
            f"numbers beyond those of its {kinds.size} instances"
        )
    if not np.isin(kinds, np.arange(1, len(CLASSES) + 1)).all():
        raise DatasetError(
            f"data set {name}: {file}: Categories are {kinds[:10].tolist()}; expected 1 to "
            f"{len(CLASSES)}"
        )
    return labels, kinds


def _check_there(name: str, file: Path) -> None:
    if not file.is_file():
        _missing(name, file)


def _missing(name: str, file: Path) -> None:
    raise DatasetError(
        f"data set {name}: there is no file {file}; set DETECTRON2_DATASETS to the folder that "
        "holds it"
    )
