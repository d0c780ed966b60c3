"""Draw the stages of SGN for its README, one row per image of ``shapes_val``.

A row shows image, breakpoints, lines, components and instances.
"""

import argparse
import colorsys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from torch import Tensor

from instseg import load_cfg
from instseg.checkpoint import Checkpointer
from instseg.data.mappers import build_train_mapper
from instseg.ops.sgn_lines import END, START
from instseg.visualize import gallery

SCALE = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="configuration file")
    parser.add_argument("weights", help="weight file")
    parser.add_argument("figure", type=Path, help="PNG file to write")
    parser.add_argument("--images", type=int, default=4, help="number of rows")
    parser.add_argument("opts", nargs="*", help="KEY VALUE pairs, after --")
    args = parser.parse_args()
    cfg = load_cfg(args.config, args.opts)
    model = build_model(cfg).eval()
    Checkpointer(model, inference=True).load(args.weights)
    mapper = build_train_mapper(cfg, augment=False)
    tiles = []
    for record in DatasetCatalog.get("shapes_val")[: args.images]:
        tiles += stages(model, mapper(record))
    cv2.imwrite(str(args.figure), gallery(tiles, columns=5))


def stages(model: Any, item: dict[str, Any]) -> list[np.ndarray]:
    """The five images of a row, BGR."""
    image = (item["image"].float() - model.pixel_mean) / model.pixel_std
    result, _ = model.find(image, item)
    pixels = item["image"].permute(1, 2, 0).numpy()
    # Green where an instance begins, red where it ends, inside components only.
    breaks = pixels // 3
    inside = (result.components >= 0).numpy()
    for label, channel in ((START, 1), (END, 0)):
        marked = (result.labels == label).any(dim=0).numpy() & inside
        breaks[marked] = 0
        breaks[marked, channel] = 255
    maps = [painted(pixels, x) for x in (result.lines, result.components, result.numbers)]
    return [
        cv2.resize(x[:, :, ::-1], None, fx=SCALE, fy=SCALE, interpolation=cv2.INTER_NEAREST)
        for x in (pixels, breaks, *maps)
    ]


def painted(image: np.ndarray, numbers: Tensor) -> np.ndarray:
    """The numbers as colours that differ between neighbours, on a darkened image."""
    count = int(numbers.max()) + 1 if numbers.numel() else 0
    # Hues a golden section apart never come close within a few numbers.
    hues = [colorsys.hsv_to_rgb(0.618034 * i % 1, 0.6 + 0.4 * (i % 2), 1.0) for i in range(count)]
    colours = (255 * np.array([*hues, (0, 0, 0)])).astype(np.uint8)
    indices = numbers.cpu().numpy()
    return np.where((indices >= 0)[:, :, None], colours[indices], image // 3).astype(np.uint8)


if __name__ == "__main__":
    with torch.no_grad():
        main()
