"""Counts the traffic of every kernel with memory, at the sizes of ``instseg benchmark ops``.

``python -m tests.emulate.measure [FOLDER_OF_SOURCES] [OPERATOR ...]`` prints a table; another
folder than ``csrc`` gives the counts of other kernels, such as older ones.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from instseg.benchmark import comparisons
from tests.emulate.build import CSRC, Build
from tests.emulate.emulated import Emulated

CPU = torch.device("cpu")
HEAD = (1 / 16, 7, 21)
Call = tuple[str, tuple[Any, ...]]


def head() -> list[Call]:
    maps, rois = comparisons._head_inputs(CPU, False)
    maps = maps.contiguous(memory_format=torch.channels_last)
    scores, logits, classes = torch.ops.instseg.fcis_head(maps, rois, None, *HEAD)
    backward = (scores, logits, maps, rois, classes, *HEAD)
    return [("fcis_head", (maps, rois, None, *HEAD)), ("fcis_head_backward", backward)]


def pooling() -> list[Call]:
    """Two maps a part: more would take the old kernel minutes."""
    rois = comparisons._rois(300, 1008.0, 608.0, CPU)
    maps = torch.randn(1, 98, 38, 63)
    grad = torch.ops.instseg.psroi_pool(maps, rois, *HEAD)
    return [("psroi_pool_backward", (grad, rois, *HEAD[:2], maps.shape))]


def instances() -> list[Call]:
    maps, windows = comparisons._window_inputs(CPU, False)
    maps = maps[:, :, :38, :63].contiguous()
    grad, some = torch.randn(38 * 63, 21, 21), torch.randn(len(windows), 21, 21)
    return [
        ("assemble_instances", (maps, None, 5, 21, -10.0)),
        ("assemble_instances_backward", (grad, None, 5, maps.shape)),
        ("assemble_instances_backward", (some, windows, 5, [1, 25, 75, 100])),
    ]


def voting() -> list[Call]:
    boxes, masks, scores, (height, width) = comparisons._vote_inputs(CPU, False)
    overlap = torch.rand(20, len(boxes), generator=torch.Generator().manual_seed(0)) < 0.02
    weights = overlap * scores[:, 1]
    weights /= weights.sum(1, keepdim=True).clamp(min=1e-9)
    return [("average_masks", (boxes, masks, weights, 0.4, height, width, False))]


def masks() -> list[Call]:
    prototypes, coefficients, boxes, (height, width) = comparisons._mask_inputs(CPU, False)
    return [("assemble_masks", (prototypes, coefficients[:20], boxes[:20], height, width))]


def points() -> list[Call]:
    """8 clusters of 40 000 points."""
    embeddings = torch.randn(40_000, 2) * 0.1 + torch.randint(0, 8, (40_000, 1)) * 4
    bins = torch.unique((embeddings[:, 0] / 1.5).round(), return_inverse=True)[1]
    return [("peel_clusters", (embeddings, bins, 1.5, 100, 1e-3, 20, 100))]


CALLS: dict[str, Callable[[], list[Call]]] = {
    "fcis_head": head,
    "psroi_pool": pooling,
    "assemble_instances": instances,
    "vote_masks": voting,
    "assemble_masks": masks,
    "mean_shift": points,
}


def main(sources: str = str(CSRC), *names: str) -> None:
    chosen = names or tuple(CALLS)
    emulated = Emulated(Build("traffic", stems=chosen, csrc=Path(sources)).library())
    print("| operator | kernel | launches | requests | sectors a request | MB read | MB written |")
    print("|---|---|---|---|---|---|---|")
    for name in chosen:
        torch.manual_seed(0)
        for operator, arguments in CALLS[name]():
            emulated.synchronisations()
            getattr(emulated.operators, operator)(*arguments)
            for k in emulated.traffic():
                print(
                    f"| `{operator}` | `{k.kernel}` | {k.launches} | {k.requests} | "
                    f"{k.sectors / max(1, k.requests):.1f} | {k.read / 1e6:.1f} | "
                    f"{k.written / 1e6:.1f} |",
                    flush=True,
                )
            print(f"| `{operator}` | host waits {emulated.synchronisations()} times | | | | | |")


if __name__ == "__main__":
    main(*sys.argv[1:])
