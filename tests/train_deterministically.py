"""Runs ``train_net.py`` with the first candidates where chance would choose among them.

Two-stage detectors train on sampled anchors and regions; one process and several draw differently.
"""

import runpy
from pathlib import Path

import torch


def first_candidates(n: int, *, device: object = None, generator: object = None) -> torch.Tensor:
    """Stand-in for torch.randperm."""
    return torch.arange(n, device=device)


torch.randperm = first_candidates
runpy.run_path(str(Path(__file__).parent.parent / "train_net.py"), run_name="__main__")
