"""Mean shift with a flat kernel: scikit-learn's method, and one that peels clusters off."""

import math

import torch
from torch import Tensor

from instseg.ops._library import check_devices, in_python, operator, register_fake, sum_dtype
from instseg.ops.mean_shift_in_python import label_points, peel, shift_seeds

_MOST_DIMENSIONS = 64
"""As in ``csrc/mean_shift/mean_shift.h``."""
_LARGEST = 1e100
"""Beyond this squares of doubles overflow; as a float it is infinite."""
_FACTOR = 0x5851F42D4C957F2D
"""Odd, so that a multiplication loses nothing."""


@torch.no_grad()
def mean_shift(
    embeddings: Tensor,
    *,
    bandwidth: float,
    seeds: Tensor | None = None,
    max_iterations: int = 300,
    tolerance: float = 1e-3,
    min_bin_count: int = 1,
    cluster_all: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cluster points by climbing from seeds (Comaniciu and Meer, PAMI 2002).

    Every seed moves to the mean of the points within the bandwidth of it, until it stays.  Among
    final positions within the bandwidth of each other, that with the most points is a centre.  A
    point belongs to its nearest centre.  ``sklearn.cluster.MeanShift`` does the same; sums are in
    double precision here, so centres differ by roundings.

    On the CPU a tree of sums answers for whole groups of points; memory is linear in N and S.

    Args:
        embeddings: (N, D), D from 1 to 64.  float32, float64, float16 or bfloat16; distances of the
            last two are computed in float32.
        bandwidth: radius of the kernel, in units of the embeddings.
        seeds: (S, D).  None: the occupied cells of a lattice of the bandwidth, :func:`bin_seeds`.
        max_iterations: after so many moves a seed makes a last one.
        tolerance: a seed stays when it moved by at most this share of the bandwidth.
        min_bin_count: cells with fewer points are no seeds.
        cluster_all: whether points out of reach of all centres join the nearest.
    Returns:
        labels (N,) int64, rows of the centres or -1, and centres (C, D) in the dtype of the
        embeddings, those with the most points first.  Points that are not finite, or beyond 1e100,
        get -1 and move no centre.  A seed that meets no point is dropped; without points there are
        no centres.  No gradient.
    Raises:
        ValueError: shapes that do not belong together, seeds that are not finite, or a number out
            of its range.
        TypeError: embeddings or seeds of whole numbers.
        RuntimeError: tensors on different devices.
    """
    check_devices("mean_shift", embeddings=embeddings, seeds=seeds)
    usable, points = _usable("mean_shift", embeddings, bandwidth)
    if seeds is None:
        seeds = bin_seeds(points, bandwidth, min_bin_count)
    elif not seeds.isfinite().all():
        raise ValueError("mean_shift: seeds has values that are not finite")
    modes, counts = operator("shift_seeds")(points, seeds, bandwidth, max_iterations, tolerance)
    centres = distinct_modes(modes, counts, bandwidth).to(embeddings.dtype)
    radius = math.inf if cluster_all else bandwidth
    labels = operator("nearest_centres")(points, centres, radius)
    return _for_all(usable, labels), centres


@torch.no_grad()
def peel_clusters(
    embeddings: Tensor,
    *,
    bandwidth: float,
    min_points: int = 1,
    max_clusters: int = 1000,
    max_iterations: int = 100,
    tolerance: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """Cluster points one ball after the other (De Brabandere et al., arXiv 1708.02551, section 4).

    A centre starts at an unlabelled point and moves to the mean of the unlabelled points within the
    bandwidth, until it stays; all unlabelled points within the bandwidth of it are then a cluster.
    This ends when no point is left, there are ``max_clusters``, or 20 clusters in a row were too
    small.

    Deviation: the paper starts at a random point.  Here it is the first one in the fullest cell of
    a lattice of the bandwidth, so large clusters come first and the result is always the same.

    Args:
        embeddings: (N, D), as in :func:`mean_shift`.
        bandwidth: radius of the kernel and of a cluster, in units of the embeddings.
        min_points: smaller clusters get no label.
        max_clusters: largest number of clusters.
        max_iterations: after so many moves a centre makes a last one.
        tolerance: a centre stays when it moved by at most this share of the bandwidth.
    Returns:
        labels (N,) int64, rows of the centres or -1, and centres (C, D) in the dtype of the
        embeddings, in the order in which they were found.  Points that are not finite, or beyond
        1e100, get -1 and move no centre.  No gradient.
    Raises:
        ValueError: a shape or a number out of its range.
        TypeError: embeddings of whole numbers.
    """
    check_devices("peel_clusters", embeddings=embeddings)
    usable, points = _usable("peel_clusters", embeddings, bandwidth)
    bins = torch.unique(_lattice_keys(points, bandwidth), return_inverse=True)[1]
    labels, centres = operator("peel_clusters")(
        points,
        bins,
        bandwidth,
        max_iterations,
        tolerance,
        min_points,
        min(max_clusters, len(points)),  # a cluster takes one point at least
    )
    count = int(labels.max()) + 1 if len(labels) else 0
    return _for_all(usable, labels), centres[:count].to(embeddings.dtype)


@torch.no_grad()
def nearest_centres(embeddings: Tensor, centres: Tensor, radius: float = math.inf) -> Tensor:
    """The row of the nearest centre, for each point.

    Args:
        embeddings: (N, D), as in :func:`mean_shift`.
        centres: (C, D).
        radius: centres farther away are not considered.
    Returns:
        (N,) int64; -1 where no centre is within the radius.  The first of equally near ones.
    Raises:
        ValueError: shapes that do not belong together, or a negative radius.
        TypeError: points or centres of whole numbers.
        RuntimeError: tensors on different devices.
    """
    check_devices("nearest_centres", embeddings=embeddings, centres=centres)
    return operator("nearest_centres")(embeddings, centres, radius)


def bin_seeds(points: Tensor, bandwidth: float, min_bin_count: int = 1) -> Tensor:
    """Cells of a lattice that hold a point, as ``sklearn.cluster.get_bin_seeds``.

    Args:
        points: (N, D), finite.
        bandwidth: the side of a cell; cells have their centres at multiples of it.
        min_bin_count: cells with fewer points are left out.
    Returns:
        (S, D) centres of the cells, or the points themselves if no two share a cell.
    """
    if min_bin_count < 1:
        raise ValueError(f"mean_shift: min_bin_count is {min_bin_count}; expected at least 1")
    keys, bins, counts = torch.unique(
        _lattice_keys(points, bandwidth), return_inverse=True, return_counts=True
    )
    index = torch.arange(len(points), device=points.device)
    first = torch.full_like(keys, len(points)).scatter_reduce(0, bins, index, "amin")
    first = first[counts >= min_bin_count]
    if len(first) == len(points):
        return points
    return _lattice(points[first], bandwidth) * bandwidth


def distinct_modes(modes: Tensor, counts: Tensor, bandwidth: float) -> Tensor:
    """Keep the mode with the most points among modes within the bandwidth of each other.

    Args:
        modes: (S, D) float64.
        counts: (S,) points of each; modes without one are left out.
        bandwidth: in units of the modes.
    Returns:
        (C, D), most points first; those with equally many by falling coordinates.
    """
    order = torch.arange(len(modes), device=modes.device)
    for column in modes.T.flip(0):
        order = order[column[order].argsort(descending=True, stable=True)]
    order = order[counts[order].argsort(descending=True, stable=True)]
    remaining, centres = modes[order[counts[order] > 0]], modes[:0]
    while len(remaining):
        centres = torch.cat([centres, remaining[:1]])
        distances = (remaining[1:] - remaining[0]).norm(dim=1)
        remaining = remaining[1:][distances > bandwidth]
    return centres


def mean_shift_reference(
    embeddings: Tensor,
    *,
    bandwidth: float,
    seeds: Tensor,
    max_iterations: int = 300,
    tolerance: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """As :func:`mean_shift` for finite points, with all distances: for tests."""
    modes, counts = seeds.double().clone(), torch.zeros(len(seeds), dtype=torch.long)
    for i, seed in enumerate(modes.clone()):
        modes[i], counts[i] = _walk(embeddings, seed, bandwidth, max_iterations, tolerance)
    centres = distinct_modes(modes, counts, bandwidth)
    if not len(centres):
        return torch.full((len(embeddings),), -1), centres
    distances, labels = torch.cdist(embeddings.double(), centres).min(dim=1)
    return labels.where(distances <= bandwidth, -1), centres


def peel_clusters_reference(
    embeddings: Tensor,
    bins: Tensor,
    *,
    bandwidth: float,
    min_points: int = 1,
    max_clusters: int = 1000,
    max_iterations: int = 100,
    tolerance: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """As :func:`peel_clusters` for finite points in given cells, with all distances: for tests.

    Args:
        embeddings: (N, D) float64.
        bins: (N,) int64, the cell of each point, 0 to N - 1; of equally full ones the lowest is
            the first.
    """
    labels, free = torch.full_like(bins, -1), torch.ones_like(bins, dtype=torch.bool)
    centres: list[Tensor] = []
    failures = 0
    while free.any() and len(centres) < max_clusters and failures < 20:
        counts = bins[free].bincount()
        fullest = (counts == counts.max()).nonzero()[0]
        seed = embeddings[free & (bins == fullest)][0]
        centre, _ = _walk(embeddings[free], seed, bandwidth, max_iterations, tolerance)
        inside = free & ((embeddings - centre).norm(dim=1) <= bandwidth)
        if inside.sum() >= min_points:
            labels[inside] = len(centres)
            centres.append(centre)
            failures = 0
        else:
            failures += 1
        # If the ball holds no point, only the seed is removed.
        free &= ~inside if inside.any() else (embeddings != seed).any(dim=1)
    return labels, torch.stack(centres) if centres else embeddings[:0]


def _walk(
    points: Tensor, centre: Tensor, bandwidth: float, max_iterations: int, tolerance: float
) -> tuple[Tensor, int]:
    """Final position of a centre, and of how many points it is the mean; 0 if it met none."""
    for completed in range(max_iterations + 1):
        inside = (points - centre).norm(dim=1) <= bandwidth
        if not inside.any():
            return centre, 0
        before, centre = centre, points[inside].double().mean(dim=0)
        if (centre - before).norm() <= tolerance * bandwidth or completed == max_iterations:
            break
    return centre, int(inside.sum())


def _usable(op: str, embeddings: Tensor, bandwidth: float) -> tuple[Tensor | None, Tensor]:
    """Which rows are usable, None for all, and these rows in single precision or more."""
    if not 0 < bandwidth < math.inf:
        raise ValueError(f"{op}: bandwidth is {bandwidth}; expected a finite number above 0")
    if embeddings.dim() != 2 or not 1 <= embeddings.shape[1] <= _MOST_DIMENSIONS:
        raise ValueError(
            f"{op}: embeddings has shape {tuple(embeddings.shape)}; expected (N, D) with D from 1 "
            f"to {_MOST_DIMENSIONS}"
        )
    if not embeddings.is_floating_point():
        raise TypeError(f"{op}: embeddings is {embeddings.dtype}; expected a floating type")
    points = embeddings.to(sum_dtype(embeddings))
    usable = (points.isfinite() & (points.abs() <= _LARGEST)).all(dim=1)
    return (None, points) if usable.all() else (usable, points[usable])


def _for_all(usable: Tensor | None, labels: Tensor) -> Tensor:
    """Labels of the usable rows → labels of all rows, -1 elsewhere."""
    if usable is None:
        return labels
    all_labels = labels.new_full(usable.shape, -1)
    all_labels[usable] = labels
    return all_labels


def _lattice(points: Tensor, bandwidth: float) -> Tensor:
    """(N, D) whole numbers: the cells of side ``bandwidth`` around its multiples."""
    return (points / bandwidth).round() + 0.0  # no negative zero


def _lattice_keys(points: Tensor, bandwidth: float) -> Tensor:
    """(N,) int64, a hash of each point's cell: two cells share one once in about 1e19 pairs."""
    keys = torch.zeros(len(points), dtype=torch.long, device=points.device)
    for column in _lattice(points, bandwidth).double().T:
        keys = (keys ^ column.contiguous().view(torch.long)) * _FACTOR
        keys = keys ^ (keys >> 29)
    return keys


in_python("shift_seeds")(shift_seeds)
in_python("nearest_centres")(label_points)
in_python("peel_clusters")(peel)


@register_fake("shift_seeds")
def _fake_shift(
    embeddings: Tensor, seeds: Tensor, bandwidth: float, max_iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    return seeds.new_empty(seeds.shape, dtype=torch.double), seeds.new_empty(
        seeds.shape[0], dtype=torch.long
    )


@register_fake("nearest_centres")
def _fake_nearest(embeddings: Tensor, centres: Tensor, radius: float) -> Tensor:
    return embeddings.new_empty(embeddings.shape[0], dtype=torch.long)


@register_fake("peel_clusters")
def _fake_peel(
    embeddings: Tensor,
    bins: Tensor,
    bandwidth: float,
    max_iterations: int,
    tolerance: float,
    min_points: int,
    max_clusters: int,
) -> tuple[Tensor, Tensor]:
    count, dimensions = embeddings.shape
    return embeddings.new_empty(count, dtype=torch.long), embeddings.new_empty(
        (max_clusters, dimensions), dtype=torch.double
    )
