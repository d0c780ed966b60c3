"""Models without numbers, for tests of names and shapes."""

import os

import torch
from detectron2.modeling import build_model
from torch import nn

import instseg


def meta_model(config: str | os.PathLike[str]) -> nn.Module:
    """The model of a configuration on the meta device, which needs neither time nor memory."""
    cfg = instseg.load_cfg(config, ["MODEL.WEIGHTS", ""])
    cfg.MODEL.DEVICE = "meta"  # no value that a user may give
    with torch.device("meta"):
        model: nn.Module = build_model(cfg)
    return model
