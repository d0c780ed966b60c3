"""Cuts rows into SGN's line segments at breakpoints, and groups these into components by links.

Both are sequential and run on the CPU; tensors on another device are copied there and back.
"""

import torch
from torch import Tensor

from instseg.ops._library import expect, in_python, operator, register_fake

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


@in_python("decode_lines")
def _decode_in_python(labels: Tensor, semantic: Tensor, widened: bool) -> Tensor:
    expect(
        labels.dim() == 2 and labels.shape == semantic.shape,
        f"decode_lines: labels and semantic have the shapes {tuple(labels.shape)} and "
        f"{tuple(semantic.shape)}; expected (H, W) twice",
    )
    begins, ends = labels == START, labels == END
    starts = torch.ones_like(begins)
    before, now = slice(None, -1), slice(1, None)
    if widened:
        breaks = (ends[:, before] & ~ends[:, now]) | (begins[:, now] & ~begins[:, before])
    else:
        breaks = ends[:, before] | begins[:, now]
    starts[:, now] = breaks | (semantic[:, now] != semantic[:, before])
    drawn = semantic > 0
    numbers = (starts & drawn).flatten().cumsum(0).view(labels.shape) - 1
    return numbers.where(drawn, NONE)


@in_python("group_lines")
def _group_in_python(pairs: Tensor, touches: Tensor) -> Tensor:
    flags = touches.tolist()
    count = len(flags)
    expect(
        pairs.dim() == 2 and pairs.shape[1] == 2,
        f"group_lines: pairs has shape {tuple(pairs.shape)}; expected (P, 2)",
    )
    expect(not (flags and flags[-1]), "group_lines: the last line touches one after it")
    expect(
        bool(((pairs >= 0) & (pairs < count)).all()),
        f"group_lines: a pair names a line that is not from 0 to {count - 1}",
    )
    group = list(range(count))
    members = [[line] for line in group]
    for first, second in pairs.tolist():
        small, large = sorted((group[first], group[second]), key=lambda name: len(members[name]))
        if small == large or any(
            (flags[line] and group[line + 1] == large)
            or (line > 0 and flags[line - 1] and group[line - 1] == large)
            for line in members[small]
        ):
            continue
        for line in members[small]:
            group[line] = large
        members[large] += members[small]
    names: dict[int, int] = {}
    numbers = [names.setdefault(name, len(names)) for name in group]
    return torch.tensor(numbers, dtype=torch.int64)


@register_fake("decode_lines")
def _fake_decode(labels: Tensor, semantic: Tensor, widened: bool) -> Tensor:
    return torch.empty_like(semantic, memory_format=torch.contiguous_format)


@register_fake("group_lines")
def _fake_group(pairs: Tensor, touches: Tensor) -> Tensor:
    return pairs.new_empty(touches.shape)
