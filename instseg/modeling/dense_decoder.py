"""A small decoder from the levels of any backbone to one map, for bottom-up methods."""

from collections.abc import Mapping

import fvcore.nn.weight_init as weight_init
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from torch import Tensor, nn
from torch.nn import functional as F


def conv_relu(inputs: int, outputs: int, size: int, norm: str, *, stride: int = 1) -> Conv2d:
    """Convolution that keeps the number of cells (or divides it), normalisation, ReLU."""
    layer = Conv2d(
        inputs,
        outputs,
        size,
        stride=stride,
        padding=size // 2,
        bias=not norm,
        norm=get_norm(norm, outputs),
        activation=F.relu,
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
