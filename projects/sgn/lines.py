"""From breakpoints to lines and from lines to connected components (sections 3 and 4)."""

import torch
from torch import Tensor

from instseg.ops.sgn_lines import END, INTERIOR, NONE, START, decode_lines, group_lines


def most_likely_labels(probabilities: Tensor, threshold: float) -> Tensor:
    """(..., 4, H, W) probabilities of breakpoint labels → (..., H, W) uint8.

    START and END need a probability above ``threshold`` together, or the pixel is INTERIOR.
    """
    labels = probabilities.argmax(dim=-3).to(torch.uint8)
    weak = probabilities[..., [START, END], :, :].sum(dim=-3) <= threshold
    labels[(labels >= START) & weak] = INTERIOR
    return labels


def line_components(
    labels: Tensor, semantic: Tensor, links: Tensor, *, widened: bool, threshold: float
) -> tuple[Tensor, Tensor]:
    """Lines of the rows, joined to components, the surest pair first.

    Two lines of successive rows that share columns and the class are a pair.  It is joined if the
    mean link over these columns is above ``threshold``, unless that would bring together lines that
    touch each other in a row.

    Args:
        labels: (H, W) uint8 breakpoints along rows.
        semantic: (H, W) int64, class + 1, 0 for background.
        links: (H, W) probability that a pixel and the one below it belong together.
        widened: see :func:`instseg.ops.sgn_lines.decode_lines`.
        threshold: for the mean link.
    Returns:
        (H, W) int64 maps of lines and of components, each numbered from 0, -1 for none; on the CPU.
    """
    labels, semantic, links = labels.cpu(), semantic.cpu(), links.cpu()
    lines = decode_lines(labels, semantic, widened=widened)
    touches = torch.zeros(int(lines.max()) + 1 if lines.numel() else 0, dtype=torch.bool)
    left, right = lines[:, :-1], lines[:, 1:]
    touches[left[(left >= 0) & (right >= 0) & (left != right)]] = True
    pairs, means, shared = _pairs(lines, semantic, links)
    is_linked = means > threshold
    pairs, means, shared = pairs[is_linked], means[is_linked], shared[is_linked]
    order = shared.argsort(descending=True, stable=True)
    order = order[means[order].argsort(descending=True, stable=True)]
    groups = group_lines(pairs[order], touches)
    components = torch.full_like(lines, NONE)
    components[lines >= 0] = groups[lines[lines >= 0]]
    return lines, components


def _pairs(lines: Tensor, semantic: Tensor, links: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lines that share columns: (P, 2) numbers, (P,) mean link, (P,) shared columns."""
    upper, lower = lines[:-1], lines[1:]
    shares = (upper >= 0) & (lower >= 0) & (semantic[:-1] == semantic[1:])
    # Two lines share columns without a gap, so a pair begins where either line changes.
    begins = shares.clone()
    same_pair = (upper[:, 1:] == upper[:, :-1]) & (lower[:, 1:] == lower[:, :-1]) & shares[:, :-1]
    begins[:, 1:] &= ~same_pair
    pairs = torch.stack([upper[begins], lower[begins]], dim=1)
    numbers = begins[shares].cumsum(dim=0) - 1
    shared = numbers.bincount(minlength=len(pairs))
    sums = numbers.bincount(links[:-1][shares].double(), minlength=len(pairs))
    return pairs, sums / shared, shared


def links_from_breakpoints(labels: Tensor, *, widened: bool) -> Tensor:
    """Links without a network: 1 where no breakpoint is between a pixel and the one below it.

    Args:
        labels: (H, W) uint8 breakpoints along columns.
        widened: see :func:`instseg.ops.sgn_lines.decode_lines`.
    Returns:
        (H, W) float32, 0 in the last row.
    """
    upper, lower = labels[:-1], labels[1:]
    if widened:
        separated = (upper == END) & (lower != END) | (lower == START) & (upper != START)
    else:
        separated = (upper == END) | (lower == START)
    links = torch.zeros(labels.shape, device=labels.device)
    links[:-1] = (~separated).float()
    return links
