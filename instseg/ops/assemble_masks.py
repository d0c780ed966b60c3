"""YOLACT's mask assembly: prototypes x coefficients -> one mask per detection."""

import torch
from torch import Tensor
from torch.nn import functional as F

from instseg.ops._library import check_devices, expect, in_python, operator, register_fake


@torch.no_grad()
def assemble_masks(
    prototypes: Tensor, coefficients: Tensor, boxes: Tensor, size: tuple[int, int]
) -> Tensor:
    """Masks of the size of an image (Bolya et al., ICCV 2019, section 3.2, and their code).

    The sigmoid of prototypes times coefficients is cropped with the box, enlarged by a cell, at the
    prototypes' resolution, then resized (bilinear, corners not aligned); pixels above 0.5 belong to
    the instance.  As the crop comes first, a mask may reach a few pixels out of its box.

    The operator computes only around the box, and holds no mask as numbers.  The result equals that
    of :func:`assemble_masks_reference` but for ties: pixels within about 1e-6 of 0.5, where the
    order of a sum decides.

    On the CPU the result takes memory where there is a mask, not for the zeros around it.

    Args:
        prototypes: (h, w, K).  float32, float64, float16 or bfloat16; the last two are computed in
            float32.
        coefficients: (N, K).
        boxes: (N, 4) corners in pixels of the result, in any order, not clipped, not rounded.
        size: height H and width W of the result.
    Returns:
        (N, H, W) bool.  A box that misses the image, or has a NaN, gives an empty mask; so do
        coefficients with a NaN, and a NaN among the prototypes empties the pixels that read it.
        No gradient.
    Raises:
        ValueError: shapes that do not belong together, or a size below 1.
        TypeError: a dtype that is not supported.
        RuntimeError: tensors on different devices, or a result that does not fit into memory.
    """
    check_devices("assemble_masks", prototypes=prototypes, coefficients=coefficients, boxes=boxes)
    return operator("assemble_masks")(prototypes, coefficients, boxes, *size)


def assemble_masks_reference(
    prototypes: Tensor,
    coefficients: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    threshold: float = 0.5,
) -> Tensor:
    """As :func:`assemble_masks`, every mask over all of the image: for tests and the benchmark.

    A slightly different ``threshold`` shows the ties.  A NaN among the prototypes shows outside of
    boxes as well.
    """
    height, width = size
    relative = boxes / boxes.new_tensor([width, height, width, height])
    small = mask_probabilities(prototypes, coefficients, relative)
    if not len(small):
        return small.new_zeros((0, height, width), dtype=torch.bool)
    full = F.interpolate(small[None], (height, width), mode="bilinear", align_corners=False)
    return full[0] > threshold


def mask_probabilities(prototypes: Tensor, coefficients: Tensor, boxes: Tensor) -> Tensor:
    """Cropped probabilities at the resolution of the prototypes, for losses; differentiable.

    Args:
        prototypes: (h, w, K).
        coefficients: (N, K).
        boxes: (N, 4) corners relative to the image, in any order and not clipped.
    Returns:
        (N, h, w), 0 outside the boxes.
    """
    probabilities = (prototypes @ coefficients.T).sigmoid().permute(2, 0, 1)
    return crop(probabilities, boxes)


def crop(masks: Tensor, boxes: Tensor, padding: float = 1.0) -> Tensor:
    """Set the pixels outside the boxes to zero (authors' code).

    Args:
        masks: (N, h, w).
        boxes: (N, 4) corners relative to the masks, in any order.
        padding: cells by which the boxes are enlarged.
    Returns:
        (N, h, w); cell j stays if ``x1 - padding <= j < x2 + padding``, nothing is rounded.
    """
    height, width = masks.shape[1:]
    left, right = _extent(boxes[:, 0], boxes[:, 2], width, padding)
    top, bottom = _extent(boxes[:, 1], boxes[:, 3], height, padding)
    x = torch.arange(width, device=masks.device, dtype=boxes.dtype)
    y = torch.arange(height, device=masks.device, dtype=boxes.dtype)
    columns = (x >= left) & (x < right)
    rows = (y >= top) & (y < bottom)
    return masks * (rows[:, :, None] & columns[:, None, :])


def _extent(first: Tensor, second: Tensor, size: int, padding: float) -> tuple[Tensor, Tensor]:
    """(N,) relative coordinates → (N, 1) lower and upper end in cells, inside the mask."""
    first, second = first[:, None] * size, second[:, None] * size
    low = (torch.minimum(first, second) - padding).clamp(min=0)
    high = (torch.maximum(first, second) + padding).clamp(max=size)
    return low, high


@in_python("assemble_masks")
def _in_python(
    prototypes: Tensor, coefficients: Tensor, boxes: Tensor, height: int, width: int
) -> Tensor:
    op = "assemble_masks"
    shapes = tuple(prototypes.shape), tuple(coefficients.shape), tuple(boxes.shape)
    expect(
        [len(shape) for shape in shapes] == [3, 2, 2]
        and min(shapes[0][:2]) > 0
        and shapes[1][1] == shapes[0][2]
        and shapes[2] == (shapes[1][0], 4),
        f"{op}: prototypes, coefficients and boxes have the shapes {shapes}; expected (h, w, K), "
        "(N, K) and (N, 4)",
    )
    expect(min(height, width) > 0, f"{op}: size is ({height}, {width}); expected at least 1 each")
    if prototypes.dtype in (torch.float16, torch.bfloat16):
        prototypes, coefficients = prototypes.float(), coefficients.float()
    masks = assemble_masks_reference(
        prototypes, coefficients.to(prototypes.dtype), boxes.to(prototypes.dtype), (height, width)
    )
    # Each comparison with a NaN is false, so that its box is empty, as it should be.
    return masks


@register_fake("assemble_masks")
def _fake(
    prototypes: Tensor, coefficients: Tensor, boxes: Tensor, height: int, width: int
) -> Tensor:
    shape = (coefficients.shape[0], height, width)
    return prototypes.new_empty(shape, dtype=torch.bool)
