"""The authors' code (github.com/dbolya/yolact) as a peer of ``instseg benchmark models``.

It runs as it is, on the CPU and with random weights: the calls by which it asks for a GPU do
nothing.  They are replaced for the whole process, so it needs one of its own.
"""

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode

from instseg.errors import ConfigError

_CONFIGS: dict[str, dict[int | None, str]] = {
    "build_resnet_backbone": {50: "yolact_resnet50_config", 101: "yolact_base_config"},
    "build_darknet_backbone": {None: "yolact_darknet53_config"},
}
"""Our backbone → its depth → the name of the authors' configuration."""
_SIDE, _CLASSES = 550, 80


Predict = Callable[[np.ndarray], Any]
"""Predicts on an (H, W, 3) uint8 image in BGR order, with masks of its size."""


def authors_predictor(cfg: CfgNode, folder: Path) -> Callable[[], Predict]:
    """A function that gets the authors' code ready; until it is called, nothing of that runs.

    Args:
        cfg: of the network that it is the peer of.
        folder: a checkout of the authors' code.
    Raises:
        ConfigError: the folder has other code, or the authors have no such network.
    """
    if not (folder / "yolact.py").is_file() or not (folder / "data" / "config.py").is_file():
        raise ConfigError(
            f"{folder} is no checkout of the authors' code; type: "
            "git clone https://github.com/dbolya/yolact"
        )
    return partial(_ready, _config_name(cfg), folder, cfg.MODEL.YOLACT.SCORE_THRESH_TEST)


def _ready(name: str, folder: Path, least_score: float) -> Predict:
    sys.path.insert(0, str(folder))
    torch.cuda.current_device = lambda: 0
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    config = import_module("data.config")
    config.set_cfg(name)
    config.cfg.mask_proto_debug = False  # an option of the authors' script
    net = import_module("yolact").Yolact()
    net.eval()  # which returns nothing
    net.detect.conf_thresh = least_score
    net.detect.use_fast_nms = True
    transform = import_module("utils.augmentations").FastBaseTransform()
    postprocess = import_module("layers.output_utils").postprocess

    @torch.no_grad()
    def predict(image: np.ndarray) -> Any:
        height, width = image.shape[:2]
        frame = torch.from_numpy(image).float()
        return postprocess(net(transform(frame[None])), width, height)

    return predict


def _config_name(cfg: CfgNode) -> str:
    """The authors' configuration of a network of ours."""
    depths = _CONFIGS.get(cfg.MODEL.BACKBONE.NAME, {})
    resnet = cfg.MODEL.BACKBONE.NAME == "build_resnet_backbone"
    name = depths.get(cfg.MODEL.RESNETS.DEPTH if resnet else None)
    usual = cfg.INPUT.SQUARE_SIZE == _SIDE and cfg.MODEL.YOLACT.NUM_CLASSES == _CLASSES
    if cfg.MODEL.META_ARCHITECTURE != "YOLACT" or name is None or not usual:
        raise ConfigError(
            "the authors have no such network; choose yolact/yolact_resnet50.yaml, "
            "yolact/yolact_base.yaml or yolact/yolact_darknet53.yaml"
        )
    return str(name)
