"""From regions to detections: mask voting or plain NMS, and masks at the image's size."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torch.nn import functional as F

from instseg.modeling import PlacedMask, masks_of
from instseg.ops.vote_masks import vote_masks
from instseg.projects.fcis.regions import Detections


@dataclass(frozen=True)
class Detector:
    """Last step of inference (section 2.3, authors' code).

    Attributes:
        voting: "image" or "box", the authors' GPU and CPU procedures of mask voting, see
            :func:`instseg.ops.vote_masks.vote_masks`; "none" keeps each region's own mask.
        min_size: least side of a region in pixels of the network input; smaller ones are dropped.
        nms_threshold: IoU above which a region is suppressed by a better one of the class.
        merge_threshold: least IoU of a voter with the detection.
        mask_threshold: least probability inside a mask.
        max_detections: per image.
        score_threshold: least class probability of a detection.
    """

    voting: str
    min_size: float
    nms_threshold: float
    merge_threshold: float
    mask_threshold: float
    max_detections: int
    score_threshold: float

    def __call__(
        self,
        detections: Detections,
        network_size: tuple[int, int],
        output_size: tuple[int, int],
        max_instances: int | None = None,
        *,
        cropped: bool = False,
    ) -> Instances:
        """
        Args:
            detections: regions of one image.
            network_size: height and width of the network input.
            output_size: height and width asked for.
            max_instances: further limit on the number of detections.
            cropped: give cropped masks.
        Returns:
            ``pred_boxes``, ``scores``, ``pred_classes`` and ``pred_masks``, (N, H, W) bool at
            ``output_size`` or cropped, by descending score.  With voting, a box is the tight box of
            its averaged mask.
        """
        sides = detections.boxes[:, 2:] - detections.boxes[:, :2]
        large = (sides >= self.min_size).all(dim=1)
        boxes = _to_output(detections.boxes[large], network_size, output_size)
        scores, masks = detections.probabilities[large], detections.masks[large]
        if len(boxes) == 0:
            classes = torch.zeros(0, dtype=torch.int64, device=boxes.device)
            scores = scores.new_zeros(0)
        elif self.voting == "none":
            boxes, scores, classes, masks = self._suppress(boxes, scores, masks)
        else:
            boxes, scores, classes, masks = vote_masks(
                boxes,
                masks,
                scores,
                output_size,
                nms_threshold=self.nms_threshold,
                merge_threshold=self.merge_threshold,
                mask_threshold=self.mask_threshold,
                max_detections=self.max_detections,
                score_threshold=self.score_threshold,
                resample=self.voting,
            )
        order = scores.sort(descending=True, stable=True).indices[:max_instances]
        instances = Instances(output_size)
        instances.pred_boxes = Boxes(boxes[order] + boxes.new_tensor([0, 0, 1, 1]))
        instances.scores = scores[order]
        instances.pred_classes = classes[order] - 1
        placed = paste_masks(masks[order], boxes[order], output_size, self.mask_threshold)
        instances.pred_masks = masks_of(
            placed, len(order), output_size, cropped=cropped, device=masks.device
        )
        return instances

    def _suppress(
        self, boxes: Tensor, scores: Tensor, masks: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """NMS in every foreground class, then the best ``max_detections`` of all."""
        regions, classes = (scores[:, 1:] > self.score_threshold).nonzero(as_tuple=True)
        classes = classes + 1
        values = scores[regions, classes]
        corners = boxes + boxes.new_tensor([0, 0, 1, 1])
        best = batched_nms(corners[regions], values, classes, self.nms_threshold)
        best = best[: self.max_detections]
        regions = regions[best]
        return boxes[regions], values[best], classes[best], masks[regions]


def _to_output(
    boxes: Tensor, network_size: tuple[int, int], output_size: tuple[int, int]
) -> Tensor:
    """(R, 4) continuous corners of the network input → inclusive ones of the output, clipped.

    The authors divide inclusive corners by the scale.
    """
    (network_height, network_width), (height, width) = network_size, output_size
    scale_x, scale_y = width / network_width, height / network_height
    boxes = boxes - boxes.new_tensor([0, 0, 1, 1])
    boxes = boxes * boxes.new_tensor([scale_x, scale_y, scale_x, scale_y])
    limit = boxes.new_tensor([width - 1, height - 1, width - 1, height - 1])
    return torch.minimum(boxes.clamp(min=0), limit)


def paste_masks(
    masks: Tensor, boxes: Tensor, image_size: tuple[int, int], threshold: float
) -> Iterator[PlacedMask]:
    """Binary masks at the size of the image, each in its box.

    Args:
        masks: (N, P, P) probabilities.
        boxes: (N, 4) inclusive corners, rounded here (half to even) and clipped to the image.
        image_size: height and width of the image.
        threshold: least probability inside.
    Yields:
        each mask, resized linearly (pixel centres at half, edges repeated) to its box.
    """
    height, width = image_size
    limit = boxes.new_tensor([width - 1, height - 1, width - 1, height - 1])
    corners = torch.minimum(boxes.round().clamp(min=0), limit).to(torch.int64).tolist()
    for row, (mask, (x1, y1, x2, y2)) in enumerate(zip(masks, corners, strict=True)):
        size = (max(y2 - y1, 0) + 1, max(x2 - x1, 0) + 1)
        resized = F.interpolate(mask[None, None].float(), size, mode="bilinear")[0, 0]
        yield PlacedMask(row, x1, y1, resized >= threshold)
