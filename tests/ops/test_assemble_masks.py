"""Mask assembly: equal to the composition over all of the image, hostile input, types, errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from instseg.ops.assemble_masks import assemble_masks, assemble_masks_reference
from tests.support.ops import CUDA, DEVICES

TIE = 1e-6
"""So close to the threshold the order of a sum may decide."""
SIZES = [(96, 130), (23, 29), (24, 31), (7, 5), (1, 1), (1, 90), (200, 3)]
Inputs = tuple[Tensor, Tensor, Tensor]


def scene(
    masks: int, height: int, width: int, cells: tuple[int, int] = (23, 29), seed: int = 0
) -> Inputs:
    """Prototypes, coefficients and boxes inside, across and beyond every border."""
    generator = torch.Generator().manual_seed(seed)
    prototypes = torch.randn(*cells, 8, generator=generator)
    coefficients = torch.randn(masks, 8, generator=generator).tanh()
    corners = torch.rand(masks, 4, generator=generator) * 1.6 - 0.3
    return prototypes, coefficients, corners * torch.tensor([width, height] * 2)


def assert_same(actual: Tensor, inputs: Inputs, size: tuple[int, int]) -> None:
    """``actual`` is what the composition gives, ties excepted: in double, it says how close."""
    expected = assemble_masks_reference(*inputs, size)
    assert actual.shape == expected.shape and actual.dtype == torch.bool
    differs = actual.cpu() != expected
    if differs.any():
        exact = tuple(tensor.double() for tensor in inputs)
        above = assemble_masks_reference(*exact, size, threshold=0.5 + TIE)
        below = assemble_masks_reference(*exact, size, threshold=0.5 - TIE)
        assert not (differs & (above == below)).any()


def on(device: str, inputs: Inputs) -> Inputs:
    prototypes, coefficients, boxes = (tensor.to(device) for tensor in inputs)
    return prototypes, coefficients, boxes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", SIZES)
def test_masks_equal_the_composition_over_all_of_the_image(
    size: tuple[int, int], device: str
) -> None:
    inputs = scene(60, *size)
    assert_same(assemble_masks(*on(device, inputs), size), inputs, size)


@pytest.mark.parametrize("device", DEVICES)
def test_masks_equal_at_the_size_of_the_paper(device: str) -> None:
    inputs = scene(20, 480, 640, (138, 138))
    masks = assemble_masks(*on(device, inputs), (480, 640))
    assert masks.any(dim=(1, 2)).sum() > 10
    assert_same(masks, inputs, (480, 640))


@given(
    st.integers(0, 5),
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.integers(0, 2**31),
)
def test_masks_of_any_sizes_equal_the_composition(
    count: int, size: tuple[int, int], cells: tuple[int, int], seed: int
) -> None:
    inputs = scene(count, *size, cells, seed)
    assert_same(assemble_masks(*inputs, size), inputs, size)


@pytest.mark.parametrize("device", DEVICES)
def test_in_double_precision_not_a_pixel_differs(device: str) -> None:
    inputs = tuple(tensor.double() for tensor in scene(60, 96, 130))
    masks = assemble_masks(*(tensor.to(device) for tensor in inputs), (96, 130))
    assert torch.equal(masks.cpu(), assemble_masks_reference(*inputs, (96, 130)))


@pytest.mark.parametrize("device", DEVICES)
def test_a_mask_reaches_out_of_its_box_by_a_cell_and_its_blending(device: str) -> None:
    """Probability 1 in cells 1..4 of 8 (box 2..4 enlarged by 1, its end left out): 4 pixels a cell.

    Blended with 0 they pass 0.5 from pixel 4, at cell 0.625, to pixel 19, at cell 4.375.
    """
    prototypes = torch.full((8, 8, 1), 40.0, device=device)
    boxes = torch.tensor([[8.0, 8, 16, 16]], device=device)
    (mask,) = assemble_masks(prototypes, torch.ones(1, 1, device=device), boxes, (32, 32))
    inside = torch.zeros(32, dtype=torch.bool, device=device)
    inside[4:20] = True
    corners = [(4, 4), (4, 19), (19, 4), (19, 19)]  # 0.625 * 0.625 is below a half
    expected = inside[:, None] & inside
    for y, x in corners:
        expected[y, x] = False
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_the_corners_of_a_box_come_in_any_order(device: str) -> None:
    prototypes, coefficients, boxes = on(device, scene(30, 40, 50))
    swapped = boxes[:, [2, 1, 0, 3]], boxes[:, [0, 3, 2, 1]]
    masks = assemble_masks(prototypes, coefficients, boxes, (40, 50))
    assert masks.any()
    for other in swapped:
        assert torch.equal(assemble_masks(prototypes, coefficients, other, (40, 50)), masks)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("far", [1e9, 3e38, torch.inf])
def test_a_huge_box_is_the_whole_image(far: float, device: str) -> None:
    prototypes = torch.ones(5, 6, 1, device=device)
    boxes = torch.tensor([[-far, -far, far, far]], device=device)
    assert assemble_masks(prototypes, torch.ones(1, 1, device=device), boxes, (9, 8)).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("corner", range(4))
@pytest.mark.parametrize("value", [torch.nan, 1e9, -1e9, torch.inf, -torch.inf])
def test_a_box_with_any_number_equals_the_composition(
    value: float, corner: int, device: str
) -> None:
    prototypes, coefficients, boxes = scene(10, 40, 50)
    boxes[:, corner] = value
    masks = assemble_masks(*on(device, (prototypes, coefficients, boxes)), (40, 50))
    assert_same(masks, (prototypes, coefficients, boxes), (40, 50))
    assert value == value or not masks.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_coefficients_that_are_no_numbers_empty_their_own_mask_alone(
    value: float, device: str
) -> None:
    """Prototypes of both signs: infinities cancel to NaN."""
    prototypes = torch.tensor([1.0, -1.0, 1.0], device=device).expand(6, 6, 3)
    coefficients = torch.tensor([[value, value, 1.0], [0.0, 0.0, 1.0]], device=device)
    boxes = torch.tensor([[0.0, 0, 12, 12]] * 2, device=device)
    masks = assemble_masks(prototypes, coefficients, boxes, (12, 12))
    assert not masks[0].any() and masks[1].all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_prototype_without_a_number_empties_the_pixels_that_read_it(device: str) -> None:
    prototypes = torch.ones(6, 6, 1, device=device)
    prototypes[2, 3] = torch.nan
    boxes = torch.tensor([[0.0, 0, 6, 6], [0, 0, 6, 0.5]], device=device)
    masks = assemble_masks(prototypes, torch.ones(2, 1, device=device), boxes, (6, 6))
    assert (~masks[0]).nonzero().tolist()[0] == [1, 2] and (~masks[0]).sum() <= 9
    assert masks[1, :2].all() and not masks[1, 2:].any()  # outside its box nothing is read


@pytest.mark.parametrize("device", DEVICES)
def test_boxes_beside_the_image_give_empty_masks(device: str) -> None:
    prototypes = torch.ones(8, 8, 1, device=device)
    boxes = torch.tensor([[-90.0, 0, -60, 32], [60, 0, 90, 32], [0, 60, 32, 90]], device=device)
    masks = assemble_masks(prototypes, torch.ones(3, 1, device=device), boxes, (32, 32))
    assert masks.shape == (3, 32, 32) and not masks.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_computed_as_floats(dtype: torch.dtype, device: str) -> None:
    prototypes, coefficients, boxes = (x.to(device, dtype) for x in scene(20, 40, 50))
    masks = assemble_masks(prototypes, coefficients, boxes, (40, 50))
    floats = assemble_masks(prototypes.float(), coefficients.float(), boxes.float(), (40, 50))
    assert masks.any() and torch.equal(masks, floats)


def test_one_thread_and_two_give_the_same() -> None:
    inputs, threads = scene(9, 300, 40), torch.get_num_threads()
    masks = []
    for count in (1, 2):
        torch.set_num_threads(count)
        masks.append(assemble_masks(*inputs, (300, 40)))
    torch.set_num_threads(threads)
    assert torch.equal(*masks)


@pytest.mark.parametrize("device", DEVICES)
def test_the_result_can_be_written_to(device: str) -> None:
    masks = assemble_masks(*on(device, scene(3, 40, 50)), (40, 50))
    masks[:] = True
    assert masks.all() and masks.clone().sum().item() == 3 * 40 * 50


@pytest.mark.parametrize("device", DEVICES)
def test_the_operator_passes_opcheck(device: str) -> None:
    inputs = on(device, scene(4, 20, 30))
    torch.library.opcheck(torch.ops.instseg.assemble_masks.default, (*inputs, 20, 30))


@pytest.mark.parametrize("device", DEVICES)
def test_torch_compile_gives_the_same(device: str) -> None:
    inputs = on(device, scene(4, 20, 30))
    compiled = torch.compile(assemble_masks, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs, (20, 30)), assemble_masks(*inputs, (20, 30)))


@pytest.mark.parametrize("device", [CUDA])
def test_both_devices_give_the_same(device: str) -> None:
    inputs = scene(40, 96, 130)
    masks = assemble_masks(*on(device, inputs), (96, 130))
    differs = masks.cpu() != assemble_masks(*inputs, (96, 130))
    assert differs.sum() <= 2  # the exponentials of both differ by a rounding
