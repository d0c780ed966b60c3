"""Cuts rows into SGN's line segments at breakpoints, and groups these into components by links.

Both are sequential and run on the CPU; tensors on another device are copied there and back.
"""

import torch
from torch import Tensor

from instseg.ops._library import operator, register_fake

BACKGROUND, INTERIOR, START, END = range(4)
"""Breakpoint labels of a pixel (recalled from Liu et al., ICCV 2017, section 3)."""
NONE = -1
"""In a map of lines or components: the pixel belongs to none."""


@torch.no_grad()
def decode_lines(labels: Tensor, semantic: Tensor, *, widened: bool) -> Tensor:
    """Cut rows into lines at breakpoints; columns are the rows of transposed maps.

    Two neighbours in a row belong to one line if they have the same class and no breakpoint is
    between them.  With labels of one pixel a breakpoint follows END and precedes START.  With
    *widened* ones, which the first and last few pixels of a run have, it lies where a series of END
    stops and where one of START begins.

    Args:
        labels: (H, W) uint8; anything but ``START`` and ``END`` counts as ``INTERIOR``.
        semantic: (H, W) int64, class + 1; 0 and less have no lines.
        widened: see above.
    Returns:
        (H, W) int64, lines numbered from 0 in reading order, or ``NONE``.
    Raises:
        ValueError: shapes that do not belong together.
        TypeError: other dtypes.
    """
    lines: Tensor = operator("decode_lines")(labels.cpu(), semantic.cpu(), widened)
    return lines.to(labels.device)


@torch.no_grad()
def group_lines(pairs: Tensor, touches: Tensor) -> Tensor:
    """Join lines pair by pair, unless lines that touch would come into one component.

    Args:
        pairs: (P, 2) int64, lines to join, the surest first.
        touches: (N,) bool, whether line i touches line i + 1 across a breakpoint; the last does
            not.  Without the rule a single wrong line glues two instances together.
    Returns:
        (N,) int64, the component of each line, numbered from 0 in the order of their first lines.
    Raises:
        ValueError: other shapes, lines that do not exist, or a last line that touches another.
        TypeError: other dtypes.
    """
    components: Tensor = operator("group_lines")(pairs.cpu(), touches.cpu())
    return components.to(pairs.device)


def decode_lines_reference(labels: Tensor, semantic: Tensor, *, widened: bool) -> Tensor:
    """As :func:`decode_lines`, pixel by pixel in plain Python: for tests and the benchmark."""
    lines, count = [], 0
    for label_row, class_row in zip(labels.tolist(), semantic.tolist(), strict=True):
        line = []
        before_label = before_class = None
        for label, kind in zip(label_row, class_row, strict=True):
            if kind <= 0:
                line.append(NONE)
            else:
                if widened:
                    ends = before_label == END and label != END
                    breaks = ends or (label == START and before_label != START)
                else:
                    breaks = before_label == END or label == START
                if breaks or kind != before_class:
                    count += 1
                line.append(count - 1)
            before_label, before_class = label, kind
        lines.append(line)
    return torch.tensor(lines, dtype=torch.int64).reshape(labels.shape)


def group_lines_reference(pairs: Tensor, touches: Tensor) -> Tensor:
    """As :func:`group_lines`, with Python's sets: for tests."""
    groups = [{line} for line in range(len(touches))]
    for first, second in pairs.tolist():
        a, b = groups[first], groups[second]
        if any(
            flag and ((i in a and i + 1 in b) or (i in b and i + 1 in a))
            for i, flag in enumerate(touches.tolist())
        ):
            continue
        joined = a | b
        for line in joined:
            groups[line] = joined
    names: dict[int, int] = {}
    numbers = [names.setdefault(min(group), len(names)) for group in groups]
    return torch.tensor(numbers, dtype=torch.int64)


@register_fake("decode_lines")
def _fake_decode(labels: Tensor, semantic: Tensor, widened: bool) -> Tensor:
    return torch.empty_like(semantic, memory_format=torch.contiguous_format)


@register_fake("group_lines")
def _fake_group(pairs: Tensor, touches: Tensor) -> Tensor:
    return pairs.new_empty(touches.shape)
