"""Training regions of FCIS and their targets (section 3, authors' code)."""

import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor
from torch.nn import functional as F

from instseg.modeling import NEITHER
from instseg.projects.fcis.regions import Regions, Samples


def assign_labels(
    boxes: Tensor, gt_boxes: Tensor, gt_classes: Tensor, matcher: Matcher
) -> tuple[Tensor, Tensor]:
    """Class of every candidate region, by its IoU with the best ground-truth box.

    Args:
        boxes: (N, 4) candidates, continuous corners.
        gt_boxes: (G, 4); G may be 0.
        gt_classes: (G,) int64, 0 .. number of classes - 1.
        matcher: gives 1 (foreground), 0 (background) or ``NEITHER``.
    Returns:
        labels (N,) int64: class + 1, 0 for the background or ``NEITHER``; and (N,) index of the
        best ground-truth box, 0 if there is none.
    """
    matched, kinds = matcher(pairwise_iou(Boxes(gt_boxes), Boxes(boxes)))
    labels = kinds.to(torch.int64)
    if len(gt_boxes):
        labels = torch.where(kinds == 1, gt_classes[matched] + 1, labels)
    return labels, matched


def every_candidate(labels: Tensor) -> Tensor:
    """Indices of all candidates that are not ignored: foreground first, then background."""
    return torch.cat([(labels > 0).nonzero()[:, 0], (labels == 0).nonzero()[:, 0]])


def random_candidates(
    labels: Tensor, count: int, positive_fraction: float
) -> tuple[Tensor, Tensor]:
    """``count`` candidates drawn at random (the VOC setting).

    Args:
        labels: (N,) of :func:`assign_labels`.
        count: number of candidates; only a smaller total gives fewer.
        positive_fraction: largest share of foreground among them.
    Returns:
        indices and their labels, foreground first, then background.  If there is too little
        background, the rest is drawn from all candidates that are not among the chosen foreground
        and labelled 0, as in the authors' code: it may include foreground that was not chosen.
    """
    device = labels.device
    positive = (labels > 0).nonzero()[:, 0]
    order = torch.randperm(len(positive), device=device)
    positive = positive[order[: int(count * positive_fraction)]]
    negative = (labels == 0).nonzero()[:, 0]
    order = torch.randperm(len(negative), device=device)
    negative = negative[order[: count - len(positive)]]
    missing = count - len(positive) - len(negative)
    free = torch.ones_like(labels, dtype=torch.bool)
    free[positive] = False
    rest = free.nonzero()[:, 0]
    rest = rest[torch.randperm(len(rest), device=device)[:missing]]
    background = torch.cat([negative, rest])
    chosen = torch.cat([positive, background])
    return chosen, torch.cat([labels[positive], torch.zeros_like(background)])


def mask_targets(
    boxes: Tensor, matched: Tensor, gt_boxes: Tensor, gt_masks: Tensor, size: int, threshold: float
) -> Tensor:
    """Masks of instances inside regions.

    Region and box of the instance are rounded to integers (half to even).  A canvas of the region's
    size holds the instance's mask where the two boxes meet and 0 elsewhere.  It is resized linearly
    (pixel centres at half, edges repeated) to ``size`` x ``size`` and compared with ``threshold``.

    Args:
        boxes: (R, 4) regions, continuous corners in pixels of the network input.
        matched: (R,) index of the instance of each.
        gt_boxes: (G, 4).
        gt_masks: (G, H, W) of the network input, bool or with values in [0, 1].
        size: bins per side.
        threshold: least value inside the mask.
    Returns:
        (R, size, size) int64, 1 inside and 0 outside.  R = 0 gives (0, size, size).
    """
    region, instance = _inclusive(boxes), _inclusive(gt_boxes)[matched]
    columns = _samples(region[:, 0], region[:, 2], size)
    rows = _samples(region[:, 1], region[:, 3], size)
    value = boxes.new_zeros(len(boxes), size, size)
    for y, weight_y in rows:
        for x, weight_x in columns:
            inside_x = (x >= instance[:, 0, None]) & (x <= instance[:, 2, None])
            inside_y = (y >= instance[:, 1, None]) & (y <= instance[:, 3, None])
            cell = gt_masks[
                matched[:, None, None],
                y.clamp(0, gt_masks.shape[1] - 1)[:, :, None],
                x.clamp(0, gt_masks.shape[2] - 1)[:, None, :],
            ]
            weight_x, weight_y = weight_x * inside_x, weight_y * inside_y
            value += cell * weight_y[:, :, None] * weight_x[:, None, :]
    return (value >= threshold).to(torch.int64)


def _inclusive(boxes: Tensor) -> Tensor:
    """(N, 4) continuous corners → rounded inclusive ones, int64."""
    return torch.cat([boxes[:, :2], boxes[:, 2:] - 1], dim=1).round().to(torch.int64)


def _samples(first: Tensor, last: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Linear interpolation of ``size`` values from the pixels ``first`` .. ``last``, (R,) each.

    Returns:
        twice (pixel (R, size) int64, weight (R, size)).
    """
    length = (last - first + 1).clamp(min=1)[:, None]
    steps = torch.arange(size, device=first.device, dtype=torch.float32)
    position = ((steps + 0.5) * (length / size) - 0.5).clamp(min=0)
    lower = torch.minimum(position.floor().to(torch.int64), length - 1)
    upper = torch.minimum(lower + 1, length - 1)
    weight = position - lower
    return [(first[:, None] + lower, 1 - weight), (first[:, None] + upper, weight)]


@torch.no_grad()
def hard_examples(regions: Regions, samples: Samples, count: int, mask_weight: float) -> Tensor:
    """The regions of one image with the largest loss (OHEM, section 3; authors' code).

    Args:
        regions: with the masks of the labelled classes.
        samples: the same regions, in the same order.
        count: number of regions to choose.
        mask_weight: weight of the mask's cross-entropy, a mean over all P x P bins in which ignored
            ones count as 0.
    Returns:
        (min(count, R),) indices, by descending loss.
    """
    labels = samples.labels
    probability = regions.scores.float().softmax(dim=1).gather(1, labels[:, None])[:, 0]
    loss = -(probability + 1e-14).log()
    logits = regions.mask_logits.float()
    errors = F.cross_entropy(logits, samples.masks, ignore_index=NEITHER, reduction="none")
    loss = loss + mask_weight * errors.mean(dim=(1, 2))
    # The first four deltas, of the background, have no target.
    box_targets = torch.cat([torch.zeros_like(samples.deltas), samples.deltas], dim=1)
    counted = (labels > 0)[:, None] * (torch.arange(8, device=labels.device) >= 4)
    errors = F.smooth_l1_loss(regions.deltas.float(), box_targets, reduction="none")
    loss = loss + (errors * counted).sum(dim=1)
    return loss.sort(descending=True, stable=True).indices[:count]
