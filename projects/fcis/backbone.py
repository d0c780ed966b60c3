"""ResNet as in the authors' code: the stem's pooling has no padding and rounds sizes up."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_resnet_backbone
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.resnet import BasicStem
from torch import Tensor
from torch.nn import functional as F


class CeilPoolStem(BasicStem):
    """Detectron2's stem with a max pool 3x3, stride 2, without padding, in ceil mode.

    n cells become ⌊n / 2⌋; with padding they would be ⌈n / 2⌉.  Cell i reads 2i .. 2i + 2 instead
    of 2i - 1 .. 2i + 1, so weights do not transfer exactly between the two.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, C, H / 4, W / 4); H and W are at least 3."""
        x = F.relu_(self.conv1(x))
        return F.max_pool2d(x, kernel_size=3, stride=2, ceil_mode=True)


@BACKBONE_REGISTRY.register()
def build_fcis_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """``build_resnet_backbone`` with :class:`CeilPoolStem`.

    The paper's trunk is ``RESNETS.RES5_DILATION`` 2 (stride 16 throughout) with
    ``OUT_FEATURES`` [res4, res5].
    """
    backbone = build_resnet_backbone(cfg, input_shape)
    backbone.stem = CeilPoolStem(
        in_channels=input_shape.channels,
        out_channels=cfg.MODEL.RESNETS.STEM_OUT_CHANNELS,
        norm=cfg.MODEL.RESNETS.NORM,
    )
    return backbone.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)
