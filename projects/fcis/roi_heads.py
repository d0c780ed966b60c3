"""The head of FCIS: score maps, the joint scores and masks of regions, and their training."""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn import functional as F

from instseg.errors import ConfigError
from instseg.masks import gt_masks_of
from instseg.modeling import NEITHER, check_finite
from instseg.ops.fcis_head import fcis_head
from instseg.ops.psroi_pool import psroi_pool
from instseg.projects.fcis.boxes import refine_boxes, to_rois
from instseg.projects.fcis.losses import fcis_losses
from instseg.projects.fcis.regions import Detections, Maps, Regions, Samples
from instseg.projects.fcis.targets import (
    assign_labels,
    every_candidate,
    hard_examples,
    mask_targets,
    random_candidates,
)


@ROI_HEADS_REGISTRY.register()
class FCISROIHeads(nn.Module):
    """Classes, masks and boxes of regions without any weight per region (FCIS, section 2).

    ::

        res5 (B, C5, H, W) → conv_new_1, ReLU → (B, CONV_DIM, H, W)
          → cls_seg → (B, 2 G² C, H, W) → fcis_head → scores (R, C), mask logits (R, 2, P, P)
          → bbox    → (B, 8 G², H, W)   → psroi_pool, mean over bins → deltas (R, 8)

    C counts the background, which is class 0 of the maps.  The score of a class is the mean over
    the bins of the larger of its inside and outside map; its mask is the softmax of the two.
    """

    @configurable
    def __init__(
        self,
        *,
        in_feature: str,
        in_channels: int,
        stride: int,
        num_classes: int,
        box_transform: Box2BoxTransform,
        matcher: Matcher,
        conv_dim: int,
        conv_lr_factor: float,
        group_size: int,
        pooled_size: int,
        sampling: str,
        regions_per_image: int,
        positive_fraction: float,
        mask_weight: float,
        mask_threshold: float,
    ) -> None:
        """
        Args:
            in_feature: name of the feature map.
            in_channels: its channels.
            stride: pixels of the network input per cell of it.
            num_classes: foreground classes, C - 1.
            box_transform: between boxes and normalised deltas.
            matcher: see :func:`~instseg.projects.fcis.targets.assign_labels`.
            conv_dim: channels of conv_new_1.
            conv_lr_factor: factor on its learning rate.
            group_size: G, position-sensitive parts per side.
            pooled_size: P, bins per side.
            sampling: "ohem" or "random".
            regions_per_image: regions trained on, and the divisor of two losses.
            positive_fraction: largest share of foreground among them, with "random".
            mask_weight: weight of ``loss_mask``.
            mask_threshold: least value of a mask target inside the instance.
        """
        super().__init__()
        self.in_feature = in_feature
        self.spatial_scale = 1 / stride
        self.box_transform = box_transform
        self.matcher = matcher
        self.conv_lr_factor = conv_lr_factor
        self.group_size = group_size
        self.pooled_size = pooled_size
        self.sampling = sampling
        self.regions_per_image = regions_per_image
        self.positive_fraction = positive_fraction
        self.mask_weight = mask_weight
        self.mask_threshold = mask_threshold
        parts = group_size * group_size
        self.conv_new_1 = nn.Conv2d(in_channels, conv_dim, 1)
        self.cls_seg = nn.Conv2d(conv_dim, 2 * parts * (num_classes + 1), 1)
        self.bbox = nn.Conv2d(conv_dim, 8 * parts, 1)
        for layer in (self.conv_new_1, self.cls_seg, self.bbox):
            for name, value in layer.named_parameters():
                nn.init.normal_(value, std=0.01 if name == "weight" else 0.0)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        node, heads = cfg.MODEL.FCIS, cfg.MODEL.ROI_HEADS
        if heads.IN_FEATURES[0] not in input_shape:
            raise ConfigError(
                f"MODEL.ROI_HEADS.IN_FEATURES is {heads.IN_FEATURES}; the backbone gives "
                f"{', '.join(input_shape)}"
            )
        shape = input_shape[heads.IN_FEATURES[0]]
        return {
            "in_feature": heads.IN_FEATURES[0],
            "in_channels": shape.channels,
            "stride": shape.stride,
            "num_classes": heads.NUM_CLASSES,
            "box_transform": Box2BoxTransform(weights=cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS),
            "matcher": Matcher(
                heads.IOU_THRESHOLDS, heads.IOU_LABELS, allow_low_quality_matches=False
            ),
            "conv_dim": node.CONV_DIM,
            "conv_lr_factor": node.CONV_LR_FACTOR,
            "group_size": node.GROUP_SIZE,
            "pooled_size": node.POOLED_SIZE,
            "sampling": node.SAMPLING,
            "regions_per_image": heads.BATCH_SIZE_PER_IMAGE,
            "positive_fraction": heads.POSITIVE_FRACTION,
            "mask_weight": node.MASK_LOSS_WEIGHT,
            "mask_threshold": node.MASK_THRESH,
        }

    def lr_multipliers(self) -> dict[str, float]:
        """Factors on the learning rate, by name of the parameter's module (authors' code)."""
        return {"conv_new_1": self.conv_lr_factor}

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Any], dict[str, Tensor]]:
        """
        Args:
            images: the batch; gives the sizes of its images without padding.
            features: feature maps by name.
            proposals: with ``proposal_boxes``, one per image.
            targets: in training, with ``gt_boxes``, ``gt_classes`` and ``gt_masks``.
        Returns:
            in training the proposals and the losses, else :class:`Detections` of every image and
            no losses.
        Raises:
            ValueError: no targets in training.
            CheckpointError: not in training, values that are not finite.
        """
        maps = self.maps(features[self.in_feature])
        boxes = [image.proposal_boxes.tensor for image in proposals]
        if not self.training:
            return self._detect(maps, boxes, images.image_sizes), {}
        if targets is None:
            raise ValueError("FCISROIHeads needs gt_boxes, gt_classes and gt_masks in training")
        samples = [
            self._sample(number, proposed, image)
            for number, (proposed, image) in enumerate(zip(boxes, targets, strict=True))
        ]
        return proposals, self._losses(maps, samples)

    def maps(self, features: Tensor) -> Maps:
        """Score and box maps of (B, C5, H, W) features."""
        hidden = F.relu(self.conv_new_1(features))
        # Matrix products over channels-last memory, the layout that fcis_head reads.
        cells = hidden.permute(0, 2, 3, 1)
        scores = F.linear(cells, self.cls_seg.weight.flatten(1), self.cls_seg.bias)
        return Maps(scores.permute(0, 3, 1, 2), self.bbox(hidden))

    def regions(self, maps: Maps, rois: Tensor, classes: Tensor | None = None) -> Regions:
        """Scores, masks and deltas of regions.

        Args:
            maps: of the batch.
            rois: (R, 5), see :func:`~instseg.projects.fcis.boxes.to_rois`.
            classes: (R,) class whose mask is wanted, -1 for none (zeros); None takes the best one.
        """
        scale, group, size = self.spatial_scale, self.group_size, self.pooled_size
        scores, mask_logits, classes = fcis_head(maps.scores, rois, classes, scale, group, size)
        deltas = psroi_pool(maps.boxes, rois, scale, group, size).mean(dim=(2, 3))
        return Regions(scores, mask_logits, classes, deltas)

    def _detect(
        self, maps: Maps, boxes: list[Tensor], sizes: list[tuple[int, int]]
    ) -> list[Detections]:
        """Score proposals, refine each once and score the result: 2 R regions per image."""
        counts = [len(proposed) for proposed in boxes]
        first = self.regions(maps, to_rois(boxes))
        check_finite(*first)
        refined = [
            refine_boxes(proposed, deltas, self.box_transform, size)
            for proposed, deltas, size in zip(boxes, first.deltas.split(counts), sizes, strict=True)
        ]
        second = self.regions(maps, to_rois(refined))
        check_finite(*second)
        passes = [
            zip(
                where,
                regions.scores.float().softmax(dim=1).split(counts),
                # The softmax of two numbers is the sigmoid of their difference.
                regions.mask_logits.float().diff(dim=1)[:, 0].sigmoid().split(counts),
                strict=True,
            )
            for where, regions in ((boxes, first), (refined, second))
        ]
        return [
            Detections(*(torch.cat(pair) for pair in zip(*of_image, strict=True)))
            for of_image in zip(*passes, strict=True)
        ]

    @torch.no_grad()
    def _sample(self, number: int, proposals: Tensor, image: Instances) -> Samples:
        """Regions of image ``number``; the ground-truth boxes are candidates too."""
        gt_boxes = image.gt_boxes.tensor
        boxes = torch.cat([proposals, gt_boxes])
        labels, matched = assign_labels(boxes, gt_boxes, image.gt_classes, self.matcher)
        if self.sampling == "ohem":
            chosen = every_candidate(labels)
            labels = labels[chosen]
        else:
            chosen, labels = random_candidates(
                labels, self.regions_per_image, self.positive_fraction
            )
        boxes, matched = boxes[chosen], matched[chosen]
        size = self.pooled_size
        masks = labels.new_full((len(labels), size, size), NEITHER)
        deltas = boxes.new_zeros(len(labels), 4)
        foreground = labels > 0
        if foreground.any():
            gt_indices = matched[foreground]
            gt_masks = gt_masks_of(image).to(boxes.device)
            masks[foreground] = mask_targets(
                boxes[foreground], gt_indices, gt_boxes, gt_masks, size, self.mask_threshold
            )
            matched_boxes = gt_boxes[gt_indices]
            deltas[foreground] = self.box_transform.get_deltas(boxes[foreground], matched_boxes)
        return Samples(torch.full_like(labels, number), boxes, labels, masks, deltas)

    def _losses(self, maps: Maps, samples_by_image: list[Samples]) -> dict[str, Tensor]:
        num_images = len(samples_by_image)
        rois = to_rois([image_samples.boxes for image_samples in samples_by_image])
        counts = [len(image_samples.labels) for image_samples in samples_by_image]
        samples = Samples(*(torch.cat(parts) for parts in zip(*samples_by_image, strict=True)))
        # Masks of background regions are ignored.
        regions = self.regions(maps, rois, torch.where(samples.labels > 0, samples.labels, -1))
        if self.sampling == "ohem":
            hardest = [
                rows[
                    hard_examples(
                        regions.at(rows), samples.at(rows), self.regions_per_image, self.mask_weight
                    )
                ]
                for rows in torch.arange(len(rois), device=rois.device).split(counts)
            ]
            hardest_rows = torch.cat(hardest)
            regions, samples = regions.at(hardest_rows), samples.at(hardest_rows)
        self._log(regions.scores, samples.labels, num_images)
        return fcis_losses(regions, samples, num_images, self.regions_per_image, self.mask_weight)

    @staticmethod
    @torch.no_grad()
    def _log(scores: Tensor, labels: Tensor, num_images: int) -> None:
        """Log the accuracy of classes, which reveals a frozen or badly loaded layer early."""
        right = (scores.argmax(dim=1) == labels).float()
        foreground = labels > 0
        storage = get_event_storage()
        storage.put_scalar("fcis/num_fg", foreground.sum().item() / num_images)
        if len(labels):
            storage.put_scalar("fcis/accuracy", right.mean().item())
        if foreground.any():
            storage.put_scalar("fcis/fg_accuracy", right[foreground].mean().item())
