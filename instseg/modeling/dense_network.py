"""A network of bottom-up methods: any backbone, a small decoder, a semantic map."""

from collections.abc import Mapping

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import Backbone
from torch import Tensor, nn
from torch.nn import functional as F


def conv_relu(inputs: int, outputs: int, size: int, norm: str, *, stride: int = 1) -> Conv2d:
    """Convolution that keeps the number of cells (or divides it), normalisation, ReLU."""
    layer = conv_norm(inputs, outputs, size, norm, stride=stride)
    layer.activation = F.relu
    return layer


def conv_norm(inputs: int, outputs: int, size: int, norm: str, *, stride: int = 1) -> Conv2d:
    """:func:`conv_relu` without ReLU."""
    layer = Conv2d(
        inputs,
        outputs,
        size,
        stride=stride,
        padding=size // 2,
        bias=not norm,
        norm=get_norm(norm, outputs),
    )
    weight_init.c2_msra_fill(layer)
    return layer


class DenseDecoder(nn.Module):
    """Adds the levels of a backbone from the coarsest to the finest, smoothing after each.

    ::

        C5 → 1x1 → merge5 (3x3) ─ up ─┐
        C4 → 1x1 ─────────────────────+ → merge4 (3x3) ─ up ─ ... → (B, channels, H / s, W / s)

    Levels may be those of a plain backbone or of a feature pyramid, with any strides; one is
    enough.

    Attributes:
        stride: s, of the finest level.
    """

    def __init__(self, levels: Mapping[str, ShapeSpec], channels: int, norm: str) -> None:
        """
        Args:
            levels: channels and stride of each level, by name.
            channels: of all inner maps and of the result.
            norm: Detectron2's name of a normalisation, "" for none.
        """
        super().__init__()
        self._names = sorted(levels, key=lambda name: -(levels[name].stride or 1))
        self.laterals = nn.ModuleDict(
            {name: conv_relu(levels[name].channels or 1, channels, 1, norm) for name in self._names}
        )
        self.merges = nn.ModuleDict(
            {name: conv_relu(channels, channels, 3, norm) for name in self._names}
        )

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Levels (B, C_i, H / s_i, W / s_i) → (B, channels, H / s, W / s)."""
        x: Tensor | None = None
        for name in self._names:
            lateral = self.laterals[name](features[name])
            if x is not None:
                size = lateral.shape[-2:]
                lateral = lateral + F.interpolate(x, size, mode="bilinear", align_corners=False)
            x = self.merges[name](lateral)
        assert x is not None
        return x


class DenseNetwork(nn.Module):
    """Backbone → decoder → semantic map, and the features for whatever else is predicted.

    ::

        image → backbone: levels → decoder (B, channels, H / s, W / s)
          └─ 3x3, stride d → 3x3 → (B, detail, H / d, W / d) ─┐
                       decoder (→ 1x1), up-sampled → join 3x3 → features → semantic 1x1

    The second line is there with ``detail_channels`` alone: it brings edges, which the first levels
    of a backbone have lost, to a map of stride d.

    Attributes:
        size_divisibility: height and width of its input are multiples of this.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        num_classes: int,
        channels: int,
        detail_channels: int,
        detail_stride: int,
        reduced: bool,
        norm: str,
        in_channels: int,
    ) -> None:
        """
        Args:
            backbone: any; all of its outputs are used.
            num_classes: C, without the background.
            channels: of the decoder.
            detail_channels: of the map beside it; 0 leaves the features at the finest stride of the
                backbone.
            detail_stride: d, pixels per cell of that map.
            reduced: the decoder's channels are reduced to ``detail_channels`` before the two join.
            norm: of the decoder, Detectron2's name, "" for none.
            in_channels: of the image.
        """
        super().__init__()
        self.backbone = backbone
        self.decoder = DenseDecoder(backbone.output_shape(), channels, norm)
        self.details: nn.Module | None = None
        if detail_channels:
            self.details = nn.Sequential(
                conv_relu(in_channels, detail_channels, 3, norm, stride=detail_stride),
                conv_relu(detail_channels, detail_channels, 3, norm),
            )
            joined = channels + detail_channels
            self.reduce: nn.Module = nn.Identity()
            if reduced:
                self.reduce = conv_relu(channels, detail_channels, 1, norm)
                joined = channels = 2 * detail_channels
            self.join = conv_relu(joined, channels, 3, norm)
        self.semantic = nn.Conv2d(channels, num_classes + 1, 1)
        # The stride of the coarsest level keeps levels aligned where the backbone asks for nothing.
        coarsest = max(shape.stride or 1 for shape in backbone.output_shape().values())
        self.size_divisibility: int = max(backbone.size_divisibility, coarsest)

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised → (B, ``semantic.in_channels``, h, w)."""
        x: Tensor = self.decoder(self.backbone(images))
        if self.details is not None:
            fine = self.details(images)
            size = fine.shape[-2:]
            coarse = F.interpolate(self.reduce(x), size, mode="bilinear", align_corners=False)
            x = self.join(torch.cat([coarse, fine], dim=1))
        return x
