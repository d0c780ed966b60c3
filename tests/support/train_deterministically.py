"""Run ``train_net.py`` in double precision, with the first candidates in place of random ones.

Two-stage detectors train on sampled anchors and regions, which one process and several processes
draw differently.  They also sum in different orders, so rounding must be far below the effect of a
mistake in the exchange of gradients.
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
