"""The losses of YOLACT (section 3.1, 3.4 and the authors' code)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.structures import Instances
from torch import Tensor
from torch.nn import functional as F

from instseg.masks import gt_masks_of
from instseg.modeling import attached_zero
from instseg.ops.assemble_masks import mask_probabilities
from instseg.projects.yolact.boxes import encode
from instseg.projects.yolact.targets import match


@dataclass(frozen=True)
class LossSettings:
    """See the keys of the same names under ``MODEL.YOLACT``."""

    positive_iou: float
    negative_iou: float
    crowd_iou: float
    negative_ratio: int
    box_weight: float
    class_weight: float
    mask_weight: float
    semantic_weight: float
    max_masks: int


@dataclass(frozen=True)
class GroundTruth:
    """The instances of one image.

    Attributes:
        boxes: (G, 4) corners relative to the image.
        classes: (G,) int64 from 0.
        masks: (G, h, w) float, 0 or 1, of the whole image at any resolution.
        crowd_boxes: (M, 4) as ``boxes``, regions full of instances that are not told apart.
    """

    boxes: Tensor
    classes: Tensor
    masks: Tensor
    crowd_boxes: Tensor


def ground_truth_of(item: dict[str, Any], device: torch.device) -> GroundTruth:
    """The instances of one training image, see :meth:`~instseg.projects.yolact.YOLACT.forward`."""
    instances: Instances = item["instances"]
    height, width = instances.image_size
    scale = torch.tensor([width, height, width, height], device=device, dtype=torch.float32)
    crowds = item["crowd_boxes"].tensor if "crowd_boxes" in item else torch.zeros(0, 4)
    return GroundTruth(
        boxes=instances.gt_boxes.tensor.to(device, torch.float32) / scale,
        classes=instances.gt_classes.to(device),
        masks=gt_masks_of(instances).to(device, torch.float32),
        crowd_boxes=crowds.to(device, torch.float32) / scale,
    )


@dataclass(frozen=True)
class Predictions:
    """Output of the network for a batch of B images with P anchors.

    Attributes:
        deltas: (B, P, 4) encoded boxes.
        logits: (B, P, C + 1), background first.
        coefficients: (B, P, K).
        prototypes: (B, h, w, K).
        semantic: (B, C, h', w') logits; None without that layer.
    """

    deltas: Tensor
    logits: Tensor
    coefficients: Tensor
    prototypes: Tensor
    semantic: Tensor | None


@dataclass(frozen=True)
class MaskSamples:
    """Masks of positive anchors of a batch and their targets, at the prototypes' resolution.

    Attributes:
        probabilities: (R, h, w), cropped to the ground-truth boxes.
        targets: (R, h, w), 0 or 1, not cropped.
        classes: (R,) int64 from 0.
        num_positives: positive anchors of the batch, at least 1; it divides the losses.
    """

    probabilities: Tensor
    targets: Tensor
    classes: Tensor
    num_positives: int


def yolact_losses(
    predictions: Predictions,
    ground_truths: Sequence[GroundTruth],
    priors: Tensor,
    settings: LossSettings,
) -> tuple[dict[str, Tensor], MaskSamples]:
    """All losses, weighted, and the masks that the mask loss used.

    An image without instances has the semantic loss alone; no background anchors are mined in it.

    Args:
        predictions: in single precision.
        ground_truths: one for each image.
        priors: (P, 4) relative centre and size.
    """
    matches = [
        match(
            ground_truth.boxes,
            ground_truth.classes,
            ground_truth.crowd_boxes,
            priors,
            positive_iou=settings.positive_iou,
            negative_iou=settings.negative_iou,
            crowd_iou=settings.crowd_iou,
        )
        for ground_truth in ground_truths
    ]
    labels = torch.stack([anchor_labels for anchor_labels, _ in matches])
    positive = labels > 0
    count = max(int(positive.sum()), 1)
    targets = [
        encode(ground_truth.boxes[matched[anchors]], priors[anchors])
        for ground_truth, (_, matched), anchors in zip(
            ground_truths, matches, positive, strict=True
        )
    ]
    box = F.smooth_l1_loss(predictions.deltas[positive], torch.cat(targets), reduction="sum")
    chosen = positive | hardest_background(predictions.logits, labels, settings.negative_ratio)
    classes = F.cross_entropy(predictions.logits[chosen], labels[chosen], reduction="sum")
    mask, samples = _mask_loss(predictions, ground_truths, matches, count, settings.max_masks)
    losses = {
        "loss_box": box * (settings.box_weight / count),
        "loss_cls": classes * (settings.class_weight / count),
        "loss_mask": mask * (settings.mask_weight / count),
    }
    if predictions.semantic is not None:
        semantic = semantic_loss(predictions.semantic, ground_truths)
        losses["loss_semantic"] = semantic * settings.semantic_weight
    return losses, samples


@torch.no_grad()
def hardest_background(logits: Tensor, labels: Tensor, ratio: int) -> Tensor:
    """Background anchors for the class loss, the hardest ones of each image (as in SSD).

    Args:
        logits: (B, P, C + 1), background first.
        labels: (B, P) as :func:`~instseg.projects.yolact.targets.match` gives them.
        ratio: how many for every positive anchor of the same image.
    Returns:
        (B, P) bool.
    """
    hardness = logits.logsumexp(dim=2) - logits[..., 0]
    hardness = torch.where(labels == 0, hardness, 0)
    order = hardness.argsort(dim=1, descending=True, stable=True)
    ranks = torch.empty_like(order)
    ranks.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    num_background = (ratio * (labels > 0).sum(dim=1)).clamp(max=labels.shape[1] - 1)
    return (ranks < num_background[:, None]) & (labels == 0)


def _mask_loss(
    predictions: Predictions,
    ground_truths: Sequence[GroundTruth],
    matches: Sequence[tuple[Tensor, Tensor]],
    count: int,
    limit: int,
) -> tuple[Tensor, MaskSamples]:
    """Sum over positive anchors, without weight; see :func:`mask_bce`."""
    size = predictions.prototypes.shape[1:3]
    # Attached to the graph also where no image has an instance.
    total = attached_zero([predictions.prototypes, predictions.coefficients])
    probabilities = [predictions.prototypes.new_zeros(0, *size)]
    targets = [predictions.prototypes.new_zeros(0, *size)]
    classes = [torch.zeros(0, dtype=torch.int64, device=total.device)]
    for i, (ground_truth, (labels, matched)) in enumerate(zip(ground_truths, matches, strict=True)):
        positive = (labels > 0).nonzero()[:, 0]
        if not len(positive):
            continue
        factor = 1.0
        if len(positive) > limit:
            factor = len(positive) / limit
            positive = positive[torch.randperm(len(positive), device=positive.device)[:limit]]
        matched = matched[positive]
        boxes = ground_truth.boxes[matched]
        predicted = mask_probabilities(
            predictions.prototypes[i], predictions.coefficients[i, positive], boxes
        )
        true = shrink(ground_truth.masks, size)[matched]
        total = total + mask_bce(predicted, true, boxes) * factor
        probabilities.append(predicted)
        targets.append(true)
        classes.append(ground_truth.classes[matched])
    samples = MaskSamples(torch.cat(probabilities), torch.cat(targets), torch.cat(classes), count)
    return total, samples


def mask_bce(probabilities: Tensor, targets: Tensor, boxes: Tensor) -> Tensor:
    """Binary cross entropy of cropped masks, each divided by its box's area, summed.

    The targets are not cropped: each of their pixels outside the box, padding included, costs 100,
    PyTorch's bound, for any prediction (authors' code).

    Args:
        probabilities: (R, h, w).
        targets: (R, h, w), 0 or 1.
        boxes: (R, 4) relative corners.
    """
    height, width = probabilities.shape[1:]
    mask_losses = F.binary_cross_entropy(probabilities, targets, reduction="none").sum(dim=(1, 2))
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1) * (height * width)
    return (mask_losses / areas).sum()


def semantic_loss(logits: Tensor, ground_truths: Sequence[GroundTruth]) -> Tensor:
    """Binary cross entropy of every class's region, mean over pixels, sum over classes (3.4).

    Args:
        logits: (B, C, h, w).
    Returns:
        mean over the images.
    """
    targets = torch.zeros_like(logits)
    for target, ground_truth in zip(targets, ground_truths, strict=True):
        if len(ground_truth.classes):
            target.index_add_(0, ground_truth.classes, shrink(ground_truth.masks, target.shape[1:]))
    targets.clamp_(max=1)
    total = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    return total / (logits.shape[0] * logits.shape[2] * logits.shape[3])


def shrink(masks: Tensor, size: Sequence[int]) -> Tensor:
    """(G, H, W) masks → (G, h, w), bilinear, 1 above a half."""
    resized = F.interpolate(masks[None], tuple(size), mode="bilinear", align_corners=False)[0]
    return (resized > 0.5).to(masks.dtype)
