"""The finest map of a network that is refined from the top down, for small instances."""

import fvcore.nn.weight_init as weight_init
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_resnet_backbone
from torch import Tensor, nn
from torch.nn import functional as F

from instseg.modeling.unet import build_unet_backbone


class FinestLevel(Backbone):
    """The finest map of a feature pyramid alone (Lin et al., arXiv 1612.03144).

    ::

        coarsest stage → 1x1 conv ─ enlarge 2x → + 1x1 conv of the next finer stage ... → 3x3 conv

    Detectron2's ``FPN`` has an output convolution for every stage; the unused ones would get no
    gradient.
    """

    def __init__(self, bottom_up: Backbone, channels: int, norm: str) -> None:
        """
        Args:
            bottom_up: gives two or more maps, each with twice the stride of the one before it.
            channels: of the result, which is called "p2" for stride 4, "p3" for stride 8 and so on.
            norm: after each convolution, as in Detectron2's ``get_norm``.
        """
        super().__init__()
        self.bottom_up = bottom_up
        stages = sorted(bottom_up.output_shape().items(), key=lambda stage: -stage[1].stride)
        self.coarsest_stride = stages[0][1].stride
        self.lateral = nn.ModuleDict(
            {name: _projection(shape.channels, channels, 1, norm) for name, shape in stages}
        )
        self.output = _projection(channels, channels, 3, norm)
        stride = stages[-1][1].stride
        name = f"p{stride.bit_length() - 1}"
        self._out_features = [name]
        self._out_feature_channels = {name: channels}
        self._out_feature_strides = {name: stride}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The map of images (B, C, H, W), multiples of :attr:`size_divisibility`."""
        stages = self.bottom_up(x)
        merged: Tensor | None = None
        for name, projection in self.lateral.items():
            projected = projection(stages[name])
            if merged is not None:
                projected = projected + F.interpolate(merged, scale_factor=2.0)
            merged = projected
        return {self._out_features[0]: self.output(merged)}

    @property
    def size_divisibility(self) -> int:
        """Pixels of height and width per cell of the coarsest stage."""
        return self.coarsest_stride


@BACKBONE_REGISTRY.register()
def build_resnet_finest_level_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FinestLevel:
    """Detectron2's ResNet, its ``RESNETS.OUT_FEATURES`` merged as ``cfg.MODEL.FPN`` says."""
    bottom_up = build_resnet_backbone(cfg, input_shape)
    return FinestLevel(bottom_up, cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.FPN.NORM)


@BACKBONE_REGISTRY.register()
def build_unet_finest_level_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FinestLevel:
    """The levels of ``cfg.MODEL.UNET`` merged as ``cfg.MODEL.FPN`` says, a map of every pixel."""
    bottom_up = build_unet_backbone(cfg, input_shape)
    return FinestLevel(bottom_up, cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.FPN.NORM)


def _projection(inputs: int, outputs: int, kernel: int, norm: str) -> Conv2d:
    """A convolution that keeps the size, with its normalisation."""
    conv = Conv2d(
        inputs,
        outputs,
        kernel,
        padding=kernel // 2,
        bias=not norm,
        norm=get_norm(norm, outputs),
    )
    weight_init.c2_xavier_fill(conv)
    return conv
