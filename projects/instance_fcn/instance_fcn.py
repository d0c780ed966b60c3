"""The network: a fully convolutional trunk, maps of instance parts, and scores."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms

from instseg.errors import ConfigError
from instseg.masks import instances_from_masks, tight_boxes
from instseg.modeling import PixelModel, check_finite, masks_of, result_size, wants_cropped
from instseg.ops.assemble_instances import assemble_instances
from instseg.projects.instance_fcn.proposals import paste_windows
from instseg.projects.instance_fcn.targets import (
    WindowRule,
    inside,
    mask_loss,
    mask_targets,
    match_cells,
    score_loss,
    top_left,
)


@META_ARCH_REGISTRY.register()
class InstanceFCN(PixelModel):
    """Instance-sensitive fully convolutional networks (Dai et al., ECCV 2016, arXiv 1603.08678).

    ::

        image → backbone → (C, H/s, W/s)
          ├─ 1x1 conv + ReLU → 3x3 conv → k x k maps: "is this the (i, j)-th part of an instance?"
          └─ 3x3 conv + ReLU → 1x1 conv → 1 map: "is an instance centred in the window here?"

    A window of m x m cells copies each of its k x k parts from the map of that part; this step
    learns and resamples nothing.  Proposals have no class: ``pred_classes`` is 0 everywhere.
    """

    num_classes_key = None

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        in_feature: str,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        rule: WindowRule,
        conv_dim: int,
        parts: int,
        windows_per_image: int,
        positive_fraction: float,
        scales: Sequence[int],
        max_size: int,
        pre_nms_topk: int,
        nms_threshold: float,
        mask_threshold: float,
        max_proposals: int,
    ) -> None:
        """
        Args:
            backbone: gives the feature map ``in_feature``; its stride is that of ``rule``.
            pixel_mean, pixel_std: see :class:`~instseg.modeling.PixelModel`.
            rule: which windows are trained on.
            conv_dim: channels of the first convolution of each branch.
            parts: k, parts of an instance in either direction.
            windows_per_image: windows sampled per image in training.
            positive_fraction: their positive share, if there are enough.
            scales: shorter sides of the image that inference searches, in pixels.
            max_size: largest longer side of a searched image, in pixels.
            pre_nms_topk: windows of each scale, by score, that get a mask.
            nms_threshold: box IoU of masks above which the one with the lower score goes.
            mask_threshold: least probability of a pixel of a mask.
            max_proposals: final number of proposals of an image.
        """
        super().__init__(pixel_mean, pixel_std)
        self.backbone = backbone
        self.in_feature = in_feature
        channels = backbone.output_shape()[in_feature].channels
        self.mask_branch = nn.Sequential(
            nn.Conv2d(channels, conv_dim, 1), nn.ReLU(), nn.Conv2d(conv_dim, parts**2, 3, padding=1)
        )
        self.score_branch = nn.Sequential(
            nn.Conv2d(channels, conv_dim, 3, padding=1), nn.ReLU(), nn.Conv2d(conv_dim, 1, 1)
        )
        for branch in (self.mask_branch, self.score_branch):
            for name, parameter in branch.named_parameters():
                nn.init.normal_(parameter, std=0.01 if name.endswith("weight") else 0)
        self.rule = rule
        self.parts = parts
        self.windows_per_image = windows_per_image
        self.positive_fraction = positive_fraction
        self.scales = tuple(scales)
        self.max_size = max_size
        self.pre_nms_topk = pre_nms_topk
        self.nms_threshold = nms_threshold
        self.mask_logit = math.log(mask_threshold / (1 - mask_threshold))
        self.max_proposals = max_proposals

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.INSTANCE_FCN
        backbone = build_backbone(cfg)
        _check(cfg, backbone)
        return {
            "backbone": backbone,
            "in_feature": node.IN_FEATURE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "rule": WindowRule(
                size=node.WINDOW_SIZE,
                stride=backbone.output_shape()[node.IN_FEATURE].stride,
                canonical_size=node.CANONICAL_SIZE,
                positive_offset=node.POSITIVE_OFFSET,
                positive_octaves=node.POSITIVE_OCTAVES,
                negative_offset=node.NEGATIVE_OFFSET,
                negative_octaves=node.NEGATIVE_OCTAVES,
            ),
            "conv_dim": node.CONV_DIM,
            "parts": node.PARTS,
            "windows_per_image": node.WINDOWS_PER_IMAGE_TRAIN,
            "positive_fraction": node.POSITIVE_FRACTION_TRAIN,
            "scales": node.SCALES_TEST,
            "max_size": cfg.INPUT.MAX_SIZE_TEST,
            "pre_nms_topk": node.PRE_NMS_TOPK_TEST,
            "nms_threshold": node.NMS_THRESH_TEST,
            "mask_threshold": node.MASK_THRESH_TEST,
            "max_proposals": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Losses in training, else one dict per image with its ``instances``.

        Args:
            batched_inputs: Detectron2's format: ``image`` (C, h, w), for training ``instances``
                with ``gt_boxes`` and ``gt_masks`` (bit masks), else optionally ``height`` and
                ``width`` of the result and ``max_instances`` in it.
        Raises:
            CheckpointError: not in training, the network gives values that are not finite.
        """
        if self.training:
            return self.losses(batched_inputs)
        # One by one: the padding of a batch would change results.
        return [{"instances": self.propose(sample)} for sample in batched_inputs]

    def maps(self, images: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Run the network.

        Args:
            images: (C, h, w) each, on the model's device, not normalised.
        Returns:
            (B, k*k, H, W) logits, channel k i + j for part (i, j), row i from the top, and
            (B, H, W) logits of the windows centred at the cells.
        """
        divisor = max(self.rule.stride, self.backbone.size_divisibility)
        batch = ImageList.from_tensors([self.normalised(image) for image in images], divisor)
        features = self.backbone(batch.tensor)[self.in_feature]
        return self.mask_branch(features), self.score_branch(features)[:, 0]

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the cells that show an image of this size, not padding alone."""
        return -(-height // self.rule.stride), -(-width // self.rule.stride)

    def losses(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """``loss_mask`` over positive windows and ``loss_score`` over all sampled ones.

        Images of one size share a forward pass.  Padding all to the largest would cost more than it
        saves, because their scales differ.
        """
        groups: dict[tuple[int, ...], list[dict[str, Any]]] = defaultdict(list)
        for sample in batched_inputs:
            groups[sample["image"].shape[-2:]].append(sample)
        # Windows of all groups; even tensors without rows are attached to the network.
        logits, targets, counted, scores, positive = (
            torch.cat(parts)
            for parts in zip(*(self._sample(group) for group in groups.values()), strict=True)
        )
        return {
            "loss_mask": mask_loss(logits, targets, counted),
            "loss_score": score_loss(scores, positive),
        }

    def _sample(self, group: list[dict[str, Any]]) -> tuple[Tensor, ...]:
        """Windows drawn from images of one size.

        Returns:
            ``logits``, ``targets`` and ``counted`` of :func:`mask_loss` for the P positive windows;
            ``logits`` and ``positive`` of :func:`score_loss` for all N windows.
        """
        mask_maps, score_maps = self.maps([sample["image"].to(self.device) for sample in group])
        grid = self.grid(*group[0]["image"].shape[-2:])
        size = self.rule.size
        windows = [torch.zeros(0, 3, dtype=torch.int64, device=self.device)]
        targets = [torch.zeros(0, size, size, device=self.device)]
        scores, positive = [], []
        for number, sample in enumerate(group):
            instances = sample["instances"].to(self.device)
            owners = match_cells(instances.gt_boxes.tensor, grid, self.rule)
            shown, empty = subsample_labels(
                owners, self.windows_per_image, self.positive_fraction, len(instances)
            )
            chosen = torch.cat([shown, empty])
            scores.append(score_maps[number, : grid[0], : grid[1]].flatten()[chosen])
            positive.append(torch.arange(len(chosen), device=self.device) < len(shown))
            if len(shown):
                corners = top_left(shown, grid[1], size)
                masks = instances.gt_masks.tensor
                windows.append(F.pad(corners, (1, 0), value=number))
                targets.append(mask_targets(masks, owners[shown], corners, grid, self.rule))
        placed = torch.cat(windows)
        return (
            assemble_instances(mask_maps, placed, self.parts, size),
            torch.cat(targets),
            inside(placed[:, 1:], grid, size),
            torch.cat(scores),
            torch.cat(positive),
        )

    def propose(self, sample: dict[str, Any]) -> Instances:
        """Proposals of one image over all scales (section 3.3).

        Returns:
            at most ``max_proposals``, by falling score, with the usual fields.
        """
        image = sample["image"].to(self.device)
        height, width = image.shape[-2:]
        size = result_size(sample)
        # Scales may become equal by the limit on the longer side; search them once.
        shapes = dict.fromkeys(self._shape_at(side, height, width) for side in self.scales)
        windows = Instances.cat([self._search(image, shape, size) for shape in shapes])
        best = nms(windows.boxes, windows.scores, self.nms_threshold)[: self.max_proposals]
        best = best[: sample.get("max_instances")]
        windows = windows[best]
        placed = paste_windows(
            windows.logits - self.mask_logit, windows.corners, windows.cells, windows.grids, size
        )
        cropped = wants_cropped(sample)
        masks = masks_of(placed, len(windows), size, cropped=cropped, device=self.device)
        # Instances whose mask loses its last pixel here are dropped.
        return instances_from_masks(masks, windows.scores, torch.zeros_like(best))

    def _shape_at(self, side: int, height: int, width: int) -> tuple[int, int]:
        """Size of an image whose shorter side becomes ``side``, if ``max_size`` allows it."""
        factor = min(side / min(height, width), self.max_size / max(height, width))
        return max(round(height * factor), 1), max(round(width * factor), 1)

    def _search(self, image: Tensor, shape: tuple[int, int], size: tuple[int, int]) -> Instances:
        """The best windows at one scale.

        Args:
            image: (C, h, w).
            shape: height and width that it is resized to.
            size: height and width of the results.
        Returns:
            ``scores`` (N,) probabilities, ``logits`` (N, m, m), ``boxes`` (N, 4) around the masks,
            in pixels of the result; ``corners``, ``cells`` and ``grids`` of :func:`paste_windows`.
        """
        # Smooths when shrinking, as Pillow does with training images.
        resized = F.interpolate(image[None].float(), shape, mode="bilinear", antialias=True)[0]
        mask_maps, score_maps = (maps.float() for maps in self.maps([resized]))
        check_finite(mask_maps, score_maps)
        grid = self.grid(*shape)
        scores = score_maps[0, : grid[0], : grid[1]].flatten().sigmoid()
        best = scores.topk(min(self.pre_nms_topk, len(scores)))
        corners = top_left(best.indices, grid[1], self.rule.size)
        maps = mask_maps[:, :, : grid[0], : grid[1]]
        logits = assemble_instances(maps, F.pad(corners, (1, 0)), self.parts, self.rule.size)
        tight = tight_boxes(logits > self.mask_logit)
        stride = self.rule.stride
        cell = scores.new_tensor([stride * size[0] / shape[0], stride * size[1] / shape[1]])
        boxes = (tight + corners.flip(1).repeat(1, 2)) * cell.flip(0).repeat(2)
        filled = tight[:, 2] > tight[:, 0]
        boxes = Boxes(boxes)
        boxes.clip(size)
        windows = Instances(size)
        windows.boxes = boxes.tensor
        windows.scores = best.values
        windows.logits = logits
        windows.corners = corners
        windows.cells = cell.expand(len(corners), 2)
        windows.grids = corners.new_tensor(grid).expand(len(corners), 2)
        return windows[filled]


def _check(cfg: CfgNode, backbone: Backbone) -> None:
    """Raise a ConfigError for values that make no network."""
    node = cfg.MODEL.INSTANCE_FCN
    known = backbone.output_shape()
    if node.IN_FEATURE not in known:
        raise ConfigError(
            f"MODEL.INSTANCE_FCN.IN_FEATURE is {node.IN_FEATURE!r}; expected one of "
            f"{', '.join(known)}"
        )
