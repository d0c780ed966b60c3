"""SGN's losses, networks and the merging of components."""

import numpy as np
import torch
from torch import Tensor

from instseg.projects.sgn import (
    Components,
    GroundTruth,
    ImageMaps,
    LineNet,
    MergerNet,
    MergeSettings,
    breakpoint_loss,
    candidate_pairs,
    crop_pairs,
    large_components,
    link_loss,
    merge_by_owner,
    merge_greedily,
    windows,
)
from instseg.projects.sgn.training import merger_loss
from tests.conftest import close
from tests.support.dense_common import line_settings, merge_settings


def components(*rows: list[int], classes: list[list[int]] | None = None) -> Components:
    numbers = torch.tensor(rows)
    semantic = (numbers >= 0).long() if classes is None else torch.tensor(classes)
    return Components.from_map(numbers, semantic)


def pairs_of(fragments: Components, settings: MergeSettings) -> list[list[int]]:
    return candidate_pairs(fragments, large_components(fragments, settings), settings).tolist()


def test_breakpoint_labels_weigh_by_inverse_frequency() -> None:
    """Nine pixels INTERIOR, one START: weights 10 / (2 * 9) and 10 / (2 * 1)."""
    logits = torch.zeros(1, 4, 1, 10)
    logits[0, 1] = 1.0
    labels = torch.ones(1, 1, 10, dtype=torch.uint8)
    labels[0, 0, 0] = 2
    everywhere = torch.ones(1, 1, 10, dtype=torch.bool)
    log_sum = float(torch.tensor([0.0, 1.0, 0.0, 0.0]).logsumexp(0))
    expected = (9 * (10 / 18) * (log_sum - 1) + (10 / 2) * log_sum) / (9 * (10 / 18) + 10 / 2)
    close(breakpoint_loss(logits, labels, everywhere), np.float32(expected))


def test_pixels_outside_of_instances_do_not_count_for_breakpoints() -> None:
    logits = torch.randn(1, 4, 2, 3, requires_grad=True)
    nowhere = torch.zeros(1, 2, 3, dtype=torch.bool)
    loss = breakpoint_loss(logits, torch.zeros(1, 2, 3, dtype=torch.uint8), nowhere)
    loss.backward()
    assert float(loss) == 0 and logits.grad is not None and not logits.grad.any()


def test_pairs_that_belong_together_weigh_as_much_as_the_others() -> None:
    logits = torch.tensor([2.0, 2.0, 2.0, -1.0]).view(1, 1, 2, 2).expand(1, 2, 2, 2)
    same = torch.tensor([True, True, True, False]).view(1, 1, 2, 2).expand(1, 2, 2, 2)
    expected = (np.log1p(np.exp(-2)) + np.log1p(np.exp(-1))) / 2
    close(link_loss(logits, same, torch.ones_like(same)), np.float32(expected))


def test_without_pairs_there_is_no_link_loss() -> None:
    nothing = torch.zeros(1, 2, 3, 3, dtype=torch.bool)
    assert float(link_loss(torch.randn(1, 2, 3, 3), nothing, nothing)) == 0


def test_the_merger_gives_the_same_whichever_component_is_first() -> None:
    network = MergerNet().eval()
    crops = torch.rand(3, 10, 64, 64)
    swapped = crops[:, [0, 1, 2, 4, 3, 5, 6, 7, 8, 9]]
    close(network(crops), network(swapped).detach())


def test_line_net_sees_nineteen_pixels() -> None:
    """3x3 convolutions of dilations 1, 1, 2, 4, 1 reach 9 pixels to each side."""
    network = LineNet(3)
    for parameter in network.parameters():
        parameter.data.fill_(0.1)
    labels = torch.zeros(1, 2, 4, 31, 31, requires_grad=True)
    network(labels, torch.zeros(1, 31, 31))[0, 0, 15, 15].backward()
    assert labels.grad is not None
    reached = labels.grad.abs().amax(dim=(0, 1, 2)).nonzero()
    assert reached.amin(dim=0).tolist() == [6, 6] and reached.amax(dim=0).tolist() == [24, 24]


def test_components_are_measured() -> None:
    fragments = components([0, 0, -1], [0, 1, 1], classes=[[2, 2, 0], [2, 3, 3]])
    assert (fragments.classes.tolist(), fragments.areas.tolist()) == ([2, 3], [3, 2])
    assert fragments.boxes.tolist() == [[0, 0, 2, 2], [1, 1, 3, 2]]


def test_candidates_are_large_near_and_of_one_class_and_the_larger_comes_first() -> None:
    row = [0, 0, 1, 1, 1, -1, 2, 2, -1, -1, -1, 3, 3, 4]
    kinds = [1, 1, 1, 1, 1, 0, 2, 2, 0, 0, 0, 1, 1, 1]
    fragments = components(row, classes=[kinds])
    near = merge_settings(min_area=2, max_gap=0.5)
    assert pairs_of(fragments, near) == [[1, 0]]
    far = merge_settings(min_area=2, max_gap=9.0)
    assert pairs_of(fragments, far) == [[1, 0], [0, 3], [1, 3]]
    one = merge_settings(min_area=1, max_gap=9.0, partners=1)
    assert pairs_of(fragments, one) == [[1, 0], [3, 4]]


def test_only_the_largest_components_are_candidates() -> None:
    fragments = components([0, 0, 1, 2, 2, 2, 3, 3])
    settings = merge_settings(min_area=1, max_gap=9.0, max_components=3)
    assert pairs_of(fragments, settings) == [[2, 0], [0, 3], [2, 3]]


def test_a_pair_is_seen_in_a_square_with_a_margin() -> None:
    fragments = components(*([[0] * 4 + [1] * 6] * 4))
    assert windows(fragments, torch.tensor([[1, 0]])).tolist() == [[-1, -4, 11, 8]]


def test_a_crop_shows_both_components_and_what_is_around_them() -> None:
    numbers = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, -1, -1]])
    semantic = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 2, 2], [1, 1, 0, 0]])
    fragments = Components.from_map(numbers, semantic)
    maps = torch.arange(6.0)[:, None, None].expand(6, 4, 4).contiguous()
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0]])
    crops = crop_pairs(maps, semantic, fragments, torch.tensor([[1, 0]]), boxes)
    assert crops.shape == (1, 10, 64, 64)
    coarse = crops[0, :, 8::16, 8::16]
    for channel, mask in enumerate(
        (numbers == 1, numbers == 0, numbers == 2, semantic == 2), start=3
    ):
        assert torch.equal(coarse[channel] > 0, mask)
    assert coarse[[0, 1, 2, 7, 8, 9], 1, 1].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_crop_is_empty_outside_of_the_image() -> None:
    fragments = components([0, 1])
    boxes = torch.tensor([[50.0, 50.0, 60.0, 60.0]])
    crops = crop_pairs(torch.ones(6, 1, 2), torch.ones(1, 2).long(), fragments, PAIR, boxes)
    assert not crops.any()


PAIR = torch.tensor([[0, 1]])


def test_the_likeliest_pair_is_merged_first_and_then_looked_at_anew() -> None:
    """0-1 is likelier than 1-2; once they are one, the new pair is not likely any more."""
    fragments = components([0, 1, 2])
    asked: list[list[list[int]]] = []

    def score(pairs: Tensor) -> Tensor:
        asked.append(pairs.tolist())
        likely = {(0, 1): 0.9, (1, 2): 0.8, (0, 2): 0.1}
        first = len(asked) == 1
        return torch.tensor([likely[tuple(sorted(p))] if first else 0.2 for p in pairs.tolist()])

    merge_greedily(fragments, merge_settings(min_area=1, max_gap=1.0), score)
    assert fragments.map.tolist() == [[0, 0, 2]]
    assert [len(pairs) for pairs in asked] == [3, 1]
    assert fragments.areas.tolist() == [2, 0, 1] and fragments.boxes[0].tolist() == [0, 0, 2, 1]


def test_pairs_likeliest_for_both_their_components_are_merged_in_one_round() -> None:
    """0-1 and 2-3 are; 1-2, likely as well, is looked at anew as the pair of both results."""
    fragments = components([0, 1, 2, 3])
    likely = {(0, 1): 0.9, (1, 2): 0.8, (2, 3): 0.85}
    asked: list[int] = []

    def score(pairs: Tensor) -> Tensor:
        asked.append(len(pairs))
        scores = [likely.get(tuple(sorted(p)), 0.1) for p in pairs.tolist()]
        return torch.tensor(scores if len(asked) == 1 else [0.1] * len(pairs))

    merge_greedily(fragments, merge_settings(min_area=1, max_gap=9.0), score)
    assert fragments.map.tolist() == [[0, 0, 2, 2]] and asked == [6, 1]


def test_everything_likely_becomes_one() -> None:
    fragments = components([0, 1, 2, 3, 4])
    settings = merge_settings(min_area=1, max_gap=9.0)
    merge_greedily(fragments, settings, lambda pairs: torch.ones(len(pairs)))
    assert len(fragments.map.unique()) == 1 and fragments.areas.sum() == 5


def test_the_fragments_of_each_instance_are_merged() -> None:
    fragments = components([0, 1, -1, 2, 3, 4])
    merge_by_owner(fragments, torch.tensor([7, -1, 3, 7, 7]))
    assert fragments.map.tolist() == [[0, 1, -1, 2, 0, 0]]
    assert fragments.areas.tolist() == [3, 1, 1, 0, 0]
    assert fragments.boxes[0].tolist() == [0, 0, 6, 1]


def test_an_image_without_components_has_nothing_to_merge() -> None:
    fragments = components([-1, -1])
    merge_by_owner(fragments, torch.zeros(0, dtype=torch.int64))
    assert fragments.map.tolist() == [[-1, -1]]


def test_an_image_without_a_pair_gives_a_merger_loss_of_0() -> None:
    nothing = torch.zeros(4, 5, dtype=torch.int64)
    labels = torch.zeros(2, 4, 5, dtype=torch.uint8)
    maps = ImageMaps(
        torch.zeros(3, 4, 5),
        nothing,
        torch.ones(4, 5),
        torch.full((2, 4, 4, 5), 0.25),
        torch.full((2, 4, 5), 0.5),
        torch.ones(2, 4, 5),
    )
    ground_truth = GroundTruth(nothing - 1, nothing, labels, labels.bool())
    network = MergerNet()
    loss = merger_loss(network, [(maps, ground_truth)], line_settings(), merge_settings(), 8)
    loss.backward()
    assert float(loss) == 0
    assert all(p.grad is not None and not p.grad.any() for p in network.parameters())
