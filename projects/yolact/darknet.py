"""DarkNet-53 (Redmon and Farhadi, YOLOv3, 2018, arXiv 1804.02767) as a Detectron2 backbone."""

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn
from torch.nn import functional as F


class DarkNet(Backbone):
    """The convolutional part of DarkNet-53 (YOLOv3, table 1).

    ::

        (3, 550, 550) → stem (32, 550, 550) → stage1 (64, 275, 275) → stage2 (128, 138, 138)
          → stage3 (256, 69, 69) → stage4 (512, 35, 35) → stage5 (1024, 18, 18)

    Outputs are ``stage3``, ``stage4`` and ``stage5``.
    """

    def __init__(
        self,
        in_channels: int,
        stem_channels: int,
        depths: Sequence[int],
        norm: str,
    ) -> None:
        """
        Args:
            in_channels: of the image.
            stem_channels: of the first layer; every stage doubles them.
            depths: residual blocks of the five stages.
            norm: Detectron2's name of a normalisation.
        """
        super().__init__()
        self.stem = _conv(in_channels, stem_channels, 3, norm)
        channels = stem_channels
        self._shapes: dict[str, ShapeSpec] = {}
        for number, depth in enumerate(depths, 1):
            blocks = [_DarkBlock(2 * channels, norm) for _ in range(depth)]
            stage = nn.Sequential(_conv(channels, 2 * channels, 3, norm, stride=2), *blocks)
            self.add_module(f"stage{number}", stage)
            channels *= 2
            if number > 2:
                self._shapes[f"stage{number}"] = ShapeSpec(channels=channels, stride=2**number)
        self._stages = [f"stage{number}" for number in range(1, len(depths) + 1)]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, in_channels, H, W) → the outputs by name."""
        x = self.stem(x)
        outputs = {}
        for name in self._stages:
            x = getattr(self, name)(x)
            if name in self._shapes:
                outputs[name] = x
        return outputs

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self._shapes


class _DarkBlock(nn.Module):
    """``x + conv2(conv1(x))``, with half the channels in between and no activation at the end."""

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        self.conv1 = _conv(channels, channels // 2, 1, norm)
        self.conv2 = _conv(channels // 2, channels, 3, norm)

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.conv2(self.conv1(x)))


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.1)


def _conv(inputs: int, outputs: int, size: int, norm: str, stride: int = 1) -> Conv2d:
    """Convolution, normalisation, leaky ReLU."""
    layer = Conv2d(
        inputs,
        outputs,
        size,
        stride=stride,
        padding=size // 2,
        bias=False,
        norm=get_norm(norm, outputs),
        activation=_leaky,
    )
    nn.init.kaiming_normal_(layer.weight, a=0.1, mode="fan_out")
    return layer


@BACKBONE_REGISTRY.register()
def build_darknet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> DarkNet:
    """DarkNet as ``MODEL.DARKNET`` describes it."""
    node = cfg.MODEL.DARKNET
    return DarkNet(input_shape.channels, node.STEM_CHANNELS, node.DEPTHS, node.NORM)
