"""Draw a training's losses and its predictions on ``shapes_val``, for a project's README.

Writes ``NAME_curves.png`` and ``NAME_gallery.png``.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
from detectron2.data import DatasetCatalog
from detectron2.structures import Instances

from instseg import Predictor
from instseg.data.images import read_image
from instseg.masks import encode, ious
from instseg.visualize import OverlayStyle, draw_instances, gallery

MIN_SCORE = 0.5


def draw_curves(metrics_file: Path, image: Path) -> None:
    """Plot every ``loss_*`` of a ``metrics.json`` over the iterations."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves: dict[str, dict[int, float]] = defaultdict(dict)  # a resumed training has some twice
    for line in metrics_file.read_text().splitlines():
        values = json.loads(line)
        for name, value in values.items():
            if name.startswith("loss_"):
                curves[name][values["iteration"]] = value
    figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
    for name, curve in sorted(curves.items()):
        axes.plot(list(curve), list(curve.values()), label=name)
    axes.set(xlabel="iteration", yscale="log")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(image, dpi=100)


def draw_gallery(predictor: Predictor, count: int = 8, proposals: bool = False) -> np.ndarray:
    """The first images of ``shapes_val`` with the predicted instances, twice as large.

    The network sees them at their own size; labels would cover most of an image as small as that.

    Args:
        predictor: of a model for the shapes.
        count: images.
        proposals: draw the best proposal for each instance, as papers on proposals do, instead of
            all instances with a score of at least ``MIN_SCORE``.
    """
    tiles = []
    for record in DatasetCatalog.get("shapes_val")[:count]:
        image = read_image(record["file_name"])
        large = cv2.resize(image, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
        instances = predictor(large)["instances"].to("cpu")
        if proposals:
            instances = best_per_instance(instances, record)
        else:
            instances = instances[instances.scores >= MIN_SCORE]
        style = OverlayStyle(labels="none" if proposals else "auto")
        tiles.append(draw_instances(large, instances, predictor.class_names, style=style))
    return gallery(tiles, columns=4)


def best_per_instance(instances: Instances, record: dict[str, Any]) -> Instances:
    """The predictions, at twice the size, that overlap most with an annotation of ``record``."""
    masks = [encode(mask) for mask in instances.pred_masks[:, ::2, ::2]]
    overlaps = ious(masks, [annotation["segmentation"] for annotation in record["annotations"]])
    return instances[sorted(set(overlaps.argmax(axis=0).tolist()))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="configuration file")
    parser.add_argument("output", type=Path, help="OUTPUT_DIR of the training")
    parser.add_argument("figures", type=Path, help="FOLDER/NAME of the figures")
    parser.add_argument("--proposals", action="store_true", help="draw the best one per instance")
    args = parser.parse_args()
    predictor = Predictor(args.config, str(args.output / "model_final.pth"))
    name = str(args.figures)
    draw_curves(args.output / "metrics.json", Path(f"{name}_curves.png"))
    cv2.imwrite(f"{name}_gallery.png", draw_gallery(predictor, proposals=args.proposals))


if __name__ == "__main__":
    main()
