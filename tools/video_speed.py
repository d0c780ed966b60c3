"""Time a video model with random weights on key frames and on the frames between.

Prints milliseconds of both, their ratio, and frames per second at some intervals of key frames.
"""

import argparse
import statistics

import torch
from detectron2.modeling import build_model

from instseg import load_cfg
from instseg.inference.optimize import optimize
from instseg.modeling import as_video, now

INTERVALS = 1, 2, 5, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="e.g. yolact_edge/yolact_edge_vid.yaml")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    cfg = load_cfg(arguments.config, ["MODEL.WEIGHTS", ""])
    model = build_model(cfg).eval()
    for form in ("eager", "folded"):
        if form == "folded":
            optimize(model)
        key, between = measure(model, cfg.INPUT.SQUARE_SIZE, arguments.repeats)
        print(f"{form}: {key:.0f} ms, between {between:.0f} ms, ratio {key / between:.2f}")
        for interval in INTERVALS:
            rate = 1000 * interval / (key + (interval - 1) * between)
            print(f"  interval {interval}: {rate:.2f} frames/s")


@torch.no_grad()
def measure(model: torch.nn.Module, side: int, repeats: int) -> tuple[float, float]:
    """Median milliseconds of a key frame and of a frame between two."""
    video = as_video(model)
    if video is None:
        raise SystemExit("the frames of this model share no work")
    images = torch.randn(1, 3, side, side, device=next(model.parameters()).device)
    _, state = video.keyframe(images)
    video.between(images, state)
    times = []
    for _ in range(repeats):
        start = now()
        video.keyframe(images)
        middle = now()
        video.between(images, state)
        times.append((middle - start, now() - middle))
    key, between = (1000 * statistics.median(column) for column in zip(*times, strict=True))
    return key, between


if __name__ == "__main__":
    main()
