"""A folder of shipped models with one that is tiny and untrained."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model

import instseg
from instseg import shipped
from instseg.categories import Categories
from instseg.checkpoint import save_safetensors
from instseg.checkpoint.half import halve
from instseg.shipped import Measurement, ShippedModel

NAME = "tiny_shapes"
CONFIG = "mask_rcnn/mask_rcnn_shapes.yaml"
OVERRIDES = (
    *("MODEL.DEVICE", "cpu"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "16"),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", "4"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "8"),
    *("MODEL.FPN.OUT_CHANNELS", "8"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "8"),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", "8"),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
)
CLASSES = Categories((3, 5, 7), ("disc", "box", "wedge"))


def save_tiny(path: Path) -> torch.nn.Module:
    """Write the weights of a random model in half precision; returns the model in float32."""
    torch.manual_seed(0)
    cfg = instseg.load_cfg(CONFIG, [*OVERRIDES, "MODEL.WEIGHTS", ""])
    model: torch.nn.Module = build_model(cfg)
    extra = {"categories": CLASSES.as_coco(), "largest_instance": 60}
    save_safetensors(path, halve(model.state_dict()).weights, extra)
    return model


def entry(file: Path, **changes: Any) -> ShippedModel:
    """The entry of the manifest for the file that :func:`save_tiny` wrote."""
    content = file.read_bytes()
    model = ShippedModel(
        name=NAME,
        system="mask_rcnn",
        file=file.name,
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
        config=CONFIG,
        overrides=OVERRIDES,
        data="shapes_train",
        licence="Apache-2.0",
        commit="0123abc",
        command=f"python train_net.py --config-file configs/{CONFIG}",
        minutes=1.5,
        machine="a machine",
        classes=CLASSES.names,
        trunk="",
        parameters=1234,
        measurements=(Measurement("a command", {"segm/AP": 12.34, "ms": 5.6}),),
        other_seeds=(),
        check={"segm/AP": 0.0},
        check_images=2,
    )
    return replace(model, **changes)


def make(folder: Path, **changes: Any) -> ShippedModel:
    """Fill a folder with the tiny model and its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{NAME}.safetensors"
    save_tiny(file)
    model = entry(file, **changes)
    shipped.write_manifest(folder, [model])
    return model


def ship(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Have instseg ship the models of ``folder``."""
    monkeypatch.setattr(shipped, "zoo_folder", lambda: folder)


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest as JSON."""
    content: dict[str, Any] = json.loads((folder / shipped.MANIFEST).read_text())
    return content
