"""Output of all networks, and the network with a decoder on any of Detectron2's backbones."""

from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from instseg.modeling import DenseNetwork


class Maps(NamedTuple):
    """Output of a network of stride s for a batch of B images.

    Attributes:
        semantic: (B, C + 1, H / s, W / s) logits, background first.
        embeddings: (B, D, H / s, W / s).
        counts: (B,) instances as a share of the largest number; None if the network does not count.
    """

    semantic: Tensor
    embeddings: Tensor
    counts: Tensor | None


class EmbeddingNetwork(Protocol):
    """Interface of a network to the meta-architecture; each is an ``nn.Module``.

    Attributes:
        size_divisibility: height and width of its input are multiples of this.
        min_size: least height and width of its input.
    """

    size_divisibility: int
    min_size: int

    def __call__(self, images: Tensor) -> Maps:
        """(B, 3, H, W) normalised → maps."""


class BackboneNetwork(DenseNetwork):
    """Semantic map and embedding of any backbone; its details have stride 2."""

    min_size = 1

    def __init__(self, *, embedding_dim: int, **settings: Any) -> None:
        """
        Args:
            embedding_dim: D.
            settings: the rest of :class:`~instseg.modeling.DenseNetwork`.
        """
        super().__init__(detail_stride=2, reduced=False, **settings)
        self.embedding = nn.Conv2d(self.semantic.in_channels, embedding_dim, 1)

    def forward(self, images: Tensor) -> Maps:
        """(B, 3, H, W) normalised → maps."""
        x = self.features(images)
        return Maps(self.semantic(x), self.embedding(x), None)
