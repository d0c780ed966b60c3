"""Position-sensitive RoI pooling against MXNet's operator, its formula, and bad input."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from instseg.ops.psroi_pool import psroi_pool, psroi_pool_reference
from tests.support.ops import CUDA, DEVICES
from tests.support.position_sensitive import FOLDER, SIZES, golden, sample_rois, signed, sizes

STEMS = ["official_g7_p21_s16", "official_g7_p7_s16", "official_g3_p9_s8", "official_g5_p21_s8"]
TORCHVISION = ["torchvision_g7_s16", "torchvision_g3_s8", "torchvision_g5_s8"]


def sample_maps(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3 * 2 * 2, 6, 7, dtype=torch.float64).to(device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("float64", 1e-12)])
@pytest.mark.parametrize("stem", STEMS)
def test_values_are_those_of_the_official_operator(stem, dtype, tolerance, device):
    arrays, maps, rois = golden(stem, dtype, device)
    out = psroi_pool(maps, rois, *sizes(arrays))
    expected = torch.from_numpy(arrays["out_f" + dtype[-2:]])
    torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-5), ("float64", 1e-11)])
@pytest.mark.parametrize("stem", STEMS)
def test_gradients_are_those_of_the_official_operator(stem, dtype, tolerance, device):
    arrays, maps, rois = golden(stem, dtype, device)
    out = psroi_pool(maps.requires_grad_(), rois, *sizes(arrays))
    upstream = signed(f"{stem}.upstream", out.shape, int(arrays["seed"]), np.dtype(dtype))
    out.backward(torch.from_numpy(upstream).to(device))
    expected = torch.from_numpy(np.load(FOLDER / f"{stem}_grad.npz")["grad_f" + dtype[-2:]])
    torch.testing.assert_close(maps.grad.cpu(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "dtype, expected, tolerance",
    [("float32", "out_separate_rounding", 1e-6), ("float64", "out_f64", 1e-12)],
)
def test_bin_edges_are_rounded_after_each_operation(dtype, expected, tolerance, device):
    arrays, maps, rois = golden("official_fma_cases", dtype, device)
    out = psroi_pool(maps, rois, *sizes(arrays)).cpu()
    separate = torch.from_numpy(arrays[expected])
    fused = torch.from_numpy(arrays["out_fused_multiply_add"])
    assert not torch.allclose(separate, fused.to(separate), rtol=0, atol=1e-6)
    torch.testing.assert_close(out, separate, rtol=0, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_values_at_coco_size_are_those_of_the_official_operator(device):
    arrays, maps, rois = golden("official_coco_size", "float32", device, factor=4)
    out = psroi_pool(maps, rois, *sizes(arrays))
    means = torch.from_numpy(arrays["mean_over_bins"])
    torch.testing.assert_close(out.double().mean((2, 3)).cpu(), means, rtol=0, atol=1e-5)
    sample = out.flatten()[torch.from_numpy(arrays["sample_index"]).to(device)].cpu()
    torch.testing.assert_close(sample, torch.from_numpy(arrays["sample_value"]), rtol=0, atol=1e-5)


def as_in_torchvision(rois: Tensor, scale: float) -> Tensor:
    """RoIs that ours takes for the cells that torchvision takes ``rois`` for.

    Torchvision rounds once scaled, so to whole cells, leaves the end out and takes one cell at
    least.
    """
    cells = rois[:, 1:] * scale
    first, last = (cells.sign() * (cells.abs() + 0.5).floor()).split(2, dim=1)
    last = torch.maximum(last, first + 1)
    return torch.cat([rois[:, :1], first / scale, last / scale - 1], dim=1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("float64", 1e-12)])
@pytest.mark.parametrize("stem", TORCHVISION)
def test_values_are_torchvisions_but_for_how_it_rounds_rois(stem, dtype, tolerance, device):
    """Torchvision's forward pass never reads the last row and column of a map."""
    arrays, maps, rois = golden(stem, dtype, device)
    scale, group = arrays["spatial_scale"].item(), arrays["group_size"].item()
    expected = torch.from_numpy(arrays["pool_out_f" + dtype[-2:]])
    out = psroi_pool(maps[..., :-1, :-1], as_in_torchvision(rois, scale), scale, group, group)
    torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=tolerance)
    plain = psroi_pool(maps, rois, scale, group, group).cpu()
    assert (plain - expected).abs().amax() > 0.1, "the definitions differ"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float64", 1e-12)])
@pytest.mark.parametrize("stem", TORCHVISION)
def test_gradients_are_torchvisions_but_for_how_it_rounds_rois(stem, dtype, tolerance, device):
    """Torchvision's backward pass does see the last row and column."""
    arrays, maps, rois = golden(stem, dtype, device)
    scale, group = arrays["spatial_scale"].item(), arrays["group_size"].item()
    rois = as_in_torchvision(rois, scale)
    out = psroi_pool(maps.requires_grad_(), rois, scale, group, group)
    upstream = signed(f"{stem}.upstream", out.shape, int(arrays["seed"]), np.dtype(dtype))
    out.backward(torch.from_numpy(upstream).to(device))
    expected = torch.from_numpy(arrays["pool_grad_f" + dtype[-2:]])
    torch.testing.assert_close(maps.grad.cpu(), expected, rtol=0, atol=tolerance)
    read = psroi_pool(maps[..., :-1, :-1], rois, scale, group, group)
    whole = (read == out).flatten(1).all(dim=1).cpu()
    assert whole.tolist() == arrays["pool_grad_matches_forward"].tolist()


@pytest.mark.parametrize("device", DEVICES)
def test_each_bin_reads_the_map_of_its_part(device):
    maps = torch.arange(64.0, device=device).view(1, 4, 4, 4)
    rois = torch.tensor([[0.0, 0, 0, 3, 3]], device=device)
    # Cells 0, 1, 4, 5 of map 0; 2, 3, 6, 7 of map 1; the lower halves of maps 2 and 3.
    expected = torch.tensor([[[[2.5, 16 + 4.5], [32 + 10.5, 48 + 12.5]]]])
    assert torch.equal(psroi_pool(maps, rois, 1.0, 2, 2).cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_an_inverted_roi_is_a_tenth_of_a_cell_at_its_first_corner(device):
    maps = torch.arange(16.0, device=device).view(1, 1, 4, 4)
    rois = torch.tensor([[0.0, 2, 1, -5, -5]], device=device)
    assert psroi_pool(maps, rois, 1.0, 1, 1).item() == 6


@pytest.mark.parametrize("device", DEVICES)
def test_half_pixels_round_away_from_zero(device):
    maps = torch.arange(16.0, device=device).view(1, 1, 4, 4)
    # 0.5 and 1.5 become 1 and 2: cells 1 and 2 of both axes.
    rois = torch.tensor([[0.0, 0.5, 0.5, 1.5, 1.5], [0, -0.5, -0.5, -0.5, -0.5]], device=device)
    assert psroi_pool(maps, rois, 1.0, 1, 1).flatten().tolist() == [7.5, 0]


@pytest.mark.parametrize("device", DEVICES)
def test_an_enormous_roi_is_the_mean_of_the_map(device):
    maps = torch.arange(16.0, device=device).view(1, 1, 4, 4)
    for size in (1e9, 1e30, 3e38):
        rois = torch.tensor([[0.0, -size, -size, size, size]], device=device)
        assert psroi_pool(maps, rois, 1.0, 1, 1).item() == 7.5


@pytest.mark.parametrize("device", DEVICES)
def test_a_roi_outside_of_the_map_is_zero_and_has_no_gradient(device):
    maps = sample_maps(device).requires_grad_()
    rois = torch.tensor([[0.0, 100, 0, 150, 40], [1, 0, -90, 40, -20]], device=device)
    out = psroi_pool(maps, rois, *SIZES)
    out.sum().backward()
    assert not out.any() and not maps.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", DEVICES)
def test_operator_and_reference_agree_wherever_the_roi_lies(device, dtype):
    maps, rois = sample_maps(device, dtype), sample_rois().to(device)
    expected = psroi_pool_reference(maps, rois, *SIZES)
    torch.testing.assert_close(psroi_pool(maps, rois, *SIZES), expected)


corner = st.floats(-40, 90, width=32)


@given(
    corners=st.lists(st.tuples(corner, corner, corner, corner), min_size=1, max_size=4),
    group=st.integers(1, 4),
    pooled=st.integers(1, 6),
    height=st.integers(0, 6),
    width=st.integers(1, 7),
    scale=st.sampled_from([1 / 16, 1 / 8, 0.3]),
)
def test_operator_and_reference_agree_on_random_input(corners, group, pooled, height, width, scale):
    rois = torch.tensor([[i % 2, *row] for i, row in enumerate(corners)])
    maps = torch.linspace(-1, 1, 2 * 2 * group**2 * height * width)
    maps = maps.view(2, 2 * group**2, height, width)
    expected = psroi_pool_reference(maps, rois, scale, group, pooled)
    torch.testing.assert_close(psroi_pool(maps, rois, scale, group, pooled), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_is_the_numerical_one_wherever_the_roi_lies(device):
    maps = sample_maps(device, torch.float64).requires_grad_()
    rois = sample_rois(dtype=torch.float64).to(device)
    assert torch.autograd.gradcheck(lambda m: psroi_pool(m, rois, *SIZES), maps)


@pytest.mark.parametrize("device", DEVICES)
def test_operator_keeps_the_rules_of_torch(device):
    maps, rois = sample_maps(device), sample_rois().to(device)
    forward = torch.ops.instseg.psroi_pool.default
    for arguments in [(maps, rois), (maps.requires_grad_(), rois), (maps, rois[:0])]:
        torch.library.opcheck(forward, (*arguments, *SIZES))
    grad = torch.randn(len(rois), 3, 5, 5, device=device, requires_grad=True)
    backward = torch.ops.instseg.psroi_pool_backward.default
    torch.library.opcheck(backward, (grad, rois, 1 / 8, 2, maps.shape))


def test_operator_compiles_into_one_graph():
    maps, rois = sample_maps().requires_grad_(), sample_rois()
    compiled = torch.compile(psroi_pool, fullgraph=True, backend="aot_eager")
    out = compiled(maps, rois, *SIZES)
    out.square().sum().backward()
    grad, maps.grad = maps.grad, None
    expected = psroi_pool(maps, rois, *SIZES)
    expected.square().sum().backward()
    assert torch.equal(out, expected) and torch.equal(grad, maps.grad)


@pytest.mark.parametrize("device", DEVICES)
def test_memory_format_of_maps_rois_and_gradient_does_not_matter(device):
    maps, rois = sample_maps(device), sample_rois().to(device)
    grad = torch.randn(len(rois), 3, 5, 5, device=device)

    def run(maps: Tensor, rois: Tensor, grad: Tensor) -> list[Tensor]:
        leaf = maps.detach().requires_grad_()
        out = psroi_pool(leaf, rois, *SIZES)
        out.backward(grad)
        return [out, leaf.grad]

    expected = run(maps, rois, grad)
    strided = torch.stack([maps, maps], -1)[..., 0]
    channels_last = maps.contiguous(memory_format=torch.channels_last)
    for other in (strided, channels_last):
        results = run(
            other, rois.t().contiguous().t(), grad.transpose(2, 3).clone().transpose(2, 3)
        )
        assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("images, height, count", [(2, 6, 0), (0, 6, 0), (2, 0, 4)])
def test_empty_input_gives_empty_output_and_zero_gradient(images, height, count, device):
    maps = torch.randn(images, 12, height, 7, device=device, requires_grad=True)
    out = psroi_pool(maps, sample_rois()[:count].to(device), *SIZES)
    out.sum().backward()
    assert out.shape == (count, 3, 5, 5) and not out.any()
    assert maps.grad.shape == maps.shape and not maps.grad.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once_from_float32(dtype, device):
    maps, rois = sample_maps(device, dtype), sample_rois().to(device)
    grad = torch.randn(len(rois), 3, 5, 5, device=device).to(dtype)
    halves, floats = maps.clone().requires_grad_(), maps.float().requires_grad_()
    out, expected = psroi_pool(halves, rois, *SIZES), psroi_pool(floats, rois, *SIZES)
    out.backward(grad)
    expected.backward(grad.float())
    assert torch.equal(out, expected.to(dtype))
    assert torch.equal(halves.grad, floats.grad.to(dtype))


ROW = (0.0, 1.0, 1.0, 20.0, 20.0)


@pytest.mark.parametrize("device", [CUDA])
def test_rois_that_cannot_be_used_are_zero_on_a_gpu(device):
    maps = sample_maps(device).requires_grad_()
    rows = [(-1, *ROW[1:]), (2, *ROW[1:]), (2**31, *ROW[1:]), (torch.nan, *ROW[1:])]
    rows += [(*ROW[:3], torch.nan, 5), (*ROW[:3], torch.inf, 5), ROW]
    out = psroi_pool(maps, torch.tensor(rows, device=device), *SIZES)
    out[:-1].sum().backward()
    assert not out[:-1].any() and out[-1].any() and not maps.grad.any()


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_cpu_and_gpu_give_the_same_bits(dtype, device):
    maps, rois = sample_maps(dtype=dtype), sample_rois()
    results = []
    for backend in ("cpu", device):
        leaf = maps.to(backend).requires_grad_()
        out = psroi_pool(leaf, rois.to(backend), *SIZES)
        out.backward(out.detach())
        results.append((out.cpu(), leaf.grad.cpu()))
    assert all(map(torch.equal, *results))
