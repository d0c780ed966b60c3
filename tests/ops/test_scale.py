"""Tensors of more than 2^31 elements: every offset is 64 bits wide."""

import pytest
import torch

from instseg.ops.assemble_instances import assemble_instances
from instseg.ops.assemble_masks import assemble_masks
from instseg.ops.fcis_head import fcis_head
from instseg.ops.psroi_pool import psroi_pool
from tests.support.ops import DEVICES

pytestmark = pytest.mark.slow

SIDE = 23_200  # four maps of it in halves are 4 GiB and 2.15e9 numbers
CORNER = (SIDE - 2.0, SIDE - 2.0, SIDE - 1.0, SIDE - 1.0)


def last_cells(device: str, channels_last: bool = False) -> torch.Tensor:
    """(1, 4, SIDE, SIDE), zero but for the last two by two cells of each map: 1, 2, 3, 4."""
    shape = (1, SIDE, SIDE, 4) if channels_last else (1, 4, SIDE, SIDE)
    maps = torch.zeros(shape, dtype=torch.float16, device=device)
    maps = maps.permute(0, 3, 1, 2) if channels_last else maps
    assert maps.numel() > 2**31
    for channel in range(4):
        maps[0, channel, -2:, -2:] = channel + 1
    return maps


@pytest.mark.parametrize("device", DEVICES)
def test_pooling_reads_the_end_of_large_maps(device: str) -> None:
    rois = torch.tensor([[0, *CORNER]], device=device)
    pooled = psroi_pool(last_cells(device), rois, 1.0, 2, 2)
    assert pooled.tolist() == [[[[1, 2], [3, 4]]]]


@pytest.mark.parametrize("device", DEVICES)
def test_the_fcis_head_reads_the_end_of_large_maps(device: str) -> None:
    """One part and two classes: outside is 1 and 2, inside 3 and 4."""
    rois = torch.tensor([[0, *CORNER]], device=device)
    scores, logits, _ = fcis_head(last_cells(device, True), rois, None, 1.0, 1, 1)
    assert scores.tolist() == [[3, 4]] and logits.flatten().tolist() == [2, 4]


@pytest.mark.parametrize("device", DEVICES)
def test_assembling_reads_the_end_of_large_maps(device: str) -> None:
    windows = torch.tensor([[0, SIDE - 2, SIDE - 2]], device=device)
    masks = assemble_instances(last_cells(device), windows, 2, 2)
    assert masks.tolist() == [[[1, 2], [3, 4]]]


@pytest.mark.parametrize("device", DEVICES)
def test_assembling_writes_the_end_of_a_large_result(device: str) -> None:
    maps = torch.full((1, 1, 2, 2), 7, dtype=torch.float16, device=device)
    windows = torch.zeros(2**15 // 4 + 1, 3, dtype=torch.int64, device=device)
    masks = assemble_instances(maps, windows, 1, 512)
    assert masks.numel() > 2**31
    assert masks[-1, :2, :2].eq(7).all() and masks[-1, 2:].eq(-10).all()


@pytest.mark.parametrize("device", DEVICES)
def test_masks_are_written_to_the_end_of_a_large_result(device: str) -> None:
    """On the CPU the zeros take no memory."""
    prototypes, coefficients = torch.ones(4, 4, 1, device=device), torch.ones(3, 1, device=device)
    boxes = torch.tensor([[0.0, 0, 1, 1]] * 2 + [[29999, 29999, 30000, 30000]], device=device)
    masks = assemble_masks(prototypes, coefficients, boxes, (30_000, 30_000))
    assert masks.numel() > 2**31
    assert masks[-1, -1, -1] and not masks[-1, 0].any() and masks[0, 0, 0]
