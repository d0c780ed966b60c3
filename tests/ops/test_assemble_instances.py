"""Instance assembling: values, gradients, windows anywhere, dtypes, layouts, errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from instseg.ops.assemble_instances import assemble_instances, assemble_instances_reference
from tests.support.ops import CUDA, DEVICES

SIZES = [(21, 5), (21, 3), (21, 7), (20, 5), (7, 7), (10, 4), (3, 5), (1, 1), (4, 1), (40, 2)]
FAR = [10**9, -(10**9), 2**63 - 1, -(2**63)]


def random_maps(parts: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, parts * parts, 9, 11, generator=torch.Generator().manual_seed(0)).to(
        dtype
    )


def windows_at_every_border(size: int) -> Tensor:
    """Inside, on, across and just beyond every border of a 9 x 11 map."""
    ys = {0, 1, 9 - size, 10 - size, -1, -size + 1, -size, 8, 9}
    xs = {0, 2, 11 - size, 12 - size, -1, -size + 1, -size, 10, 11}
    return torch.tensor([(i % 2, y, x) for i, (y, x) in enumerate((y, x) for y in ys for x in xs)])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("size", "parts"), SIZES)
def test_windows_equal_the_double_loop(size: int, parts: int, device: str) -> None:
    maps, windows = random_maps(parts), windows_at_every_border(size)
    expected = assemble_instances_reference(maps, windows, parts, size)
    actual = assemble_instances(maps.to(device), windows.to(device), parts, size)
    assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("size", "parts"), SIZES)
def test_every_position_equals_the_double_loop(size: int, parts: int, device: str) -> None:
    maps = random_maps(parts)[:, :, :5, :4]
    expected = assemble_instances_reference(maps, None, parts, size)
    assert torch.equal(assemble_instances(maps.to(device), None, parts, size).cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_parts_of_a_window_of_21_are_4_4_5_4_4_cells(device: str) -> None:
    maps = torch.arange(25.0, device=device).view(1, 25, 1, 1).expand(1, 25, 21, 21)
    mask = assemble_instances(maps, torch.tensor([[0, 0, 0]], device=device), 5, 21)
    part = torch.tensor([0] * 4 + [1] * 4 + [2] * 5 + [3] * 4 + [4] * 4, device=device)
    assert torch.equal(mask[0], (5 * part[:, None] + part).float())


@pytest.mark.parametrize("device", DEVICES)
def test_a_window_worked_out_by_hand(device: str) -> None:
    # Two parts, size 2: value (i, j) comes from map 2 i + j at cell (y0 + i, x0 + j).
    maps = torch.arange(16.0, device=device).view(1, 4, 2, 2)
    windows = torch.tensor([[0, 0, 0], [0, 1, 1], [0, -1, 0]], device=device)
    masks = assemble_instances(maps, windows, 2, 2, fill=-1)
    assert masks.tolist() == [[[0, 5], [10, 15]], [[3, -1], [-1, -1]], [[-1, -1], [8, 13]]]


@pytest.mark.parametrize("device", DEVICES)
def test_an_even_window_reaches_half_its_size_before_its_centre(device: str) -> None:
    maps = torch.arange(5.0, device=device).view(1, 1, 1, 5)
    assert assemble_instances(maps, None, 1, 4, fill=-1)[2, 2].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", FAR)
def test_a_window_far_away_is_all_fill(offset: int, device: str) -> None:
    maps = random_maps(5).to(device)
    windows = torch.tensor([[0, offset, 0], [1, 0, offset], [1, offset, offset]], device=device)
    assert (assemble_instances(maps, windows, 5, 21, fill=-3) == -3).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", FAR)
def test_a_window_far_away_has_no_gradient(offset: int, device: str) -> None:
    maps = random_maps(5).to(device).requires_grad_()
    windows = torch.tensor([[0, offset, 0], [1, 0, offset]], device=device)
    assemble_instances(maps, windows, 5, 21).sum().backward()
    assert maps.grad is not None and not maps.grad.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("parts", [1, 3, 5, 7])
def test_flipping_maps_and_windows_flips_the_masks(parts: int, device: str) -> None:
    maps, windows = random_maps(parts).to(device), windows_at_every_border(21).to(device)
    # Parts from right to left, cells from right to left, windows from right to left.
    flipped = maps.view(2, parts, parts, 9, 11).flip([2, 4]).reshape_as(maps)
    mirrored = windows.clone()
    mirrored[:, 2] = 11 - 21 - windows[:, 2]
    actual = assemble_instances(flipped, mirrored, parts, 21)
    assert torch.equal(actual, assemble_instances(maps, windows, parts, 21).flip(2))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("size", "parts"), [(5, 3), (4, 3), (6, 2)])
def test_gradient_of_windows_at_every_border_is_right(size: int, parts: int, device: str) -> None:
    maps = random_maps(parts, torch.float64)[:, :, :4, :5].to(device).requires_grad_()
    windows = (windows_at_every_border(size) - torch.tensor([0, 2, 3])).to(device)
    assert torch.autograd.gradcheck(lambda x: assemble_instances(x, windows, parts, size), maps)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("size", "parts"), [(5, 3), (4, 3)])
def test_gradient_of_every_position_is_right(size: int, parts: int, device: str) -> None:
    maps = random_maps(parts, torch.float64)[:, :, :3, :4].to(device).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: assemble_instances(x, None, parts, size), maps)


@pytest.mark.parametrize("device", DEVICES)
def test_a_cell_gets_the_sum_over_its_windows(device: str) -> None:
    maps = torch.zeros(1, 1, 3, 3, device=device, requires_grad=True)
    windows = torch.tensor([[0, 0, 0], [0, 0, 0], [0, 1, 1]], device=device)
    assemble_instances(maps, windows, 1, 2).sum().backward()  # an expanded gradient, stride 0
    assert maps.grad is not None
    assert maps.grad[0, 0].tolist() == [[2, 2, 0], [2, 3, 1], [0, 1, 1]]


@pytest.mark.parametrize("threads", [1, 3])
def test_gradient_on_the_cpu_does_not_depend_on_the_threads(threads: int) -> None:
    grad = torch.randn(63, 7, 7, dtype=torch.float32)
    windows = torch.randint(-3, 8, (63, 3), generator=torch.Generator().manual_seed(1))
    windows[:, 0] %= 2
    op = torch.ops.instseg.assemble_instances_backward.default
    expected = op(grad, windows, 3, [2, 9, 9, 11])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(op(grad, windows, 3, [2, 9, 9, 11]), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("size", "parts"), [(21, 5), (5, 5), (3, 1), (19, 1)])
def test_every_dtype_is_copied_exactly(
    dtype: torch.dtype, size: int, parts: int, device: str
) -> None:
    maps, windows = random_maps(parts, dtype), windows_at_every_border(size)
    expected = assemble_instances_reference(maps, windows, parts, size)
    actual = assemble_instances(maps.to(device), windows.to(device), parts, size)
    assert actual.dtype == dtype and torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradient_of_halves_is_summed_in_float32(dtype: torch.dtype, device: str) -> None:
    # In halves the sum of 4000 ones would stop at 2048 (float16) or 256 (bfloat16).
    maps = torch.zeros(1, 1, 1, 1, device=device, dtype=dtype, requires_grad=True)
    windows = torch.zeros(4000, 3, dtype=torch.int64, device=device)
    assemble_instances(maps, windows, 1, 1).sum(dtype=torch.float32).backward()
    assert maps.grad is not None and maps.grad.item() == torch.tensor(4000.0).to(dtype).item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("shape", "windows", "count"),
    [
        ((2, 9, 4, 4), torch.zeros(0, 3, dtype=torch.int64), 0),
        ((0, 9, 4, 4), torch.zeros(0, 3, dtype=torch.int64), 0),
        ((0, 9, 4, 4), None, 0),
        ((2, 9, 0, 4), None, 0),
        ((2, 9, 0, 4), torch.zeros(5, 3, dtype=torch.int64), 5),
    ],
)
def test_empty_input_gives_empty_or_filled_masks(
    shape: tuple[int, ...], windows: Tensor | None, count: int, device: str
) -> None:
    maps = torch.randn(shape, device=device, requires_grad=True)
    masks = assemble_instances(maps, None if windows is None else windows.to(device), 3, 6)
    assert masks.shape == (count, 6, 6) and (masks == -10).all()
    masks.sum().backward()
    assert maps.grad is not None and maps.grad.shape == shape and not maps.grad.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("windows", [windows_at_every_border(6), None])
def test_the_operator_passes_opcheck(windows: Tensor | None, device: str) -> None:
    maps = random_maps(3).to(device).requires_grad_()
    rows = None if windows is None else windows.to(device)
    torch.library.opcheck(torch.ops.instseg.assemble_instances.default, (maps, rows, 3, 6, -10.0))
    grad = torch.randn(198 if rows is None else len(rows), 6, 6, device=device, requires_grad=True)
    backward = torch.ops.instseg.assemble_instances_backward.default
    torch.library.opcheck(backward, (grad, rows, 3, [2, 9, 9, 11]))


@pytest.mark.parametrize("device", DEVICES)
def test_torch_compile_gives_the_same(device: str) -> None:
    maps = random_maps(3).to(device).requires_grad_()
    windows = windows_at_every_border(6).to(device)
    compiled = torch.compile(assemble_instances, fullgraph=True, backend="aot_eager")
    masks = compiled(maps, windows, 3, 6)
    assert torch.equal(masks, assemble_instances(maps, windows, 3, 6))
    masks.sum().backward()
    assert maps.grad is not None and maps.grad.any()


@given(
    st.integers(1, 8),
    st.integers(1, 12),
    st.tuples(st.integers(1, 2), st.integers(1, 6), st.integers(1, 6)),
    st.lists(st.tuples(st.integers(-14, 14), st.integers(-14, 14)), max_size=4),
)
def test_any_window_equals_the_double_loop(
    parts: int, size: int, shape: tuple[int, int, int], corners: list[tuple[int, int]]
) -> None:
    images, height, width = shape
    maps = torch.randn(images, parts * parts, height, width)
    windows = torch.tensor([(i % images, *c) for i, c in enumerate(corners)]).view(-1, 3).long()
    expected = assemble_instances_reference(maps, windows, parts, size)
    assert torch.equal(assemble_instances(maps, windows, parts, size), expected)


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("index", [-1, 2, 2**31, -(2**63)])
def test_a_bad_batch_index_is_fill_on_a_gpu(index: int, device: str) -> None:
    maps = random_maps(3).to(device).requires_grad_()
    masks = assemble_instances(maps, torch.tensor([[index, 0, 0]], device=device), 3, 6)
    masks.sum().backward()
    assert (masks == -10).all() and maps.grad is not None and not maps.grad.any()


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("windows", [windows_at_every_border(6), None])
def test_gradients_on_both_devices_have_the_same_bits(windows: Tensor | None, device: str) -> None:
    grad = torch.randn(198 if windows is None else len(windows), 6, 6)
    op = torch.ops.instseg.assemble_instances_backward.default
    expected = op(grad, windows, 3, [2, 9, 9, 11])
    rows = None if windows is None else windows.to(device)
    assert torch.equal(op(grad.to(device), rows, 3, [2, 9, 9, 11]).cpu(), expected)
