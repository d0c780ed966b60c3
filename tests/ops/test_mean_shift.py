"""Mean shift: equal to scikit-learn and to all distances; peeling, points of every kind."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from instseg.ops.mean_shift import (
    bin_seeds,
    distinct_modes,
    mean_shift,
    mean_shift_reference,
    nearest_centres,
    peel_clusters,
    peel_clusters_reference,
)
from tests.support.ops import CUDA, DEVICES

METHODS = [mean_shift, peel_clusters]
BANDWIDTH = 1.5
Method = Callable[..., tuple[Tensor, Tensor]]


def blobs(
    clusters: int = 5, points: int = 60, dimensions: int = 8, stray: int = 20, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Shuffled points of balls at least 4 apart, strays between them, and what they belong to."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.zeros(clusters, dimensions, dtype=torch.double)
    means[:, 0] = 4.0 * torch.arange(clusters)
    spread = 0.3 / math.sqrt(dimensions)
    noise = torch.randn(clusters, points, dimensions, generator=generator, dtype=torch.double)
    inside = (means[:, None] + spread * noise).flatten(0, 1)
    corner = torch.rand(stray, dimensions, generator=generator, dtype=torch.double)
    outside = means.amin(0) - 3 + (means.amax(0) - means.amin(0) + 6) * corner
    labels = torch.arange(clusters).repeat_interleave(points)
    labels = torch.cat([labels, torch.full((stray,), -1)])
    order = torch.randperm(len(labels), generator=generator)
    return torch.cat([inside, outside])[order], labels[order]


def same_partition(first: Tensor, second: Tensor) -> bool:
    """Whether two labelings differ by the names of the labels alone."""
    pairs = torch.stack([first.cpu(), second.cpu()], dim=1).unique(dim=0)
    return all(len(pairs) == len(pairs[:, i].unique()) for i in (0, 1))


def scikit_learn(points: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    cluster = pytest.importorskip("sklearn.cluster", reason="the extra `test` is not installed")
    fitted = cluster.MeanShift(bandwidth=BANDWIDTH, **options).fit(points.numpy())
    return torch.from_numpy(fitted.labels_.astype(np.int64)), torch.from_numpy(
        fitted.cluster_centers_
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dimensions", [1, 2, 8, 33, 64])
@pytest.mark.parametrize("cluster_all", [False, True])
def test_bin_seeding_equals_scikit_learn(cluster_all: bool, dimensions: int, device: str) -> None:
    points, _ = blobs(dimensions=dimensions, stray=60)
    labels, centres = mean_shift(points.to(device), bandwidth=BANDWIDTH, cluster_all=cluster_all)
    expected, positions = scikit_learn(points, bin_seeding=True, cluster_all=cluster_all)
    torch.testing.assert_close(centres.cpu(), positions)
    assert torch.equal(labels.cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_given_seeds_equal_scikit_learn(device: str) -> None:
    points, _ = blobs(dimensions=3, stray=100)
    seeds = points[::7] + 0.5
    labels, centres = mean_shift(points.to(device), bandwidth=BANDWIDTH, seeds=seeds.to(device))
    expected, positions = scikit_learn(points, seeds=seeds.numpy(), cluster_all=False)
    torch.testing.assert_close(centres.cpu(), positions)
    assert torch.equal(labels.cpu(), expected)


def test_singles_equal_scikit_learn_in_doubles() -> None:
    points, _ = blobs(dimensions=8, points=500, stray=200)
    labels, _ = mean_shift(points.float(), bandwidth=BANDWIDTH, cluster_all=True)
    expected, _ = scikit_learn(points, bin_seeding=True)
    assert (labels == expected).float().mean() > 0.999


@pytest.mark.parametrize("least", [1, 2, 5, 1000])
def test_bins_are_those_of_scikit_learn(least: int) -> None:
    cluster = pytest.importorskip("sklearn.cluster", reason="the extra `test` is not installed")
    points, _ = blobs(dimensions=2, stray=50)
    expected = cluster.get_bin_seeds(points.numpy(), 0.7, least)
    seeds = bin_seeds(points, 0.7, least)
    rounded = [[round(float(x), 3) for x in seed] for seed in expected]
    assert sorted([round(x, 3) for x in seed] for seed in seeds.tolist()) == sorted(rounded)


def test_points_that_have_a_bin_each_are_the_seeds() -> None:
    cluster = pytest.importorskip("sklearn.cluster", reason="the extra `test` is not installed")
    points = 3 * torch.arange(5.0)[:, None] + 0.2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert cluster.get_bin_seeds(points.numpy(), 1.0).tolist() == points.tolist()
    assert torch.equal(bin_seeds(points, 1.0), points)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_cut_of_the_tree_gives_what_all_distances_give(
    dtype: torch.dtype, device: str
) -> None:
    """Overlapping clouds of more points than a leaf: balls hold, cut and miss nodes."""
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(1500, 3, generator=generator, dtype=torch.double).to(dtype)
    seeds = points[:40]
    labels, centres = mean_shift(points.to(device), bandwidth=0.8, seeds=seeds.to(device))
    expected, positions = mean_shift_reference(points, bandwidth=0.8, seeds=seeds)
    assert len(centres) > 2 and centres.dtype == dtype
    torch.testing.assert_close(centres.cpu(), positions.to(dtype))
    assert (labels.cpu() == expected).float().mean() > 0.998


@given(st.integers(1, 150), st.integers(1, 9), st.integers(1, 12), st.integers(0, 2**31))
def test_any_points_and_seeds_equal_all_distances(
    count: int, dimensions: int, seeds: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(count, dimensions, generator=generator, dtype=torch.double)
    starts = torch.rand(seeds, dimensions, generator=generator, dtype=torch.double)
    labels, centres = mean_shift(points, bandwidth=0.3, seeds=starts)
    expected, positions = mean_shift_reference(points, bandwidth=0.3, seeds=starts)
    torch.testing.assert_close(centres, positions)
    assert torch.equal(labels, expected)


@given(
    st.integers(1, 150),
    st.integers(1, 9),
    st.integers(1, 150),
    st.integers(1, 5),
    st.integers(0, 9),
    st.integers(0, 2**31),
)
def test_peeling_any_points_out_of_any_cells_equals_all_distances(
    count: int, dimensions: int, cells: int, least: int, max_clusters: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(count, dimensions, generator=generator, dtype=torch.double)
    bins = torch.randint(0, min(cells, count), (count,), generator=generator)
    labels, centres = torch.ops.instseg.peel_clusters(
        points, bins, 0.3, 100, 1e-3, least, max_clusters
    )
    expected, positions = peel_clusters_reference(
        points, bins, bandwidth=0.3, min_points=least, max_clusters=max_clusters
    )
    assert torch.equal(labels, expected)
    torch.testing.assert_close(centres[: len(positions)], positions)


@given(st.integers(0, 200), st.integers(0, 20), st.integers(1, 64), st.integers(0, 2**31))
def test_the_nearest_centre_is_that_of_all_distances(
    count: int, centres: int, dimensions: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(count, dimensions, generator=generator, dtype=torch.double)
    others = torch.rand(centres, dimensions, generator=generator, dtype=torch.double)
    distances = torch.cat([torch.full((count, 1), 0.8).double(), torch.cdist(points, others)], 1)
    assert torch.equal(nearest_centres(points, others, 0.8), distances.argmin(1) - 1)


@pytest.mark.parametrize("device", DEVICES)
def test_a_walk_by_hand(device: str) -> None:
    """From 0: the mean of 0 and 0.9 is 0.45, of 0, 0.9, 1.4 is 23/30, then all four: 0.95."""
    points = torch.tensor([[0.0], [0.9], [1.4], [1.5]], device=device, dtype=torch.double)
    seeds = torch.zeros(1, 1, device=device, dtype=torch.double)
    for moves, expected in enumerate([0.45, 2.3 / 3, 0.95, 0.95]):
        _, centres = mean_shift(points, bandwidth=1.0, seeds=seeds, max_iterations=moves)
        assert centres.item() == pytest.approx(expected)


@pytest.mark.parametrize("device", DEVICES)
def test_a_point_at_the_bandwidth_is_inside(device: str) -> None:
    points = torch.tensor([[0.0], [1.0], [2.0]], device=device)
    labels, centres = mean_shift(points, bandwidth=1.0, seeds=points[1:2])
    assert centres.tolist() == [[1.0]] and labels.tolist() == [0, 0, 0]


def test_modes_in_reach_of_a_fuller_one_are_dropped() -> None:
    modes = torch.tensor([[0.0], [0.75], [1.5], [5.0], [9.0]]).double()
    counts = torch.tensor([3, 7, 3, 7, 0])
    assert distinct_modes(modes, counts, 1.0).tolist() == [[5.0], [0.75]]


@pytest.mark.parametrize("device", DEVICES)
def test_seeds_that_meet_no_point_give_no_centres(device: str) -> None:
    points, seeds = torch.zeros(3, 2, device=device), torch.full((1, 2), 9.0, device=device)
    labels, centres = mean_shift(points, bandwidth=1.0, seeds=seeds)
    assert labels.tolist() == [-1, -1, -1] and centres.shape == (0, 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dimensions", [1, 2, 8, 33, 64])
def test_peeling_finds_separate_clusters(dimensions: int, device: str) -> None:
    points, true_labels = blobs(dimensions=dimensions, stray=0)
    labels, centres = peel_clusters(points.to(device), bandwidth=BANDWIDTH)
    assert len(centres) == 5 and same_partition(labels, true_labels)


@pytest.mark.parametrize("device", DEVICES)
def test_the_fullest_cell_is_peeled_off_first(device: str) -> None:
    points = torch.cat([torch.zeros(5, 2), torch.full((9, 2), 8.0), torch.full((7, 2), -8.0)])
    labels, centres = peel_clusters(points.to(device), bandwidth=1.0)
    assert centres.tolist() == [[8.0, 8.0], [-8.0, -8.0], [0.0, 0.0]]
    assert labels.tolist() == [2] * 5 + [0] * 9 + [1] * 7


@pytest.mark.parametrize("device", DEVICES)
def test_points_that_were_taken_move_no_later_centre(device: str) -> None:
    """0 and 0.8 and 1.6: the ball around 0 takes 0.8 along, and 1.6 stays where it is."""
    points = torch.tensor([[0.0]] * 9 + [[0.8]] + [[1.6]] * 3, device=device, dtype=torch.double)
    labels, centres = peel_clusters(points, bandwidth=1.0)
    assert centres.flatten().tolist() == pytest.approx([0.08, 1.6])
    assert labels.tolist() == [0] * 10 + [1] * 3


@pytest.mark.parametrize("device", DEVICES)
def test_clusters_of_too_few_points_get_no_label(device: str) -> None:
    points = torch.cat([torch.zeros(5, 2), torch.full((4, 2), 8.0)]).to(device)
    labels, centres = peel_clusters(points, bandwidth=1.0, min_points=5)
    assert labels.tolist() == [0] * 5 + [-1] * 4 and centres.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("max_clusters", [0, 2, 5, 9])
def test_no_more_clusters_than_asked_for_are_peeled_off(max_clusters: int, device: str) -> None:
    points, true_labels = blobs(stray=0)
    labels, centres = peel_clusters(
        points.to(device), bandwidth=BANDWIDTH, max_clusters=max_clusters
    )
    assert len(centres) == min(max_clusters, 5) == len(labels[labels >= 0].unique())


@pytest.mark.parametrize("device", DEVICES)
def test_peeling_ends_after_twenty_small_clusters(device: str) -> None:
    """Pairs in cells of their own come before three points that share their cells less."""
    lonely = 10 + 5 * torch.arange(40.0).repeat_interleave(2)
    spread = torch.tensor([-0.6, -0.3, 0.6])
    points = torch.cat([lonely, spread])[:, None].to(device)
    labels, _ = peel_clusters(points, bandwidth=1.0, min_points=3, max_clusters=9)
    assert (labels == -1).all()
    labels, _ = peel_clusters(points[40:], bandwidth=1.0, min_points=3, max_clusters=9)
    assert labels[-3:].tolist() == [-1] * 3
    labels, _ = peel_clusters(points[42:], bandwidth=1.0, min_points=3, max_clusters=9)
    assert labels[-3:].tolist() == [0] * 3


@pytest.mark.parametrize("device", DEVICES)
def test_a_ball_around_nothing_does_not_stop_the_peeling(device: str) -> None:
    """A triangle whose mean is out of reach of its corners, at one move only."""
    angles = torch.arange(3).double() * 2 * math.pi / 3
    points = torch.stack([angles.cos(), angles.sin()], dim=1).to(device)
    labels, _ = peel_clusters(points * 0.9, bandwidth=0.89, max_iterations=0)
    assert sorted(labels.tolist()) == [0, 1, 2]


@pytest.mark.parametrize("device", DEVICES)
def test_a_point_belongs_to_the_first_of_its_nearest_centres(device: str) -> None:
    points = torch.tensor([[0.0], [1.0], [1.1], [5.0]], device=device)
    centres = torch.tensor([[0.0], [2.0], [2.0]], device=device)
    assert nearest_centres(points, centres).tolist() == [0, 0, 1, 1]
    assert nearest_centres(points, centres, 1.0).tolist() == [0, 0, 1, -1]
    assert nearest_centres(points, centres[:0]).tolist() == [-1] * 4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [1, 64, 65, 1000])
def test_equal_points_are_one_cluster(count: int, method: Method, device: str) -> None:
    points = torch.full((count, 3), 1.25, device=device)
    labels, centres = method(points, bandwidth=0.1)
    assert labels.tolist() == [0] * count and centres.tolist() == [[1.25] * 3]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_points_that_are_no_numbers_get_no_label_and_change_nothing(
    value: float, method: Method, device: str
) -> None:
    points, _ = blobs(dimensions=3)
    spoilt = torch.cat([points[:50], points[:2], points[50:]])
    spoilt[50, 1] = spoilt[51, 2] = value
    labels, centres = method(spoilt.to(device), bandwidth=BANDWIDTH)
    expected, positions = method(points.to(device), bandwidth=BANDWIDTH)
    assert torch.equal(centres, positions) and labels[50:52].tolist() == [-1, -1]
    assert torch.equal(torch.cat([labels[:50], labels[52:]]), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e30, 3e38])
def test_huge_points_are_clusters_of_their_own(scale: float, method: Method) -> None:
    points = torch.tensor([[-1.0], [-1.0], [0.0], [1.0], [1.0], [1.0]]) * scale
    labels, centres = method(points, bandwidth=1.0)
    assert len(centres) == 3 and same_partition(labels, torch.tensor([0, 0, 1, 2, 2, 2]))
    assert torch.isfinite(centres).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_computed_as_floats(dtype: torch.dtype, method: Method, device: str) -> None:
    points = blobs(dimensions=4)[0].to(device, dtype)
    labels, centres = method(points, bandwidth=BANDWIDTH)
    expected, positions = method(points.float(), bandwidth=BANDWIDTH)
    assert centres.dtype == dtype and torch.equal(centres, positions.to(dtype))
    assert (labels == expected).float().mean() > 0.98  # the nearest of rounded centres


@pytest.mark.parametrize("method", METHODS)
def test_one_thread_and_two_give_the_same(method: Method) -> None:
    points, threads = blobs(points=900)[0].float(), torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(method(points, bandwidth=BANDWIDTH))
    torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("method", METHODS)
def test_both_devices_give_the_same(method: Method, device: str) -> None:
    points = blobs(points=3000)[0]
    labels, centres = method(points.to(device), bandwidth=BANDWIDTH)
    expected, positions = method(points, bandwidth=BANDWIDTH)
    torch.testing.assert_close(centres.cpu(), positions)
    assert torch.equal(labels.cpu(), expected)


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_gives_the_same_twice(method: Method, device: str) -> None:
    points = blobs(points=3000)[0].float().to(device)
    first, second = (method(points, bandwidth=BANDWIDTH) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_operators_pass_opcheck(dtype: torch.dtype, device: str) -> None:
    points = blobs(dimensions=3)[0].to(device, dtype)
    bins, ops = torch.zeros(len(points), dtype=torch.long, device=device), torch.ops.instseg
    torch.library.opcheck(ops.shift_seeds.default, (points, points[:9], 1.5, 10, 1e-3))
    torch.library.opcheck(ops.nearest_centres.default, (points, points[:9], 1.5))
    torch.library.opcheck(ops.peel_clusters.default, (points, bins, 1.5, 10, 1e-3, 2, 7))


@pytest.mark.parametrize(
    ("bins", "message"),
    [
        (torch.zeros(2, dtype=torch.long), r"bins has shape \[2\]; expected \(3,\)"),
        (torch.tensor([0, 1, 3]), "bins are 0 to 3; expected 0 to 2"),
        (torch.tensor([0, 1, -1]), "bins are -1 to 1; expected 0 to 2"),
    ],
)
def test_bins_that_do_not_fit_are_named(bins: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"peel_clusters: {message}"):
        torch.ops.instseg.peel_clusters(torch.zeros(3, 2), bins, 1.0, 9, 1e-3, 1, 9)
