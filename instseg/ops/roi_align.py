"""RoIAlign on a CPU, with the numbers of torchvision and Detectron2.

The slow reference is ``torchvision.ops.roi_align`` itself.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torchvision  # noqa: F401 - registers the operators that the Python form calls
from torch import Tensor

from instseg.ops._library import (
    check_devices,
    check_roi_values,
    expect,
    in_python,
    operator,
    register_fake,
    sum_dtype,
)

_forward = operator("roi_align")
_backward = operator("roi_align_backward")


def roi_align(
    maps: Tensor | Sequence[Tensor],
    rois: Tensor,
    spatial_scale: float | Sequence[float],
    pooled_size: int | tuple[int, int],
    sampling_ratio: int = 0,
    *,
    levels: Tensor | None = None,
    aligned: bool = True,
) -> Tensor:
    """Means of bilinear samples in the bins of RoIs (He et al., Mask R-CNN, section 3).

    A RoI is cut into P x Q bins.  The axis of P bins has, for a map of length L,

        start = y1 * spatial_scale - offset      (offset 0.5 if ``aligned``, else 0)
        bin   = (y2 * spatial_scale - offset - start) / P      (a RoI of 1 cell at least unless
                                                                 ``aligned``)
        n     = ``sampling_ratio``, or where that is 0, ceil(bin)
        y     = start + p * bin + (i + 0.5) * bin / n      (sample i of bin p)

    A sample beyond -1 or L is 0, others are moved inside the map.  Every operation is rounded as
    torchvision's is: in float32, and in float64, results and gradients have the same bits as those
    of ``torchvision.ops.roi_align`` on a CPU, which knows one map, one thread and no bfloat16.

    Args:
        maps: (B, C, H, W), or several of them, of different sizes, such as those of a feature
            pyramid; float32, float64, float16 or bfloat16 (summed in float32), of any memory
            format; channels last are faster.
        rois: (R, 5) float32 or float64 rows (batch index, x1, y1, x2, y2), pixels of the network
            input; no gradient.
        spatial_scale: cells of a map per pixel; one for each map.
        pooled_size: P, or P and Q.
        sampling_ratio: samples of a bin along each axis, 0 for one per cell.
        levels: (R,) int64, the number of the map of each RoI; None with one map.
        aligned: shift positions by half a cell, as Detectron2's ``ROIAlignV2`` does.

    Returns:
        (R, C, P, Q) in the dtype of ``maps``, contiguous; empty for zero RoIs.  Gradients are
        deterministic.

    Raises:
        ValueError: shapes or numbers do not fit, or a coordinate is not finite.
        IndexError: a batch index is not a whole number from 0 to B - 1, or a level not one of the
            maps.
        TypeError: a dtype that is not supported.
        RuntimeError: several devices, or a GPU, where torchvision's operator is fast.
    """
    several = [maps] if isinstance(maps, Tensor) else list(maps)
    scales = [spatial_scale] if isinstance(spatial_scale, int | float) else list(spatial_scale)
    if not several:
        raise ValueError("roi_align: maps is empty; expected one map at least")
    check_devices("roi_align", maps=several[0], rois=rois, levels=levels)
    if several[0].is_cuda:
        raise RuntimeError(
            f"roi_align: maps is on {several[0].device}; use torchvision.ops.roi_align on a GPU"
        )
    size = pooled_size if isinstance(pooled_size, tuple) else (pooled_size, pooled_size)
    return _forward(several, rois, levels, scales, *size, sampling_ratio, aligned)


@register_fake("roi_align")
def _fake(
    maps: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor | None,
    scales: Sequence[float],
    height: int,
    width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    shape = (rois.size(0), maps[0].size(1), height, width)
    return torch.empty(shape, dtype=maps[0].dtype, device=maps[0].device)


@register_fake("roi_align_backward")
def _fake_backward(
    grad: Tensor,
    rois: Tensor,
    levels: Tensor | None,
    scales: Sequence[float],
    heights: Sequence[int],
    widths: Sequence[int],
    images: int,
    sampling_ratio: int,
    aligned: bool,
    channels_last: bool,
) -> list[Tensor]:
    format = torch.channels_last if channels_last else torch.contiguous_format
    return [
        grad.new_empty((images, grad.size(1), height, width)).contiguous(memory_format=format)
        for height, width in zip(heights, widths, strict=True)
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    maps, rois, levels, ctx.scales, _, _, *ctx.sampling = inputs
    ctx.save_for_backward(rois, levels)
    ctx.shape = [x.shape[2] for x in maps], [x.shape[3] for x in maps], maps[0].shape[0]
    ctx.channels_last = maps[0].is_contiguous(memory_format=torch.channels_last)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rois, levels = ctx.saved_tensors
    grads = _backward(grad, rois, levels, ctx.scales, *ctx.shape, *ctx.sampling, ctx.channels_last)
    return grads, *[None] * 7


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, rois, levels, ctx.scales, _, _, _, *ctx.sampling, _ = inputs
    ctx.save_for_backward(rois, levels)
    ctx.pooled_size = grad.shape[2:]


def _differentiate_backward(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    # The operator is linear in the maps: the derivative of its gradient is the operator itself.
    rois, levels = ctx.saved_tensors
    pooled = _forward(list(grads), rois, levels, ctx.scales, *ctx.pooled_size, *ctx.sampling)
    return pooled, *[None] * 9


torch.library.register_autograd("instseg::roi_align", _differentiate, setup_context=_save)
torch.library.register_autograd(
    "instseg::roi_align_backward", _differentiate_backward, setup_context=_save_backward
)


def _check_rois(rois: Tensor, images: int) -> None:
    expect(
        rois.dim() == 2 and rois.shape[1] == 5,
        f"roi_align: rois has shape {tuple(rois.shape)}; expected (R, 5)",
    )
    check_roi_values("roi_align", rois, images)


def _of_level(rois: Tensor, levels: Tensor | None, number: int) -> Tensor:
    """(R,) whether a RoI belongs to a map."""
    if levels is None:
        return torch.ones(len(rois), dtype=torch.bool, device=rois.device)
    return levels == number


@in_python("roi_align")
def _align_in_python(
    maps: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor | None,
    scales: Sequence[float],
    height: int,
    width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    _check_rois(rois, maps[0].shape[0])
    operator_of_torchvision = torch.ops.torchvision.roi_align
    pooled = maps[0].new_zeros((len(rois), maps[0].shape[1], height, width))
    for number, (cells, scale) in enumerate(zip(maps, scales, strict=True)):
        chosen, cells = _of_level(rois, levels, number), cells.to(sum_dtype(cells))
        options = (scale, height, width, sampling_ratio, aligned)
        values = operator_of_torchvision(cells, rois[chosen].to(cells.dtype), *options)
        pooled[chosen] = values.to(pooled.dtype)
    return pooled


@in_python("roi_align_backward")
def _backward_in_python(
    grad: Tensor,
    rois: Tensor,
    levels: Tensor | None,
    scales: Sequence[float],
    heights: Sequence[int],
    widths: Sequence[int],
    images: int,
    sampling_ratio: int,
    aligned: bool,
    channels_last: bool,
) -> list[Tensor]:
    _check_rois(rois, images)
    format = torch.channels_last if channels_last else torch.contiguous_format
    _, channels, rows, columns = grad.shape
    grads = []
    for number, (scale, *size) in enumerate(zip(scales, heights, widths, strict=True)):
        chosen, values = _of_level(rois, levels, number), grad.to(sum_dtype(grad))
        shape = (scale, rows, columns, images, channels, *size, sampling_ratio, aligned)
        chosen_rois = rois[chosen].to(values.dtype)
        cells = torch.ops.torchvision._roi_align_backward(values[chosen], chosen_rois, *shape)
        grads.append(cells.to(grad.dtype).contiguous(memory_format=format))
    return grads
