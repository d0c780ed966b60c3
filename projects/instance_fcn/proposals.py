"""From assembled windows to masks of the image's size."""

import torch
from torch import Tensor

# Elements of the largest intermediate tensor when masks are enlarged: 64 MiB of float32.
_CHUNK = 2**24


def paste_windows(
    logits: Tensor, corners: Tensor, cells: Tensor, grids: Tensor, image_size: tuple[int, int]
) -> Tensor:
    """Masks of whole images from the logits of windows.

    Logits are interpolated linearly between the centres of cells.  Beyond the last centres they
    keep their value up to the border of the window or map; outside the window the mask is empty.

    Args:
        logits: (N, m, m); the mask is where they are above 0.
        corners: (N, 2) rows and columns of the top-left cells, possibly outside the map.
        cells: (N, 2) height and width of a cell in pixels of the result.
        grids: (N, 2) rows and columns of the map that a window was cut from.
        image_size: height H and width W of the result.
    Returns:
        (N, H, W) bool.
    """
    height, width = image_size
    masks = torch.zeros(len(logits), height, width, dtype=torch.bool, device=logits.device)
    step = max(_CHUNK // max(height * width, 1), 1)
    for start in range(0, len(logits), step):
        part = slice(start, start + step)
        placed = [values[part].unbind(1) for values in (corners, cells, grids)]
        rows, columns = (
            _weights(corner, cell, grid, length, logits.shape[-1])
            for corner, cell, grid, length in zip(*placed, image_size, strict=True)
        )
        masks[part] = rows @ logits[part].float() @ columns.transpose(1, 2) > 0
    return masks


def _weights(corner: Tensor, cell: Tensor, grid: Tensor, length: int, size: int) -> Tensor:
    """Interpolation along one axis.

    Args:
        corner, cell, grid: (N,), see :func:`paste_windows`.
        length: pixels of the image along this axis.
        size: cells of the window.
    Returns:
        (N, length, size) float32, rows of sum 1, or 0 for pixels outside the window.
    """
    pixels = torch.arange(length, dtype=torch.float32, device=cell.device) + 0.5
    position = pixels / cell[:, None] - corner[:, None]
    outside = (position < 0) | (position > size)
    # Cells outside the map have no logit.
    first = (-corner).clamp(min=0)[:, None]
    last = torch.minimum(grid - corner, grid.new_tensor(size))[:, None] - 1
    position = torch.minimum(torch.maximum(position - 0.5, first), last)
    steps = torch.arange(size, device=cell.device)
    weights = (1 - (position[:, :, None] - steps).abs()).clamp(min=0)
    return weights.masked_fill(outside[:, :, None], 0)
