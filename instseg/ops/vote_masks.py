"""FCIS's mask voting: averages the masks of overlapping RoIs into one per detection."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from instseg.ops._library import check_devices, in_python, operator, register_fake
from instseg.ops.vote_masks_in_python import average_masks, nms_per_class

_PAIRS = 2**21
"""Number of pairs (detection, RoI) whose overlap is computed at a time; about 80 bytes each."""


@torch.no_grad()
def vote_masks(
    boxes: Tensor,
    masks: Tensor,
    scores: Tensor,
    image_size: tuple[int, int],
    nms_threshold: float = 0.3,
    merge_threshold: float = 0.5,
    mask_threshold: float = 0.4,
    max_detections: int = 100,
    score_threshold: float = 0.001,
    resample: str = "box",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Detections of one image by mask voting (Li et al., CVPR 2017, section 3.2, and their code).

    Per foreground class: greedy suppression of boxes.  Every box that is left and scores well
    enough is a detection; all RoIs that overlap it vote with their binary masks, weighted by their
    probability of that class.  The box of the detection is the tight box of the average, its mask
    the average inside that box.  If no pixel of an average passes, the box is the centre pixel.

    Deviation: the paper lets masks of the same category vote; the code, and so this, takes every
    overlapping RoI, with the one mask of its best class.

    Boxes have inclusive pixel corners throughout: a box is x2 - x1 + 1 pixels wide.

    Args:
        boxes: (R, 4) x1, y1, x2, y2 in pixels of the image; clipped to it here as well.
        masks: (R, P, P) or (R, 1, P, P) foreground probability of each RoI, stretched over its box.
        scores: (R, C) class probabilities, background first.
        image_size: height and width of the image in pixels.
        nms_threshold: a box is suppressed by a better one of its class with a larger IoU.
        merge_threshold: RoIs whose IoU with a detection is at least this vote for its mask.
        mask_threshold: binarises the masks of the voters and their average (0 < threshold <= 1).
        max_detections: number kept of all classes together; those that tie with the last stay too.
        score_threshold: detections with a lower probability are dropped.
        resample: "box" cuts the average out at its tight box and resizes it (the authors' CPU
            procedure); "image" reads up to half a pixel beyond that box and drops detections one
            pixel wide or high (their GPU procedure, behind the published numbers).  Both run on
            both devices.
    Returns:
        boxes (N, 4) float32, whole pixels; scores (N,) float32; classes (N,) int64 from 1 to C-1;
        masks (N, P, P) float32 averages in 0..1, not binary.  Classes ascend, and inside a class
        scores descend.  RoIs with a number that is not finite or with an inverted box neither
        detect nor vote.  No gradient.
    Raises:
        ValueError: shapes that do not belong together, an empty image, thresholds outside 0..1, or
            an unknown ``resample``.
        RuntimeError: tensors on different devices.
    """
    check_devices("vote_masks", boxes=boxes, masks=masks, scores=scores)
    _check_shapes(boxes, masks, scores)
    _check_numbers(image_size, mask_threshold, max_detections, resample)
    _check_shares(
        nms_threshold=nms_threshold,
        merge_threshold=merge_threshold,
        score_threshold=score_threshold,
    )
    height, width = image_size
    boxes, masks, scores, valid = _clean(boxes, masks, scores, height, width)
    by_class = scores[:, 1:].t().contiguous()
    keep = operator("nms_per_class")(
        boxes, by_class, nms_threshold, score_threshold, max_detections
    )
    classes, rois = keep.nonzero(as_tuple=True)
    order = _best(by_class[classes, rois], classes, max_detections)
    classes, rois = classes[order], rois[order]
    kept_scores = by_class[classes, rois]

    def averaged(part: Tensor) -> tuple[Tensor, Tensor]:
        centres, voters = boxes[rois[part]], by_class[classes[part]]
        weights = _weights(boxes, centres, voters, valid, merge_threshold)
        average: tuple[Tensor, Tensor] = operator("average_masks")(
            boxes, masks, weights, mask_threshold, height, width, resample == "image"
        )
        return average

    step = max(_PAIRS // max(len(boxes), 1), 1)
    parts = torch.arange(len(rois), device=rois.device).split(step)
    out_boxes, out_masks = map(torch.cat, zip(*map(averaged, parts), strict=True))
    classes = classes + 1
    if resample == "image":
        wide = (out_boxes[:, 2:] > out_boxes[:, :2]).all(dim=1)
        out_boxes, out_masks = out_boxes[wide], out_masks[wide]
        kept_scores, classes = kept_scores[wide], classes[wide]
    return out_boxes, kept_scores, classes, out_masks


def _check_shapes(boxes: Tensor, masks: Tensor, scores: Tensor) -> None:
    count = boxes.shape[0] if boxes.dim() else 0
    if boxes.shape != (count, 4):
        raise ValueError(f"vote_masks: boxes has shape {tuple(boxes.shape)}; expected (R, 4)")
    side = masks.shape[-1] if masks.dim() else 0
    if side == 0 or masks.shape not in ((count, side, side), (count, 1, side, side)):
        raise ValueError(
            f"vote_masks: masks has shape {tuple(masks.shape)}; expected ({count}, P, P)"
        )
    if scores.dim() != 2 or scores.shape[0] != count or scores.shape[1] == 0:
        raise ValueError(
            f"vote_masks: scores has shape {tuple(scores.shape)}; expected ({count}, C), "
            "background first"
        )


def _check_numbers(
    image_size: tuple[int, int], mask_threshold: float, max_detections: int, resample: str
) -> None:
    if min(image_size) < 1:
        raise ValueError(f"vote_masks: image_size is {image_size}; expected at least 1 x 1 pixels")
    if not 0 < mask_threshold <= 1:
        raise ValueError(
            f"vote_masks: mask_threshold is {mask_threshold}; expected more than 0, at most 1"
        )
    if max_detections < 0:
        raise ValueError(f"vote_masks: max_detections is {max_detections}; expected at least 0")
    if resample not in ("box", "image"):
        raise ValueError(f"vote_masks: resample is {resample!r}; expected 'box' or 'image'")


def _check_shares(**thresholds: float) -> None:
    for name, threshold in thresholds.items():
        if not 0 <= threshold <= 1:
            raise ValueError(f"vote_masks: {name} is {threshold}; expected 0 to 1")


def _clean(
    boxes: Tensor, masks: Tensor, scores: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes inside the image, masks (R, P, P), scores (-inf in unusable rows), usable rows."""
    boxes, scores = boxes.float(), scores.float()
    masks = masks.float().reshape(-1, masks.shape[-1], masks.shape[-1])
    valid = (
        boxes.isfinite().all(dim=1)
        & scores.isfinite().all(dim=1)
        & masks.isfinite().flatten(1).all(dim=1)
        & (boxes[:, 2:] >= boxes[:, :2]).all(dim=1)
    )
    limits = boxes.new_tensor([width - 1, height - 1, width - 1, height - 1])
    boxes = boxes.clamp(min=0).minimum(limits)
    return boxes, masks, scores.where(valid[:, None], -torch.inf), valid


def _best(scores: Tensor, classes: Tensor, max_detections: int) -> Tensor:
    """Indices of the ``max_detections`` best and their ties, by class, then by falling score."""
    if len(scores) == 0:
        return classes
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] >= scores[order[min(len(order), max_detections) - 1]]]
    return order[classes[order].argsort(stable=True)]


def _weights(
    boxes: Tensor, kept_boxes: Tensor, scores: Tensor, valid: Tensor, merge_threshold: float
) -> Tensor:
    """(N, R) share of every RoI in the mask of every detection; rows sum to 1.

    Float64, as in the authors' code, since the IoU alone decides whether a box votes.
    """
    a, b = kept_boxes.double()[:, None], boxes.double()[None]
    sides = (
        torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2]) + 1
    ).clamp(min=0)
    inter = sides[..., 0] * sides[..., 1]
    area_a, area_b = ((x[..., 2:] - x[..., :2] + 1).prod(dim=-1) for x in (a, b))
    votes = (inter / (area_a + area_b - inter) >= merge_threshold) & valid
    weights = scores.double().where(votes, 0.0)
    total = weights.sum(dim=1, keepdim=True)
    return (weights / total.where(total > 0, 1.0)).float()


def vote_masks_reference(
    boxes: Tensor,
    masks: Tensor,
    scores: Tensor,
    image_size: tuple[int, int],
    nms_threshold: float = 0.3,
    merge_threshold: float = 0.5,
    mask_threshold: float = 0.4,
    max_detections: int = 100,
    score_threshold: float = 0.001,
    resample: str = "box",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`vote_masks` in plain NumPy, for clean input: slow, for tests and the benchmark.

    Every mask is rendered to the whole image, and averaged there; ``cv2`` resizes.
    """
    height, width = image_size
    side = masks.shape[-1]
    rois = boxes.float().cpu().numpy()
    probabilities = scores.float().cpu().numpy()
    soft = masks.float().cpu().numpy().reshape(-1, side, side)
    candidates = [
        (c, r)
        for c in range(1, probabilities.shape[1])
        for r in _nms(rois, probabilities[:, c], nms_threshold)[:max_detections]
    ]
    pooled = sorted((probabilities[r, c] for c, r in candidates), reverse=True)[:max_detections]
    lowest = max(pooled[-1], score_threshold) if pooled else 1.0
    candidates = [(c, r) for c, r in candidates if probabilities[r, c] >= lowest]
    rendered = (
        np.stack([_render(*pair, height, width) for pair in zip(rois, soft, strict=True)])
        if len(rois)
        else np.zeros((0, height, width), np.float32)
    )
    binary = (rendered >= mask_threshold).astype(np.float32)
    detections = []
    for c, r in candidates:
        voters = np.flatnonzero(_overlap(rois[r], rois) >= merge_threshold)
        weights = probabilities[voters, c] / probabilities[voters, c].sum()
        average = np.zeros((height, width), np.float32)
        for voter, weight in zip(voters, weights, strict=True):
            average += weight * binary[voter]
        box = _tight_box(average >= mask_threshold)
        if resample == "image" and (box[2] <= box[0] or box[3] <= box[1]):
            continue
        mask = _resize(average, box, side, resample)
        detections.append((box, probabilities[r, c], c, mask))
    return (
        torch.tensor([f[0] for f in detections], dtype=torch.float32).view(-1, 4),
        torch.tensor([f[1] for f in detections], dtype=torch.float32),
        torch.tensor([f[2] for f in detections], dtype=torch.int64),
        torch.from_numpy(np.array([f[3] for f in detections], np.float32).reshape(-1, side, side)),
    )


def _overlap(box: Any, boxes: Any) -> Any:
    """IoU of one box with many; inclusive corners."""
    box, boxes = box.astype(np.float64), boxes.astype(np.float64)
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2]) + 1
    inter = sides.clip(min=0).prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2] + 1).prod(axis=1)
    return inter / ((box[2:] - box[:2] + 1).prod() + areas - inter)


def _nms(boxes: Any, scores: Any, threshold: float) -> list[int]:
    """Indices of the boxes that no better one suppresses, best first."""
    order = np.argsort(-scores, kind="stable")
    kept_rows = []
    while len(order):
        kept_rows.append(int(order[0]))
        order = order[1:][_overlap(boxes[order[0]], boxes[order[1:]]) <= threshold]
    return kept_rows


def _render(box: Any, mask: Any, height: int, width: int) -> Any:
    """A mask stretched over its box, in an image that is zero elsewhere."""
    import cv2

    x1, y1, x2, y2 = np.round(box).astype(int)
    image = np.zeros((height, width), np.float32)
    image[y1 : y2 + 1, x1 : x2 + 1] = cv2.resize(mask, (int(x2 - x1 + 1), int(y2 - y1 + 1)))
    return image


def _tight_box(pixels: Any) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 around the true pixels; the centre pixel if there is none."""
    rows, columns = np.where(pixels)
    if len(rows) == 0:
        height, width = pixels.shape
        return width // 2, height // 2, width // 2, height // 2
    return int(columns.min()), int(rows.min()), int(columns.max()), int(rows.max())


def _resize(average: Any, box: tuple[int, int, int, int], side: int, resample: str) -> Any:
    """The average in ``box`` at side x side samples, by one of the two procedures."""
    import cv2

    x1, y1, x2, y2 = box
    if resample == "box":
        return cv2.resize(average[y1 : y2 + 1, x1 : x2 + 1], (side, side))
    step = np.arange(side) + 0.5
    x = (x1 + step * (x2 - x1 + 1) / side - 0.5).clip(0, average.shape[1] - 1)
    y = (y1 + step * (y2 - y1 + 1) / side - 0.5).clip(0, average.shape[0] - 1)
    left, top = x.astype(int), y.astype(int)
    right = np.minimum(left + 1, average.shape[1] - 1)
    bottom = np.minimum(top + 1, average.shape[0] - 1)
    fx, fy = x - left, (y - top)[:, None]
    upper = average[np.ix_(top, left)] * (1 - fx) + average[np.ix_(top, right)] * fx
    lower = average[np.ix_(bottom, left)] * (1 - fx) + average[np.ix_(bottom, right)] * fx
    return upper * (1 - fy) + lower * fy


in_python("nms_per_class")(nms_per_class)
in_python("average_masks")(average_masks)


@register_fake("nms_per_class")
def _fake_nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float, max_kept: int
) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.bool)


@register_fake("average_masks")
def _fake_average(
    boxes: Tensor,
    masks: Tensor,
    weights: Tensor,
    mask_threshold: float,
    height: int,
    width: int,
    from_image: bool,
) -> tuple[Tensor, Tensor]:
    count = weights.shape[0]
    return boxes.new_empty((count, 4)), masks.new_empty((count, masks.shape[1], masks.shape[1]))
