"""SGN without its networks: targets, lines, components, and the way back from them to masks."""

from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import BitMasks, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import instseg
from instseg.modeling import dense_targets
from instseg.ops.sgn_lines import BACKGROUND, END, INTERIOR, NONE, START
from instseg.projects.sgn import (
    Components,
    GroundTruth,
    breakpoint_labels,
    degrade,
    find_components,
    line_components,
    link_targets,
    links_from_breakpoints,
    majority_owners,
    merge_by_owner,
    most_likely_labels,
)
from tests.support.dense_common import line_settings

CPU = torch.device("cpu")


def rows(*numbers: list[int]) -> Tensor:
    return torch.tensor(numbers)


@pytest.mark.parametrize(
    ("widening", "expected"),
    [
        (0, [BACKGROUND, START, INTERIOR, INTERIOR, INTERIOR, END, START, END, START]),
        (1, [BACKGROUND, START, START, INTERIOR, END, END, START, END, START]),
        (2, [BACKGROUND, START, START, START, END, END, START, END, START]),
        (9, [BACKGROUND, START, START, START, END, END, START, END, START]),
    ],
)
def test_runs_begin_with_start_and_finish_with_end(widening: int, expected: list[int]) -> None:
    """Runs of 5, 2 and 1 pixels; START never takes more than half, rounded up."""
    owners = rows([-1, 4, 4, 4, 4, 4, 0, 0, 7])
    horizontal, _ = breakpoint_labels(owners, widening)
    assert horizontal.tolist() == [expected]


def test_columns_are_labelled_from_top_to_bottom() -> None:
    owners = rows([3, -1], [3, 3], [3, 3], [1, 1])
    _, vertical = breakpoint_labels(owners, 0)
    assert vertical.T.tolist() == [[START, INTERIOR, END, START], [BACKGROUND, START, END, START]]


def test_links_join_neighbours_of_one_instance_and_count_within_a_class() -> None:
    owners = rows([0, 0, 1], [2, 0, -1])[None]
    semantic = rows([1, 1, 1], [2, 1, 0])[None]
    same, counts = link_targets(owners, semantic)
    assert same[0].tolist() == [
        [[False, True, False], [False] * 3],
        [[True, False, False], [False] * 3],
    ]
    assert counts[0].tolist() == [
        [[False, True, False], [False] * 3],
        [[True, True, False], [False] * 3],
    ]


def test_degraded_breakpoints_stay_labels_and_background_stays_where_it_was_shifted() -> None:
    labels = torch.randint(0, 4, (3, 40, 50)).to(torch.uint8)
    worse = degrade(labels)
    assert worse.dtype == torch.uint8 and int(worse.max()) <= END
    for before, other in zip(labels, worse, strict=True):
        assert (before == BACKGROUND).sum() == (other == BACKGROUND).sum()
        assert not torch.equal(before, other)


def test_a_component_belongs_to_the_instance_that_covers_half_of_it() -> None:
    components = rows([0, 0, 0, 1, 1, 2, 2, 2, -1])
    owners = rows([5, 5, 3, 4, -1, -1, -1, 6, 6])
    assert majority_owners(components, owners, 4).tolist() == [5, 4, -1, -1]
    assert majority_owners(components, torch.full_like(owners, -1), 3).tolist() == [-1] * 3


def test_a_weak_breakpoint_is_interior() -> None:
    probabilities = torch.tensor([[0.0, 0.0], [0.35, 0.2], [0.45, 0.4], [0.2, 0.4]])[:, None]
    assert most_likely_labels(probabilities, 0.5).tolist() == [[START, START]]
    assert most_likely_labels(probabilities, 0.7).tolist() == [[INTERIOR, START]]


def test_lines_are_joined_over_the_mean_of_the_links_that_they_share() -> None:
    labels = torch.full((2, 4), INTERIOR, dtype=torch.uint8)
    semantic = torch.ones(2, 4, dtype=torch.int64)
    links = torch.tensor([[1.0, 1.0, 0.0, 0.1], [9.0] * 4])
    for threshold, count in ((0.5, 1), (0.53, 2)):
        _, components = line_components(labels, semantic, links, widened=False, threshold=threshold)
        assert int(components.max()) + 1 == count


def test_the_surest_pair_comes_first_and_touching_lines_stay_apart() -> None:
    """The line below touches two lines that a breakpoint separates; its links say which one."""
    labels = torch.tensor([[INTERIOR, END, INTERIOR], [INTERIOR] * 3], dtype=torch.uint8)
    semantic = torch.ones(2, 3, dtype=torch.int64)
    links = torch.tensor([[0.6, 0.6, 0.9], [0.0] * 3])
    _, components = line_components(labels, semantic, links, widened=False, threshold=0.5)
    assert components.tolist() == [[0, 0, 1], [1, 1, 1]]


def scene(seed: int, size: int = 48) -> tuple[Tensor, Tensor]:
    """Rectangles and ellipses of three classes over each other: owners and semantic map."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    owners, kinds = np.full((size, size), -1), np.zeros((size, size), int)
    for number in range(12):
        cy, cx = rng.integers(0, size, 2)
        ry, rx = rng.integers(1, size // 4, 2)
        dy, dx = np.abs(y - cy) / ry, np.abs(x - cx) / rx
        mask = (dy**2 + dx**2 <= 1) if number % 2 else np.maximum(dy, dx) <= 1
        owners[mask], kinds[mask] = number, rng.integers(1, 4)
    return torch.from_numpy(owners), torch.from_numpy(kinds)


def connected(owners: Tensor) -> Tensor:
    """4-connected components of the instances, found by flooding."""
    result, count = torch.full_like(owners, NONE), 0
    for y, x in (owners >= 0).nonzero().tolist():
        if result[y, x] != NONE:
            continue
        todo = [(y, x)]
        while todo:
            i, j = todo.pop()
            if result[i, j] == NONE and owners[i, j] == owners[y, x]:
                result[i, j] = count
                near = ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1))
                todo += [(a, b) for a, b in near if min(a, b) >= 0 and max(a, b) < len(owners)]
        count += 1
    return result


def same_partition(first: Tensor, second: Tensor) -> bool:
    pairs = torch.stack([first.flatten(), second.flatten()], dim=1).unique(dim=0)
    return all(len(pairs) == len(pairs[:, i].unique()) for i in (0, 1))


def truth_of(owners: Tensor, semantic: Tensor, widening: int) -> GroundTruth:
    same, _ = link_targets(owners[None], semantic[None])
    return GroundTruth(owners, semantic, torch.stack(breakpoint_labels(owners, widening)), same[0])


@pytest.mark.parametrize("direction", ["rows", "columns"])
@pytest.mark.parametrize("seed", range(20))
def test_true_breakpoints_and_links_give_the_connected_components(
    seed: int, direction: str
) -> None:
    ground_truth = truth_of(*scene(seed), widening=0)
    lines = line_settings(widening=0, direction=direction)
    _, component_map = find_components(
        ground_truth.labels, ground_truth.semantic, ground_truth.links, lines
    )
    assert same_partition(component_map, connected(ground_truth.owners))


@settings(max_examples=40, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 6), st.integers(0, 999))
def test_any_instance_map_is_found_again(height: int, width: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    owners = torch.randint(-1, count, (height, width), generator=generator)
    kinds = torch.randint(1, 3, (count + 1,), generator=generator)
    ground_truth = truth_of(owners, torch.where(owners >= 0, kinds[owners], 0), widening=0)
    _, component_map = find_components(
        ground_truth.labels, ground_truth.semantic, ground_truth.links, line_settings(widening=0)
    )
    components = Components.from_map(component_map, ground_truth.semantic)
    merge_by_owner(components, majority_owners(component_map, owners, len(components.areas)))
    assert same_partition(components.map, owners)


def ious(record: dict[str, Any], widening: int) -> list[float]:
    """Masks of a record → breakpoints → lines → components → masks: IoU of each instance."""
    masks = np.stack([mask_util.decode(x["segmentation"]) for x in record["annotations"]])
    instances = Instances(masks.shape[1:])
    instances.gt_classes = torch.tensor([x["category_id"] for x in record["annotations"]])
    instances.gt_masks = BitMasks(torch.from_numpy(masks.astype(bool)))
    targets = dense_targets([instances], masks.shape[1:], 1, CPU)
    ground_truth = GroundTruth.of_image(targets, 0, masks.shape[1:], widening)
    lines = line_settings(widening=widening)
    _, component_map = find_components(
        ground_truth.labels, ground_truth.semantic, ground_truth.links, lines
    )
    components = Components.from_map(component_map, ground_truth.semantic)
    owners = majority_owners(component_map, ground_truth.owners, len(components.areas))
    merge_by_owner(components, owners)
    best = []
    for mask in torch.from_numpy(masks.astype(bool)):
        numbers = components.map[mask]
        number = int(numbers[numbers >= 0].mode().values)
        whole = components.map == number
        best.append(float((whole & mask).sum() / (whole | mask).sum()))
    return best


@pytest.mark.parametrize(("widening", "least"), [(0, 1.0), (1, 0.98)])
@pytest.mark.parametrize("part", range(4))
def test_shapes_come_back_from_their_breakpoints(part: int, widening: int, least: float) -> None:
    instseg.get_cfg()
    for record in DatasetCatalog.get("shapes_val")[part::20]:
        assert min(ious(record, widening)) >= least


@pytest.mark.parametrize(("widening", "least"), [(0, 1.0), (1, 0.98)])
def test_nuclei_come_back_from_their_breakpoints(
    widening: int, least: float, data_root: Path
) -> None:
    instseg.get_cfg()
    overlaps = [x for r in DatasetCatalog.get("nuclei_val")[::6] for x in ious(r, widening)]
    assert len(overlaps) > 200 and sum(overlaps) / len(overlaps) >= least


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shapes_val", "nuclei_val"])
def test_every_instance_of_both_sets_comes_back(name: str, data_root: Path) -> None:
    """With the widened breakpoints of the configurations: in the mean, and none is lost."""
    instseg.get_cfg()
    overlaps = [x for record in DatasetCatalog.get(name) for x in ious(record, 1)]
    assert sum(overlaps) / len(overlaps) >= 0.98 and min(overlaps) > 0.5


def test_an_instance_that_another_one_breaks_up_comes_back_in_one_piece() -> None:
    owners = torch.zeros(9, 9, dtype=torch.int64)
    owners[:, 4] = 1
    owners[4] = 1
    ground_truth = truth_of(owners, torch.ones_like(owners), widening=0)
    _, component_map = find_components(
        ground_truth.labels, ground_truth.semantic, ground_truth.links, line_settings(widening=0)
    )
    assert int(component_map.max()) + 1 == 5
    components = Components.from_map(component_map, ground_truth.semantic)
    merge_by_owner(components, majority_owners(component_map, owners, 5))
    assert same_partition(components.map, owners)


@pytest.mark.parametrize("widening", [0, 1])
def test_links_without_a_network_agree_with_vertical_lines(widening: int) -> None:
    owners, semantic = scene(3)
    ground_truth = truth_of(owners, semantic, widening)
    links = links_from_breakpoints(ground_truth.labels[1], widened=widening > 0)
    inside = (owners[:-1] >= 0) & (owners[:-1] == owners[1:])
    assert (links[:-1][inside] == 1).all()


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0), (1, 1), (1, 7), (7, 1)])
@pytest.mark.parametrize("label", [BACKGROUND, INTERIOR, START, END])
@pytest.mark.parametrize("kind", [0, 2])
def test_maps_of_any_size_and_one_label_give_components(
    size: tuple[int, int], label: int, kind: int
) -> None:
    """No foreground, nothing but breakpoints, a single pixel."""
    labels = torch.full(size, label, dtype=torch.uint8)
    lines, component_map = line_components(
        labels, torch.full(size, kind), torch.ones(size), widened=False, threshold=0.5
    )
    assert component_map.shape == size and ((component_map >= 0) == (kind > 0)).all()
    assert torch.equal(lines >= 0, component_map >= 0)
