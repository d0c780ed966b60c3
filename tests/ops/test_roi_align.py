"""RoIAlign on the CPU against torchvision's operator, whose bits it gives, and bad input."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import roi_align as torchvision_roi_align

from instseg.ops.roi_align import roi_align
from tests.support.position_sensitive import BOXES, sample_rois

SCALE, SIZE = 1 / 8, (3, 5)
FINITE = torch.arange(len(BOXES)) != list(BOXES).index("enormous")
"""Torchvision would visit every one of 10^17 samples of the other."""


def sample_maps(dtype: torch.dtype = torch.float32, channels: int = 20) -> Tensor:
    """Maps as both kernels are to read them: the channels are no multiple of those read at once."""
    return torch.randn(2, channels, 6, 7, dtype=torch.float64).to(dtype)


def rois_of(dtype: torch.dtype = torch.float32) -> Tensor:
    return sample_rois(dtype=dtype)[FINITE]


def results(operator: Any, maps: Tensor, rois: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Values, and the gradient of the maps."""
    leaf = maps.detach().requires_grad_()
    out = operator(leaf, rois, spatial_scale=SCALE, **options)
    upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    out.backward(upstream)
    return out.detach(), leaf.grad


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_have_the_bits_of_torchvision(
    dtype: torch.dtype, ratio: int, aligned: bool, format: torch.memory_format
) -> None:
    maps, rois = sample_maps(dtype).contiguous(memory_format=format), rois_of(dtype)
    options = {"sampling_ratio": ratio, "aligned": aligned}
    pooled = results(roi_align, maps, rois, pooled_size=SIZE, **options)
    expected = results(torchvision_roi_align, maps, rois, output_size=SIZE, **options)
    assert all(map(torch.equal, pooled, expected))
    assert pooled[0].abs().amax() > 0.1 and pooled[1].abs().amax() > 0.1


@pytest.mark.parametrize("count", [1, 400])
@pytest.mark.parametrize("channels", [1, 64, 130])
def test_few_and_many_regions_of_maps_in_planes_have_the_bits_of_torchvision(
    channels: int, count: int
) -> None:
    """Many regions turn the map once, few turn what they read of it."""
    torch.manual_seed(0)
    maps = torch.randn(2, channels, 40, 50)
    corners = torch.rand(count, 2) * torch.tensor([350, 280])
    sizes = torch.rand(count, 2) * 120
    rois = torch.cat([torch.arange(count)[:, None] % 2, corners, corners + sizes], dim=1)
    pooled = results(roi_align, maps, rois, pooled_size=7)
    expected = results(torchvision_roi_align, maps, rois, output_size=7, aligned=True)
    assert all(map(torch.equal, pooled, expected))


corner = st.floats(-40, 90, width=32)


@given(
    corners=st.lists(st.tuples(corner, corner, corner, corner), min_size=1, max_size=4),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    ratio=st.integers(0, 3),
    height=st.integers(1, 6),
    width=st.integers(1, 7),
    scale=st.sampled_from([1 / 16, 1 / 8, 0.3]),
    aligned=st.booleans(),
)
def test_random_input_has_the_bits_of_torchvision(
    corners: Any, size: Any, ratio: int, height: int, width: int, scale: float, aligned: bool
) -> None:
    rois = torch.tensor([[i % 2, *row] for i, row in enumerate(corners)])
    if ratio == 0:  # torchvision asks for too much memory where one axis alone is inverted
        rois[:, 3:] = torch.maximum(rois[:, 1:3], rois[:, 3:])
    maps = torch.linspace(-1, 1, 2 * 3 * height * width).view(2, 3, height, width)
    pooled = roi_align(maps, rois, scale, size, ratio, aligned=aligned)
    expected = torchvision_roi_align(maps, rois, size, scale, ratio, aligned)
    assert torch.equal(pooled, expected)


def test_a_bin_is_the_mean_of_its_samples() -> None:
    """4 x 4 cells with the values 0 ... 15: y * 4 + x at (x, y), whose pixel is at + 0.5."""
    maps = torch.arange(16.0).view(1, 1, 4, 4)
    rois = torch.tensor([[0.0, 1, 1, 3, 3]])
    # Samples at 0.5 + 0.5, 1.5: cells 1 and 2 of both axes.
    assert roi_align(maps, rois, 1.0, 2).flatten().tolist() == [5, 6, 9, 10]
    assert roi_align(maps, rois, 1.0, 1).item() == 7.5


def test_a_region_beyond_all_numbers_is_zero() -> None:
    maps = torch.ones(1, 1, 4, 4, requires_grad=True)
    out = roi_align(maps, torch.tensor([[0.0, -3e38, 0, 3e38, 3e38]]), 10.0, 2)
    out.sum().backward()
    assert not out.any() and not maps.grad.any()


@pytest.mark.parametrize("size", [1e6, 1e9, 1e30])
def test_an_enormous_region_counts_all_its_samples_and_visits_those_of_the_map(size: float) -> None:
    maps = torch.ones(1, 1, 4, 4, requires_grad=True)
    rois = torch.tensor([[0.0, -size, -size, size, size]])
    out = roi_align(maps, rois, 1.0, 1)
    out.sum().backward()
    assert 0 <= out.item() < 1e-4 and maps.grad.isfinite().all()
    coarse = roi_align(maps, rois, 1.0, 1, 2)
    assert coarse.item() == 0  # both samples lie outside


def test_several_maps_give_what_each_gives_for_its_regions() -> None:
    torch.manual_seed(0)
    maps = [torch.randn(2, 8, side, side + 1, requires_grad=True) for side in (12, 6, 3)]
    scales, rois = (1 / 4, 1 / 8, 1 / 16), rois_of()
    levels = torch.arange(len(rois)) % 2 * 2  # the second map has no region
    out = roi_align(maps, rois, scales, 4, levels=levels)
    grads = torch.autograd.grad(out.square().sum(), maps)
    for number, (one, scale) in enumerate(zip(maps, scales, strict=True)):
        chosen = levels == number
        alone = torchvision_roi_align(one, rois[chosen], 4, scale, aligned=True)
        assert torch.equal(out[chosen], alone)
        (grad,) = torch.autograd.grad(alone.square().sum(), one)
        assert torch.equal(grads[number], grad)


def test_gradient_is_the_numerical_one_wherever_the_region_lies() -> None:
    maps = sample_maps(torch.float64, 2).requires_grad_()
    rois = sample_rois(dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m: roi_align(m, rois, SCALE, SIZE), maps)


def test_operator_keeps_the_rules_of_torch() -> None:
    rois = rois_of()
    for maps in (sample_maps(), sample_maps().requires_grad_()):
        for chosen in (rois, rois[:0]):
            arguments = ([maps], chosen, None, [SCALE], *SIZE, 0, True)
            torch.library.opcheck(torch.ops.instseg.roi_align.default, arguments)
    grad = torch.randn(len(rois), 20, *SIZE, requires_grad=True)
    for channels_last in (False, True):
        arguments = (grad, rois, None, [SCALE], [6], [7], 2, 0, True, channels_last)
        torch.library.opcheck(torch.ops.instseg.roi_align_backward.default, arguments)


def test_operator_compiles_into_one_graph_and_is_exported() -> None:
    maps, rois = sample_maps().requires_grad_(), rois_of()

    def pooled(maps: Tensor, rois: Tensor) -> Tensor:
        return roi_align(maps, rois, SCALE, SIZE)

    compiled = torch.compile(pooled, fullgraph=True, backend="aot_eager")
    expected = pooled(maps, rois)
    assert torch.equal(compiled(maps, rois), expected)

    class Pooling(torch.nn.Module):
        def forward(self, maps: Tensor, rois: Tensor) -> Tensor:
            return pooled(maps, rois)

    exported = torch.export.export(Pooling(), (maps.detach(), rois))
    assert torch.equal(exported.module()(maps.detach(), rois), expected)


@pytest.mark.parametrize("shape", [(2, 4, 6, 7), (0, 4, 6, 7), (2, 0, 6, 7), (2, 4, 0, 7)])
def test_empty_input_gives_zeros(shape: tuple[int, ...]) -> None:
    maps = torch.randn(shape, requires_grad=True)
    rois = rois_of()[: 0 if 0 in shape[:1] or all(shape) else None]
    out = roi_align(maps, rois, SCALE, SIZE)
    out.sum().backward()
    assert out.shape == (len(rois), shape[1], *SIZE) and not out.any()
    assert maps.grad.shape == maps.shape and not maps.grad.any()


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once_from_float32(
    dtype: torch.dtype, format: torch.memory_format
) -> None:
    """Positions stay in float32: those of torchvision's float16 would be a pixel off."""
    maps, rois = sample_maps(dtype).contiguous(memory_format=format), rois_of()
    grad = torch.randn(len(rois), 20, *SIZE).to(dtype)
    halves, floats = maps.clone().requires_grad_(), maps.float().requires_grad_()
    out, expected = (roi_align(x, rois, SCALE, SIZE) for x in (halves, floats))
    out.backward(grad)
    expected.backward(grad.float())
    assert torch.equal(out, expected.to(dtype))
    assert torch.equal(halves.grad, floats.grad.to(dtype))


def test_threads_change_no_bit() -> None:
    torch.manual_seed(0)
    maps, rois = torch.randn(2, 200, 30, 30), rois_of().repeat(20, 1)
    runs, threads = [], torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            runs.append(results(roi_align, maps, rois, pooled_size=7))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *runs))


def test_a_level_that_there_is_no_map_for_and_maps_that_differ_are_refused() -> None:
    maps, rois = [sample_maps(), sample_maps()[:, :, :3]], rois_of()
    levels = torch.zeros(len(rois), dtype=torch.int64)
    with pytest.raises(IndexError, match=r"roi_align: levels\[2\] is 2; expected 0 to 1"):
        roi_align(maps, rois, (1, 2), SIZE, levels=levels.index_fill(0, torch.tensor([2]), 2))
    with pytest.raises(ValueError, match="roi_align: levels is missing"):
        roi_align(maps, rois, (1, 2), SIZE)
    with pytest.raises(ValueError, match="roi_align: maps are 2 and spatial_scale 1"):
        roi_align(maps, rois, 1.0, SIZE, levels=levels)
    with pytest.raises(ValueError, match="roi_align: maps have shapes .* same images and channels"):
        roi_align([maps[0], maps[1][:, 1:]], rois, (1, 2), SIZE, levels=levels)
    with pytest.raises(TypeError, match="roi_align: maps are Float and Double; expected one dtype"):
        roi_align([maps[0], maps[1].double()], rois, (1, 2), SIZE, levels=levels)
    with pytest.raises(ValueError, match="roi_align: maps is empty"):
        roi_align([], rois, (), SIZE, levels=levels)
