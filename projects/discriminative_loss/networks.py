"""What all networks give, and the one that puts a decoder on any of Detectron2's backbones."""

from typing import NamedTuple, Protocol

import torch
from detectron2.modeling import Backbone
from torch import Tensor, nn
from torch.nn import functional as F

from instseg.modeling import DenseDecoder, conv_relu


class Maps(NamedTuple):
    """Output of a network of stride s for a batch of B pictures.

    Attributes:
        semantic: (B, C + 1, H / s, W / s) logits, background first.
        embeddings: (B, D, H / s, W / s).
        counts: (B,) objects as a share of the largest number; None if the network does not count.
    """

    semantic: Tensor
    embeddings: Tensor
    counts: Tensor | None


class EmbeddingNetwork(Protocol):
    """What the meta-architecture asks of a network; each is an ``nn.Module``.

    Attributes:
        size_divisibility: height and width of its input are multiples of this.
        min_size: and at least this.
    """

    size_divisibility: int
    min_size: int

    def __call__(self, images: Tensor) -> Maps:
        """(B, 3, H, W) normalised → maps."""


class BackboneNetwork(nn.Module):
    """Backbone → decoder → 1x1 convolutions to the semantic map and the embedding.

    ::

        image → backbone: levels → decoder (B, channels, H / s, W / s)
          └─ 3x3 stride 2 → 3x3 → (B, detail, H / 2, W / 2) ─┐
                                            decoder, up-sampled → 3x3 → heads

    The second line is there with ``detail_channels`` alone: it brings edges, which the backbone's
    first levels have lost, to a map of stride 2.
    """

    min_size = 1

    def __init__(
        self,
        backbone: Backbone,
        *,
        num_classes: int,
        embedding_dim: int,
        channels: int,
        detail_channels: int,
        norm: str,
        in_channels: int = 3,
    ) -> None:
        """
        Args:
            backbone: any; all of its outputs are used.
            num_classes: C, without the background.
            embedding_dim: D.
            channels: of the decoder.
            detail_channels: of the map of stride 2; 0 leaves the result at the finest stride of the
                backbone.
            norm: of the decoder, Detectron2's name, "" for none.
            in_channels: of the image.
        """
        super().__init__()
        self.backbone = backbone
        self.decoder = DenseDecoder(backbone.output_shape(), channels, norm)
        self.details: nn.Module | None = None
        if detail_channels:
            self.details = nn.Sequential(
                conv_relu(in_channels, detail_channels, 3, norm, stride=2),
                conv_relu(detail_channels, detail_channels, 3, norm),
            )
            self.join = conv_relu(channels + detail_channels, channels, 3, norm)
        self.semantic = nn.Conv2d(channels, num_classes + 1, 1)
        self.embedding = nn.Conv2d(channels, embedding_dim, 1)
        # The stride of the coarsest level keeps levels aligned where the backbone asks for nothing.
        coarsest = max(shape.stride or 1 for shape in backbone.output_shape().values())
        self.size_divisibility = max(backbone.size_divisibility, coarsest)

    def forward(self, images: Tensor) -> Maps:
        """(B, 3, H, W) normalised → maps."""
        x = self.decoder(self.backbone(images))
        if self.details is not None:
            fine = self.details(images)
            coarse = F.interpolate(x, fine.shape[-2:], mode="bilinear", align_corners=False)
            x = self.join(torch.cat([coarse, fine], dim=1))
        return Maps(self.semantic(x), self.embedding(x), None)
