"""ResNet with modulated deformable convolutions (DCNv2) on torchvision's operator."""

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import ResNet, build_resnet_backbone
from torch import Tensor, nn
from torchvision.ops import deform_conv2d


class DeformableConv2d(nn.Module):
    """3x3 convolution that looks at learned places with learned strengths (DCNv2, 1811.11168).

    One ordinary convolution predicts 27 channels: 18 offsets in cells, (dy, dx) of every tap, and 9
    logits of strengths, taps row by row.  It begins at zero: no offsets, half the strength.
    Samples are bilinear, zero outside the map.
    """

    def __init__(self, conv: Conv2d) -> None:
        """
        Args:
            conv: a 3x3 convolution with padding 1; its weights and normalisation are taken over.
        """
        super().__init__()
        self.stride = conv.stride
        self.weight = conv.weight
        # Beyond the plain convolution, although a normalisation follows: released weights have it.
        self.bias = nn.Parameter(torch.zeros_like(conv.weight[:, 0, 0, 0]))
        self.norm = conv.norm
        self.offset_mask = nn.Conv2d(conv.in_channels, 27, 3, stride=conv.stride, padding=1)
        for value in self.offset_mask.parameters():
            nn.init.zeros_(value)
        if not conv.weight.requires_grad:
            self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) → (B, out, H', W')."""
        offsets, strengths = self.offset_mask(x).split([18, 9], dim=1)
        # Torchvision's operator reads outside of the map, or ends the process, where an offset is
        # NaN, as after a step that diverged; the strengths carry the NaN on.
        strengths = strengths + offsets.unflatten(1, (9, 2)).sum(dim=2) * 0
        offsets = offsets.where(~offsets.isnan(), 0)
        # It has no kernel for bfloat16 on a CPU, which autocast gives.
        x, offsets, strengths = (part.to(self.weight.dtype) for part in (x, offsets, strengths))
        x = deform_conv2d(
            x, offsets, self.weight, self.bias, self.stride, padding=1, mask=strengths.sigmoid()
        )
        return x if self.norm is None else self.norm(x)


def deformable_blocks(num_blocks: int, count: int, interval: int) -> list[int]:
    """Which blocks of a stage are deformable (section 6.2, authors' code).

    Args:
        num_blocks: of the stage.
        count: how many blocks at its end are asked for.
        interval: only every ``interval``-th of them, counted from the first block of the stage.
    """
    first = max(num_blocks - count, 0)
    return [i for i in range(first, num_blocks) if i % interval == 0]


@BACKBONE_REGISTRY.register()
def build_deformable_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Detectron2's ResNet, deformable where ``MODEL.YOLACT_PLUS.DEFORMABLE_*`` say."""
    node = cfg.MODEL.YOLACT_PLUS
    backbone = build_resnet_backbone(cfg, input_shape)
    for stage, count in zip(backbone.stages, node.DEFORMABLE_BLOCKS, strict=False):
        for i in deformable_blocks(len(stage), count, node.DEFORMABLE_INTERVAL):
            stage[i].conv2 = DeformableConv2d(stage[i].conv2)
    return backbone
