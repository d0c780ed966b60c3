"""Write a data set as images and label images, for a ``labels:`` name.

``python tools/label_images.py nuclei_val OUTPUT`` writes ``OUTPUT/images``, ``OUTPUT/labels`` and
``OUTPUT/classes.csv``.  Files are numbered in the order of the images, so that a training on
``labels:OUTPUT/images:OUTPUT/labels:OUTPUT/classes.csv`` draws the same images as one on the
original.  Instances are numbered in their order.  Where two overlap, the first one has the pixels.
"""

import argparse
import csv
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from instseg.config.nodes import get_cfg
from instseg.data.build import register_dataset
from instseg.data.dataset import load
from instseg.data.images import read_image
from instseg.masks import decode


def write(name: str, output: Path) -> str:
    """Write the data set ``name``; returns the name of the result."""
    get_cfg()  # registers the built-in data sets
    register_dataset(name)
    dataset = load(name)
    for folder in ("images", "labels"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    lost = total = 0
    with (output / "classes.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("file", "label", "class"))
        for number, record in enumerate(dataset.records):
            image = Path(record["file_name"])
            height, width = record["height"], record["width"]
            if image.is_file():
                shutil.copyfile(image, output / f"images/{number:06d}{image.suffix}")
            else:
                pixels = Image.fromarray(read_image(record["file_name"], format="RGB"))
                pixels.save(output / f"images/{number:06d}.png")
            labels = np.zeros((height, width), dtype=np.uint16)
            for label, annotation in enumerate(record["annotations"], start=1):
                mask = decode(annotation["segmentation"], height, width)
                lost += np.count_nonzero(mask & (labels > 0))
                total += np.count_nonzero(mask)
                labels[mask & (labels == 0)] = label
                kind = dataset.classes[annotation["category_id"]]
                table.writerow((f"{number:06d}", label, kind))
            Image.fromarray(labels).save(output / f"labels/{number:06d}.png")
    print(f"{len(dataset.records)} images; {lost} of {total} pixels belong to an earlier instance")
    return f"labels:{output}/images:{output}/labels:{output}/classes.csv"


def main() -> None:
    """Write a data set and print the name of the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", help="a registered name, or coco:PATH:IMAGE_ROOT")
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    print(write(arguments.dataset, arguments.output))


if __name__ == "__main__":
    main()
