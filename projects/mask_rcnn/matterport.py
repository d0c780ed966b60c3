"""The backbone of matterport/Mask_RCNN (Keras), for weights converted from there."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN
from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone
from detectron2.modeling.backbone.resnet import BasicStem
from torch import Tensor
from torch.nn import functional as F


class SamePaddingStem(BasicStem):
    """ResNet stem whose max pooling pads as TensorFlow's "same" does.

    For even sizes, as all images padded for an FPN have, "same" pads one row at the bottom and one
    column at the right.  Detectron2 pads one on every side, so its windows lie two image pixels
    further to the top left.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) normalised pixels → (B, C, ceil(ceil(H / 2) / 2), likewise W)."""
        x = F.relu_(self.conv1(x))
        height, width = x.shape[-2:]
        # Values after a ReLU are never below 0, so zeros act like TensorFlow's padding.
        x = F.pad(x, (width % 2, 1, height % 2, 1))
        return F.max_pool2d(x, kernel_size=3, stride=2)


@BACKBONE_REGISTRY.register()
def build_matterport_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Detectron2's ResNet-FPN with :class:`SamePaddingStem`; names of parameters are the same."""
    backbone = build_resnet_fpn_backbone(cfg, input_shape)
    stem = SamePaddingStem(
        in_channels=input_shape.channels,
        out_channels=cfg.MODEL.RESNETS.STEM_OUT_CHANNELS,
        norm=cfg.MODEL.RESNETS.NORM,
    )
    backbone.bottom_up.stem = stem.freeze() if cfg.MODEL.BACKBONE.FREEZE_AT >= 1 else stem
    return backbone
