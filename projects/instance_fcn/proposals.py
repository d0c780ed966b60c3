"""From assembled windows to masks of the image's size."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from instseg.modeling import PlacedMask


def paste_windows(
    logits: Tensor, corners: Tensor, cells: Tensor, grids: Tensor, image_size: tuple[int, int]
) -> Iterator[PlacedMask]:
    """Masks of windows at the size of an image.

    Logits are interpolated linearly between the centres of cells.  Beyond the last centres they
    keep their value up to the border of the window or map; outside the window the mask is empty.

    Args:
        logits: (N, m, m); the mask is where they are above 0.
        corners: (N, 2) rows and columns of the top-left cells, possibly outside the map.
        cells: (N, 2) height and width of a cell in pixels of the result.
        grids: (N, 2) rows and columns of the map that a window was cut from.
        image_size: height H and width W of the result.
    Yields:
        each mask, inside its window.
    """
    size = logits.shape[-1]
    limits = corners.new_tensor(image_size)
    # A pixel more on every side, since positions are rounded.
    first = torch.minimum(((corners * cells).floor().long() - 1).clamp(min=0), limits)
    last = torch.minimum((((corners + size) * cells).ceil().long() + 1).clamp(min=0), limits)
    spans = torch.stack([first, torch.maximum(first, last)], dim=2).tolist()
    for row, (down, across) in enumerate(spans):
        rows, columns = (
            _weights(corners[row, axis], cells[row, axis], grids[row, axis], span, size)
            for axis, span in enumerate((down, across))
        )
        with torch.autocast(logits.device.type, enabled=False):
            pixels = rows @ logits[row].float() @ columns.T > 0
        yield PlacedMask(row, across[0], down[0], pixels)


def _weights(corner: Tensor, cell: Tensor, grid: Tensor, span: Sequence[int], size: int) -> Tensor:
    """Interpolation along one axis.

    Args:
        corner, cell, grid: numbers, see :func:`paste_windows`.
        span: first pixel, and the one after the last.
        size: cells of the window.
    Returns:
        (P, size) float32, rows of sum 1, or 0 for pixels outside the window.
    """
    pixels = torch.arange(*span, dtype=torch.float32, device=cell.device) + 0.5
    position = pixels / cell - corner
    outside = (position < 0) | (position > size)
    # Cells outside the map have no logit.
    first = (-corner).clamp(min=0)
    last = torch.minimum(grid - corner, grid.new_tensor(size)) - 1
    position = torch.minimum(torch.maximum(position - 0.5, first), last)
    steps = torch.arange(size, device=cell.device)
    weights = (1 - (position[:, None] - steps).abs()).clamp(min=0)
    return weights.masked_fill(outside[:, None], 0)
