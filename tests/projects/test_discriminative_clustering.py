"""Instances from embeddings: golden maps, classes and scores by hand, limits, k-means."""

import numpy as np
import pytest
import torch
from torch import Tensor

from instseg.modeling import NONE
from instseg.projects.discriminative_loss.clustering import (
    Clusters,
    cluster,
    k_means,
)
from tests.conftest import GOLDEN, load_module
from tests.support.dense_common import cluster_settings
from tests.support.ops import CUDA, DEVICES


def semantic_of(classes: Tensor, count: int, certainty: float = 1.0) -> Tensor:
    """(h, w) class numbers, 0 the background → probabilities (count + 1, h, w)."""
    chosen = torch.nn.functional.one_hot(classes, count + 1).permute(2, 0, 1).float()
    return chosen * certainty + (1 - chosen) * (1 - certainty) / max(count, 1)


def scene(
    instances: int = 6, side: int = 40, dimensions: int = 4, noise: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Embeddings of vertical stripes, 3 apart, below a row of background; and their label map."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(side)[None].expand(side, side) * instances // side + 1
    labels = labels.clone()
    labels[0] = 0
    embeddings = noise * torch.randn(dimensions, side, side, generator=generator)
    embeddings[0] += 3.0 * labels
    return embeddings, labels


def masks_of(clusters: Clusters) -> Tensor:
    """(N, h, w) bool, in the order of the instances."""
    return clusters.numbers.cpu() == torch.arange(len(clusters.scores))[:, None, None]


def assert_recovers(clusters: Clusters, labels: Tensor) -> None:
    """Every label is a mask of its own, and nothing else is."""
    true_masks = [labels == i for i in labels.unique() if i > 0]
    assert len(clusters.scores) == len(true_masks)
    for mask in true_masks:
        assert (masks_of(clusters) == mask).all(dim=(1, 2)).sum() == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("instances", [1, 2, 6, 40])
def test_separate_instances_are_recovered(instances: int, device: str) -> None:
    embeddings, labels = scene(instances)
    probabilities = semantic_of((labels > 0).long(), 1)
    clusters = cluster(embeddings.to(device), probabilities.to(device), cluster_settings())
    assert_recovers(clusters, labels)
    assert clusters.classes.tolist() == [0] * instances and clusters.numbers.device.type == device


def test_the_golden_map_is_recovered() -> None:
    """Means more than 100 apart, every pixel within 0.4 of its own (case d), however few."""
    folder = GOLDEN / "discriminative_loss"
    inputs = load_module(folder / "inputs.py").make("d")
    expected = np.load(folder / "golden.npz")["d_labels"]
    for embeddings, labels in zip(
        torch.as_tensor(inputs[0]), torch.as_tensor(expected), strict=True
    ):
        probabilities = semantic_of(labels.long().clamp(max=1), 1)
        smallest = int(labels[labels > 0].unique(return_counts=True)[1].min())
        settings = cluster_settings(bandwidth=1.0, min_pixels=smallest)
        assert_recovers(cluster(embeddings, probabilities, settings), labels)


def test_a_map_of_the_golden_recipe_with_an_instance_of_nine_pixels_is_recovered() -> None:
    inputs = load_module(GOLDEN / "discriminative_loss" / "inputs.py").make("d", seed=1)
    embeddings, labels = (torch.as_tensor(x)[0] for x in (inputs[0], inputs[3]))
    sizes = labels[labels > 0].unique(return_counts=True)[1]
    assert sizes.min() == 9 < cluster_settings().min_pixels
    probabilities = semantic_of(labels.clamp(max=1), 1)
    clusters = cluster(embeddings, probabilities, cluster_settings(bandwidth=1.0))
    assert len(clusters.scores) == len(sizes) - 1
    settings = cluster_settings(bandwidth=1.0, min_pixels=9)
    assert_recovers(cluster(embeddings, probabilities, settings), labels)


def test_four_hundred_instances_are_recovered() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400).view(20, 20).repeat_interleave(4, 0).repeat_interleave(4, 1) + 1
    means = torch.stack([4.0 * (labels % 20), 4.0 * (labels // 20)])
    embeddings = means + 0.1 * torch.randn(2, 80, 80, generator=generator)
    clusters = cluster(
        embeddings, semantic_of(labels.clamp(max=1), 1), cluster_settings(max_instances=500)
    )
    assert_recovers(clusters, labels)


def test_equal_embeddings_of_two_classes_are_two_instances() -> None:
    """The semantic map separates classes: those at the left are 1, those at the right 3."""
    classes = torch.tensor([[1] * 5 + [3] * 5] * 4)
    clusters = cluster(torch.ones(2, 4, 10), semantic_of(classes, 3), cluster_settings())
    assert sorted(clusters.classes.tolist()) == [0, 2]
    assert_recovers(clusters, classes)


def test_the_score_is_probability_times_compactness() -> None:
    """Half of the pixels at 0, half at 0.6: r = 0.3, and 1 / (1 + 0.09 / 2.25) = 1 / 1.04."""
    embeddings = torch.tensor([0.0, 0.6]).repeat(8)[None, None]
    probabilities = semantic_of(torch.ones(1, 16, dtype=torch.long), 1, 0.8)
    clusters = cluster(embeddings, probabilities, cluster_settings(bandwidth=1.5))
    assert clusters.compactness.tolist() == pytest.approx([1 / 1.04])
    assert clusters.scores.tolist() == pytest.approx([0.8 / 1.04])


def test_instances_come_by_falling_score() -> None:
    embeddings, labels = scene(4)
    certainty = torch.where(labels == 3, 0.9, 0.7)
    probabilities = torch.stack([1 - certainty, certainty])
    probabilities[:, labels == 0] = torch.tensor([1.0, 0.0])[:, None]
    clusters = cluster(embeddings, probabilities, cluster_settings())
    assert torch.equal(clusters.numbers == 0, labels == 3)
    assert clusters.scores.tolist() == sorted(clusters.scores.tolist(), reverse=True)


def test_the_best_of_too_many_instances_are_kept() -> None:
    embeddings, labels = scene(6)
    probabilities = semantic_of((labels > 0).long() * (1 + labels % 2), 2)
    settings = cluster_settings(max_instances=3)
    some, every = (
        cluster(embeddings, probabilities, option) for option in (settings, cluster_settings())
    )
    assert len(some.scores) == 3 and len(every.scores) == 6
    assert not len(cluster(embeddings, probabilities, cluster_settings(max_instances=0)).scores)


def test_small_instances_are_dropped() -> None:
    embeddings, labels = scene(3)
    embeddings[:, 20, 20:24] = 99.0
    probabilities = semantic_of(labels.clamp(max=1), 1)
    clusters = cluster(embeddings, probabilities, cluster_settings(min_pixels=5))
    sizes = masks_of(clusters).sum((1, 2))
    assert sizes.min() > 100
    clusters = cluster(embeddings, probabilities, cluster_settings(min_pixels=4))
    sizes = masks_of(clusters).sum((1, 2))
    assert sizes.min() == 4


@pytest.mark.parametrize("method", ["mean_shift", "k_means"])
@pytest.mark.parametrize("size", [(0, 0), (1, 1), (3, 7)])
def test_an_image_without_instances_has_no_instances(method: str, size: tuple[int, int]) -> None:
    background = semantic_of(torch.zeros(size, dtype=torch.long), 2)
    clusters = cluster(torch.zeros(4, *size), background, cluster_settings(method), 3)
    assert clusters.numbers.shape == size and (clusters.numbers == NONE).all()
    assert clusters.classes.dtype == torch.int64 and clusters.scores.shape == (0,)


@pytest.mark.parametrize("method", ["mean_shift", "k_means"])
def test_an_image_of_one_pixel_can_be_an_instance(method: str) -> None:
    settings = cluster_settings(method, min_pixels=1)
    clusters = cluster(torch.zeros(4, 1, 1), torch.tensor([0.2, 0.8]).view(2, 1, 1), settings, 3)
    assert clusters.numbers.tolist() == [[0]] and clusters.scores.tolist() == pytest.approx([0.8])


def test_nothing_but_background_among_the_classes_gives_nothing() -> None:
    clusters = cluster(torch.zeros(4, 3, 3), torch.ones(1, 3, 3), cluster_settings())
    assert (clusters.numbers == NONE).all() and clusters.scores.shape == (0,)


@pytest.mark.parametrize("device", DEVICES)
def test_k_means_with_the_true_number_recovers_instances(device: str) -> None:
    embeddings, labels = scene(6)
    probabilities = semantic_of((labels > 0).long(), 1).to(device)
    clusters = cluster(embeddings.to(device), probabilities, cluster_settings("k_means"), 6)
    assert_recovers(clusters, labels)


def test_the_class_of_a_k_means_instance_is_by_vote() -> None:
    """Ten pixels at 0, six of them of class 2; eight at 9, all of class 1."""
    classes = torch.tensor([[1] * 4 + [2] * 6 + [1] * 8])
    embeddings = torch.tensor([0.0] * 10 + [9.0] * 8)[None, None]
    settings = cluster_settings("k_means", min_pixels=1)
    clusters = cluster(embeddings, semantic_of(classes, 2), settings, 2)
    votes = {
        int(m.sum()): int(c) for m, c in zip(masks_of(clusters), clusters.classes, strict=True)
    }
    assert votes == {10: 1, 8: 0}
    assert sorted(clusters.scores.tolist()) == pytest.approx([0.6, 1.0])


@pytest.mark.parametrize("count", [-1, 0, 1, 3, 5, 9])
def test_k_means_makes_at_most_a_cluster_per_point(count: int) -> None:
    points = torch.arange(5.0)[:, None]
    labels, centres = k_means(points, count)
    assert len(centres) == max(0, min(count, 5)) == len(labels[labels >= 0].unique())


def test_k_means_of_equal_points_ends() -> None:
    labels, centres = k_means(torch.ones(50, 3), 4)
    assert labels.unique().tolist() == [0] and centres.tolist() == [[1.0] * 3] * 4


def test_k_means_reaches_what_scikit_learn_reaches() -> None:
    reference = pytest.importorskip("sklearn.cluster", reason="the extra `test` is not installed")
    points = torch.rand(2000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    labels, centres = k_means(points, 8)
    spread = float((points - centres[labels]).square().sum())
    other = reference.KMeans(8, n_init=8, random_state=0).fit(points.numpy())
    assert spread == pytest.approx(other.inertia_, rel=0.02)


def test_k_means_gives_the_same_twice() -> None:
    points = torch.rand(20000, 3, generator=torch.Generator().manual_seed(0))
    assert all(map(torch.equal, k_means(points, 7), k_means(points, 7)))


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("method", ["mean_shift", "k_means"])
def test_both_devices_give_the_same(method: str, device: str) -> None:
    embeddings, labels = scene(6, noise=0.3)
    probabilities = semantic_of(labels.clamp(max=1), 1)
    settings = cluster_settings(method)
    clusters = cluster(embeddings, probabilities, settings, 6)
    other = cluster(embeddings.to(device), probabilities.to(device), settings, 6)
    assert torch.equal(clusters.numbers, other.numbers.cpu())
    torch.testing.assert_close(other.scores.cpu(), clusters.scores)


@pytest.mark.parametrize(
    ("embeddings", "probabilities"),
    [((4, 3, 3), (2, 3, 4)), ((4, 9), (2, 3, 3)), ((4, 3, 3), (0, 3, 3))],
)
def test_maps_that_do_not_belong_together_are_an_error(
    embeddings: tuple[int, ...], probabilities: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="; expected"):
        cluster(torch.zeros(embeddings), torch.zeros(probabilities), cluster_settings())


def test_k_means_without_a_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="k-means needs the number of instances"):
        cluster(torch.zeros(4, 3, 3), torch.ones(2, 3, 3), cluster_settings("k_means"))
