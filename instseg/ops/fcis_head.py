"""The head of FCIS in one operator: score maps and RoIs to class scores and mask logits."""

from typing import Any, NoReturn

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
from instseg.ops.psroi_pool import pooled_sums, psroi_pool_reference, spread_gradient

_forward = operator("fcis_head")
_backward = operator("fcis_head_backward")


def fcis_head(
    maps: Tensor,
    rois: Tensor,
    classes: Tensor | None,
    spatial_scale: float,
    group_size: int,
    pooled_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of all classes and the inside/outside logits of one class per RoI (FCIS section 2.2).

    Let z_t(c, p) be the value of bin p that :func:`~instseg.ops.psroi_pool.psroi_pool` gives for
    the outside (t = 0) and inside (t = 1) map of class c.  The score of c is the mean of
    ``max(z_0(c, p), z_1(c, p))`` over all P * P bins; bins without cells count as 0.  The logits
    are ``z_t(c, p)`` of one class.  The (R, 2 * C, P, P) values are never held: the operator reads
    the maps once, in the order of memory.

    It reads channels-last memory, where the 2 * C numbers of a part at a cell are neighbours, and
    copies other maps to it first.  :func:`to_fcis_head_order` gives the authors' channels this
    order.

    Args:
        maps: (B, G*G*2*C, H, W) with channel ((gy * G + gx) * 2 + t) * C + c, class 0 being the
            background; float32, float64, float16 or bfloat16 (summed in float32).
        rois: (R, 5) float32 or float64 rows (batch index, x1, y1, x2, y2), pixels of the network
            input, corners inclusive; bins, sizes and positions as for ``psroi_pool``.
        classes: (R,) int64, the class 0..C-1 whose logits are wanted, -1 for none; or None for the
            class 1..C-1 with the highest score, the lowest of several.
        spatial_scale: cells of ``maps`` per pixel.
        group_size: G.
        pooled_size: P.

    Returns:
        Scores (R, C) and logits (R, 2, P, P), outside first, in the dtype of ``maps``, and the
        classes (R,) of the logits; class -1 has logits 0.  Scores and logits have a gradient with
        respect to ``maps``, channels-last; that of a tie of outside and inside goes to outside.
        Both directions are deterministic and do not depend on the number of threads.

    Raises:
        ValueError: shapes or numbers do not fit, or, on the CPU, a coordinate is not finite.
        IndexError: on the CPU, a batch index is not a whole number from 0 to B - 1 or a class not
            one from -1 to C - 1.  On a GPU, where a check would have to wait, such RoIs
            and those with a coordinate that is not finite have no cells: their scores, logits and
            gradient are 0.  Such classes count as -1 there.
        TypeError: a dtype that is not supported.
        RuntimeError: several devices, or a second derivative is asked for.
    """
    check_devices("fcis_head", maps=maps, rois=rois, classes=classes)
    if maps.dim() == 4:
        maps = maps.contiguous(memory_format=torch.channels_last)
    return _forward(maps, rois, classes, spatial_scale, group_size, pooled_size)


def to_fcis_head_order(
    weight_or_maps: Tensor, num_classes: int, group_size: int, dim: int = 0
) -> Tensor:
    """Bring channels from the authors' order into that of :func:`fcis_head`.

    Args:
        weight_or_maps: any tensor with 2*C*G*G channels (2 * c + t) * G * G + gy * G + gx along
            ``dim``: weight or bias of a convolution (0) or maps (1).
        num_classes: C, with the background.
        group_size: G.
        dim: the dimension of the channels.

    Returns:
        The same with channel ((gy * G + gx) * 2 + t) * C + c.

    Raises:
        ValueError: another number of channels.
    """
    parts = group_size * group_size
    expected, channels = 2 * num_classes * parts, weight_or_maps.shape[dim]
    if channels != expected:
        raise ValueError(
            f"to_fcis_head_order: weight_or_maps has {channels} channels along dimension {dim}; "
            f"expected {expected} (2 * {num_classes} classes * {group_size} * {group_size} parts)"
        )
    order = torch.arange(expected, device=weight_or_maps.device)
    order = order.view(num_classes, 2, parts).permute(2, 1, 0).flatten()
    return weight_or_maps.index_select(dim, order)


@register_fake("fcis_head")
def _fake(
    maps: Tensor,
    rois: Tensor,
    classes: Tensor | None,
    spatial_scale: float,
    group_size: int,
    pooled_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    count, num_classes = rois.size(0), maps.size(1) // (2 * group_size * group_size)
    return (
        maps.new_empty((count, num_classes)),
        maps.new_empty((count, 2, pooled_size, pooled_size)),
        maps.new_empty((count,), dtype=torch.int64),
    )


@register_fake("fcis_head_backward")
def _fake_backward(
    grad_scores: Tensor,
    grad_logits: Tensor,
    maps: Tensor,
    rois: Tensor,
    classes: Tensor,
    spatial_scale: float,
    group_size: int,
    pooled_size: int,
) -> Tensor:
    return torch.empty_like(maps, memory_format=torch.channels_last)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    maps, rois, _, ctx.spatial_scale, ctx.group_size, ctx.pooled_size = inputs
    ctx.save_for_backward(maps, rois, output[2])
    ctx.mark_non_differentiable(output[2])


def _differentiate(
    ctx: Any, grad_scores: Tensor, grad_logits: Tensor, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    sizes = (ctx.spatial_scale, ctx.group_size, ctx.pooled_size)
    grad_maps = _backward(grad_scores, grad_logits, *ctx.saved_tensors, *sizes)
    return grad_maps, None, None, None, None, None


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass


def _refuse(ctx: Any, grad: Tensor) -> NoReturn:
    raise RuntimeError("fcis_head has no second derivative; leave create_graph=True out")


torch.library.register_autograd("instseg::fcis_head", _differentiate, setup_context=_save)
torch.library.register_autograd("instseg::fcis_head_backward", _refuse, setup_context=_save_nothing)


def _to_psroi_order(maps: Tensor, group_size: int) -> Tensor:
    """Channels (g, t, c) → the (t, c, g) of :func:`~instseg.ops.psroi_pool.psroi_pool`."""
    return maps.unflatten(1, (group_size**2, 2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(1, 3)


@in_python("fcis_head")
def _head_in_python(
    maps: Tensor,
    rois: Tensor,
    classes: Tensor | None,
    spatial_scale: float,
    group_size: int,
    pooled_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    expect(
        maps.dim() == 4 and maps.shape[1] % (2 * group_size**2) == 0,
        f"fcis_head: maps has shape {tuple(maps.shape)}; expected (B, C, H, W) with a multiple of "
        f"{2 * group_size**2} channels (2 * group_size * group_size)",
    )
    pooled = pooled_sums(
        _to_psroi_order(maps, group_size), rois, spatial_scale, group_size, pooled_size
    ).unflatten(1, (2, -1))
    num_classes = pooled.shape[2]
    scores = pooled.amax(1).mean((2, 3))
    if classes is None:
        expect(num_classes > 1, "fcis_head: maps holds no class beside the background")
        chosen = scores[:, 1:].argmax(1) + 1
    else:
        expect(
            bool(((classes >= -1) & (classes < num_classes)).all()),
            f"fcis_head: a class is not from -1 to {num_classes - 1}",
            IndexError,
        )
        chosen = classes.clone()
    rows = torch.arange(len(rois), device=maps.device)
    logits = pooled[rows, :, chosen.clamp(min=0)] * (chosen >= 0)[:, None, None, None]
    return scores.to(maps.dtype), logits.to(maps.dtype), chosen


@in_python("fcis_head_backward")
def _head_backward_in_python(
    grad_scores: Tensor,
    grad_logits: Tensor,
    maps: Tensor,
    rois: Tensor,
    classes: Tensor,
    spatial_scale: float,
    group_size: int,
    pooled_size: int,
) -> Tensor:
    official = _to_psroi_order(maps, group_size)
    pooled = pooled_sums(official, rois, spatial_scale, group_size, pooled_size)
    outside, inside = pooled.unflatten(1, (2, -1)).unbind(1)
    share = grad_scores.double()[:, :, None, None] / pooled_size**2
    grad = torch.stack([share * (outside >= inside), share * (outside < inside)], dim=2)
    rows = (classes >= 0).nonzero()[:, 0]
    grad[rows, classes[rows]] += grad_logits.double()[rows]
    dtype = sum_dtype(maps)
    cells = spread_gradient(
        grad.transpose(1, 2).flatten(1, 2), rois, spatial_scale, group_size, official.shape, dtype
    )
    parts = cells.unflatten(1, (2, -1, group_size**2)).permute(0, 3, 1, 2, 4, 5).flatten(1, 3)
    return parts.to(maps.dtype).contiguous(memory_format=torch.channels_last)


def fcis_head_reference(
    maps: Tensor,
    rois: Tensor,
    classes: Tensor | None,
    spatial_scale: float,
    group_size: int,
    pooled_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`fcis_head` by its formula, through all pooled maps; differentiable and slow.

    On ties of outside and inside its gradient is split between both.
    """
    parts = group_size * group_size
    # (g, t, c) to the (t, c, g) of psroi_pool.
    official = maps.unflatten(1, (parts, 2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(1, 3)
    pooled = psroi_pool_reference(official, rois, spatial_scale, group_size, pooled_size)
    pooled = pooled.unflatten(1, (2, -1))
    scores = pooled.amax(1).mean((2, 3))
    if classes is None:
        classes = scores[:, 1:].argmax(1) + 1
    rows = torch.arange(len(rois), device=maps.device)
    logits = pooled[rows, :, classes.clamp(min=0)]
    return scores, logits * (classes >= 0)[:, None, None, None], classes
