"""InstanceFCN's instance assembling: k x k instance-sensitive score maps -> one mask per window."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from instseg.ops._library import (
    check_devices,
    expect,
    in_python,
    operator,
    register_fake,
    sum_dtype,
)


def assemble_instances(
    maps: Tensor, windows: Tensor | None, parts: int, size: int, fill: float = -10.0
) -> Tensor:
    """Copy the mask of every window out of the score maps (Dai et al., ECCV 2016, section 3.1).

    A window of ``size`` x ``size`` cells is split into ``parts`` x ``parts`` parts, and the mask
    value at (i, j) is ``maps[b, part(i) * parts + part(j), y0 + i, x0 + j]``, a plain copy, with
    ``part(i) = floor((2 i + 1) parts / (2 size))``: the part that holds the centre of cell i.
    Flipping maps and windows flips the masks exactly for every odd ``parts``.

    Deviation: the paper has no rule for sizes that ``parts`` does not divide, nor for windows that
    reach beyond the map.

    Args:
        maps: (B, parts * parts, H, W) logits; channel i * parts + j belongs to the part in row i,
            column j of an instance.  float32, float64, float16 or bfloat16.
        windows: (N, 3) int64 rows of image, y0 and x0, the top-left cell, which may lie anywhere,
            also outside the map.  None: one window around every cell, ordered by image, row and
            column; for an even ``size`` that of cell y covers y - size / 2 to y + size / 2 - 1.
        parts: k, parts per side of a window.
        size: m, cells per side of a window.
        fill: value of mask pixels outside the map; no gradient reaches them.
    Returns:
        (N, size, size) of the dtype of ``maps``; N = B * H * W without ``windows``.
    Raises:
        ValueError: the channel count is not parts * parts, ``windows`` is not (N, 3), or a number
            is out of its range.
        IndexError: a batch index outside 0..B-1, on the CPU.  On a GPU, where a check would stop
            the stream, such a window is all ``fill`` and gives no gradient.
        TypeError: a dtype that is not supported.
        RuntimeError: tensors on different devices.
    """
    check_devices("assemble_instances", maps=maps, windows=windows)
    return operator("assemble_instances")(maps, windows, parts, size, fill)


def assemble_instances_reference(
    maps: Tensor, windows: Tensor | None, parts: int, size: int, fill: float = -10.0
) -> Tensor:
    """As :func:`assemble_instances`, one mask value at a time: slow, for tests."""
    images, _, height, width = maps.shape
    if windows is None:
        corners = [
            (b, y - size // 2, x - size // 2)
            for b in range(images)
            for y in range(height)
            for x in range(width)
        ]
    else:
        corners = [(int(b), int(y), int(x)) for b, y, x in windows.tolist()]
    part = [(2 * i + 1) * parts // (2 * size) for i in range(size)]
    background = maps.new_tensor(fill)
    values = [
        maps[b, part[i] * parts + part[j], y + i, x + j]
        if 0 <= y + i < height and 0 <= x + j < width
        else background
        for b, y, x in corners
        for i in range(size)
        for j in range(size)
    ]
    # The empty sum keeps the graph connected when no window touches the map.
    flat = torch.stack(values) if values else maps.new_empty(0)
    return (flat + maps.sum() * 0).view(len(corners), size, size)


def _cells(
    shape: Sequence[int], windows: Tensor | None, parts: int, size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(N, m, m) index of every mask value in the flat maps, and whether it lies inside of them."""
    images, channels, height, width = shape
    expect(
        parts > 0 and size > 0 and channels == parts * parts,
        f"assemble_instances: maps has {channels} channels; expected parts * parts = "
        f"{parts * parts}, and a size of at least 1",
    )
    if windows is None:
        ranges = (torch.arange(length, device=device) for length in (images, height, width))
        image, top, left = torch.cartesian_prod(*ranges).view(-1, 3).unbind(1)
        top, left = top - size // 2, left - size // 2
    else:
        expect(
            windows.dim() == 2 and windows.shape[1] == 3,
            f"assemble_instances: windows has shape {tuple(windows.shape)}; expected (N, 3)",
        )
        image, top, left = windows.unbind(1)
        expect(
            bool(((image >= 0) & (image < images)).all()),
            f"assemble_instances: a batch index is not from 0 to {images - 1}",
            IndexError,
        )
    offset = torch.arange(size, device=device)
    part = (2 * offset + 1) * parts // (2 * size)
    y, x = (top[:, None] + offset)[:, :, None], (left[:, None] + offset)[:, None]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    channel = part[:, None] * parts + part
    index = ((image[:, None, None] * channels + channel) * height + y) * width + x
    return index.where(inside, 0), inside


@in_python("assemble_instances")
def _in_python(maps: Tensor, windows: Tensor | None, parts: int, size: int, fill: float) -> Tensor:
    expect(maps.dim() == 4, f"assemble_instances: maps has {maps.dim()} dimensions; expected 4")
    index, inside = _cells(maps.shape, windows, parts, size, maps.device)
    if not maps.numel():
        return maps.new_full(index.shape, fill)
    return maps.reshape(-1)[index].masked_fill(~inside, fill)


@in_python("assemble_instances_backward")
def _backward_in_python(
    grad: Tensor, windows: Tensor | None, parts: int, maps_shape: Sequence[int]
) -> Tensor:
    index, inside = _cells(maps_shape, windows, parts, grad.shape[1], grad.device)
    dtype = sum_dtype(grad)
    sums = torch.zeros(math.prod(maps_shape), dtype=dtype, device=grad.device)
    sums.index_add_(0, index[inside], grad[inside].to(dtype))
    return sums.view(list(maps_shape)).to(grad.dtype)


@register_fake("assemble_instances")
def _fake(maps: Tensor, windows: Tensor | None, parts: int, size: int, fill: float) -> Tensor:
    count = maps.shape[0] * maps.shape[2] * maps.shape[3] if windows is None else windows.shape[0]
    return maps.new_empty((count, size, size))


@register_fake("assemble_instances_backward")
def _fake_backward(
    grad: Tensor, windows: Tensor | None, parts: int, maps_shape: list[int]
) -> Tensor:
    return grad.new_empty(maps_shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    maps, windows, ctx.parts, _, _ = inputs
    ctx.maps_shape = maps.shape
    ctx.save_for_backward(windows)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (windows,) = ctx.saved_tensors
    grad_maps = operator("assemble_instances_backward")(grad, windows, ctx.parts, ctx.maps_shape)
    return grad_maps, None, None, None, None


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, windows, ctx.parts, _ = inputs
    ctx.size = grad.shape[1]
    ctx.save_for_backward(windows)


def _double_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # Both directions are linear and each is the other's transpose; fill gets no gradient.
    (windows,) = ctx.saved_tensors
    grad_grad = operator("assemble_instances")(grad, windows, ctx.parts, ctx.size, 0.0)
    return grad_grad, None, None, None


torch.library.register_autograd("instseg::assemble_instances", _backward, setup_context=_setup)
torch.library.register_autograd(
    "instseg::assemble_instances_backward", _double_backward, setup_context=_setup_backward
)
