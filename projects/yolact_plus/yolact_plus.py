"""YOLACT++: YOLACT with masks scored by their own predicted IoU."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.nn import functional as F

from instseg.modeling import check_finite, stage
from instseg.projects.yolact import YOLACT, Detections, MaskSamples, mask_probabilities

_MASKS = 100
"""Number of masks whose IoU is predicted together; the default number of detections."""


class FastMaskIoUNet(nn.Module):
    """Predicts the IoU of a mask with its instance from the mask alone (section 6.1).

    ::

        (N, 1, 138, 138) → 3x3 convolutions of stride 2, no padding, ReLU → (N, 128, 3, 3)
          → 1x1 convolution, ReLU → (N, C, 3, 3) → maximum → (N, C)
    """

    def __init__(self, num_classes: int, channels: Sequence[int]) -> None:
        """
        Args:
            num_classes: outputs; only that of the mask's class means anything.
            channels: of the convolutions of stride 2.
        """
        super().__init__()
        sizes = [1, *channels]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2) for a, b in zip(sizes[:-1], sizes[1:], strict=True)
        )
        self.predictor = nn.Conv2d(sizes[-1], num_classes, 1)
        for layer in (*self.convs, self.predictor):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, masks: Tensor) -> Tensor:
        """(N, h, w) cropped probabilities → (N, C), not below 0 and not bounded above."""
        x = masks[:, None]
        for layer in self.convs:
            x = F.relu(layer(x))
        return F.relu(self.predictor(x)).amax(dim=(2, 3))


@META_ARCH_REGISTRY.register()
class YOLACTPlus(YOLACT):
    """YOLACT++ (Bolya et al., TPAMI 2020, arXiv 1912.06218).

    Deformable convolutions are in its backbone and more anchors in its configuration; new here is
    the re-scoring of masks.  Detections have ``mask_scores`` (N,) beside ``scores``: score times
    predicted IoU, by which masks are ranked in evaluation.  Boxes, masks and their order stay those
    of YOLACT.
    """

    gives_mask_scores = True

    @configurable
    def __init__(
        self,
        *,
        maskiou_net: FastMaskIoUNet,
        maskiou_weight: float,
        maskiou_min_area: int,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            maskiou_net: predicts the IoU of masks.
            maskiou_weight: factor of its loss.
            maskiou_min_area: it trains on masks of more prototype pixels than this.
            kwargs: those of YOLACT.
        """
        super().__init__(**kwargs)
        self.maskiou_net = maskiou_net
        self.maskiou_weight = maskiou_weight
        self.maskiou_min_area = maskiou_min_area

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.YOLACT_PLUS
        arguments: dict[str, Any] = super().from_config(cfg)
        arguments["maskiou_net"] = FastMaskIoUNet(
            cfg.MODEL.YOLACT.NUM_CLASSES, node.MASKIOU_CHANNELS
        )
        arguments["maskiou_weight"] = node.MASKIOU_WEIGHT
        arguments["maskiou_min_area"] = node.MASKIOU_MIN_AREA
        return arguments

    def extra_losses(self, samples: MaskSamples) -> dict[str, Tensor]:
        """Loss of the re-scoring network; it trains prototypes and coefficients as well."""
        large = samples.targets.sum(dim=(1, 2)) > self.maskiou_min_area
        masks, classes = samples.probabilities[large], samples.classes[large]
        predicted = self.maskiou_net(masks)[torch.arange(len(masks)), classes]
        targets = mask_ious(masks.detach() > 0.5, samples.targets[large] > 0.5)
        loss = F.smooth_l1_loss(predicted, targets, reduction="sum")
        return {"loss_maskiou": loss * (self.maskiou_weight / samples.num_positives)}

    def finish(
        self,
        detections: Detections,
        prototypes: Tensor,
        size: tuple[int, int],
        *,
        cropped: bool = False,
    ) -> Instances:
        """See YOLACT; with ``mask_scores``."""
        instances = super().finish(detections, prototypes, size, cropped=cropped)
        with stage("mask re-scoring"):
            ious = self.predicted_ious(detections, prototypes)
            instances.mask_scores = detections.scores * ious
        return instances

    def extra_networks(self) -> dict[str, Tensor]:
        """The re-scoring network: it looks at the masks of the detections."""
        side = 2 * -(-self.image_size // 8)
        return {"maskiou_net": torch.zeros(2, side, side, device=self.device)}

    def predicted_ious(self, detections: Detections, prototypes: Tensor) -> Tensor:
        """(N,) predicted IoU of each detection's mask, for its class; some masks at a time."""
        starts = range(0, max(len(detections.scores), 1), _MASKS)
        parts = [detections[start : start + _MASKS] for start in starts]
        return torch.cat([self._ious(part, prototypes) for part in parts])

    def _ious(self, detections: Detections, prototypes: Tensor) -> Tensor:
        extents = self.mask_extents(detections)
        masks = mask_probabilities(prototypes, detections.coefficients, extents)
        class_ious: Tensor = self.maskiou_net(masks).float()
        check_finite(class_ious)
        return class_ious[torch.arange(len(class_ious)), detections.classes]


def mask_ious(first: Tensor, second: Tensor) -> Tensor:
    """IoU of masks, pair by pair: (N, h, w) bool twice → (N,) float, 0 for two empty ones."""
    shared = (first & second).sum(dim=(1, 2))
    union = (first | second).sum(dim=(1, 2))
    return shared / union.clamp(min=1)
