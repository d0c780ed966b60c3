"""Anchors and region proposals with the authors' rules, on Detectron2's RPN."""

import math

import torch
import torchvision
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY, DefaultAnchorGenerator
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor
from torch.nn import functional as F

from instseg.errors import ConfigError
from instseg.modeling import NEITHER, check_finite
from instseg.projects.fcis.boxes import clip_boxes


@ANCHOR_GENERATOR_REGISTRY.register()
class RoundedAnchorGenerator(DefaultAnchorGenerator):
    """Anchors whose sides are integers before they are scaled (Faster R-CNN's first code).

    A square of s x s pixels, s being the stride, is changed to each aspect ratio, its sides are
    rounded, and the result is multiplied by each scale ``SIZES / s``.  With s = 16 and the ratios
    0.5, 1, 2 the sides are 23 x 12, 16 x 16 and 11 x 22 times the scale.  Order: ratio-major, as in
    the released weights.
    ``ANCHOR_GENERATOR.OFFSET`` must be 0.5, the centre of the cell.
    """

    def generate_cell_anchors(
        self,
        sizes: tuple[float, ...] = (64, 128, 256, 512),
        aspect_ratios: tuple[float, ...] = (0.5, 1, 2),
    ) -> Tensor:
        """(ratios * sizes, 4) continuous corners around (0, 0), in pixels of the network input."""
        if self.num_features != 1:
            raise ConfigError(
                f"MODEL.RPN.IN_FEATURES names {self.num_features} feature maps; "
                "RoundedAnchorGenerator works on one"
            )
        cell = self.strides[0]
        anchors = []
        for ratio in aspect_ratios:
            width = round(math.sqrt(cell * cell / ratio))
            height = round(width * ratio)
            for size in sizes:
                x, y = width * size / cell / 2, height * size / cell / 2
                anchors.append([-x, -y, x, y])
        return torch.tensor(anchors)


@PROPOSAL_GENERATOR_REGISTRY.register()
class FCISRPN(RPN):
    """Detectron2's RPN on one feature map with the rules of the authors' code.

    - Anchors count only if they lie completely inside the image, also as the best anchor of an
      instance.
    - The classification loss is the mean over the sampled anchors of an image.
    - Proposals come from the ⌊H / s⌋ x ⌊W / s⌋ cells that are completely inside the image, in
      training as in testing; after NMS no proposals are added.

    Deviation: the authors repeat proposals at random up to 300, so that results change from run to
    run and repeated regions count double in mask voting.
    """

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """See ``RPN``: labels (A,) 1, 0 or ``NEITHER`` and matched boxes (A, 4) of every image."""
        all_anchors = Boxes.cat(anchors)
        labels, matched = [], []
        for image in gt_instances:
            height, width = image.image_size
            corners = all_anchors.tensor
            inside = (
                (corners[:, :2] >= 0).all(dim=1)
                & (corners[:, 2] <= width)
                & (corners[:, 3] <= height)
            ).nonzero()[:, 0]
            ious = pairwise_iou(image.gt_boxes, all_anchors[inside])
            # Each instance takes its best anchors; without an overlapping anchor it takes none.
            reached = (ious > 0).any(dim=1)
            gt_indices, inside_labels = self.anchor_matcher(ious[reached])
            label = torch.full_like(corners[:, 0], NEITHER, dtype=torch.int8)
            label[inside] = inside_labels
            labels.append(self._subsample_labels(label))
            boxes = torch.zeros_like(corners)
            if reached.any():
                boxes[inside] = image.gt_boxes.tensor[reached][gt_indices]
            matched.append(boxes)
        return labels, matched

    def losses(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """See ``RPN``; ``loss_rpn_cls`` is the mean over the sampled anchors of each image."""
        losses: dict[str, Tensor] = super().losses(
            anchors, pred_objectness_logits, gt_labels, pred_anchor_deltas, gt_boxes
        )
        labels = torch.stack(gt_labels)
        sampled = labels >= 0
        errors = F.binary_cross_entropy_with_logits(
            torch.cat(pred_objectness_logits, dim=1), (labels == 1).float(), reduction="none"
        )
        means = (errors * sampled).sum(dim=1) / sampled.sum(dim=1).clamp(min=1)
        losses["loss_rpn_cls"] = means.mean() * self.loss_weight.get("loss_rpn_cls", 1.0)
        return losses

    @torch.no_grad()
    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """See ``RPN``: ``proposal_boxes`` and ``objectness_logits`` by descending score.

        Raises:
            FloatingPointError: in training, boxes or scores are not finite.
            CheckpointError: the same outside training.
        """
        return [
            self._proposals_of(anchors[0].tensor, logits.float(), deltas.float(), size)
            for logits, deltas, size in zip(
                pred_objectness_logits[0], pred_anchor_deltas[0], image_sizes, strict=True
            )
        ]

    def _proposals_of(
        self, anchors: Tensor, logits: Tensor, deltas: Tensor, image_size: tuple[int, int]
    ) -> Instances:
        """Proposals of one image of (A, 4) anchors, (A,) logits and (A, 4) deltas."""
        stride = self.anchor_generator.strides[0]
        height, width = (side // stride * stride for side in image_size)
        centres = (anchors[:, :2] + anchors[:, 2:]) / 2
        complete = (centres[:, 0] < width) & (centres[:, 1] < height)
        logits = logits[complete]
        boxes = self.box2box_transform.apply_deltas(deltas[complete], anchors[complete])
        if not self.training:
            check_finite(logits, boxes)
        elif not (logits.isfinite().all() and boxes.isfinite().all()):
            raise FloatingPointError("RPN: boxes or scores are not finite, training has diverged")
        boxes = clip_boxes(boxes, image_size)
        sides = boxes[:, 2:] - boxes[:, :2]
        large = (sides >= self.min_box_size).all(dim=1)
        boxes, logits = boxes[large], logits[large]
        order = logits.sort(descending=True, stable=True).indices
        order = order[: self.pre_nms_topk[self.training]]
        order = order[torchvision.ops.nms(boxes[order], logits[order], self.nms_thresh)]
        order = order[: self.post_nms_topk[self.training]]
        proposals = Instances(image_size)
        proposals.proposal_boxes = Boxes(boxes[order])
        proposals.objectness_logits = logits[order]
        return proposals
