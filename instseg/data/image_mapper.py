"""Mappers that turn the records of data sets into training samples of images."""

from typing import Any

import numpy as np
import torch
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import Boxes

from instseg.data.image_reader import ImageReader
from instseg.data.images import Array, read_labels
from instseg.data.instances import (
    InstanceMapper,
    corners_of,
    transformed_instances,
    without_crowds,
)
from instseg.data.intensity import AS_IS, Intensity
from instseg.data.windows import WindowTransform
from instseg.errors import ImageError
from instseg.masks import to_rle

_TRIES = 10
"""Draws of augmentations for one image, until one keeps an instance."""
_THINNEST = 4 / 550
"""Pixels; thinner boxes are dropped, as in the code of YOLACT's authors."""


class Mapper(InstanceMapper):
    """Detectron2's mapper with the image reader of instseg.

    Detectron2's own reader turns 16 bits into white and floats in 0 to 1 into black, and trains on
    the readable part of a damaged file.  For all other images both readers give the same bits.
    """

    def __init__(
        self, *args: Any, intensity: Intensity = AS_IS, cache_mib: float = 0, **kwargs: Any
    ) -> None:
        """
        Args:
            args, kwargs: those of Detectron2's mapper.
            intensity: what is done to the channels of images.
            cache_mib: room for decoded images, see :class:`ImageReader`.
        """
        super().__init__(*args, **kwargs)
        self.read = ImageReader(format=self.image_format, intensity=intensity, cache_mib=cache_mib)

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """
        Raises:
            ImageError: the image, or the labels of its pixels, cannot be used.
        """
        record = _copy(dataset_dict)
        image = read_recorded(record, self.read)
        labels = _read_semantic(record)
        data = T.AugInput(image, boxes=self._boxes_of(record), sem_seg=labels)
        transforms = self.augmentations(data)
        size = data.image.shape[:2]
        record["image"] = channels_first(data.image)
        if labels is not None:
            record["sem_seg"] = torch.as_tensor(data.sem_seg.astype(np.int64))
        if self.proposal_topk is not None:
            utils.transform_proposals(record, size, transforms, proposal_topk=self.proposal_topk)
        if not self.is_train:
            record.pop("annotations", None)
        elif "annotations" in record:
            self._transform_annotations(record, transforms, size)
        return record

    def _boxes_of(self, record: dict[str, Any]) -> Array | None:
        """(N, 4) boxes of the instances in training, for augmentations that use them."""
        if not self.is_train or "annotations" not in record:
            return None
        return corners_of(without_crowds(record["annotations"]))

    def _transform_annotations(
        self, record: dict[str, Any], transforms: T.TransformList, size: tuple[int, int]
    ) -> None:
        """Replace ``annotations`` by ``instances`` as Detectron2 does, with two differences.

        Polygons that become bit masks are drawn before they are cut, which needs only NumPy, and
        boxes may be computed from masks in images without instances too.
        """
        cut = any(isinstance(x, T.CropTransform | WindowTransform) for x in transforms.transforms)
        if cut and self.use_instance_mask and self.instance_mask_format == "bitmask":
            for annotation in record["annotations"]:
                mask = annotation["segmentation"]
                annotation["segmentation"] = to_rle(mask, record["height"], record["width"])
        if not without_crowds(record["annotations"]):
            del record["annotations"]
            record["instances"] = utils.annotations_to_instances([], size)
            return
        super()._transform_annotations(record, transforms, size)


def channels_first(image: Array) -> torch.Tensor:
    """(H, W, C) pixels → (C, H, W), always a copy: the pixels may belong to a reader."""
    return torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))


def _copy(record: dict[str, Any]) -> dict[str, Any]:
    """A record whose fields, and those of its annotations, can be replaced."""
    copied = dict(record)
    if "annotations" in record:
        copied["annotations"] = [dict(annotation) for annotation in record["annotations"]]
    return copied


def read_recorded(record: dict[str, Any], read: ImageReader) -> Array:
    """Read the image of a record, and add its size to the record if that is missing.

    Args:
        record: Detectron2's, with ``file_name``; changed in place.
        read: keeps the image if it has room.
    Returns:
        (H, W, C) uint8 that must not be written to.
    Raises:
        ImageError: the image cannot be read, or has another size than the record says.
    """
    image = read(record["file_name"])
    height, width = image.shape[:2]
    expected = record.setdefault("width", width), record.setdefault("height", height)
    _check_size(record["file_name"], (width, height), expected)
    return image


def _read_semantic(record: dict[str, Any]) -> Array | None:
    """(H, W) labels of the pixels from the file that the record names; None if it names none."""
    file = record.pop("sem_seg_file_name", None)
    if file is None:
        return None
    labels = read_labels(file)
    _check_size(file, labels.shape[::-1], (record["width"], record["height"]))
    # Detectron2's transforms can stretch these types.
    return labels.astype(np.uint8 if labels.max() < 256 else np.float32)


def _check_size(file: str, size: tuple[int, ...], expected: tuple[Any, ...]) -> None:
    """Refuse an image of another size than the data set says."""
    if size != expected:
        raise ImageError(
            f"{file} is {size[0]} x {size[1]} pixels, the data set says {expected[0]} x "
            f"{expected[1]}; correct width and height"
        )


class SSDMapper(Mapper):
    """Mapper for augmentations that use the boxes and may lose instances.

    It differs from Detectron2's mapper: augmentations get the instances' boxes; an instance stays
    if the centre of its box is still in the image; crowds stay as ``crowd_boxes`` (``Boxes``);
    polygons are drawn before they are transformed, so that cropping them needs only NumPy.

    Every record gives a sample.  If augmentations lose all of its instances, they are drawn again,
    a few times, and then replaced by ``plain_augmentations``.

    Deviation: YOLACT's authors take another image, drawn at random, after a first such loss.
    """

    def __init__(
        self, *args: Any, plain_augmentations: list[T.Augmentation | T.Transform], **kwargs: Any
    ) -> None:
        """
        Args:
            args, kwargs: those of :class:`Mapper`.
            plain_augmentations: augmentations that lose no instance.
        """
        super().__init__(*args, **kwargs)
        self.plain_augmentations = T.AugmentationList(plain_augmentations)

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        dataset_dict = dict(dataset_dict)  # read_recorded may add the size
        image = read_recorded(dataset_dict, self.read)
        for _ in range(_TRIES):
            record, lost = self._augmented(dataset_dict, image, self.augmentations)
            if not lost:
                return record
        return self._augmented(dataset_dict, image, self.plain_augmentations)[0]

    def _augmented(
        self, dataset_dict: dict[str, Any], image: np.ndarray, augmentations: T.AugmentationList
    ) -> tuple[dict[str, Any], bool]:
        """The sample, and whether it lost all of its instances."""
        record = _copy(dataset_dict)
        shape = image.shape[:2]
        singles: list[dict[str, Any]] = []
        crowds: list[dict[str, Any]] = []
        for annotation in record.pop("annotations", []):
            (crowds if annotation.get("iscrowd", 0) else singles).append(annotation)
        data = T.AugInput(image, boxes=corners_of(singles))
        transforms = augmentations(data)
        size = data.image.shape[:2]
        record["image"] = channels_first(data.image)
        self._transform_rest(record, transforms)
        inside = [
            {**annotation, "segmentation": to_rle(annotation["segmentation"], *shape)}
            for annotation in _centred_inside(singles, transforms, size)
        ]
        record["instances"] = transformed_instances(
            inside, transforms, size, tight=self.recompute_boxes, thinnest=_THINNEST
        )
        crowds = _centred_inside(crowds, transforms, size)
        if crowds:
            boxes = Boxes(torch.as_tensor(transforms.apply_box(corners_of(crowds))))
            boxes.clip(size)
            record["crowd_boxes"] = boxes[boxes.nonempty(_THINNEST)]
        return record, bool(singles) and not len(record["instances"])

    def _transform_rest(self, record: dict[str, Any], transforms: T.TransformList) -> None:
        """Transform further parts of a sample in place; subclasses override it."""


def _centred_inside(
    annotations: list[dict[str, Any]], transforms: T.TransformList, size: tuple[int, int]
) -> list[dict[str, Any]]:
    """The annotations whose boxes have their centres in the image after ``transforms``."""
    boxes = corners_of(annotations)
    x, y = transforms.apply_coords((boxes[:, :2] + boxes[:, 2:]) / 2).T
    inside = (0 < x) & (x < size[1]) & (0 < y) & (y < size[0])
    return [annotations[number] for number in np.flatnonzero(inside)]
