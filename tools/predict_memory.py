"""Measure the memory of ``instseg predict`` on a long video or a large folder (Linux: /proc).

Writes untrained weights and a synthetic clip, or with --images a folder of small images.  Then it
predicts and prints the memory of the process as it goes on.  The untrained model gives every image
as many instances as it may.
"""

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from instseg import Predictor, cli
from instseg.data.videos import Frame, VideoWriter

SIZE = (240, 320)
# A small network, so that decoding, drawing and recording are a good part of the work.
SMALL = ["MODEL.DEVICE", "cpu", "INPUT.SQUARE_SIZE", "64", "TEST.DETECTIONS_PER_IMAGE", "5"]
SMALL += ["MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"]


def write_clip(path: Path, frames: int) -> None:
    """Write a video of a bright square that wanders over noise."""
    noise = np.random.default_rng(0).integers(0, 100, (*SIZE, 3), dtype=np.uint8)
    with VideoWriter(path, 25) as writer:
        for number in range(frames):
            image = noise.copy()
            left, top = number * 5 % (SIZE[1] - 40), number * 3 % (SIZE[0] - 40)
            image[top : top + 40, left : left + 40] = (60, 200, 255)
            writer.write(Frame(image, number / 25))


def write_images(folder: Path, count: int) -> None:
    """Write one image of noise under many names."""
    folder.mkdir()
    first = folder / "0.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(first)
    for number in range(1, count):
        os.link(first, folder / f"{number}.png")


def resident() -> float:
    """Megabytes that this process has in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


class Sampler(threading.Thread):
    """Notes and prints memory whenever another ``step`` frames stand in a file of results.

    Attributes:
        samples: (frames or images done, megabytes).
    """

    def __init__(self, results: Path, step: int) -> None:
        super().__init__(daemon=True)
        self.samples: list[tuple[int, float]] = []
        self._results = results
        self._step = step
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._results.exists() and not self._ended.wait(0.05):
            pass
        done, due = -1, self._step  # the first line is the header
        with self._results.open() as file:
            while not self._ended.is_set():
                # Read by line, which keeps no more than one of them.
                for line in file:
                    done += line.endswith("\n")
                if done >= due:
                    self.samples.append((done, resident()))
                    print(f"{done:7d} done  {self.samples[-1][1]:8.1f} MB", flush=True)
                    due = done - done % self._step + self._step
                time.sleep(0.05)

    def end(self) -> None:
        self._ended.set()
        self.join()


def measure(
    config: str,
    overrides: Sequence[str],
    frames: int,
    step: int,
    folder: Path,
    *,
    images: bool = False,
) -> list[tuple[int, float]]:
    """Predict on a clip of ``frames`` frames, or on as many images.

    Returns:
        (frames or images done, megabytes) about every ``step``.
    """
    if images:
        inputs, written = folder / "images", folder / "results" / "categories.jsonl"
        write_images(inputs, frames)
    else:
        inputs, written = folder / "clip.mp4", folder / "results" / "clip.jsonl"
        write_clip(inputs, frames)
    torch.manual_seed(0)
    model = Predictor(config, overrides=overrides).model
    torch.save({"model": model.state_dict()}, folder / "weights.pth")
    sampler = Sampler(written, step)
    sampler.start()
    files = ["--weights", folder / "weights.pth", "--input", inputs]
    options = ["--config-file", config, *files, "--output", folder / "results", "--confidence", "0"]
    try:
        status = cli.main(["predict", *map(str, options), "--", *overrides])
    finally:
        sampler.end()
    if status:
        raise SystemExit(f"prediction ended with status {status}")
    return sampler.samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", default="yolact/yolact_shapes.yaml", metavar="FILE")
    parser.add_argument("--frames", type=int, default=10_000, metavar="N")
    parser.add_argument("--images", action="store_true", help="as many images in a folder")
    parser.add_argument("overrides", nargs="*", default=SMALL, metavar="KEY VALUE")
    args = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        step = max(args.frames // 10, 1)
        samples = measure(
            *(args.config_file, args.overrides, args.frames, step, Path(folder)),
            images=args.images,
        )
    growth = samples[-1][1] - samples[0][1]
    print(f"grown by {growth:.1f} MB in {samples[-1][0] - samples[0][0]}")
    print(f"{args.frames / (time.perf_counter() - start):.1f} a second", file=sys.stderr)


if __name__ == "__main__":
    main()
