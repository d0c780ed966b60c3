"""Every compiled operator, with inputs and a composition of common operators that does the same."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import batched_nms
from torchvision.ops import roi_align as torchvision_roi_align

from instseg.benchmark.embeddings import (
    as_array,
    clustered,
    clustered_by_scikit_learn,
    embedding_inputs,
)
from instseg.modeling import fast_nms, warp
from instseg.ops.assemble_instances import assemble_instances
from instseg.ops.assemble_masks import assemble_masks, assemble_masks_reference
from instseg.ops.fcis_head import fcis_head
from instseg.ops.psroi_pool import psroi_pool
from instseg.ops.roi_align import roi_align
from instseg.ops.sgn_lines import END, INTERIOR, START, decode_lines, decode_lines_reference
from instseg.ops.vote_masks import vote_masks, vote_masks_reference

Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class OperatorComparison:
    """An operator and its peer, which compute the same.

    Attributes:
        peer: name of ``theirs`` in the table.
        inputs: makes what ``ours`` takes, on a device, at full size or tiny.
        ours: the operator, as its users call it.
        theirs: the composition.
        their_inputs: the same in the layout that ``theirs`` wants; not timed.
        slow: ``theirs`` takes long: it is timed once, and its memory is not measured.
        needs: package that ``theirs`` imports; without it the row is left out.
        on_gpu: whether ``ours`` runs on a GPU; else the row is left out there.
    """

    peer: str
    inputs: Callable[[torch.device, bool], Inputs]
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    their_inputs: Callable[..., Inputs] = lambda *inputs: inputs
    slow: bool = False
    needs: str | None = None
    on_gpu: bool = True


def _rois(count: int, width: float, height: float, device: torch.device) -> Tensor:
    """(count, 5) boxes of all sizes inside an image, as a detector proposes them."""
    generator = torch.Generator().manual_seed(0)
    centres, sizes = torch.rand(2, count, 2, generator=generator)
    extent = torch.tensor([width, height])
    half = extent * (0.02 + 0.3 * sizes.square())
    low, high = centres * extent - half, centres * extent + half
    boxes = torch.cat([low, high], 1).clamp(min=0).minimum(extent.repeat(2) - 1)
    return torch.cat([torch.zeros(count, 1), boxes], 1).to(device)


_CLASSES, _GROUP, _POOLED, _SCALE = 81, 7, 21, 1 / 16
"""FCIS on COCO; the classes include the background."""


def _head_inputs(device: torch.device, tiny: bool) -> Inputs:
    """Score maps and RoIs of an image of 600 x 1000 pixels."""
    height, width, count = (4, 4, 1) if tiny else (38, 63, 300)
    torch.manual_seed(0)
    maps = torch.randn(1, height, width, _GROUP**2 * 2 * _CLASSES, device=device)
    return maps.permute(0, 3, 1, 2), _rois(count, 16.0 * width, 16.0 * height, device)


def maps_in_their_order(maps: Tensor, rois: Tensor) -> Inputs:
    """The maps in the channel order of the authors, as planes instead of channels last."""
    cells = maps.permute(0, 2, 3, 1).unflatten(3, (_GROUP**2, 2, _CLASSES))
    return cells.permute(0, 5, 4, 3, 1, 2).flatten(1, 3).contiguous(), rois


def _fused_head(maps: Tensor, rois: Tensor) -> tuple[Tensor, ...]:
    scores, logits, classes = fcis_head(maps, rois, None, _SCALE, _GROUP, _POOLED)
    return scores.softmax(1), logits.softmax(1), classes


def _pool_as_torchvision(maps: Tensor, rois: Tensor) -> tuple[Tensor, Tensor]:
    """``psroi_pool``, and the int32 channel of every value, which torchvision's operator makes."""
    pooled = psroi_pool(maps, rois, _SCALE, _GROUP, _POOLED)
    part = torch.arange(_POOLED, dtype=torch.int32, device=maps.device) * _GROUP // _POOLED
    outputs = torch.arange(pooled.shape[1], dtype=torch.int32, device=maps.device)[:, None, None]
    channels = (outputs * _GROUP + part[:, None]) * _GROUP + part
    return pooled, channels.expand_as(pooled).contiguous()


def _composed_head(maps: Tensor, rois: Tensor) -> tuple[Tensor, ...]:
    pooled, _channels = _pool_as_torchvision(maps, rois)
    pooled = pooled.unflatten(1, (_CLASSES, 2))
    larger, _indices = pooled.max(2)
    probabilities = larger.mean((2, 3)).softmax(1)
    classes = probabilities[:, 1:].argmax(1) + 1
    masks = pooled.softmax(2)[torch.arange(len(rois), device=rois.device), classes]
    return probabilities, masks, classes


def _lean_head(maps: Tensor, rois: Tensor) -> tuple[Tensor, ...]:
    """The composition that needs the least memory: no indices, the softmax of one class."""
    pooled = psroi_pool(maps, rois, _SCALE, _GROUP, _POOLED).unflatten(1, (_CLASSES, 2))
    probabilities = pooled.amax(2).mean((2, 3)).softmax(1)
    classes = probabilities[:, 1:].argmax(1) + 1
    chosen = pooled[torch.arange(len(rois), device=rois.device), classes]
    return probabilities, chosen.softmax(1), classes


def _with_gradient(head: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    def run(maps: Tensor, rois: Tensor) -> Tensor:
        maps = maps.detach().requires_grad_()
        probabilities, masks, _ = head(maps, rois)
        (gradient,) = torch.autograd.grad(probabilities.square().sum() + masks.sum(), maps)
        return gradient

    return run


_PARTS, _WINDOW = 5, 21
"""InstanceFCN."""


def _window_inputs(device: torch.device, tiny: bool) -> Inputs:
    """Score maps of an image of 600 x 800 pixels and windows anywhere, also across borders."""
    height, width, count = (8, 8, 1) if tiny else (75, 100, 1000)
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(1, _PARTS**2, height, width, generator=generator)
    centres = torch.rand(count, 2, generator=generator) * torch.tensor([height, width])
    windows = torch.cat([torch.zeros(count, 1), centres - _WINDOW // 2], 1).long()
    return maps.to(device), windows.to(device)


def _assemble(maps: Tensor, windows: Tensor) -> Tensor:
    return assemble_instances(maps, windows, _PARTS, _WINDOW)


def _assemble_by_index(maps: Tensor, windows: Tensor) -> Tensor:
    padded = F.pad(maps, (_WINDOW,) * 4, value=-10.0)
    height, width = padded.shape[2:]
    steps = torch.arange(_WINDOW, device=maps.device)
    part = (2 * steps + 1) * _PARTS // (2 * _WINDOW)
    images, rows, columns = windows.unbind(1)
    channels = images[:, None, None] * _PARTS**2 + part[:, None] * _PARTS + part
    rows, columns = (first[:, None] + steps + _WINDOW for first in (rows, columns))
    index = (channels * height + rows[:, :, None]) * width + columns[:, None, :]
    return padded.flatten().index_select(0, index.flatten()).view_as(index)


def _vote_inputs(device: torch.device, tiny: bool) -> Inputs:
    """RoIs, masks and scores as FCIS gives them for an image of 600 x 1000 pixels."""
    count = 2 if tiny else 600
    boxes = _rois(count, 1000.0, 600.0, torch.device("cpu"))[:, 1:]
    generator = torch.Generator().manual_seed(0)
    steps = torch.linspace(-1, 1, _POOLED)
    radius = steps[:, None] ** 2 + steps**2
    masks = (1.2 + 0.2 * torch.randn(count, 1, 1, generator=generator) - radius).clamp(0, 1)
    scores = (3 * torch.randn(count, _CLASSES, generator=generator)).softmax(1)
    return boxes.to(device), masks.to(device), scores.to(device), (600, 1000)


def _mask_inputs(device: torch.device, tiny: bool) -> Inputs:
    """Outputs of YOLACT's network for an image of 480 x 640 pixels."""
    cells, count, height, width = (9, 2, 32, 40) if tiny else (138, 100, 480, 640)
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(cells, cells, 32, generator=generator).relu()
    coefficients = torch.randn(count, 32, generator=generator).tanh()
    boxes = _rois(count, float(width), float(height), device)[:, 1:]
    return prototypes.to(device), coefficients.to(device), boxes, (height, width)


_NMS_IOU, _NMS_TOP, _DETECTIONS = 0.5, 200, 100
"""YOLACT."""


def _nms_inputs(device: torch.device, tiny: bool) -> Inputs:
    """Boxes and scores of every anchor of YOLACT for an image of 550 x 550 pixels."""
    boxes = _rois(2 if tiny else 19248, 550.0, 550.0, device)[:, 1:]
    generator = torch.Generator().manual_seed(0)
    scores = (3 * torch.randn(len(boxes), _CLASSES, generator=generator)).softmax(1)
    return boxes, scores[:, 1:].T.contiguous().to(device)


def _fast_nms(boxes: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
    limits = {"top_k": _NMS_TOP, "max_detections": _DETECTIONS}
    return fast_nms(boxes, scores, iou_threshold=_NMS_IOU, **limits)


def _batched_nms(boxes: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
    best, rows = scores.topk(min(_NMS_TOP, scores.shape[1]), dim=1)
    classes = torch.arange(len(scores), device=scores.device)[:, None].expand_as(rows).flatten()
    best, rows = best.flatten(), rows.flatten()
    kept_rows = batched_nms(boxes[rows], best, classes, _NMS_IOU)[:_DETECTIONS]
    return rows[kept_rows], classes[kept_rows], best[kept_rows]


def _warp_inputs(device: torch.device, tiny: bool) -> Inputs:
    """P4 of YolactEdge for an image of 550 x 550 pixels, and a flow of some cells."""
    cells = 5 if tiny else 35
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 256, cells, cells, generator=generator)
    flow = 0.2 * torch.randn(1, 2, cells, cells, generator=generator)
    return features.to(device), flow.to(device)


def _warp_by_index(features: Tensor, flow: Tensor) -> Tensor:
    height, width = features.shape[2:]
    padded = F.pad(features, (1, 1, 1, 1)).flatten(2)
    rows, columns = (torch.arange(size, device=flow.device) for size in (height, width))
    x = columns + flow[:, 0] * ((width - 1) / 2) + 1
    y = rows[:, None] + flow[:, 1] * ((height - 1) / 2) + 1
    # Positions outside the map sample the border of zeros.
    x, y = x.clamp(0, width + 1), y.clamp(0, height + 1)
    left, top = x.floor().clamp(max=width), y.floor().clamp(max=height)
    total = torch.zeros_like(features)
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        index = ((top + i) * (width + 2) + left + j).long().flatten(1)[:, None]
        weight = (1 - (y - top - i).abs()) * (1 - (x - left - j).abs())
        cells = padded.gather(2, index.expand(-1, padded.shape[1], -1))
        total += cells.view_as(features) * weight[:, None]
    return total


_REGION_BINS = 7
"""Detectron2's box head."""


def _region_inputs(device: torch.device, tiny: bool) -> Inputs:
    """P3 of an image of 800 x 1088 pixels, channels last, and the proposals of Mask R-CNN."""
    height, width, count = (4, 4, 1) if tiny else (100, 136, 1000)
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(1, height, width, 256, generator=generator)
    rois = _rois(count, 8.0 * width, 8.0 * height, device)
    return maps.permute(0, 3, 1, 2).to(device), rois


def _in_planes(maps: Tensor, rois: Tensor) -> Inputs:
    return maps.contiguous(), rois


def _align(maps: Tensor, rois: Tensor) -> Tensor:
    return roi_align(maps, rois, 1 / 8, _REGION_BINS)


def _align_by_torchvision(maps: Tensor, rois: Tensor) -> Tensor:
    return torchvision_roi_align(maps, rois, _REGION_BINS, 1 / 8, aligned=True)


def _map_gradient(align: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def run(maps: Tensor, rois: Tensor) -> Tensor:
        maps = maps.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(align(maps, rois).sum(), maps)
        return gradient

    return run


_RUN = 40
"""Mean length of an instance's runs in pixels."""


def _breakpoint_inputs(device: torch.device, tiny: bool) -> Inputs:
    """Widened breakpoints and classes of an image of Cityscapes' size."""
    size = (8, 24) if tiny else (1024, 2048)
    generator = torch.Generator().manual_seed(0)
    labels = torch.full(size, INTERIOR, dtype=torch.uint8)
    starts = torch.rand(size, generator=generator) < 1 / _RUN
    for shift, label in ((0, START), (1, START), (-1, END), (-2, END)):
        labels[starts.roll(shift, dims=1)] = label
    stripes = torch.randint(0, 4, (size[0], -(-size[1] // 128)), generator=generator)
    semantic = stripes.repeat_interleave(128, dim=1)[:, : size[1]].contiguous()
    return labels.to(device), semantic.to(device)


def _decode_widened(labels: Tensor, semantic: Tensor) -> Tensor:
    return decode_lines(labels, semantic, widened=True)


def _decode_widened_in_python(labels: Tensor, semantic: Tensor) -> Tensor:
    return decode_lines_reference(labels, semantic, widened=True)


COMPARISONS: dict[str, OperatorComparison] = {
    "fcis_head_forward": OperatorComparison(
        peer="pooling as torchvision's, max, mean, softmax",
        inputs=_head_inputs,
        ours=_fused_head,
        theirs=_composed_head,
        their_inputs=maps_in_their_order,
    ),
    "fcis_head_backward": OperatorComparison(
        peer="the same, forward and backward",
        inputs=_head_inputs,
        ours=_with_gradient(_fused_head),
        theirs=_with_gradient(_composed_head),
        their_inputs=maps_in_their_order,
    ),
    "fcis_head_lean_peer": OperatorComparison(
        peer="psroi_pool, amax, mean, softmax of one class",
        inputs=_head_inputs,
        ours=_fused_head,
        theirs=_lean_head,
        their_inputs=maps_in_their_order,
    ),
    "instance_assembling": OperatorComparison(
        peer="index_select",
        inputs=_window_inputs,
        ours=_assemble,
        theirs=_assemble_by_index,
    ),
    "mask_voting": OperatorComparison(
        peer="NumPy and OpenCV",
        inputs=_vote_inputs,
        ours=vote_masks,
        theirs=vote_masks_reference,
    ),
    "mask_assembly": OperatorComparison(
        peer="matmul, sigmoid, crop, interpolate, threshold",
        inputs=_mask_inputs,
        ours=assemble_masks,
        theirs=assemble_masks_reference,
    ),
    "fast_nms": OperatorComparison(
        peer="torchvision batched_nms",
        inputs=_nms_inputs,
        ours=_fast_nms,
        theirs=_batched_nms,
    ),
    "roi_align_forward": OperatorComparison(
        peer="torchvision roi_align",
        inputs=_region_inputs,
        ours=_align,
        theirs=_align_by_torchvision,
        their_inputs=_in_planes,
        on_gpu=False,
    ),
    "roi_align_backward": OperatorComparison(
        peer="the same, forward and backward",
        inputs=_region_inputs,
        ours=_map_gradient(_align),
        theirs=_map_gradient(_align_by_torchvision),
        their_inputs=_in_planes,
        on_gpu=False,
    ),
    "feature_warping": OperatorComparison(
        peer="gather of four neighbours",
        inputs=_warp_inputs,
        ours=warp,
        theirs=_warp_by_index,
    ),
    "mean_shift": OperatorComparison(
        peer="scikit-learn MeanShift",
        inputs=embedding_inputs,
        ours=clustered,
        theirs=clustered_by_scikit_learn,
        their_inputs=as_array,
        slow=True,
        needs="sklearn",
    ),
    "line_decoding": OperatorComparison(
        peer="plain Python",
        inputs=_breakpoint_inputs,
        ours=_decode_widened,
        theirs=_decode_widened_in_python,
        slow=True,
    ),
}
