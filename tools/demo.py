"""``make demo``: draw all shipped models, train Mask R-CNN on synthetic shapes, count coins.

Writes ``summary.json``, ``gallery.png`` and ``coins.png`` into ``output/demo``, and
``side_by_side.png`` if models are shipped.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import skimage.data
from figures import draw_gallery
from scipy.ndimage import binary_fill_holes
from scipy.ndimage import label as label_regions
from side_by_side import of_labels, write
from skimage.filters import sobel
from skimage.segmentation import watershed

from instseg import Predictor
from instseg.data.images import read_image, read_labels
from instseg.processes import end_with_make, run
from instseg.shipped import shipped_models
from instseg.visualize import draw_instances

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs/mask_rcnn/mask_rcnn_shapes.yaml"
MIN_SCORE = 0.5
# The photograph is larger than the training images: keep its scale, allow more instances.
COINS_OVERRIDES = [
    *("INPUT.MIN_SIZE_TEST", 303),
    *("TEST.DETECTIONS_PER_IMAGE", 100),
    *("MODEL.RPN.PRE_NMS_TOPK_TEST", 1000),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", 500),
]


def draw_shipped(file: Path) -> str:
    """Draw what every shipped model for nuclei finds on nuclei and on coins; returns what to tell.

    ``docs/nuclei.png`` is an image of BBBC038v1 (CC0), ``docs/nuclei_labels.png`` its ground truth.
    """
    nuclei = of_labels(
        read_image(ROOT / "docs/nuclei.png"), read_labels(ROOT / "docs/nuclei_labels.png")
    )
    photograph = skimage.data.coins()
    masks = coin_masks(photograph)
    labels = (masks * np.arange(1, len(masks) + 1)[:, None, None]).max(axis=0)
    coins = of_labels(cv2.cvtColor(photograph, cv2.COLOR_GRAY2BGR), labels)
    models = [model for model in shipped_models() if model.data == "nuclei_train"]
    return write(file, [nuclei, coins], models)


def train(output: Path, overrides: list[str]) -> dict[str, float]:
    """Run ``train_net.py`` and return the metrics of its final evaluation, in per cent."""
    run(
        [sys.executable, ROOT / "train_net.py", "--config-file", CONFIG]
        + ["OUTPUT_DIR", str(output), *overrides]
    )
    metrics: dict[str, float] = {}
    for line in (output / "metrics.json").read_text().splitlines():
        metrics.update(json.loads(line))
    return {key: metrics[key] for key in ("bbox/AP", "segm/AP", "segm/AP50")}


def coin_masks(photograph: np.ndarray) -> np.ndarray:
    """(24, H, W) bool coins by scikit-image's edge and watershed recipe.

    Source: scikit-image's user guide, "Image segmentation", region-based part.
    """
    markers = np.zeros_like(photograph)
    markers[photograph < 30] = 1
    markers[photograph > 150] = 2
    coins = binary_fill_holes(watershed(sobel(photograph), markers) == 2)
    labels, count = label_regions(coins)
    masks = np.stack([labels == i for i in range(1, count + 1)])
    return masks[masks.sum(axis=(1, 2)) > 100]


def count_matched(predicted: np.ndarray, coins: np.ndarray) -> int:
    """Number of ``coins`` (K, H, W) that ``predicted`` masks (N, H, W) match at IoU >= 0.5."""
    overlap = np.einsum("nhw,khw->nk", predicted.astype(np.float32), coins.astype(np.float32))
    union = predicted.sum(axis=(1, 2))[:, None] + coins.sum(axis=(1, 2)) - overlap
    # Coins do not overlap, so at IoU >= 0.5 a prediction matches one coin at most.
    return int((overlap / union >= 0.5).any(axis=0).sum())


def count_coins(weights: str, overrides: list[str], overlay: Path) -> tuple[int, int]:
    """Segment ``skimage.data.coins()``, draw the result, return (number of coins, coins found)."""
    photograph = skimage.data.coins()
    predictor = Predictor(CONFIG, weights, overrides=[*COINS_OVERRIDES, *overrides])
    instances = predictor(photograph)["instances"].to("cpu")
    instances = instances[instances.scores >= MIN_SCORE]
    image = cv2.cvtColor(photograph, cv2.COLOR_GRAY2BGR)
    cv2.imwrite(str(overlay), draw_instances(image, instances, predictor.class_names))
    coins = coin_masks(photograph)
    return len(coins), count_matched(instances.pred_masks.numpy(), coins)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("output/demo"))
    parser.add_argument("overrides", nargs="*", help="configuration, KEY VALUE ...")
    args = parser.parse_args()
    end_with_make()
    start = time.monotonic()
    print(draw_shipped(args.output / "side_by_side.png"), flush=True)
    summary: dict[str, float] = train(args.output, args.overrides)
    weights = str(args.output / "model_final.pth")

    coins, matched = count_coins(weights, args.overrides, args.output / "coins.png")
    summary["coins_found"] = matched
    predictor = Predictor(CONFIG, weights, overrides=args.overrides)
    cv2.imwrite(str(args.output / "gallery.png"), draw_gallery(predictor))
    summary["seconds"] = round(time.monotonic() - start, 1)
    (args.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")

    print(
        f"shapes_val: box AP {summary['bbox/AP']:.1f}, mask AP {summary['segm/AP']:.1f}, ", end=""
    )
    print(f"mask AP50 {summary['segm/AP50']:.1f}")
    print(f"skimage.data.coins(): {matched} of {coins} coins found at IoU >= 0.5")
    print(f"{summary['seconds']:.0f} s; images and summary.json are in {args.output}")


if __name__ == "__main__":
    main()
