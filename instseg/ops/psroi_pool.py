"""Position-sensitive RoI pooling with the rounding and bin rules of FCIS and R-FCN."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from instseg.ops._library import (
    check_devices,
    check_roi_values,
    expect,
    in_python,
    operator,
    register_fake,
    sum_dtype,
)

_forward = operator("psroi_pool")
_backward = operator("psroi_pool_backward")


def psroi_pool(
    maps: Tensor, rois: Tensor, spatial_scale: float, group_size: int, pooled_size: int
) -> Tensor:
    """Mean of every bin of every RoI, each bin from the maps of its part (FCIS section 2.2).

    A RoI is cut into P x P bins, P = ``pooled_size``, and into G x G parts, G = ``group_size``.
    Bin p of an axis reads part ``floor(p * G / P)`` and, of a map of length L, the cells

        start = r(x1) * spatial_scale            end = (r(x2) + 1) * spatial_scale
        bin   = max(end - start, 0.1) / P        (r rounds half away from zero)
        lower = clip(floor(p * bin + start), 0, L)
        upper = clip(ceil((p + 1) * bin + start), 0, L)     (exclusive)

    in float32, or in float64 for float64 maps, with one rounding after each operation on every
    device; this gives the bins of the authors' operator.  A bin without cells is 0, so RoIs may
    lie partly or fully outside of the map and be arbitrarily large; inverted ones are 0.1 cells
    wide.

    Args:
        maps: (B, D*G*G, H, W), channel (d * G + gy) * G + gx; float32, float64, float16 or
            bfloat16 (summed in float32), of any memory format.
        rois: (R, 5) float32 or float64 rows (batch index, x1, y1, x2, y2), pixels of the network
            input, corners inclusive; no gradient.
        spatial_scale: cells of ``maps`` per pixel.
        group_size: G.
        pooled_size: P; need not be a multiple of G.

    Returns:
        (R, D, P, P) in the dtype of ``maps``; empty for zero RoIs.  The gradient of an output,
        divided by the number of its cells, goes to each of them; it is deterministic.

    Raises:
        ValueError: shapes or numbers do not fit, or, on the CPU, a coordinate is not finite.
        IndexError: on the CPU, a batch index is not a whole number from 0 to B - 1.  On a GPU,
            where a check would have to wait, such RoIs and those with a coordinate that is not
            finite have no cells: output and gradient are 0.
        TypeError: a dtype that is not supported.
        RuntimeError: several devices.
    """
    check_devices("psroi_pool", maps=maps, rois=rois)
    return _forward(maps, rois, spatial_scale, group_size, pooled_size)


@register_fake("psroi_pool")
def _fake(
    maps: Tensor, rois: Tensor, spatial_scale: float, group_size: int, pooled_size: int
) -> Tensor:
    dims = maps.size(1) // (group_size * group_size)
    return maps.new_empty((rois.size(0), dims, pooled_size, pooled_size))


@register_fake("psroi_pool_backward")
def _fake_backward(
    grad: Tensor, rois: Tensor, spatial_scale: float, group_size: int, maps_shape: Sequence[int]
) -> Tensor:
    return grad.new_empty(maps_shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    maps, rois, ctx.spatial_scale, ctx.group_size, _ = inputs
    ctx.save_for_backward(rois)
    ctx.maps_shape = maps.shape


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (rois,) = ctx.saved_tensors
    grad_maps = _backward(grad, rois, ctx.spatial_scale, ctx.group_size, ctx.maps_shape)
    return grad_maps, None, None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, rois, ctx.spatial_scale, ctx.group_size, _ = inputs
    ctx.save_for_backward(rois)
    ctx.pooled_size = grad.size(2)


def _differentiate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # The operator is linear in the maps: the derivative of its gradient is the operator itself.
    (rois,) = ctx.saved_tensors
    return _forward(grad, rois, ctx.spatial_scale, ctx.group_size, ctx.pooled_size), *[None] * 4


torch.library.register_autograd("instseg::psroi_pool", _differentiate, setup_context=_save)
torch.library.register_autograd(
    "instseg::psroi_pool_backward", _differentiate_backward, setup_context=_save_backward
)


def _edges(
    first: Tensor, last: Tensor, spatial_scale: float, pooled_size: int, length: int
) -> tuple[Tensor, Tensor]:
    """(R, P) first and one past the last cell of the bins of an axis, as :func:`bin_edges`."""
    first, last = (value.sign() * (value.abs() + 0.5).floor() for value in (first, last))
    scale = first.new_tensor(spatial_scale)
    start, end = first * scale, (last + 1) * scale
    size = (torch.maximum(end - start, start.new_tensor(0.1)) / pooled_size)[:, None]
    p = torch.arange(pooled_size, device=first.device, dtype=first.dtype)
    lower, upper = (p * size + start[:, None]).floor(), ((p + 1) * size + start[:, None]).ceil()
    return lower.clamp(0, length).long(), upper.clamp(0, length).long()


class _Corners:
    """Where a table of sums, (B, G, G, H + 1, W + 1, D), is read for every bin of every RoI."""

    def __init__(
        self, shape: Sequence[int], rois: Tensor, scale: float, groups: int, pooled: int, dtype: Any
    ) -> None:
        images, _, height, width = shape
        rois = rois.to(dtype)
        check_roi_values("psroi_pool", rois, images)
        batch, x1, y1, x2, y2 = rois.unbind(dim=1)
        self.top, self.bottom = _edges(y1, y2, scale, pooled, height)
        self.left, self.right = _edges(x1, x2, scale, pooled, width)
        part = torch.arange(pooled, device=rois.device) * groups // pooled
        self._parts = batch.long()[:, None, None], part[:, None], part
        high, wide = self.bottom - self.top, self.right - self.left
        self.areas = (high[:, :, None] * wide[:, None])[..., None]

    def __iter__(self) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        for sign, y, x in (
            (1, self.bottom, self.right),
            (-1, self.top, self.right),
            (-1, self.bottom, self.left),
            (1, self.top, self.left),
        ):
            yield sign, (*self._parts, y[:, :, None], x[:, None])


def pooled_sums(
    maps: Tensor, rois: Tensor, spatial_scale: float, group_size: int, pooled_size: int
) -> Tensor:
    """:func:`psroi_pool` from a table of sums, in float64 (R, D, P, P).

    One cell of ``maps`` that is not finite makes every bin below and to the right of it NaN; the
    compiled operator spoils only the bins that hold the cell.
    """
    _check(maps, rois, group_size, pooled_size)
    dtype = sum_dtype(maps)
    corners = _Corners(maps.shape, rois, spatial_scale, group_size, pooled_size, dtype)
    cells = maps.double().unflatten(1, (-1, group_size, group_size)).permute(0, 2, 3, 4, 5, 1)
    sums = F.pad(cells.cumsum(3).cumsum(4), (0, 0, 1, 0, 1, 0))
    total = sum(sign * sums[index] for sign, index in corners)
    assert isinstance(total, Tensor)
    # A cell that is not finite spoils the sums behind it; a bin without cells is 0 all the same.
    means = torch.where(corners.areas > 0, total / corners.areas.clamp(min=1), 0.0)
    return means.permute(0, 3, 1, 2)


def spread_gradient(
    grad: Tensor,
    rois: Tensor,
    spatial_scale: float,
    group_size: int,
    maps_shape: Sequence[int],
    dtype: Any,
) -> Tensor:
    """The gradient of :func:`pooled_sums` with respect to its maps, in float64."""
    images, channels, height, width = maps_shape
    corners = _Corners(maps_shape, rois, spatial_scale, group_size, grad.shape[2], dtype)
    values = grad.double().permute(0, 2, 3, 1) / corners.areas.clamp(min=1)
    values = values * (corners.areas > 0)
    dims = channels // group_size**2
    sums = values.new_zeros((images, group_size, group_size, height + 1, width + 1, dims))
    for sign, index in corners:
        sums.index_put_(index, sign * values, accumulate=True)
    cells = sums.flip(3, 4).cumsum(3).cumsum(4).flip(3, 4)[:, :, :, 1:, 1:]
    return cells.permute(0, 5, 1, 2, 3, 4).reshape(list(maps_shape))


def _check(maps: Tensor, rois: Tensor, group_size: int, pooled_size: int) -> None:
    expect(maps.dim() == 4, f"psroi_pool: maps has {maps.dim()} dimensions; expected 4")
    expect(
        rois.dim() == 2 and rois.shape[1] == 5,
        f"psroi_pool: rois has shape {tuple(rois.shape)}; expected (R, 5)",
    )
    expect(
        rois.dtype in (torch.float32, torch.float64),
        f"psroi_pool: rois is {rois.dtype}; expected float32 or float64",
        TypeError,
    )
    expect(
        min(group_size, pooled_size) >= 1 and maps.shape[1] % group_size**2 == 0,
        f"psroi_pool: maps has {maps.shape[1]} channels; expected a multiple of group_size * "
        "group_size, and sizes of at least 1",
    )


@in_python("psroi_pool")
def _pool_in_python(
    maps: Tensor, rois: Tensor, spatial_scale: float, group_size: int, pooled_size: int
) -> Tensor:
    return pooled_sums(maps, rois, spatial_scale, group_size, pooled_size).to(maps.dtype)


@in_python("psroi_pool_backward")
def _backward_in_python(
    grad: Tensor, rois: Tensor, spatial_scale: float, group_size: int, maps_shape: Sequence[int]
) -> Tensor:
    dtype = sum_dtype(grad)
    cells = spread_gradient(grad, rois, spatial_scale, group_size, maps_shape, dtype)
    return cells.to(grad.dtype)


def bin_edges(
    first: float, last: float, spatial_scale: float, pooled_size: int, length: int, dtype: Any
) -> list[tuple[int, int]]:
    """First and one past the last cell of the bins of one axis of one RoI; slow.

    Args:
        first: the first pixel of the RoI along the axis.
        last: its last pixel, inclusive.
        spatial_scale: cells per pixel.
        pooled_size: number of bins.
        length: of the map, in cells.
        dtype: ``torch.float32`` or ``torch.float64``, that of the arithmetic.
    """

    def number(value: float) -> Tensor:
        return torch.tensor(value, dtype=dtype)

    def away_from_zero(value: float) -> float:
        return math.copysign(math.floor(abs(value) + 0.5), value)

    def clip(edge: Tensor) -> int:
        return int(edge.clamp(0, length))

    start = number(away_from_zero(first)) * number(spatial_scale)
    end = (number(away_from_zero(last)) + 1) * number(spatial_scale)
    size = torch.maximum(end - start, number(0.1)) / pooled_size
    return [
        (clip(torch.floor(p * size + start)), clip(torch.ceil((p + 1) * size + start)))
        for p in range(pooled_size)
    ]


def psroi_pool_reference(
    maps: Tensor, rois: Tensor, spatial_scale: float, group_size: int, pooled_size: int
) -> Tensor:
    """:func:`psroi_pool` by its formula, bin by bin; differentiable and slow.

    Needs finite RoIs with batch indices of the batch.
    """
    height, width = maps.shape[2:]
    dtype = sum_dtype(maps)
    cells = maps.to(dtype).unflatten(1, (-1, group_size, group_size))
    dims = cells.shape[1]
    pooled = []
    for image, x1, y1, x2, y2 in rois.to(dtype).tolist():
        rows = bin_edges(y1, y2, spatial_scale, pooled_size, height, dtype)
        columns = bin_edges(x1, x2, spatial_scale, pooled_size, width, dtype)
        for py, (top, bottom) in enumerate(rows):
            for px, (left, right) in enumerate(columns):
                gy, gx = py * group_size // pooled_size, px * group_size // pooled_size
                bin_cells = cells[int(image), :, gy, gx, top:bottom, left:right].flatten(1)
                empty = bin_cells.shape[1] == 0
                pooled.append(bin_cells.sum(1) if empty else bin_cells.mean(1))
    if not pooled:
        return maps.new_zeros((0, dims, pooled_size, pooled_size))
    stacked = torch.stack(pooled).unflatten(0, (-1, pooled_size, pooled_size))
    return stacked.permute(0, 3, 1, 2).to(maps.dtype)
