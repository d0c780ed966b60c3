"""From the trunk's map to the mask and the score of every window (sections 3.1 and 3.2).

All heads are convolutional: a map of one window gives one result, and a larger map gives a result
for each of its windows, one cell apart.  Training and inference run the same layers.
"""

from torch import Tensor, nn
from torch.nn import functional as F


class Embedding(nn.Module):
    """Map → one vector per window: 1x1 convolution, ReLU, one layer without activation.

    Together with a linear layer it is a mask layer of low rank; every output sees the whole window.
    """

    def __init__(self, channels: int, feature_dim: int, embedding_dim: int, window: int) -> None:
        """
        Args:
            channels: of the map.
            feature_dim: of the 1x1 convolution.
            embedding_dim: dimension of a vector.
            window: cells along its sides.
        """
        super().__init__()
        self.reduce = nn.Conv2d(channels, feature_dim, 1)
        self.project = nn.Conv2d(feature_dim, embedding_dim, window)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) → (B, E, h - window + 1, w - window + 1)."""
        vectors: Tensor = self.project(F.relu(self.reduce(x)))
        return vectors


class SharedScoreHead(nn.Module):
    """Scores from the vectors that the masks come from, as released."""

    def __init__(self, embedding_dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.hidden = nn.Conv2d(embedding_dim, hidden_dim, 1)
        self.output = nn.Conv2d(hidden_dim, 1, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor, vectors: Tensor) -> Tensor:
        """(B, E, H, W) ``vectors`` → (B, H, W) logits; ``features`` are not used."""
        x = F.relu(self.hidden(self.dropout(vectors)))
        scores: Tensor = self.output(self.dropout(x))[:, 0]
        return scores


class PooledScoreHead(nn.Module):
    """Scores from the trunk's map by a 2x2 max-pooling and layers of their own (first paper).

    Deviation: the paper interleaves the maps of four shifted poolings of stride 2; a pooling of
    stride 1 and a dilated layer after it give the same numbers at once.
    """

    def __init__(
        self, channels: int, embedding_dim: int, hidden_dim: int, window: int, dropout: float
    ) -> None:
        """
        Args:
            channels: of the map.
            embedding_dim, hidden_dim: units of the two hidden layers.
            window: cells along the sides of a window, even.
            dropout: probability for the hidden layers.
        """
        super().__init__()
        self.pooled = nn.Conv2d(channels, embedding_dim, window // 2, dilation=2)
        self.hidden = nn.Conv2d(embedding_dim, hidden_dim, 1)
        self.output = nn.Conv2d(hidden_dim, 1, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor, vectors: Tensor) -> Tensor:
        """(B, C, h, w) ``features`` → (B, H, W) logits; ``vectors`` are not used."""
        x = F.relu(self.pooled(F.max_pool2d(features, 2, 1)))
        x = F.relu(self.hidden(self.dropout(x)))
        scores: Tensor = self.output(self.dropout(x))[:, 0]
        return scores
