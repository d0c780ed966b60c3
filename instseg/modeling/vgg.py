"""VGG (Simonyan and Zisserman, ICLR 2015, arXiv 1409.1556) as a backbone of Detectron2.

Parameters are called as in torchvision's ``vgg11 ... vgg19``, ``features.N.weight``, so that its
ImageNet weights load by their names (``MODEL.WEIGHTS FILE?matching_heuristics=True``).
"""

from collections.abc import Sequence

import fvcore.nn.weight_init as weight_init
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

# Depth -> convolutions in each of the five stages (table 1 of the paper: A, B, D, E).
_CONVS = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
_CHANNELS = (64, 128, 256, 512, 512)
_STAGES = tuple(f"conv{number}" for number in range(1, 6))


class VGG(Backbone):
    """The convolutions of VGG; no fifth pooling and no fully connected layers.

    ::

        image (B, C, H, W)
          → conv1 (B, 64, H, W) → pool → conv2 (B, 128, H/2, W/2) → pool
          → conv3 (B, 256, H/4, W/4) → pool → conv4 (B, 512, H/8, W/8) → pool4
          → conv5 (B, 512, H/S, W/S), S = ``output_stride``

    For S = 8 pool4 has stride 1 and conv5 dilation 2.  Its kernel is then 3 with padding 1, which
    keeps size and centring; the 2x2 kernel of S = 16 would shift the map by half a cell.  Weights
    are the same for both.
    """

    def __init__(
        self,
        *,
        depth: int = 16,
        in_channels: int = 3,
        norm: str = "",
        output_stride: int = 16,
        out_features: Sequence[str] = ("conv5",),
        freeze_at: int = 0,
    ) -> None:
        """
        Args:
            depth: 11, 13, 16 or 19.
            in_channels: channels of the image.
            norm: after each convolution, as in Detectron2's ``get_norm``; "" for none.
            output_stride: pixels per cell of conv5, 16 or 8.
            out_features: stages to return, of conv1 ... conv5.
            freeze_at: number of stages, from the first, that are not trained.
        """
        super().__init__()
        last = max(_STAGES.index(name) for name in out_features)
        self._out_features = [name for name in _STAGES if name in out_features]
        self._out_feature_channels = dict(zip(_STAGES, _CHANNELS, strict=True))
        strides = (1, 2, 4, 8, output_stride)
        self._out_feature_strides = dict(zip(_STAGES, strides, strict=True))
        self._size_divisibility = strides[last]
        layers: list[nn.Module] = []
        # Position of the layer that ends each stage, and of the one that begins it.
        self._ends: dict[str, int] = {}
        for stage in range(last + 1):
            start = len(layers)
            dilation = 2 if stage == 4 and output_stride == 8 else 1
            for _ in range(_CONVS[depth][stage]):
                channels = _CHANNELS[stage]
                layers += _convolution(in_channels, channels, dilation, norm)
                in_channels = channels
            if stage < freeze_at:
                layers[start:] = [_frozen(layer) for layer in layers[start:]]
            self._ends[_STAGES[stage]] = len(layers) - 1
            if stage < last:
                holes = stage == 3 and output_stride == 8
                layers.append(nn.MaxPool2d(3, 1, 1) if holes else nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Outputs of the stages asked for.

        Args:
            x: (B, C, H, W); cells of ``conv5`` cover whole strides where H and W are multiples of
                :attr:`size_divisibility`, otherwise the last rows and columns are dropped.
        """
        outputs = {}
        start = 0
        for name, end in self._ends.items():
            x = self.features[start : end + 1](x)
            if name in self._out_features:
                outputs[name] = x
            start = end + 1
        return outputs

    @property
    def size_divisibility(self) -> int:
        """Pixels of height and width that the network uses at a time."""
        return self._size_divisibility


@BACKBONE_REGISTRY.register()
def build_vgg_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> VGG:
    """VGG by ``cfg.MODEL.VGG``, its first ``MODEL.BACKBONE.FREEZE_AT`` stages frozen."""
    node = cfg.MODEL.VGG
    return VGG(
        depth=node.DEPTH,
        in_channels=input_shape.channels,
        norm=node.NORM,
        output_stride=node.OUTPUT_STRIDE,
        out_features=node.OUT_FEATURES,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )


def _convolution(inputs: int, outputs: int, dilation: int, norm: str) -> list[nn.Module]:
    """A 3x3 convolution that keeps the size, with what follows it."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation)
    weight_init.c2_msra_fill(conv)
    layers: list[nn.Module] = [conv]
    if norm:
        layers.append(get_norm(norm, outputs))
    return [*layers, nn.ReLU(inplace=True)]


def _frozen(layer: nn.Module) -> nn.Module:
    """``layer`` without trainable parameters or running statistics."""
    for parameter in layer.parameters():
        parameter.requires_grad = False
    frozen: nn.Module = FrozenBatchNorm2d.convert_frozen_batchnorm(layer)
    return frozen
