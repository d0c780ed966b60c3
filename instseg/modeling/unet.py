"""The contracting path of U-Net (Ronneberger, Fischer, Brox, MICCAI 2015, arXiv 1505.04597) as a
backbone of Detectron2.

Its first level keeps every pixel, for dense systems whose instances are few pixels wide.
"""

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn
from torch.nn import functional as F

from instseg.modeling.dense_network import conv_norm, conv_relu


class UNetEncoder(Backbone):
    """Levels of halved size, each two 3x3 convolutions.

    ::

        image (B, C, H, W) → level1 (B, c1, H, W) → pool → level2 (B, c2, H/2, W/2) → pool → ...

    Unlike the paper's, convolutions are padded and normalised, and the input of a level is added to
    its output (a residual block, with which it learns from scratch in fewer iterations).  The
    expanding path is :class:`~instseg.modeling.DenseDecoder`.
    """

    def __init__(self, channels: Sequence[int], *, in_channels: int = 3, norm: str = "BN") -> None:
        """
        Args:
            channels: of each level, from the finest.
            in_channels: channels of the image.
            norm: after each convolution, as in Detectron2's ``get_norm``; "" for none.
        """
        super().__init__()
        names = [f"level{number}" for number in range(1, len(channels) + 1)]
        self.levels = nn.ModuleDict()
        for name, outputs in zip(names, channels, strict=True):
            self.levels[name] = _Level(in_channels, outputs, norm)
            in_channels = outputs
        self._out_features = names
        self._out_feature_channels = dict(zip(names, channels, strict=True))
        self._out_feature_strides = {name: 2**number for number, name in enumerate(names)}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """All levels.

        Args:
            x: (B, C, H, W), H and W multiples of :attr:`size_divisibility`.
        """
        outputs: dict[str, Tensor] = {}
        for name, level in self.levels.items():
            x = outputs[name] = level(F.max_pool2d(x, 2) if outputs else x)
        return outputs

    @property
    def size_divisibility(self) -> int:
        """Pixels of height and width per cell of the coarsest level."""
        return int(2 ** (len(self.levels) - 1))


class _Level(nn.Module):
    """Residual block of two 3x3 convolutions."""

    def __init__(self, inputs: int, outputs: int, norm: str) -> None:
        super().__init__()
        self.shortcut = conv_norm(inputs, outputs, 1, norm)
        self.first = conv_relu(inputs, outputs, 3, norm)
        self.second = conv_norm(outputs, outputs, 3, norm)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) → (B, outputs, h, w)."""
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


@BACKBONE_REGISTRY.register()
def build_unet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> UNetEncoder:
    """The contracting path of U-Net by ``cfg.MODEL.UNET``."""
    node = cfg.MODEL.UNET
    return UNetEncoder(node.CHANNELS, in_channels=input_shape.channels or 3, norm=node.NORM)
