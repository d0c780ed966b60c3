"""Draw the results of a training with the discriminative loss.

Each row shows an image of ``DATASETS.TEST``, its embedding in colours (of the network on the image
without resizing), the predicted instances and the ground truth.
"""

import argparse
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from detectron2.data import DatasetCatalog
from torch import Tensor

from instseg import Predictor
from instseg.data.images import read_image
from instseg.masks import decode
from instseg.visualize import gallery

Pixels = npt.NDArray[np.uint8]
_BACKGROUND = 40
_GOLDEN_ANGLE = 0.618034  # of the colour circle: neighbours in a list differ most


def embedding_colours(embeddings: Tensor, foreground: Tensor) -> Pixels:
    """The three main directions of the foreground's embeddings as blue, green, red.

    Args:
        embeddings: (D, h, w).
        foreground: (h, w) bool; the rest is dark grey.
    Returns:
        (h, w, 3) uint8.
    """
    image = np.full((*foreground.shape, 3), _BACKGROUND, dtype=np.uint8)
    points = embeddings[:, foreground].T.double()
    if not len(points):
        return image
    points = points - points.mean(dim=0)
    _, directions = torch.linalg.eigh(points.T @ points)
    main = points @ directions[:, -3:].flip(1)
    low, high = (main.quantile(share, dim=0) for share in (0.02, 0.98))
    colours = ((main - low) / (high - low).clamp(min=1e-6)).clamp(0, 1) * 215 + _BACKGROUND
    image[foreground.numpy(), : main.shape[1]] = colours.to(torch.uint8).numpy()
    return image


def label_colours(masks: npt.NDArray[np.bool_]) -> Pixels:
    """(N, h, w) masks → (h, w, 3) uint8, each mask in another colour."""
    image = np.full((*masks.shape[1:], 3), _BACKGROUND, dtype=np.uint8)
    for number, mask in enumerate(masks):
        hue = round(180 * (number * _GOLDEN_ANGLE % 1)) % 180
        colour = cv2.cvtColor(np.array([[[hue, 170, 235]]], dtype=np.uint8), cv2.COLOR_HSV2BGR)
        image[mask] = colour[0, 0]
    return image


def tiles(predictor: Predictor, record: dict[str, Any]) -> list[Pixels]:
    """Image, embedding, predicted instances and ground truth of one record."""
    pixels = read_image(record["file_name"])
    model: Any = predictor.model
    channels = pixels[:, :, ::-1] if predictor.cfg.INPUT.FORMAT == "RGB" else pixels
    image = torch.from_numpy(channels.transpose(2, 0, 1).copy()).to(model.device).float()
    with torch.no_grad():
        maps = model.maps([(image - model.pixel_mean) / model.pixel_std])
    height, width = (-(-side // model.output_stride) for side in pixels.shape[:2])
    foreground = maps.semantic[0, :, :height, :width].argmax(dim=0).cpu() > 0
    colours = embedding_colours(maps.embeddings[0, :, :height, :width].cpu(), foreground)
    size = pixels.shape[1::-1]
    predicted_masks = predictor(pixels)["instances"].pred_masks.cpu().numpy()
    decoded = [
        decode(annotation["segmentation"], *pixels.shape[:2])
        for annotation in record["annotations"]
    ]
    true_masks = np.array(decoded, dtype=bool).reshape(-1, *pixels.shape[:2])
    return [
        np.ascontiguousarray(pixels),
        np.asarray(cv2.resize(colours, size, interpolation=cv2.INTER_NEAREST), dtype=np.uint8),
        label_colours(predicted_masks),
        label_colours(true_masks),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="configuration file")
    parser.add_argument("weights", help="checkpoint")
    parser.add_argument("figure", type=Path, help="PNG to write")
    parser.add_argument("--count", type=int, default=4, help="images")
    parser.add_argument("--scale", type=int, default=1, help="times as large")
    args = parser.parse_args()
    predictor = Predictor(args.config, args.weights)
    records = DatasetCatalog.get(predictor.cfg.DATASETS.TEST[0])[: args.count]
    rows = [tile for record in records for tile in tiles(predictor, record)]
    sheet = gallery(rows, columns=4)
    size = (sheet.shape[1] * args.scale, sheet.shape[0] * args.scale)
    args.figure.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(args.figure), cv2.resize(sheet, size, interpolation=cv2.INTER_NEAREST)):
        parser.error(f"{args.figure} cannot be written")


if __name__ == "__main__":
    main()
