"""MobileNetV2 (Sandler et al., CVPR 2018, arXiv 1801.04381) as a Detectron2 backbone.

Parameters are called as in torchvision's ``mobilenet_v2``, ``features.N...``, so that its ImageNet
weights load by their names (``MODEL.WEIGHTS FILE?matching_heuristics=True``).
"""

from functools import partial

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn
from torchvision.models import mobilenet_v2

from instseg.data.images import check_colour

_ENDS = {"stage3": 7, "stage4": 11, "stage5": 17}
"""Outputs, and where in torchvision's network they end."""


class MobileNetV2(Backbone):
    """The part of torchvision's MobileNetV2 that YolactEdge uses.

    ::

        (3, 550, 550) → stem (32, 275, 275) → stage3 (32, 69, 69) → stage4 (64, 35, 35)
          → stage5 (160, 18, 18)

    Outputs are the last blocks with 32, 64 and 160 channels (authors' code); the blocks with 96
    channels belong to ``stage5``.
    """

    stage_names = tuple(_ENDS)

    def __init__(self, width: float, norm: str) -> None:
        """
        Args:
            width: factor on all channels.
            norm: Detectron2's name of a normalisation.
        """
        super().__init__()
        network = mobilenet_v2(width_mult=width, norm_layer=partial(get_norm, norm))
        self.features = network.features[: _ENDS["stage5"]]
        self._shapes = {
            name: ShapeSpec(channels=self.features[end - 1].out_channels, stride=8 << level)
            for level, (name, end) in enumerate(_ENDS.items())
        }

    @property
    def stem(self) -> nn.Module:
        """(B, 3, H, W) → input of the first stage."""
        stem: nn.Module = self.features[0]
        return stem

    @property
    def stages(self) -> list[nn.Sequential]:
        """The stages of :attr:`stage_names`, one after the other."""
        ends = list(_ENDS.values())
        return [self.features[a:b] for a, b in zip([1, *ends[:-1]], ends, strict=True)]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) → the outputs by name."""
        x = self.stem(x)
        outputs = {}
        for name, stage in zip(self.stage_names, self.stages, strict=True):
            x = outputs[name] = stage(x)
        return outputs

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self._shapes


@BACKBONE_REGISTRY.register()
def build_mobilenet_v2_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> MobileNetV2:
    """MobileNetV2 as ``MODEL.MOBILENET`` describes it."""
    check_colour(cfg, "MobileNetV2")
    return MobileNetV2(cfg.MODEL.MOBILENET.WIDTH, cfg.MODEL.MOBILENET.NORM)
