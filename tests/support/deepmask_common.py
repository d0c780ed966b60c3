"""Small networks and patches for the tests of DeepMask and SharpMask."""

from typing import Any

import torch
from detectron2.modeling import Backbone
from torch import Tensor, nn

from instseg.projects.deepmask import DeepMask, SymmetricConv2d, SymmetricResNet


class NearSighted(Backbone):
    """Cells of 16 pixels that see only their neighbours, so no farther than the context."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.cells = nn.Conv2d(3, channels, 16, 16)
        self.neighbours = SymmetricConv2d(channels, channels, 3)
        self._out_features = ["res4"]
        self._out_feature_channels = {"res4": channels}
        self._out_feature_strides = {"res4": 16}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"res4": self.neighbours(self.cells(x).tanh())}

    @property
    def size_divisibility(self) -> int:
        return 16


def narrow_resnet(**settings: Any) -> SymmetricResNet:
    sizes: dict[str, Any] = {
        "depth": 18,
        "in_channels": 3,
        "stem_channels": 8,
        "width": 8,
        "out_channels": 8,
        "norm": "",
        "out_features": ["res4"],
    }
    return SymmetricResNet(**{**sizes, **settings})


def settings(**changed: Any) -> dict[str, Any]:
    """Arguments of a small DeepMask: windows of 64 pixels, patches of 96."""
    return {
        "in_feature": "res4",
        "pixel_mean": [118.0, 118.0, 118.0],
        "pixel_std": [60.0, 60.0, 60.0],
        "patch_size": 64,
        "context": 16,
        "mask_size": 16,
        "feature_dim": 8,
        "embedding_dim": 32,
        "score_branch": "shared",
        "score_dim": 16,
        "dropout": 0.5,
        "score_weight": 1 / 32,
        "octaves": (-0.5, 0.0),
        "max_size": 2000,
        "mask_threshold": 0.2,
        "max_proposals": 1000,
        **changed,
    }


def small(**changed: Any) -> DeepMask:
    torch.manual_seed(0)
    backbone = changed.pop("backbone", None) or narrow_resnet()
    return DeepMask(backbone=backbone, **settings(**changed))


def mask_patch(side: int = 96, mask: int = 32) -> dict[str, Any]:
    """A bright square in the middle of a patch whose window is two thirds as wide."""
    image = torch.full((3, side, side), 90.0)
    image[:, side // 3 : 2 * side // 3, side // 3 : 2 * side // 3] = 200
    target = -torch.ones(mask, mask)
    target[mask // 4 : 3 * mask // 4, mask // 4 : 3 * mask // 4] = 1
    return {"image": image, "head": "mask", "gt_mask": target}


def score_patch(label: float = 1.0) -> dict[str, Any]:
    return {"image": mask_patch()["image"], "head": "score", "label": label}
