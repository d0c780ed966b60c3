"""Runs ``train_net.py`` in double precision, with the first candidates where chance would choose.

Two-stage detectors train on sampled anchors and regions, which one process and several draw
differently; and they sum in different orders, so that rounding must be far below what a mistake in
the exchange of gradients changes.
"""

import runpy
from pathlib import Path

import torch
import torchvision


def first_candidates(n: int, *, device: object = None, generator: object = None) -> torch.Tensor:
    """Stand-in for torch.randperm."""
    return torch.arange(n, device=device)


def nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """torchvision's, for Detectron2's boxes, which are float32 whatever their scores are."""
    return torch.ops.torchvision.nms(boxes.to(scores.dtype), scores, iou_threshold)


torch.randperm = first_candidates
torchvision.ops.boxes.nms = nms
torch.set_default_dtype(torch.float64)
runpy.run_path(str(Path(__file__).parents[2] / "train_net.py"), run_name="__main__")
