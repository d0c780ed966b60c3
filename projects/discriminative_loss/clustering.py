"""From embeddings and a semantic map to instances: mean shift per class, or k-means."""

from dataclasses import dataclass

import torch
from torch import Tensor

from instseg.modeling import NONE, DenseInstances, renumbered
from instseg.ops.mean_shift import nearest_centres, peel_clusters

_STARTS, _SAMPLE, _MOST_STEPS = 8, 8192, 100
"""k-means starts this often on a sample of points; the best start goes on with all of them."""


@dataclass(frozen=True)
class ClusterSettings:
    """How pixels are grouped.

    Attributes:
        method: ``mean_shift`` groups every class by itself (section 4); ``k_means`` groups all
            foreground at once into a given number of instances, whose pixels vote on the class
            (Wizaron's code).
        bandwidth: radius of an instance in units of the embedding.
        min_pixels: instances with fewer pixels are dropped.
        max_instances: limit on the instances of an image, which keeps those with the best scores;
            also limits the clusters that mean shift looks for in a class, the fullest first.
    """

    method: str
    bandwidth: float
    min_pixels: int
    max_instances: int


@dataclass(frozen=True)
class Clusters(DenseInstances):
    """Instances of one image; none is empty.

    ``scores`` (N,) in 0..1 are the mean probability of the class over the pixels, times
    ``compactness``.

    Attributes:
        compactness: (N,) in 0..1: 1 / (1 + (r / bandwidth)^2) with r the root mean square distance
            of the pixels from their mean; 1 if all embeddings are equal.
    """

    compactness: Tensor


@torch.no_grad()
def cluster(
    embeddings: Tensor,
    probabilities: Tensor,
    settings: ClusterSettings,
    number: int | None = None,
) -> Clusters:
    """Group the pixels of one image.

    Args:
        embeddings: (D, h, w), D from 1 to 64.
        probabilities: (C + 1, h, w) of the classes, background first.  A pixel belongs to its
            most probable class.
        settings: the method and its limits.
        number: number of instances, for k-means.
    Raises:
        ValueError: shapes that do not fit, or no number for k-means.
    """
    if embeddings.dim() != 3 or probabilities.dim() != 3:
        raise ValueError(
            f"embeddings has shape {tuple(embeddings.shape)} and probabilities "
            f"{tuple(probabilities.shape)}; expected (D, h, w) and (C + 1, h, w)"
        )
    if embeddings.shape[1:] != probabilities.shape[1:] or not len(probabilities):
        raise ValueError(
            f"embeddings is {tuple(embeddings.shape[1:])} pixels and probabilities "
            f"{tuple(probabilities.shape)}; expected maps of one size"
        )
    semantic = probabilities.argmax(dim=0).flatten() if probabilities.numel() else None
    if semantic is None:
        return _nothing(probabilities)
    points = embeddings.flatten(1).T
    if settings.method == "k_means":
        if number is None:
            raise ValueError("k-means needs the number of instances; none is predicted or given")
        pixels, labels = _all_at_once(points, semantic, number)
    else:
        pixels, labels = _class_by_class(points, semantic, len(probabilities), settings)
    return _measured(points, probabilities, pixels, labels, settings)


def k_means(points: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from the best of several k-means++ starts; always the same result.

    Args:
        points: (N, D), D from 1 to 64, finite.
        count: number of clusters; at most one per point is made.
    Returns:
        labels (N,) int64, -1 if there are no clusters, and centres (count, D).
    """
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    count = max(0, min(count, len(points)))
    if count == 0:
        return torch.full((len(points),), -1, device=points.device), points[:0]
    step = -(-len(points) // max(_SAMPLE, 4 * count))
    sample = points[::step].cpu()
    generator = torch.Generator().manual_seed(0)
    best, least = points[:0], float("inf")
    for _ in range(_STARTS):
        labels, centres = _lloyd(sample, _spread(sample, min(count, len(sample)), generator))
        spread = float((sample - centres[labels]).square().sum())
        if spread < least or not len(best):
            best, least = centres, spread
    return _lloyd(points, best.to(points.device))


def _spread(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Starting centres, each a point drawn by its squared distance to earlier ones (k-means++)."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    distances = (points - points[chosen[0]]).square().sum(dim=1)
    while len(chosen) < count:
        total = distances.double().cumsum(dim=0)
        draw = torch.rand(1, generator=generator, dtype=torch.double) * total[-1]
        chosen.append(min(int(torch.searchsorted(total, draw, right=True)), len(points) - 1))
        new_distances = (points - points[chosen[-1]]).square().sum(dim=1)
        distances = torch.minimum(distances, new_distances)
    return points[chosen]


def _lloyd(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Labels and centres when no label changes any more; a centre without points stays."""
    labels = nearest_centres(points, centres)
    for _ in range(_MOST_STEPS):
        counts = labels.bincount(minlength=len(centres))[:, None]
        means = _sums(points, labels, len(centres)) / counts
        centres = means.to(points.dtype).where(counts > 0, centres)
        before, labels = labels, nearest_centres(points, centres)
        if torch.equal(before, labels):
            break
    return labels, centres


def _sums(values: Tensor, labels: Tensor, count: int) -> Tensor:
    """(N, ...) values → (count, ...) float64 sums over equal labels."""
    sums = values.new_zeros((count, *values.shape[1:]), dtype=torch.double)
    return sums.index_add_(0, labels, values.double())


def _class_by_class(
    points: Tensor, semantic: Tensor, classes: int, settings: ClusterSettings
) -> tuple[Tensor, Tensor]:
    """Mean shift in each class: indices of pixels and their labels."""
    pixels, labels, count = [], [], 0
    for kind in range(1, classes):
        of_class = (semantic == kind).nonzero()[:, 0]
        if not len(of_class):
            continue
        label, centres = peel_clusters(
            points[of_class],
            bandwidth=settings.bandwidth,
            min_points=settings.min_pixels,
            max_clusters=settings.max_instances,
        )
        pixels.append(of_class[label >= 0])
        labels.append(label[label >= 0] + count)
        count += len(centres)
    if not pixels:
        return semantic[:0], semantic[:0]
    return torch.cat(pixels), torch.cat(labels)


def _all_at_once(points: Tensor, semantic: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """k-means in the foreground: indices of pixels and their labels."""
    pixels = (semantic > 0).nonzero()[:, 0]
    labels, _ = k_means(points[pixels], number)
    return pixels[labels >= 0], labels[labels >= 0]


def _measured(
    points: Tensor,
    probabilities: Tensor,
    pixels: Tensor,
    labels: Tensor,
    settings: ClusterSettings,
) -> Clusters:
    """The best clusters that are large enough, with their classes and scores."""
    if not len(pixels):
        return _nothing(probabilities)
    embedded, shares = points[pixels].double(), probabilities.flatten(1)[:, pixels]
    number = int(labels.max()) + 1
    sizes = labels.bincount(minlength=number)
    per_pixel = sizes.clamp(min=1)[:, None]
    means = _sums(embedded, labels, number) / per_pixel
    squares = (embedded - means[labels]).square().sum(dim=1, keepdim=True)
    variance = (_sums(squares, labels, number) / per_pixel)[:, 0]
    compactness = 1 / (1 + variance / settings.bandwidth**2)
    kinds = shares[1:].argmax(dim=0)
    votes = torch.zeros(number, len(probabilities) - 1, device=labels.device, dtype=torch.long)
    votes.index_put_((labels, kinds), torch.ones_like(kinds), accumulate=True)
    classes = votes.argmax(dim=1)
    semantic = _sums(shares[1:].T, labels, number) / per_pixel
    scores = semantic.gather(1, classes[:, None])[:, 0] * compactness
    order = scores.argsort(descending=True, stable=True)
    order = order[sizes[order] >= settings.min_pixels][: settings.max_instances]
    label_map = labels.new_full(probabilities.shape[1:], NONE)
    label_map.view(-1)[pixels] = labels
    return Clusters(
        numbers=renumbered(label_map, order, number),
        classes=classes[order],
        scores=scores[order].float(),
        compactness=compactness[order].float(),
    )


def _nothing(probabilities: Tensor) -> Clusters:
    no_scores = probabilities.new_zeros(0, dtype=torch.float32)
    numbers = torch.full(probabilities.shape[1:], NONE, device=probabilities.device)
    return Clusters(numbers, no_scores.long(), no_scores, no_scores)
