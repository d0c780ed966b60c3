"""ResNet without its last stage, mirrored borders in place of zeros.

Parameters are called as in torchvision's ``resnet18 ... resnet101``, so that its ImageNet weights
load by their names (``MODEL.WEIGHTS FILE?matching_heuristics=True``).
"""

from collections.abc import Sequence

import fvcore.nn.weight_init as weight_init
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn
from torch.nn import functional as F

from instseg.projects.deepmask.layers import SymmetricConv2d

# Depth -> blocks of the three stages that remain.
_BLOCKS = {18: (2, 2, 2), 34: (3, 4, 6), 50: (3, 4, 6), 101: (3, 4, 23)}
_OUTPUTS = ("conv1", "res2", "res3", "res4")


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions and the shortcut."""

    def __init__(self, inputs: int, width: int, outputs: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = SymmetricConv2d(inputs, width, 3, stride, bias=False)
        self.bn1 = _norm(norm, width)
        self.conv2 = SymmetricConv2d(width, outputs, 3, bias=False)
        self.bn2 = _norm(norm, outputs)
        self.downsample = _shortcut(inputs, outputs, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class _Bottleneck(nn.Module):
    """1x1, 3x3 with the stride, 1x1 (as facebook/fb.resnet.torch has it), and the shortcut."""

    def __init__(self, inputs: int, width: int, outputs: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = _norm(norm, width)
        self.conv2 = SymmetricConv2d(width, width, 3, stride, bias=False)
        self.bn2 = _norm(norm, width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = _norm(norm, outputs)
        self.downsample = _shortcut(inputs, outputs, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class SymmetricResNet(Backbone):
    """ResNet up to stride 16 with mirrored borders (SharpMask, section 4).

    ::

        image (B, C, H, W)
          → conv1 (B, stem, H/2, W/2) → pool → res2 (B, out, H/4, W/4)
          → res3 (B, 2 out, H/8, W/8) → res4 (B, 4 out, H/16, W/16), all rounded up
    """

    def __init__(
        self,
        *,
        depth: int,
        in_channels: int,
        stem_channels: int,
        width: int,
        out_channels: int,
        norm: str,
        out_features: Sequence[str],
    ) -> None:
        """
        Args:
            depth: 18 and 34 have basic blocks, 50 and 101 bottlenecks.
            in_channels: channels of the image.
            stem_channels: of ``conv1``.
            width: channels inside the blocks of res2; twice and four times that in the next stages.
            out_channels: of res2, likewise.
            norm: as in Detectron2's ``get_norm``; "FrozenBN" is the paper's.
            out_features: maps to return, of conv1, res2, res3, res4.
        """
        super().__init__()
        self.conv1 = SymmetricConv2d(in_channels, stem_channels, 7, 2, bias=False)
        self.bn1 = _norm(norm, stem_channels)
        block = _Bottleneck if depth >= 50 else _BasicBlock
        channels = [stem_channels]
        for stage, count in enumerate(_BLOCKS[depth]):
            outputs = out_channels * 2**stage
            blocks = [
                block(
                    channels[-1] if number == 0 else outputs,
                    width * 2**stage,
                    outputs,
                    2 if stage and number == 0 else 1,
                    norm,
                )
                for number in range(count)
            ]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            channels.append(outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                weight_init.c2_msra_fill(module)
        self._out_features = [name for name in _OUTPUTS if name in out_features]
        self._out_feature_channels = dict(zip(_OUTPUTS, channels, strict=True))
        self._out_feature_strides = dict(zip(_OUTPUTS, (2, 4, 8, 16), strict=True))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The maps asked for, of images (B, C, H, W) of any size."""
        outputs = {"conv1": F.relu(self.bn1(self.conv1(x)))}
        x = F.max_pool2d(outputs["conv1"], 3, 2, 1)
        for stage in (1, 2, 3):
            x = outputs[f"res{stage + 1}"] = self.get_submodule(f"layer{stage}")(x)
        return {name: outputs[name] for name in self._out_features}

    @property
    def size_divisibility(self) -> int:
        """No size needs padding."""
        return 1


@BACKBONE_REGISTRY.register()
def build_symmetric_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SymmetricResNet:
    """:class:`SymmetricResNet` by ``cfg.MODEL.RESNETS``."""
    node = cfg.MODEL.RESNETS
    return SymmetricResNet(
        depth=node.DEPTH,
        in_channels=input_shape.channels,
        stem_channels=node.STEM_OUT_CHANNELS,
        width=node.WIDTH_PER_GROUP,
        out_channels=node.RES2_OUT_CHANNELS,
        norm=node.NORM,
        out_features=node.OUT_FEATURES,
    )


def _norm(norm: str, channels: int) -> nn.Module:
    """Detectron2's normalisation of that name, "" for none."""
    return get_norm(norm, channels) or nn.Identity()


def _shortcut(inputs: int, outputs: int, stride: int, norm: str) -> nn.Module:
    """The input that a block adds to its result, projected where the shape changes."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
    return nn.Sequential(conv, _norm(norm, outputs))
