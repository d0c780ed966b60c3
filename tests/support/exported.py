"""Predictors of tiny networks, exported as ONNX."""

import json
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn

import instseg
from instseg.categories import Categories
from instseg.export import export
from instseg.inference.predictor import Predictor
from instseg.projects.yolact_plus import DeformableConv2d
from tests.support.yolact_tiny import TINY, decided, tiny_predictor

SMALL = [
    *(*TINY, "MODEL.BACKBONE.NAME", "build_mobilenet_v2_backbone", "MODEL.MOBILENET.WIDTH", 0.25),
    *("MODEL.YOLACT_EDGE.FLOW_CHANNELS", 4, "MODEL.YOLACT_EDGE.KEYFRAME_INTERVAL", 3),
]


class Case:
    """A predictor, and the ONNX files made of it."""

    def __init__(self, paper: str, folder: Path) -> None:
        self.predictor = tiny_predictor(paper)
        if paper == "yolact_plus":
            stage = self.predictor.model.backbone.stage5
            stage[0] = DeformableConv2d(stage[0])
        decided(self.predictor.model)
        self.predictor.categories = Categories((7, 12, 30), ("a", "b", "c"))
        self.predictor.largest_instance = 5
        self.path = folder / f"{paper}.onnx"
        self.files = _exported(self.predictor, self.path)


class VideoCase:
    """A predictor, and the files made of it."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        config = "yolact_edge/yolact_edge_shapes_video.yaml"
        self.predictor = Predictor(instseg.load_cfg(config, SMALL))
        model: Any = self.predictor.model
        _shorten(model.backbone.features)
        decided(model)
        for motion in model.flow_net.predictors:
            torch.nn.init.normal_(motion.flow.weight, std=0.5)
        self.model = model
        self.path = folder / "edge.onnx"
        self.files = _exported(self.predictor, self.path)


def _exported(predictor: Predictor, path: Path) -> list[Path]:
    """The files of a network, which one of the processes of this run of tests exports."""
    path.parent.mkdir(exist_ok=True)
    listing = path.parent / "files.json"
    with FileLock(path.parent / ".lock"):
        if not listing.exists():
            files = export(predictor, "onnx", path)
            listing.write_text(json.dumps([str(file) for file in files]))
    return [Path(file) for file in json.loads(listing.read_text())]


def _shorten(blocks: nn.Sequential) -> None:
    """Empty all blocks of a MobileNetV2 that repeat another but one: tracing takes its time."""
    repeated = [i for i, block in enumerate(blocks) if getattr(block, "use_res_connect", False)]
    for number in repeated[1:]:
        blocks[number] = nn.Identity()
