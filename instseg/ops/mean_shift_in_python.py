"""The operators of mean shift in Python, for installations without compiled ones."""

import math

import torch
from torch import Tensor

from instseg.ops._library import expect, sum_dtype

_MOST_FAILURES = 20
"""As in ``csrc/mean_shift/mean_shift.h``."""
_DISTANCES = 2**22
"""Number of distances that are computed at a time."""


def _squared_distances(points: Tensor, centres: Tensor) -> Tensor:
    """(C, N) sums in the order of the dimensions, as the compiled operators have them."""
    total = points.new_zeros((len(centres), len(points)))
    for coordinate, centre in zip(points.T, centres.to(points.dtype).T, strict=True):
        total += (coordinate - centre[:, None]) ** 2
    return total


def _points(op: str, points: Tensor, rows: Tensor) -> Tensor:
    """The points in the precision that distances have."""
    expect(
        points.dim() == rows.dim() == 2 and points.shape[1] == rows.shape[1],
        f"{op}: the shapes are {tuple(points.shape)} and {tuple(rows.shape)}; expected (N, D) and "
        "(any, D)",
    )
    expect(
        points.is_floating_point() and rows.is_floating_point(),
        f"{op}: the types are {points.dtype} and {rows.dtype}; expected floating types",
        TypeError,
    )
    return points.to(sum_dtype(points))


def _check_walk(op: str, bandwidth: float, max_iterations: int, tolerance: float) -> None:
    expect(
        0 < bandwidth < math.inf and max_iterations >= 0 and tolerance >= 0,
        f"{op}: bandwidth, max_iterations and tolerance are {bandwidth}, {max_iterations} and "
        f"{tolerance}; expected a finite number above 0, and two of at least 0",
    )


def _walk(
    points: Tensor, seeds: Tensor, bandwidth: float, max_iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Final positions (S, D) float64 of centres, and how many points each is the mean of."""
    centres = seeds.double().clone()
    counts = torch.zeros(len(seeds), dtype=torch.long, device=seeds.device)
    walking = torch.arange(len(seeds), device=seeds.device)
    squared, values = points.new_tensor(bandwidth) ** 2, points.double()
    for completed in range(max_iterations + 1):
        inside = (_squared_distances(points, centres[walking]) <= squared).double()
        counts[walking] = inside.sum(1).long()
        met = counts[walking] > 0
        walking, inside = walking[met], inside[met]
        means = inside @ values / counts[walking][:, None]
        moved = (means - centres[walking]).norm(dim=1)
        centres[walking] = means
        walking = walking[moved > tolerance * bandwidth]
        if not len(walking) or completed == max_iterations:
            break
    return centres, counts


def shift_seeds(
    embeddings: Tensor, seeds: Tensor, bandwidth: float, max_iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Final positions (S, D) float64 of seeds, and of how many points each is the mean."""
    points = _points("mean_shift", embeddings, seeds)
    _check_walk("mean_shift", bandwidth, max_iterations, tolerance)
    if not len(seeds) or not len(points):
        return seeds.double().clone(), seeds.new_zeros(len(seeds), dtype=torch.long)
    parts = seeds.split(max(_DISTANCES // len(points), 1))
    walks = [_walk(points, part, bandwidth, max_iterations, tolerance) for part in parts]
    modes, counts = map(torch.cat, zip(*walks, strict=True))
    return modes, counts


def label_points(embeddings: Tensor, centres: Tensor, radius: float) -> Tensor:
    """(N,) row of the nearest centre, the first of equally near ones; -1 beyond the radius."""
    points = _points("nearest_centres", embeddings, centres)
    expect(radius >= 0, f"nearest_centres: radius is {radius}; expected at least 0")
    labels = points.new_full((len(points),), -1, dtype=torch.long)
    best = points.new_full((len(points),), math.inf)
    for number, centre in enumerate(centres):
        distances = _squared_distances(points, centre[None])[0]
        nearer = distances < best
        labels[nearer], best[nearer] = number, distances[nearer]
    return labels.where(best <= points.new_tensor(radius) ** 2, -1)


def peel(
    embeddings: Tensor,
    bins: Tensor,
    bandwidth: float,
    max_iterations: int,
    tolerance: float,
    min_points: int,
    max_clusters: int,
) -> tuple[Tensor, Tensor]:
    """Labels (N,) and centres (max_clusters, D) of clusters that are taken one after the other."""
    points = _points("peel_clusters", embeddings, embeddings)
    _check_walk("peel_clusters", bandwidth, max_iterations, tolerance)
    expect(
        min_points >= 1 and max_clusters >= 0,
        f"peel_clusters: min_points and max_clusters are {min_points} and {max_clusters}; expected "
        "at least 1 and 0",
    )
    labels, free = torch.full_like(bins, -1), torch.ones_like(bins, dtype=torch.bool)
    centres = points.new_full((max_clusters, points.shape[1]), math.nan, dtype=torch.double)
    clusters = failures = 0
    while free.any() and clusters < max_clusters and failures < _MOST_FAILURES:
        remaining, rows = points[free], free.nonzero()[:, 0]
        counts = bins[free].bincount()
        seed = remaining[bins[free] == (counts == counts.max()).nonzero()[0]][:1]
        centre = _walk(remaining, seed, bandwidth, max_iterations, tolerance)[0]
        squared = points.new_tensor(bandwidth) ** 2
        inside = _squared_distances(remaining, centre)[0] <= squared
        enough = int(inside.sum()) >= min_points
        if enough:
            labels[rows[inside]] = clusters
            centres[clusters] = centre[0]
        clusters, failures = (clusters + 1, 0) if enough else (clusters, failures + 1)
        # If the ball holds no point, only the seed is removed.
        gone = inside if inside.any() else (remaining == seed).all(dim=1)
        free[rows[gone]] = False
    return labels, centres
