"""Embeddings of an image as a discriminative loss makes them, and two ways to cluster them."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from instseg.ops.mean_shift import mean_shift

BANDWIDTH = 1.5
_DIMENSIONS, _SPREAD, _APART = 8, 0.5, 3.0
"""As in the paper on Cityscapes: instances within delta_v, their means 2 delta_d apart."""


def embedding_inputs(device: torch.device, tiny: bool) -> tuple[Any, ...]:
    """(pixels, 8) embeddings of an image of 520 x 696 pixels with 60 instances.

    Instances are the cells nearest to random points.  Across a border the embedding changes from
    one mean to the other within about three pixels, as networks draw it.
    """
    height, width, count = (24, 32, 4) if tiny else (520, 696, 60)
    generator = torch.Generator().manual_seed(0)
    means = _means_apart(count, generator)
    points = torch.rand(count, 2, generator=generator) * torch.tensor([height, width])
    y, x = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    squares = (y[:, None, None] - points[:, 0]) ** 2 + (x[:, None] - points[:, 1]) ** 2
    owners = F.one_hot(squares.argmin(dim=2), count).permute(2, 0, 1).float()
    soft = F.avg_pool2d(owners, 3, stride=1, padding=1, count_include_pad=False)
    noise = torch.randn(height * width, _DIMENSIONS, generator=generator) / _DIMENSIONS**0.5
    return ((soft.flatten(1).T @ means + _SPREAD * noise).to(device),)


def _means_apart(count: int, generator: torch.Generator) -> Tensor:
    """(count, 8) random positions, drawn until all keep their distance."""
    means = torch.zeros(0, _DIMENSIONS)
    while len(means) < count:
        new = 2.5 * torch.randn(1, _DIMENSIONS, generator=generator)
        if (means - new).norm(dim=1).ge(_APART).all():
            means = torch.cat([means, new])
    return means


def clustered(embeddings: Tensor) -> Tensor:
    """(pixels,) labels by our operator."""
    return mean_shift(embeddings, bandwidth=BANDWIDTH, cluster_all=True)[0]


def clustered_by_scikit_learn(embeddings: Any) -> Tensor:
    """(pixels,) labels of a NumPy array, by scikit-learn."""
    from sklearn.cluster import MeanShift

    labels = MeanShift(bandwidth=BANDWIDTH, bin_seeding=True).fit(embeddings).labels_
    return torch.as_tensor(labels, dtype=torch.long)


def as_array(embeddings: Tensor) -> tuple[Any, ...]:
    """The embeddings as scikit-learn takes them."""
    return (embeddings.cpu().numpy(),)
