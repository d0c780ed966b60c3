"""Measure memory and time of one large image, system by system; needs /proc (Linux).

Each system runs in its own process, as its paper's network with random weights that drops no
instance for its score.  Memory is the peak of the prediction beside the model.
"""

import argparse
import time
from collections.abc import Sequence

import numpy as np
import torch

from instseg import Predictor
from instseg.benchmark.rows import forget_peak, in_fresh_process, peak_resident
from instseg.modeling import MASK_FORMS
from instseg.projects import projects

# Score thresholds that let every instance of a random network pass.
ANY = ["MODEL.WEIGHTS", "", *(word for project in projects() for word in project.any_score)]


def random_image(megapixels: float) -> np.ndarray:
    """Blots of 50 x 50 pixels, 4 wide to 3 high."""
    scale = (megapixels * 1e6 / 12) ** 0.5 / 50
    blots = np.random.default_rng(0).integers(
        0, 256, (round(3 * scale), round(4 * scale), 3), dtype=np.uint8
    )
    return blots.repeat(50, axis=0).repeat(50, axis=1)


def measure(config: str, overrides: Sequence[str], megapixels: float, masks: str) -> float | None:
    """Predict, print a row of the table, and return the mebibytes; None where unknown."""
    torch.manual_seed(0)
    predictor = Predictor(config, overrides=[*ANY, *overrides], masks=masks)
    image = random_image(megapixels)
    forget_peak()
    before, start = peak_resident(), time.perf_counter()
    count = len(predictor(image)["instances"])
    seconds, peak = time.perf_counter() - start, peak_resident()
    mebibytes = None if before is None or peak is None else peak - before
    size = "x".join(map(str, image.shape[1::-1]))
    print(f"| {config} | {size} | {count} | {mebibytes:.0f} MiB | {seconds:.1f} s |", flush=True)
    return mebibytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    references = [project.reference for project in projects()]
    parser.add_argument("--config-file", nargs="+", default=references, metavar="FILE")
    parser.add_argument("--megapixels", type=float, default=4, metavar="N")
    parser.add_argument("--masks", choices=MASK_FORMS, default="dense")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE")
    args = parser.parse_args()
    print(
        "| configuration | image | instances | memory | time |\n|---|---|---|---|---|", flush=True
    )
    for config in args.config_file:
        in_fresh_process(measure, config, args.overrides, args.megapixels, args.masks)


if __name__ == "__main__":
    main()
