"""Calls of operators, with which emulated kernels are compared with the CPU operators."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from instseg.ops.mean_shift import _lattice_keys
from tests.support.position_sensitive import SIZES, head_classes, head_maps, sample_rois

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


class Call(NamedTuple):
    """One call of an operator.

    Attributes:
        operator: name in ``torch.ops.instseg``.
        arguments: of it.
        tolerance: relative, of floating results; 0 asks for the same bits.
    """

    operator: str
    arguments: tuple[Any, ...]
    tolerance: float = 0.0


def number(low: int, high: int) -> int:
    """A random whole number from ``low`` to ``high``."""
    return int(torch.randint(low, high + 1, ()))


def rois(count: int, images: int, width: int) -> Tensor:
    """RoIs inside, across and beyond the border of maps of ``width`` cells of 8 pixels."""
    corners = torch.rand(count, 4) * 16 * width - 2 * width
    return torch.cat([torch.randint(0, images, (count, 1)).float(), corners], dim=1)


def fcis_head(count: int) -> Iterator[Call]:
    def both(maps: Tensor, rows: Tensor, classes: Tensor | None, *sizes: Any) -> Iterator[Call]:
        yield Call("fcis_head", (maps, rows, classes, *sizes))
        outputs = torch.ops.instseg.fcis_head(maps, rows, classes, *sizes)
        grads = [torch.randn_like(output) for output in outputs[:2]]
        yield Call("fcis_head_backward", (*grads, maps, rows, outputs[2], *sizes))

    for dtype in DTYPES:
        for classes in (None, head_classes(len(sample_rois()))):
            yield from both(head_maps(dtype=dtype), sample_rois(), classes, *SIZES)
    for _ in range(count):
        images, group, num_classes = number(1, 2), number(1, 4), number(2, 40)
        height, width, pooled = number(1, 12), number(1, 12), number(1, 8)
        maps = torch.randn(images, 2 * group**2 * num_classes, height, width)
        yield from both(maps, rois(number(0, 20), images, width), None, 1 / 8, group, pooled)
    many = rois(530, 1, 9)  # more than a block culls at once
    yield from both(torch.randn(1, 2 * 4 * 2, 9, 9), many, None, 1 / 8, 2, 3)
    wide = torch.randn(1, 2 * 300, 3, 4)  # more classes than threads
    yield from both(wide, rois(5, 1, 4), None, 1 / 8, 1, 2)
    yield from both(torch.randn(1, 2 * 2, 7, 40), rois(9, 1, 40), None, 1 / 8, 1, 11)
    yield from both(torch.randn(1, 2 * 49 * 2, 3, 4), rois(9, 1, 4), None, 1 / 8, 7, 3)


def psroi_pool(count: int) -> Iterator[Call]:
    def both(maps: Tensor, rows: Tensor, scale: float, group: int, pooled: int) -> Iterator[Call]:
        yield Call("psroi_pool", (maps, rows, scale, group, pooled))
        grad = torch.randn_like(torch.ops.instseg.psroi_pool(maps, rows, scale, group, pooled))
        yield Call("psroi_pool_backward", (grad, rows, scale, group, maps.shape))

    for dtype in DTYPES:
        yield from both(torch.randn(2, 12, 6, 7).to(dtype), sample_rois(), *SIZES)
    for _ in range(count):
        images, group, dims = number(1, 2), number(1, 4), number(1, 20)
        height, width, pooled = number(1, 40), number(1, 40), number(1, 8)
        maps = torch.randn(images, group**2 * dims, height, width)
        yield from both(maps, rois(number(0, 20), images, width), 1 / 8, group, pooled)
    yield from both(torch.randn(1, 8, 9, 9), rois(530, 1, 9), 1 / 8, 2, 3)
    yield from both(torch.randn(1, 2, 7, 40), rois(9, 1, 40), 1 / 8, 1, 11)


def assemble_instances(count: int) -> Iterator[Call]:
    for dtype in DTYPES:
        for _ in range(count):
            images, parts, size = number(1, 2), number(1, 5), number(1, 12)
            height, width, windows = number(1, 12), number(1, 12), number(0, 30)
            maps = torch.randn(images, parts**2, height, width).to(dtype)
            image, corners = torch.randint(0, images, (windows, 1)), (windows, 2)
            rows = torch.cat([image, torch.randint(-15, 15, corners)], dim=1)
            for chosen in (None, rows):
                yield Call("assemble_instances", (maps, chosen, parts, size, -10.0))
                masks = height * width * images if chosen is None else windows
                grad = torch.randn(masks, size, size).to(dtype)
                arguments = (grad, chosen, parts, maps.shape)
                yield Call("assemble_instances_backward", arguments)
    many = torch.cat([torch.zeros(600, 1).long(), torch.randint(-5, 9, (600, 2))], dim=1)
    grad = torch.randn(600, 7, 7)  # more windows than a block culls at once
    yield Call("assemble_instances_backward", (grad, many, 3, [2, 9, 9, 11]))
    far = torch.tensor([[0, 2**63 - 1, 0], [1, 0, -(2**63)], [1, 10**9, -(10**9)]])
    yield Call("assemble_instances", (torch.randn(2, 9, 5, 4), far, 3, 4, -10.0))
    yield Call("assemble_instances_backward", (torch.randn(3, 4, 4), far, 3, [2, 9, 5, 4]))


def assemble_masks(count: int) -> Iterator[Call]:
    for dtype in DTYPES:
        for _ in range(count):
            cells_y, cells_x, prototypes = number(1, 50), number(1, 50), number(0, 9)
            height, width, masks = number(1, 90), number(1, 140), number(0, 6)
            boxes = (torch.rand(masks, 4) * 1.4 - 0.2) * torch.tensor([width, height] * 2)
            planes = torch.randn(cells_y, cells_x, prototypes).to(dtype)
            factors = torch.randn(masks, prototypes).to(dtype)
            yield Call("assemble_masks", (planes, factors, boxes, height, width))


def vote_masks(count: int) -> Iterator[Call]:
    for regions in [600, *(number(0, 300) for _ in range(count))]:
        classes, side, averages = number(1, 6), number(1, 22), number(0, 8)
        height, width = number(1, 70), number(1, 100)
        size = torch.tensor([width, height])
        corner = torch.rand(regions, 2) * size
        boxes = torch.cat([corner, corner + torch.rand(regions, 2) * size * 0.6], dim=1)
        if regions:
            boxes[torch.randint(regions, (regions // 20,))] = math.nan
        masks, scores = torch.rand(regions, side, side), torch.rand(classes, regions)
        yield Call("nms_per_class", (boxes, scores, 0.3, 0.1, 30))
        weights = torch.rand(averages, regions) * (torch.rand(averages, regions) < 0.2)
        weights /= weights.sum(1, keepdim=True).clamp(min=1e-9)
        for from_image in (False, True):
            arguments = (boxes, masks, weights, 0.4, height, width, from_image)
            yield Call("average_masks", arguments)
        all_vote = torch.full((1, regions), 1 / max(1, regions))  # more than a block looks at once
        yield Call("average_masks", (boxes, masks, all_vote, 0.1, height, width, False))


def mean_shift(count: int) -> Iterator[Call]:
    """Sums of doubles in another order than the tree's, hence the tolerance."""

    def all_of(points: Tensor, bandwidth: float) -> Iterator[Call]:
        seeds, walk = points[:6], (bandwidth, 50, 1e-3)
        yield Call("shift_seeds", (points, seeds, *walk), 1e-9)
        yield Call("nearest_centres", (points, points[:9], bandwidth))
        bins = torch.unique(_lattice_keys(points, bandwidth), return_inverse=True)[1]
        yield Call("peel_clusters", (points, bins, *walk, 5, 20), 1e-9)

    for dtype in (torch.float32, torch.float64):
        for dimensions in (1, 2, 3, 5, 8, 32, 64):
            points = torch.randn(300 * count, dimensions) * 0.3
            points += torch.randint(0, 4, (300 * count, 1)) * 2
            yield from all_of(points.to(dtype), 1.0 if dimensions < 8 else 0.5 * dimensions**0.5)
    # More points than 1024 blocks take at once, in two clusters.
    points = torch.rand(262_144 + 300, 1) * 0.1
    points[::3] += 5
    bins = (points[:, 0] > 1).long()
    yield Call("peel_clusters", (points, bins, 1.0, 50, 1e-3, 5, 20), 1e-9)


OPERATORS: dict[str, Callable[[int], Iterator[Call]]] = {
    "fcis_head": fcis_head,
    "psroi_pool": psroi_pool,
    "assemble_instances": assemble_instances,
    "assemble_masks": assemble_masks,
    "vote_masks": vote_masks,
    "mean_shift": mean_shift,
}


def difference(call: Call, operators: Any) -> str:
    """How the result of ``operators`` differs from that of the CPU operators; "" if it does not."""
    given = [a.clone() if isinstance(a, Tensor) else a for a in call.arguments]
    expected = getattr(torch.ops.instseg, call.operator)(*given)
    actual = getattr(operators, call.operator)(*given)
    pairs = zip(*((x,) if isinstance(x, Tensor) else x for x in (actual, expected)), strict=True)
    shapes = [tuple(a.shape) if isinstance(a, Tensor) else a for a in call.arguments]
    for index, (a, e) in enumerate(pairs):
        try:
            torch.testing.assert_close(a, e, rtol=call.tolerance, atol=0, equal_nan=True)
        except AssertionError as error:
            return f"{call.operator}{shapes}, result {index}: {error}"
    return ""


def first_difference(name: str, count: int, operators: Any, seed: int = 0) -> str:
    """The first difference among the calls of one operator; "" if there is none."""
    torch.manual_seed(seed)
    for call in OPERATORS[name](count):
        if text := difference(call, operators):
            return text
    return ""
