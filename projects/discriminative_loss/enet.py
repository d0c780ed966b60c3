"""ENet (Paszke et al., arXiv 1606.02147) with a branch for each output.

The branches and their layers are those of ``davyneven/fastSceneUnderstanding`` (arXiv 1708.02550).
"""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.layers import get_norm
from torch import Tensor, nn
from torch.nn import functional as F

from instseg.projects.discriminative_loss.networks import Maps

_SECTION: tuple[dict[str, Any], ...] = (
    {},
    {"dilation": 2},
    {"asymmetric": True},
    {"dilation": 4},
    {},
    {"dilation": 8},
    {"asymmetric": True},
    {"dilation": 16},
)
"""The eight bottlenecks of sections 2 and 3."""


def _normed(layer: nn.Module, channels: int, norm: str, eps: float) -> list[nn.Module]:
    normalisation = get_norm(norm, channels)
    if normalisation is None:
        return [layer]
    normalisation.eps = eps
    return [layer, normalisation]


class Initial(nn.Module):
    """3x3 convolution with stride 2 beside a pooling of the image.

    ::

        (B, 3, H, W) → conv (13) | max pool (3) → (B, 16, H/2, W/2)
    """

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 13, 3, stride=2, padding=1)
        self.finish = nn.Sequential(*_normed(nn.Identity(), 16, norm, 1e-5), nn.PReLU(16))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), even sizes → (B, 16, H/2, W/2)."""
        joined: Tensor = self.finish(torch.cat([self.conv(images), F.max_pool2d(images, 2)], dim=1))
        return joined


class Bottleneck(nn.Module):
    """1x1 to a quarter, a middle convolution, 1x1 back, dropout; added to the input."""

    def __init__(
        self,
        channels: int,
        norm: str,
        dropout: float,
        *,
        dilation: int = 1,
        asymmetric: bool = False,
        decoder: bool = False,
    ) -> None:
        """
        Args:
            channels: of input and output.
            norm: after each convolution.
            dropout: share of whole channels that training leaves out.
            dilation: of the 3x3 convolution.
            asymmetric: 5x1 and 1x5 in place of 3x3.
            decoder: ReLU in place of PReLU, batch norm's eps 1e-3.
        """
        super().__init__()
        inner = channels // 4
        eps = 1e-3 if decoder else 1e-5
        middle: nn.Module = nn.Conv2d(inner, inner, 3, padding=dilation, dilation=dilation)
        if asymmetric:
            middle = nn.Sequential(
                nn.Conv2d(inner, inner, (5, 1), padding=(2, 0), bias=False),
                nn.Conv2d(inner, inner, (1, 5), padding=(0, 2)),
            )
        self.layers = nn.Sequential(
            *_normed(nn.Conv2d(channels, inner, 1, bias=False), inner, norm, eps),
            _activation(inner, decoder),
            *_normed(middle, inner, norm, eps),
            _activation(inner, decoder),
            *_normed(nn.Conv2d(inner, channels, 1, bias=False), channels, norm, eps),
            nn.Dropout2d(dropout),
        )
        self.activation = _activation(channels, decoder)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) → the same."""
        out: Tensor = self.activation(x + self.layers(x))
        return out


class Down(nn.Module):
    """Halves the map; the shortcut is a max pool whose new channels are zero."""

    def __init__(self, inputs: int, outputs: int, norm: str, dropout: float) -> None:
        super().__init__()
        inner = inputs // 4
        self.layers = nn.Sequential(
            *_normed(nn.Conv2d(inputs, inner, 2, stride=2, bias=False), inner, norm, 1e-5),
            nn.PReLU(inner),
            *_normed(nn.Conv2d(inner, inner, 3, padding=1), inner, norm, 1e-5),
            nn.PReLU(inner),
            *_normed(nn.Conv2d(inner, outputs, 1, bias=False), outputs, norm, 1e-5),
            nn.Dropout2d(dropout),
        )
        self.activation = nn.PReLU(outputs)
        self.added = outputs - inputs

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, h, w) → (B, outputs, h/2, w/2) and the pool's indices (B, C, ...)."""
        pooled, where = F.max_pool2d(x, 2, return_indices=True)
        shortcut = F.pad(pooled, (0, 0, 0, 0, 0, self.added))
        return self.activation(shortcut + self.layers(x)), where


class Up(nn.Module):
    """Doubles the map; the shortcut puts values back where the matching pool took them."""

    def __init__(self, inputs: int, outputs: int, norm: str) -> None:
        super().__init__()
        inner = inputs // 4
        double = nn.ConvTranspose2d(inner, inner, 3, stride=2, padding=1, output_padding=1)
        self.layers = nn.Sequential(
            *_normed(nn.Conv2d(inputs, inner, 1, bias=False), inner, norm, 1e-3),
            nn.ReLU(),
            *_normed(double, inner, norm, 1e-3),
            nn.ReLU(),
            *_normed(nn.Conv2d(inner, outputs, 1, bias=False), outputs, norm, 1e-3),
        )
        self.shortcut = nn.Sequential(
            *_normed(nn.Conv2d(inputs, outputs, 1, bias=False), outputs, norm, 1e-3)
        )

    def forward(self, x: Tensor, where: Tensor) -> Tensor:
        """(B, C, h, w) and the indices of the pool (B, outputs, h, w) → (B, outputs, 2h, 2w)."""
        return F.relu(F.max_unpool2d(self.shortcut(x), where, (2, 2)) + self.layers(x))


class Branch(nn.Module):
    """Section 3 and the decoder: (B, 128, H/8, W/8) → (B, outputs, H, W)."""

    def __init__(self, outputs: int, norm: str) -> None:
        super().__init__()
        self.section3 = nn.Sequential(
            *(Bottleneck(128, norm, 0.1, **options) for options in _SECTION)
        )
        self.up4 = Up(128, 64, norm)
        self.section4 = nn.Sequential(*(Bottleneck(64, norm, 0.1, decoder=True) for _ in range(2)))
        self.up5 = Up(64, 16, norm)
        self.section5 = Bottleneck(16, norm, 0.1, decoder=True)
        self.full = nn.ConvTranspose2d(16, outputs, 2, 2)

    def forward(self, x: Tensor, where1: Tensor, where2: Tensor) -> Tensor:
        """
        Args:
            x: (B, 128, H/8, W/8).
            where1: (B, 16, H/4, W/4) indices of the pool of section 1.
            where2: (B, 64, H/8, W/8) indices of the pool of section 2.
        """
        x = self.section4(self.up4(self.section3(x), where2))
        out: Tensor = self.full(self.section5(self.up5(x, where1)))
        return out


class MultiBranchENet(nn.Module):
    """Initial block, sections 1 and 2 shared by all branches.

    ::

        (B, 3, H, W) → initial (16, H/2) → section 1 (64, H/4) → section 2 (128, H/8)
          └─ for each output: section 3 → decoder → (B, outputs, H, W)
    """

    def __init__(self, outputs: Sequence[int], norm: str) -> None:
        """
        Args:
            outputs: channels of each branch; the companion paper has (20, 8, 1) for semantic
                classes, embedding and depth.
            norm: after each convolution, e.g. "FrozenBN".
        """
        super().__init__()
        self.initial = Initial(norm)
        self.down1 = Down(16, 64, norm, 0.01)
        self.section1 = nn.Sequential(*(Bottleneck(64, norm, 0.01) for _ in range(4)))
        self.down2 = Down(64, 128, norm, 0.1)
        self.section2 = nn.Sequential(
            *(Bottleneck(128, norm, 0.1, **options) for options in _SECTION)
        )
        self.branches = nn.ModuleList(Branch(channels, norm) for channels in outputs)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W), multiples of 8 → (B, outputs, H, W) of every branch."""
        x, where1 = self.down1(self.initial(images))
        x, where2 = self.down2(self.section1(x))
        x = self.section2(x)
        return [branch(x, where1, where2) for branch in self.branches]


class ENet(nn.Module):
    """:class:`MultiBranchENet` with a semantic and an embedding branch."""

    size_divisibility = 8
    min_size = 8

    def __init__(self, num_classes: int, embedding_dim: int, *, norm: str) -> None:
        """
        Args:
            num_classes: C, without the background.
            embedding_dim: D.
            norm: after each convolution.
        """
        super().__init__()
        self.net = MultiBranchENet((num_classes + 1, embedding_dim), norm)

    def forward(self, images: Tensor) -> Maps:
        """(B, 3, H, W) normalised → maps of stride 1."""
        semantic, embeddings = self.net(images)
        return Maps(semantic, embeddings, None)


def _activation(channels: int, decoder: bool) -> nn.Module:
    return nn.ReLU() if decoder else nn.PReLU(channels)
