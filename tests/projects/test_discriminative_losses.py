"""The discriminative loss against numbers of two public codes and against numbers made by hand."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from instseg.modeling import IGNORED, NONE, DenseTargets, dice_loss, semantic_loss
from instseg.projects.discriminative_loss import (
    DiscriminativeSettings,
    Terms,
    count_loss,
    discriminative_loss,
)
from tests.conftest import GOLDEN, close, load_module
from tests.support.dense_common import discriminative_settings

FOLDER = GOLDEN / "discriminative_loss"
CASES = "abcde"


@pytest.fixture(scope="module")
def golden() -> Any:
    return np.load(FOLDER / "golden.npz")


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return load_module(FOLDER / "inputs.py")


def targets_of(labels: Tensor, classes: dict[int, int] | None = None) -> DenseTargets:
    """Label maps (B, h, w), 0 for background, numbered in each image by itself → targets.

    Args:
        classes: class of each number, 0 where it is not named.
    """
    owners = torch.full_like(labels, NONE)
    images, kinds = [], []
    for image, label_map in enumerate(labels):
        for number in label_map.unique():
            if number:
                owners[image][label_map == number] = len(images)
                images.append(image)
                kinds.append((classes or {}).get(int(number), 0))
    semantic = (labels > 0).long()
    return DenseTargets(
        owners,
        semantic,
        torch.tensor(images, dtype=torch.int64),
        torch.tensor(kinds, dtype=torch.int64),
    )


def settings_of(recipe: ModuleType, name: str, variance: str) -> DiscriminativeSettings:
    norm, delta_var, delta_dist = (recipe.CASES[name][i] for i in (6, 8, 9))
    return DiscriminativeSettings(delta_var, delta_dist, f"L{norm}", variance)


def run(
    recipe: ModuleType, name: str, variance: str
) -> tuple[Terms, Tensor, DiscriminativeSettings]:
    embeddings, _, _, labels = recipe.make(name)
    x = torch.from_numpy(embeddings).double().requires_grad_()
    settings = settings_of(recipe, name, variance)
    terms = discriminative_loss(x, targets_of(torch.from_numpy(labels)), settings)
    return terms, x, settings


def values(terms: Terms) -> list[float]:
    terms_alone = [float(x) for x in (terms.variance, terms.distance, terms.regulariser)]
    return [*terms_alone, terms_alone[0] + terms_alone[1] + 0.001 * terms_alone[2]]


def gradient(terms: Terms, x: Tensor) -> Tensor:
    total = terms.variance + terms.distance + 0.001 * terms.regulariser
    (result,) = torch.autograd.grad(total, x)
    return result.float()


@pytest.mark.parametrize("name", CASES)
def test_the_recipe_makes_the_label_maps_that_the_numbers_belong_to(
    recipe: ModuleType, golden: Any, name: str
) -> None:
    assert (recipe.make(name)[3] == golden[f"{name}_labels"]).all()


@pytest.mark.parametrize("name", CASES)
def test_terms_per_pixel_equal_wizarons(recipe: ModuleType, golden: Any, name: str) -> None:
    terms, _, _ = run(recipe, name, "pixel")
    np.testing.assert_allclose(values(terms), golden[f"{name}_terms"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_terms_per_instance_equal_the_papers(recipe: ModuleType, golden: Any, name: str) -> None:
    terms, _, _ = run(recipe, name, "instance")
    expected = golden[f"{name}_paper_terms"].mean(axis=0)
    np.testing.assert_allclose(values(terms), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_the_means_of_instances_equal_wizarons(recipe: ModuleType, golden: Any, name: str) -> None:
    """Once they are taken from the pixels, all means are 0 and with them their norms."""
    embeddings, masks, _, labels = recipe.make(name)
    means = np.einsum("bshw,bsd->bdhw", masks, golden[f"{name}_means"])
    x = torch.from_numpy(embeddings - means).double()
    targets = targets_of(torch.from_numpy(labels))
    terms = discriminative_loss(x, targets, settings_of(recipe, name, "pixel"))
    assert 0 <= terms.regulariser.item() <= 1e-5


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_per_pixel_equals_wizarons(recipe: ModuleType, golden: Any, name: str) -> None:
    terms, x, _ = run(recipe, name, "pixel")
    expected = golden[f"{name}_grad"]
    step = 1 if expected.shape == x.shape else 3
    sampled = gradient(terms, x)[:, :, ::step, ::step]
    close(sampled, expected, 1e-5 * float(np.abs(expected).max()))


@pytest.mark.parametrize("name", "ce")
def test_the_gradient_per_instance_equals_the_papers(
    recipe: ModuleType, golden: Any, name: str
) -> None:
    terms, x, _ = run(recipe, name, "instance")
    expected = golden[f"{name}_paper_grad"]
    close(gradient(terms, x), expected, 1e-5 * float(np.abs(expected).max()))


@pytest.mark.parametrize(("background", "name"), [(False, "dice_fg"), (True, "dice_all")])
def test_dice_equals_wizarons(recipe: ModuleType, golden: Any, background: bool, name: str) -> None:
    logits, labels = (torch.from_numpy(x) for x in recipe.semantic())
    close(dice_loss(logits, labels, background=background), golden[name].astype(np.float32))


def test_cross_entropy_equals_wizarons(recipe: ModuleType, golden: Any) -> None:
    logits, labels = (torch.from_numpy(x) for x in recipe.semantic())
    close(semantic_loss(logits, labels), golden["ce"].astype(np.float32))


def test_padding_is_in_no_semantic_loss(recipe: ModuleType) -> None:
    logits, labels = (torch.from_numpy(x) for x in recipe.semantic())
    wide = torch.nn.functional.pad(logits, (0, 5, 0, 3), value=7.0)
    marked = torch.nn.functional.pad(labels, (0, 5, 0, 3), value=IGNORED)
    close(semantic_loss(wide, marked), semantic_loss(logits, labels))
    close(dice_loss(wide, marked), dice_loss(logits, labels))


def line(*points: float) -> Tensor:
    """(1, 1, 1, W) embeddings of one dimension."""
    return torch.tensor(points, dtype=torch.float64).view(1, 1, 1, -1)


def labelled(*numbers: int) -> Tensor:
    return torch.tensor(numbers).view(1, 1, -1)


def test_two_means_closer_than_both_margins_are_pushed_by_the_exact_amount() -> None:
    # Means 0 and 2, 2 delta_d = 3: (3 - 2)^2 for both ordered pairs, over 2.
    terms = discriminative_loss(line(0, 2), targets_of(labelled(1, 2)), discriminative_settings())
    assert values(terms)[:3] == pytest.approx([0, 1, 1])


def test_variance_by_hand() -> None:
    # Instance 1: mean 0, pixels 2 away: (2 - 0.5)^2.  Instance 2: one pixel, 0.
    x, labels = line(-2, 2, 50), labelled(1, 1, 2)
    by_instance = discriminative_loss(x, targets_of(labels), discriminative_settings())
    by_pixel = discriminative_loss(x, targets_of(labels), discriminative_settings(variance="pixel"))
    assert float(by_instance.variance) == pytest.approx(2.25 / 2)
    assert float(by_pixel.variance) == pytest.approx(4.5 / 3)


def test_instances_of_different_classes_do_not_see_each_other() -> None:
    # The same place in the embedding, but classes 0 and 1; terms are means over the two classes.
    targets = targets_of(labelled(1, 2, 3), {1: 0, 2: 1, 3: 1})
    terms = discriminative_loss(line(0, 0, 2), targets, discriminative_settings())
    assert float(terms.distance) == pytest.approx((0 + 1) / 2)
    assert float(terms.regulariser) == pytest.approx((0 + 1) / 2)


def test_images_do_not_see_each_other_and_one_without_instances_counts_zero() -> None:
    x = line(0, 2, 5).repeat(2, 1, 1, 1)
    labels = torch.cat([labelled(1, 2, 0), labelled(0, 0, 0)])
    terms = discriminative_loss(x, targets_of(labels), discriminative_settings())
    assert float(terms.distance) == pytest.approx(1 / 2)


def test_an_instance_without_a_cell_counts_nowhere() -> None:
    targets = targets_of(labelled(1, 2))
    more = DenseTargets(
        targets.owners,
        targets.semantic,
        torch.cat([targets.images, torch.zeros(1, dtype=torch.int64)]),
        torch.cat([targets.classes, torch.zeros(1, dtype=torch.int64)]),
    )
    settings = discriminative_settings()
    assert values(discriminative_loss(line(0, 2), more, settings)) == values(
        discriminative_loss(line(0, 2), targets, settings)
    )


@pytest.mark.parametrize("labels", [labelled(0, 0), labelled(1, 1), labelled(1, 2)])
@pytest.mark.parametrize("norm", ["L1", "L2"])
def test_a_collapsed_embedding_has_a_finite_gradient(labels: Tensor, norm: str) -> None:
    """No instance, one and two, everything at 0, where norms have no derivative."""
    x = torch.zeros(1, 4, 1, 2, requires_grad=True)
    terms = discriminative_loss(x, targets_of(labels), discriminative_settings(norm=norm))
    assert gradient(terms, x).isfinite().all()


def test_no_instance_gives_zero_attached_to_the_graph() -> None:
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    targets = targets_of(torch.zeros(2, 4, 5, dtype=torch.int64))
    terms = discriminative_loss(x, targets, discriminative_settings())
    assert values(terms) == [0, 0, 0, 0]
    assert not gradient(terms, x).any()


def test_hundreds_of_instances_of_one_pixel_equal_a_sum_over_pairs() -> None:
    x = torch.randn(1, 4, 20, 20, dtype=torch.float64)
    labels = torch.arange(1, 401).view(1, 20, 20)
    terms = discriminative_loss(x, targets_of(labels), discriminative_settings())
    points = x[0].flatten(1).T
    apart = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    hinges = (3 - apart).clamp(min=0).square().fill_diagonal_(0)
    assert float(terms.variance) == 0
    assert float(terms.distance) == pytest.approx(float(hinges.sum()) / (400 * 399))


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
def test_half_precision_is_summed_in_single(dtype: torch.dtype) -> None:
    """4096 pixels at 100 would overflow a sum in half precision."""
    x = torch.full((1, 2, 64, 64), 100.0, dtype=dtype, requires_grad=True)
    targets = targets_of(torch.ones(1, 64, 64, dtype=torch.int64))
    terms = discriminative_loss(x, targets, discriminative_settings())
    assert terms.regulariser.dtype == torch.float32
    assert float(terms.regulariser) == pytest.approx(100 * 2**0.5, rel=1e-5)


@pytest.mark.parametrize("norm", ["L1", "L2"])
@pytest.mark.parametrize("variance", ["instance", "pixel"])
def test_the_gradient_is_that_of_the_values(norm: str, variance: str) -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 4, (2, 4, 5))
    targets = targets_of(labels, {2: 1})
    settings = DiscriminativeSettings(0.3, 1.1, norm, variance)

    def total(x: Tensor) -> Tensor:
        terms = discriminative_loss(x, targets, settings)
        return terms.variance + terms.distance + terms.regulariser

    assert torch.autograd.gradcheck(total, (x,))


def test_maps_of_another_size_are_refused() -> None:
    targets = targets_of(labelled(1, 2, 0))
    with pytest.raises(ValueError, match=r"\(1, 1, 3\); expected the same batch"):
        discriminative_loss(line(0, 2), targets, discriminative_settings())


def test_the_count_is_compared_in_units_of_the_largest() -> None:
    labels = torch.cat([labelled(1, 2, 3), labelled(0, 0, 0)])
    loss = count_loss(torch.tensor([0.5, 0.1]), targets_of(labels), max_count=10)
    assert float(loss) == pytest.approx(((0.5 - 0.3) ** 2 + 0.1**2) / 2)
