"""MaskIoU head and the ROI heads that use it, on Detectron2's ``StandardROIHeads``."""

from typing import Any

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, cat
from detectron2.modeling import ROI_HEADS_REGISTRY, StandardROIHeads
from detectron2.modeling.roi_heads import select_foreground_proposals
from detectron2.modeling.roi_heads.mask_head import (
    ROI_MASK_HEAD_REGISTRY,
    BaseMaskRCNNHead,
    mask_rcnn_inference,
    mask_rcnn_loss,
)
from detectron2.structures import Instances
from detectron2.utils.registry import Registry
from torch import Tensor, nn
from torch.nn import functional as F

from instseg.errors import ConfigError
from instseg.projects.mask_scoring_rcnn.targets import maskiou_targets, visible_ratios

ROI_MASKIOU_HEAD_REGISTRY = Registry("ROI_MASKIOU_HEAD")
ROI_MASKIOU_HEAD_REGISTRY.__doc__ = """
Heads that predict the IoU of a mask with its instance.

The registered object is called with ``(cfg, input_shape)``, the shape of the region features.  Its
result is called with ``(features, masks)``, like :class:`MaskIoUHead`.
"""


@ROI_MASKIOU_HEAD_REGISTRY.register()
class MaskIoUHead(nn.Module):
    """Predicts the IoU of a mask with its instance (Huang et al., section 3.2, figure 3).

    ::

        features (R, C, S, S) ┐
        masks (R, 1, 2S, 2S) ─┴ max pool 2 → (R, C + 1, S, S)
          → 3x3 convolutions + ReLU, the last with stride 2 → (R, CONV_DIM, ⌈S/2⌉, ⌈S/2⌉)
          → fc1, fc2 + ReLU → (R, FC_DIM) → maskiou → (R, K)
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_classes: int,
        num_conv: int,
        conv_dim: int,
        fc_dim: int,
    ) -> None:
        """
        Args:
            input_shape: channels, height and width of the region features, without the mask.
            num_classes: foreground classes K; each has an output of its own.
            num_conv: convolutions, at least one.
            conv_dim: their channels.
            fc_dim: outputs of the two fully connected layers.
        """
        super().__init__()
        self.num_conv = num_conv
        channels = input_shape.channels + 1
        for k in range(1, num_conv + 1):
            conv = nn.Conv2d(channels, conv_dim, 3, stride=2 if k == num_conv else 1, padding=1)
            weight_init.c2_msra_fill(conv)
            self.add_module(f"maskiou_fcn{k}", conv)
            channels = conv_dim
        cells = ((input_shape.height + 1) // 2) * ((input_shape.width + 1) // 2)
        self.maskiou_fc1 = nn.Linear(conv_dim * cells, fc_dim)
        self.maskiou_fc2 = nn.Linear(fc_dim, fc_dim)
        for layer in (self.maskiou_fc1, self.maskiou_fc2):
            weight_init.c2_xavier_fill(layer)
        self.maskiou = nn.Linear(fc_dim, num_classes)
        nn.init.normal_(self.maskiou.weight, std=0.01)
        nn.init.zeros_(self.maskiou.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        node = cfg.MODEL.ROI_MASKIOU_HEAD
        return {
            "input_shape": input_shape,
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "num_conv": node.NUM_CONV,
            "conv_dim": node.CONV_DIM,
            "fc_dim": node.FC_DIM,
        }

    def forward(self, features: Tensor, masks: Tensor) -> Tensor:
        """Predicted IoU for every class.

        Args:
            features: (R, C, S, S) region features, those of the mask head.
            masks: (R, 1, 2S, 2S) probabilities of the mask to score.
        Returns:
            (R, K), unbounded; only the value of the mask's class has a meaning.  R = 0 gives
            (0, K).
        """
        x = torch.cat([features, F.max_pool2d(masks, kernel_size=2, stride=2)], dim=1)
        for k in range(1, self.num_conv + 1):
            x = F.relu(self.get_submodule(f"maskiou_fcn{k}")(x))
        x = F.relu(self.maskiou_fc1(x.flatten(1)))
        x = F.relu(self.maskiou_fc2(x))
        scores: Tensor = self.maskiou(x)
        return scores


def build_maskiou_head(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
    """The head named by ``MODEL.ROI_MASKIOU_HEAD.NAME``.

    Raises:
        ConfigError: nothing is registered under that name.
    """
    name = cfg.MODEL.ROI_MASKIOU_HEAD.NAME
    if name not in ROI_MASKIOU_HEAD_REGISTRY:
        known = ", ".join(sorted(registered for registered, _ in ROI_MASKIOU_HEAD_REGISTRY))
        raise ConfigError(
            f"MODEL.ROI_MASKIOU_HEAD.NAME: nothing is registered as {name!r}; registered: {known}"
        )
    head: nn.Module = ROI_MASKIOU_HEAD_REGISTRY.get(name)(cfg, input_shape)
    return head


@ROI_HEADS_REGISTRY.register()
class MaskScoringROIHeads(StandardROIHeads):
    """Box and mask heads of Mask R-CNN plus a MaskIoU head (Mask Scoring R-CNN, CVPR 2019).

    Training has one more loss, ``loss_maskiou``.  Detections carry ``mask_scores`` (N,)
    beside ``scores``: class score times predicted IoU.  It may be negative or above 1, as in the
    authors' code; ``scores``, boxes, masks and their order stay those of Mask R-CNN.

    The region features are pooled once and feed both heads.  Unless gradients are stopped, the loss
    of the MaskIoU head also trains the mask head, through the mask, and the backbone.
    """

    gives_mask_scores = True

    @configurable
    def __init__(
        self,
        *,
        maskiou_head: nn.Module | None,
        maskiou_loss_weight: float,
        stop_gradient: bool,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            maskiou_head: see :class:`MaskIoUHead`; None gives plain Mask R-CNN.
            maskiou_loss_weight: factor of ``loss_maskiou``.
            stop_gradient: let ``loss_maskiou`` train the MaskIoU head alone.
            kwargs: those of ``StandardROIHeads``.
        """
        super().__init__(**kwargs)
        self.maskiou_head = maskiou_head
        self.gives_mask_scores = maskiou_head is not None
        self.maskiou_loss_weight = maskiou_loss_weight
        self.stop_gradient = stop_gradient

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        if cfg.MODEL.MASKIOU_ON:
            _check_mask_head(cfg)
        arguments: dict[str, Any] = {
            **super().from_config(cfg, input_shape),
            "maskiou_head": None,
            "maskiou_loss_weight": cfg.MODEL.MASKIOU_LOSS_WEIGHT,
            "stop_gradient": cfg.MODEL.ROI_MASKIOU_HEAD.STOP_GRADIENT,
        }
        if not cfg.MODEL.MASKIOU_ON:
            return arguments
        size = cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION
        channels = input_shape[cfg.MODEL.ROI_HEADS.IN_FEATURES[0]].channels
        shape = ShapeSpec(channels=channels, height=size, width=size)
        # Leaves the random numbers that follow as in Mask R-CNN at the same seed.
        with torch.random.fork_rng():
            arguments["maskiou_head"] = build_maskiou_head(cfg, shape)
        return arguments

    def _forward_mask(self, features: dict[str, Tensor], instances: list[Instances]) -> Any:
        """Mask and MaskIoU branch; see ``StandardROIHeads``.

        Returns:
            in training a dict of losses, else ``instances`` with ``pred_masks`` and, if they have
            ``scores``, ``mask_scores``.
        """
        head = self.maskiou_head
        if head is None or not self.mask_on:
            return super()._forward_mask(features, instances)
        if self.training:
            instances, _ = select_foreground_proposals(instances, self.num_classes)
            boxes = [x.proposal_boxes for x in instances]
        else:
            boxes = [x.pred_boxes for x in instances]
        pooled = self.mask_pooler([features[name] for name in self.mask_in_features], boxes)
        logits = self.mask_head.layers(pooled)
        if self.training:
            return self._mask_losses(head, pooled, logits, instances)
        mask_rcnn_inference(logits, instances)
        masks = cat([x.pred_masks for x in instances])
        rescore(head(pooled, masks), instances)
        return instances

    def _mask_losses(
        self, head: nn.Module, pooled: Tensor, logits: Tensor, instances: list[Instances]
    ) -> dict[str, Tensor]:
        """Losses of both heads on the positive regions of all images, (R, ...) in their order."""
        losses = {
            "loss_mask": mask_rcnn_loss(logits, instances, self.mask_head.vis_period)
            * self.mask_head.loss_weight
        }
        classes = cat([x.gt_classes for x in instances])
        selected = select_masks(logits, classes)
        judged = (pooled, selected.sigmoid())
        if self.stop_gradient:
            judged = (judged[0].detach(), judged[1].detach())
        predicted = head(*judged)
        targets = self._targets(selected[:, 0], instances)
        loss = maskiou_loss(predicted, classes, targets)
        losses["loss_maskiou"] = loss * self.maskiou_loss_weight
        return losses

    @staticmethod
    @torch.no_grad()
    def _targets(logits: Tensor, instances: list[Instances]) -> Tensor:
        """(R,) MaskIoU targets of (R, M, M) logits."""
        size = logits.shape[-1]
        targets = [logits.new_zeros(0, dtype=torch.float32)]
        by_image = logits.split([len(x) for x in instances])
        for image, mask_logits in zip(instances, by_image, strict=True):
            if len(image):  # without any, Detectron2 adds no gt_masks
                boxes = image.proposal_boxes.tensor
                true = image.gt_masks.crop_and_resize(boxes, size)
                ratios = visible_ratios(image.gt_masks, boxes, image.image_size)
                targets.append(maskiou_targets(mask_logits, true, ratios))
        return torch.cat(targets)


def _check_mask_head(cfg: CfgNode) -> None:
    """Raise a ConfigError unless masks are made from pooled features."""
    node = cfg.MODEL.ROI_MASK_HEAD
    if not node.POOLER_TYPE or not issubclass(
        ROI_MASK_HEAD_REGISTRY.get(node.NAME), BaseMaskRCNNHead
    ):
        raise ConfigError(
            f"MODEL.ROI_MASK_HEAD.NAME {node.NAME} with POOLER_TYPE {node.POOLER_TYPE!r} gives no "
            "pooled features to score masks with; use MaskRCNNConvUpsampleHead and ROIAlignV2, or "
            "set MODEL.MASKIOU_ON False"
        )


def select_masks(mask_logits: Tensor, classes: Tensor) -> Tensor:
    """The mask of one class per region; class-agnostic heads have no others.

    Args:
        mask_logits: (R, K, M, M) or (R, 1, M, M).
        classes: (R,) int64.
    Returns:
        (R, 1, M, M) logits.
    """
    if mask_logits.shape[1] == 1:
        return mask_logits
    return mask_logits[torch.arange(len(classes), device=classes.device), classes][:, None]


def maskiou_loss(predicted: Tensor, classes: Tensor, targets: Tensor) -> Tensor:
    """Half the mean squared error over the regions whose mask meets its instance (section 3.3).

    Args:
        predicted: (R, K) output of the MaskIoU head.
        classes: (R,) int64 true classes.
        targets: (R,) IoU; regions with target 0 do not count.
    Returns:
        scalar, 0 if no region counts; always attached to the graph.
    """
    of_class = predicted.float()[torch.arange(len(classes), device=classes.device), classes]
    counted = targets > 0
    errors = torch.where(counted, of_class - targets, of_class * 0)
    return 0.5 * errors.square().sum() / counted.sum().clamp(min=1)


def rescore(predicted: Tensor, instances: list[Instances]) -> None:
    """Give every detection of every image its ``mask_scores`` (section 3.2, "inference").

    Args:
        predicted: (N, K) output of the MaskIoU head for the detections of all images, in order.
        instances: one per image, with ``pred_classes`` and ``scores``; those without ``scores``,
            as from boxes given by the user, are left as they are.
    """
    for image, ious in zip(instances, predicted.split([len(x) for x in instances]), strict=True):
        if image.has("scores"):
            rows = torch.arange(len(image), device=ious.device)
            image.mask_scores = image.scores * ious[rows, image.pred_classes].to(image.scores.dtype)
