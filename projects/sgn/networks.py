"""The three networks (sections 2, 4 and 5)."""

import torch
from detectron2.modeling import Backbone
from torch import Tensor, nn
from torch.nn import functional as F

from instseg.modeling import DenseDecoder, conv_relu
from instseg.projects.sgn.merging import CROP_CHANNELS


class BreakpointNet(nn.Module):
    """Backbone → decoder → labels of breakpoints in both directions, and a semantic map.

    ::

        image → backbone: levels → decoder (B, channels, H / s, W / s)
          └─ 3x3 → 3x3 → (B, detail, H, W) ─┐
                     decoder → 1x1, up-sampled → 3x3 → heads

    The second line is there with ``detail_channels`` alone: breakpoints are a pixel or three wide,
    which the first levels of a backbone do not resolve.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        num_classes: int,
        channels: int,
        detail_channels: int,
        norm: str,
        head_lr_factor: float = 1.0,
    ) -> None:
        """
        Args:
            backbone: any; all of its outputs are used.
            num_classes: C, without the background.
            channels: of the decoder.
            detail_channels: of the map of stride 1; 0 leaves the result at the finest stride of the
                backbone.
            norm: of the decoder, Detectron2's name, "" for none.
            head_lr_factor: on the learning rate of all but the backbone.
        """
        super().__init__()
        self.backbone = backbone
        self.decoder = DenseDecoder(backbone.output_shape(), channels, norm)
        self.details: nn.Module | None = None
        if detail_channels:
            self.details = nn.Sequential(
                conv_relu(3, detail_channels, 3, norm),
                conv_relu(detail_channels, detail_channels, 3, norm),
            )
            self.reduce = conv_relu(channels, detail_channels, 1, norm)
            channels = 2 * detail_channels
            self.join = conv_relu(channels, channels, 3, norm)
        self.semantic = nn.Conv2d(channels, num_classes + 1, 1)
        self.breakpoints = nn.Conv2d(channels, 2 * 4, 1)
        self.head_lr_factor = head_lr_factor
        # The stride of the coarsest level keeps levels aligned where the backbone asks for nothing.
        coarsest = max(shape.stride or 1 for shape in backbone.output_shape().values())
        self.size_divisibility = max(backbone.size_divisibility, coarsest)

    def lr_multipliers(self) -> dict[str, float]:
        """For the optimizer: factors on the learning rate by name of a module."""
        heads = (name for name, _ in self.named_children() if name != "backbone")
        return dict.fromkeys(heads, self.head_lr_factor)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) normalised → logits (B, C + 1, h, w) and (B, 2, 4, h, w).

        The second are of the labels of ``instseg.ops.sgn_lines`` along rows and along columns.
        """
        x = self.decoder(self.backbone(images))
        if self.details is not None:
            fine = self.details(images)
            coarse = F.interpolate(
                self.reduce(x), fine.shape[-2:], mode="bilinear", align_corners=False
            )
            x = self.join(torch.cat([coarse, fine], dim=1))
        return self.semantic(x), self.breakpoints(x).unflatten(1, (2, 4))


class LineNet(nn.Module):
    """Which neighbouring pixels belong together, from breakpoints alone; no colour, any class.

    Five 3x3 convolutions, two of them dilated, see 19 pixels.
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
    """Whether two components are one object, from a crop around them."""

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
        """(P, 10, 64, 64), see :func:`crop_pairs` → (P,) logits, whichever component is first."""
        picture, first, second, rest = crops.split([3, 1, 1, CROP_CHANNELS - 5], dim=1)
        swapped = torch.cat([picture, second, first, rest], dim=1)
        features = self.layers(torch.cat([crops, swapped])).mean(dim=(2, 3))
        logits: Tensor = self.score(features)[:, 0]
        return logits.view(2, -1).mean(dim=0)
