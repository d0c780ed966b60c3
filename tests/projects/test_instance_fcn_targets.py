"""InstanceFCN: matching, targets, losses and pasting worked out by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from instseg.masks import tight_boxes
from instseg.modeling import masks_of
from instseg.projects.instance_fcn import (
    mask_loss,
    mask_targets,
    match_cells,
    paste_windows,
    score_loss,
    top_left,
)
from instseg.projects.instance_fcn.proposals import _weights
from instseg.projects.instance_fcn.targets import inside
from tests.support.instance_fcn_common import window_rule


def centred(y: float, x: float, side: float) -> list[float]:
    return [x - side / 2, y - side / 2, x + side / 2, y + side / 2]


def test_windows_within_two_cells_are_positive_and_from_four_cells_on_negative() -> None:
    """The instance is centred on cell 20 (8 * 20 + 4 = 164): 16 pixels are 2 cells, 32 are 4."""
    owners = match_cells(torch.tensor([centred(164, 164, 128)]), (41, 41), window_rule())
    expected = torch.full((41, 41), 1)
    expected[17:24, 17:24] = -1
    expected[18:23, 18:23] = 0
    assert torch.equal(owners.view(41, 41), expected)


@pytest.mark.parametrize(
    ("octaves", "at_centre"), [(0.29, 0), (-0.29, 0), (0.31, -1), (-0.99, -1), (1.0, 1), (-1.0, 1)]
)
def test_the_longer_side_decides_which_scale_an_instance_belongs_to(
    octaves: float, at_centre: int
) -> None:
    box = centred(164, 164, 128 * 2**octaves)
    box[0], box[2] = 164 - 8, 164 + 8
    owners = match_cells(torch.tensor([box]), (41, 41), window_rule())
    assert owners.view(41, 41)[20, 20] == at_centre


def test_a_window_near_two_instances_shows_the_nearer_one() -> None:
    boxes = torch.tensor([centred(164, 164, 128), centred(164, 188, 128)])
    row = match_cells(boxes, (41, 41), window_rule()).view(41, 41)[20]
    # Cells 20 and 23 are the centres; 21 and 22 lie between.
    assert row[18:26].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_without_instances_every_window_is_negative() -> None:
    assert match_cells(torch.zeros(0, 4), (3, 5), window_rule()).tolist() == [0] * 15


def test_an_even_window_is_centred_on_a_corner_of_its_cell() -> None:
    rule = window_rule(size=4, positive_offset=0.0)
    owners = match_cells(torch.tensor([centred(80, 88, 128)]), (41, 41), rule)
    assert (owners == 0).nonzero().tolist() == [[10 * 41 + 11]]


@pytest.mark.parametrize(("size", "corner"), [(21, [-8, -7]), (4, [0, 1]), (1, [2, 3])])
def test_the_top_left_cell_of_a_window_may_lie_outside_the_map(
    size: int, corner: list[int]
) -> None:
    assert top_left(torch.tensor([2 * 10 + 3]), 10, size).tolist() == [corner]


def test_a_cell_belongs_to_the_target_if_half_of_it_is_covered() -> None:
    """13 columns of 4-pixel cells are three cells and a quarter, 14 are three and a half."""
    rule = window_rule(size=5, stride=4)
    masks = torch.zeros(2, 20, 20, dtype=torch.bool)
    masks[0, :, :13] = True
    masks[1, :, :14] = True
    owners, corners = torch.tensor([0, 1]), torch.zeros(2, 2, dtype=torch.int64)
    targets = mask_targets(masks, owners, corners, (5, 5), rule)
    assert targets[0].unique(dim=0).tolist() == [[1, 1, 1, 0, 0]]
    assert targets[1].unique(dim=0).tolist() == [[1, 1, 1, 1, 0]]


def test_the_target_has_the_windows_own_instance_alone_and_nothing_outside_the_map() -> None:
    rule = window_rule(size=3, stride=4)
    masks = torch.zeros(3, 10, 10, dtype=torch.bool)  # 3 x 3 cells, the last ones half outside
    masks[0, :4, :4] = True
    masks[1, :4, 4:8] = True
    masks[2] = True
    corners = torch.tensor([[-1, -1], [0, 0], [2, 0]])
    targets = mask_targets(masks, torch.tensor([0, 1, 2]), corners, (3, 3), rule)
    assert targets[0].nonzero().tolist() == [[1, 1]]
    assert targets[1].nonzero().tolist() == [[0, 1]]
    # Half of the last row of cells lies in the image, a quarter of its last cell.
    assert targets[2].nonzero().tolist() == [[0, 0], [0, 1]]


def test_cells_outside_the_map_do_not_count() -> None:
    counted = inside(torch.tensor([[-1, 1]]), (4, 3), 3)
    assert counted[0].int().tolist() == [[0, 0, 0], [1, 1, 0], [1, 1, 0]]


def test_the_mask_loss_is_the_mean_over_counted_cells() -> None:
    """log 2 for logit 0, log(1 + e^-1) for logit 1 on the instance; the third does not count."""
    logits, targets = torch.tensor([[[0.0, 1, 9]]]), torch.tensor([[[0.0, 1, 0]]])
    counted = torch.tensor([[[True, True, False]]])
    expected = (math.log(2) + math.log(1 + math.exp(-1))) / 2
    assert mask_loss(logits, targets, counted).item() == pytest.approx(expected)


def test_the_score_loss_is_the_mean_over_windows() -> None:
    expected = (math.log(1 + math.exp(-2)) + math.log(2)) / 2
    loss = score_loss(torch.tensor([2.0, 0]), torch.tensor([True, False]))
    assert loss.item() == pytest.approx(expected)


def test_losses_without_windows_are_zero_and_attached() -> None:
    logits = torch.zeros(0, 3, 3, requires_grad=True)
    loss = mask_loss(logits, torch.zeros(0, 3, 3), torch.zeros(0, 3, 3, dtype=torch.bool))
    loss += score_loss(logits[:, 0, 0], torch.zeros(0, dtype=torch.bool))
    loss.backward()
    assert (loss.item(), logits.grad is not None) == (0, True)


def paste(logits: list[list[float]], corner: list[int], cell: list[float], **kw: Any) -> Tensor:
    grid = kw.get("grid", [100, 100])
    values = torch.tensor(logits)[None]
    cells = torch.tensor([cell])
    placed = paste_windows(values, torch.tensor([corner]), cells, torch.tensor([grid]), (12, 16))
    return masks_of(placed, 1, (12, 16), cropped=False, device="cpu")[0]


def test_a_window_is_pasted_where_its_cells_are() -> None:
    """Cells of 2 x 4 pixels from row 2 and column 4 on; beyond the window there is nothing."""
    mask = paste([[5.0, 5], [5, 5]], [1, 1], [2.0, 4.0])
    assert tight_boxes(mask[None]).tolist() == [[4, 2, 12, 6]]
    assert mask.sum() == 8 * 4


def test_logits_are_interpolated_between_the_centres_of_cells() -> None:
    """Centres at 2 and 6; from 3 to -1 the line crosses zero at 2 + 4 * 3 / 4 = 5."""
    mask = paste([[3.0, -1], [3, -1]], [0, 0], [4.0, 4.0])
    assert mask.nonzero()[:, 1].unique().tolist() == [0, 1, 2, 3, 4]


def test_the_cells_outside_the_map_do_not_eat_into_a_mask() -> None:
    """Only the second row and column lie on the map; the first has the logit of no instance."""
    mask = paste([[-10.0, -10], [-10, 1]], [-1, -1], [4.0, 4.0])
    assert tight_boxes(mask[None]).tolist() == [[0, 0, 4, 4]]
    mask = paste([[1.0, -10], [-10, -10]], [2, 3], [4.0, 4.0], grid=[3, 4])
    assert tight_boxes(mask[None]).tolist() == [[12, 8, 16, 12]]


def test_parts_of_windows_hold_all_that_they_show() -> None:
    """The same over the whole image, with the interpolation that the windows are cut from."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 3, 3, generator=generator)
    corners = torch.randint(-3, 8, (40, 2), generator=generator)
    cells = torch.rand(40, 2, generator=generator) * 3 + 0.3
    grids = torch.full((40, 2), 6)
    placed = paste_windows(logits, corners, cells, grids, (9, 7))
    masks = masks_of(placed, 40, (9, 7), cropped=False, device="cpu")
    assert masks.any()
    for row, mask in enumerate(masks):
        down, across = (
            _weights(corners[row, axis], cells[row, axis], grids[row, axis], (0, length), 3)
            for axis, length in enumerate((9, 7))
        )
        values = down @ logits[row] @ across.T
        assert torch.equal(mask[values.abs() > 1e-5], (values > 0)[values.abs() > 1e-5])
