"""The three networks (sections 2, 4 and 5)."""

from typing import Any

import torch
from torch import Tensor, nn

from instseg.modeling import DenseNetwork, conv_relu
from instseg.projects.sgn.merging import CROP_CHANNELS


class BreakpointNet(DenseNetwork):
    """Labels of breakpoints in both directions, and a semantic map.

    Its details have stride 1: breakpoints are one to three pixels wide, too narrow for the first
    levels of a backbone.
    """

    def __init__(self, *, head_lr_factor: float, **settings: Any) -> None:
        """
        Args:
            head_lr_factor: factor on the learning rate of all but the backbone.
            settings: the rest of :class:`~instseg.modeling.DenseNetwork`.
        """
        super().__init__(detail_stride=1, reduced=True, in_channels=3, **settings)
        self.breakpoints = nn.Conv2d(self.semantic.in_channels, 2 * 4, 1)
        self.head_lr_factor = head_lr_factor

    def lr_multipliers(self) -> dict[str, float]:
        """For the optimizer: factors on the learning rate by name of a module."""
        heads = (name for name, _ in self.named_children() if name != "backbone")
        return dict.fromkeys(heads, self.head_lr_factor)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) normalised → logits (B, C + 1, h, w) and (B, 2, 4, h, w).

        The second are logits of the labels of ``instseg.ops.sgn_lines``, along rows and columns.
        """
        x = self.features(images)
        return self.semantic(x), self.breakpoints(x).unflatten(1, (2, 4))


class LineNet(nn.Module):
    """Links between neighbouring pixels, from breakpoints alone; no colour, any class.

    Five 3x3 convolutions, two of them dilated, cover 19 pixels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 9
        for dilation in (1, 1, 2, 4, 1):
            layers += [
                nn.Conv2d(inputs, channels, 3, padding=dilation, dilation=dilation),
                nn.ReLU(inplace=True),
            ]
            inputs = channels
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 2, 1))

    def forward(self, breakpoints: Tensor, confidence: Tensor) -> Tensor:
        """
        Args:
            breakpoints: (B, 2, 4, H, W) probabilities of labels along rows and columns.
            confidence: (B, H, W) probability of each pixel's class.
        Returns:
            (B, 2, H, W) logits that a pixel and the one below, to the right, belong together.
        """
        links: Tensor = self.layers(torch.cat([breakpoints.flatten(1, 2), confidence[:, None]], 1))
        return links


class MergerNet(nn.Module):
    """Whether two components are one instance, from a crop around them."""

    def __init__(self) -> None:
        super().__init__()
        channels = (CROP_CHANNELS, 32, 64, 128, 256)
        self.layers = nn.Sequential(
            *(
                conv_relu(a, b, 3, "BN", stride=2)
                for a, b in zip(channels, channels[1:], strict=False)
            )
        )
        self.score = nn.Linear(channels[-1], 1)

    def forward(self, crops: Tensor) -> Tensor:
        """(P, 10, 64, 64), see :func:`crop_pairs` → (P,) logits, for either order of a pair."""
        image, first, second, rest = crops.split([3, 1, 1, CROP_CHANNELS - 5], dim=1)
        swapped = torch.cat([image, second, first, rest], dim=1)
        features = self.layers(torch.cat([crops, swapped])).mean(dim=(2, 3))
        logits: Tensor = self.score(features)[:, 0]
        return logits.view(2, -1).mean(dim=0)
