"""What bottom-up models share: a network gives maps, and their cells are grouped to instances."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from instseg.masks import CroppedMasks, instances_from_masks
from instseg.modeling.dense_targets import NONE, DenseTargets, dense_targets
from instseg.modeling.pixels import PixelModel
from instseg.modeling.results import result_size, wants_cropped
from instseg.modeling.stages import stage


@dataclass(frozen=True)
class DenseInstances:
    """Instances of one image, best first; no two overlap.

    Attributes:
        numbers: (h, w) int64, the instance at each cell, 0 ... N - 1, or ``NONE``.
        classes: (N,) int64 from 0, without the background.
        scores: (N,), descending.
    """

    numbers: Tensor
    classes: Tensor
    scores: Tensor


class DenseModel(PixelModel, ABC):
    """A model that groups the cells of its maps to instances.

    A descendant defines :meth:`losses` and :meth:`find`.

    Attributes:
        output_stride: pixels per cell of the maps that losses and grouping see.
        give_semantic: give the semantic probabilities as ``sem_seg`` too.
    """

    def __init__(
        self,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        *,
        output_stride: int,
        give_semantic: bool,
    ) -> None:
        super().__init__(pixel_mean, pixel_std)
        self.output_stride = output_stride
        self.give_semantic = give_semantic

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """
        Args:
            batched_inputs: Detectron2's: ``image`` (3, h, w) in 0..255; for training ``instances``
                with ``gt_classes`` and ``gt_masks``; else optionally ``height``, ``width`` and
                ``max_instances`` of the result; and what :meth:`find` looks for.
        Returns:
            in training a dict of scalar losses, else a list of dicts with ``instances``:
            ``pred_boxes``, ``scores``, ``pred_classes``, ``pred_masks`` (N, height, width) bool or
            cropped, which do not overlap; and ``sem_seg`` (C + 1, height, width) if asked for.
        Raises:
            CheckpointError: not in training, the network gives values that are not finite.
        """
        images = self.normalised_images(batched_inputs)
        if self.training:
            return self.losses(images, batched_inputs)
        # One by one: the padding of a batch would change results.
        return [
            self.segment(image, item) for image, item in zip(images, batched_inputs, strict=True)
        ]

    @abstractmethod
    def losses(
        self, images: Sequence[Tensor], batched_inputs: list[dict[str, Any]]
    ) -> dict[str, Tensor]:
        """The weighted losses of a batch of images (3, h, w), normalised."""

    @abstractmethod
    def find(self, image: Tensor, item: dict[str, Any]) -> tuple[DenseInstances, Tensor]:
        """Instances of one image, and its (C + 1, h, w) semantic probabilities.

        Args:
            image: (3, h', w') normalised.
            item: see :meth:`forward`.
        """

    def segment(self, image: Tensor, item: dict[str, Any]) -> dict[str, Any]:
        """Result of one image.

        Args:
            image: (3, h', w') normalised.
            item: see :meth:`forward`.
        """
        grouped, probabilities = self.find(image, item)
        size = result_size(item)
        with stage("masks"):
            rows, columns = (
                resized_index(length, new_length, self.output_stride, self.device)
                for length, new_length in zip(image.shape[1:], size, strict=True)
            )
            count = len(grouped.scores[: item.get("max_instances")])
            best = torch.arange(count, device=self.device)
            numbers = grouped.numbers[rows[:, None], columns]
            masks: Tensor | CroppedMasks = (
                CroppedMasks.from_label_image((numbers + 1).cpu().numpy(), len(best))
                if wants_cropped(item)
                else numbers == best[:, None, None]
            )
            # A tiny instance may vanish in a smaller result.
            instances = instances_from_masks(masks, grouped.scores[best], grouped.classes[best])
        result: dict[str, Any] = {"instances": instances}
        if self.give_semantic:
            result["sem_seg"] = probabilities[:, rows[:, None], columns]
        return result

    def padded(self, images: Sequence[Tensor], divisor: int, least: int = 1) -> Tensor:
        """:func:`padded_batch` that the cells of the maps fill without a rest."""
        return padded_batch(images, max(divisor, self.output_stride), least)

    def resized(self, maps: Tensor, batch: Tensor) -> Tensor:
        """Maps of a batch (B, 3, H, W) → the same at ``output_stride``, in single precision."""
        height, width = (length // self.output_stride for length in batch.shape[2:])
        return at_size(maps, (height, width))

    def cells(self, image: Tensor) -> tuple[int, int]:
        """Rows and columns of the maps that show an image (3, h, w), not padding."""
        height, width = (-(-length // self.output_stride) for length in image.shape[1:])
        return height, width

    def targets(self, maps: Tensor, batched_inputs: Sequence[dict[str, Any]]) -> DenseTargets:
        """Targets for maps (B, C, h, w) of a padded batch."""
        height, width = (length * self.output_stride for length in maps.shape[2:])
        gt_instances = [item["instances"] for item in batched_inputs]
        return dense_targets(gt_instances, (height, width), self.output_stride, self.device)


def renumbered(numbers: Tensor, chosen: Tensor, count: int) -> Tensor:
    """A map of numbers with the ``chosen`` alone, from 0 in their order.

    Args:
        numbers: (h, w) int64, 0 ... count - 1 or ``NONE``.
        chosen: (N,) int64, some of the numbers; cells of the others become ``NONE``.
    """
    new_numbers = torch.full((count + 1,), NONE, device=numbers.device)
    new_numbers[chosen] = torch.arange(len(chosen), device=numbers.device)
    # Cells without an instance have the number -1, which finds the last entry.
    return new_numbers[numbers]


def padded_batch(images: Sequence[Tensor], divisor: int, least: int = 1) -> Tensor:
    """(C, h, w) each → (B, C, H, W), padded with 0 at their right and bottom.

    Args:
        images: at least one.
        divisor: H and W are multiples of it.
        least: smallest height and width.
    """
    height, width = (
        -(-max(least, *(x.shape[axis] for x in images)) // divisor) * divisor for axis in (1, 2)
    )
    batch = images[0].new_zeros(len(images), images[0].shape[0], height, width)
    for row, image in zip(batch, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return batch


def at_size(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, h, w) → (B, C, *size) in single precision, bilinear."""
    maps = maps.float()
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def resized_index(length: int, new_length: int, stride: int, device: torch.device) -> Tensor:
    """(new_length,) cell, in a map of this stride, of each pixel of a side that is resized.

    Args:
        length: of the side that the map shows.
        new_length: of the side after resizing; every pixel takes the nearest.
    """
    middles = (torch.arange(new_length, device=device) * 2 + 1) * length
    return middles // (2 * new_length) // stride
