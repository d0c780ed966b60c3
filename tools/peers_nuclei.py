"""Train StarDist on the split of the nuclei set for some minutes, and score it as our models.

    python tools/peers_nuclei.py --minutes 25 --output output/stardist

Makes a virtual environment in ``OUTPUT/venv`` and installs StarDist and TensorFlow there, since
instseg does not depend on them; ``--python`` takes an environment of yours.  Trains by
``tools/stardist_nuclei.py`` on ``nuclei_train``, chooses thresholds on it, predicts ``nuclei_val``,
and prints the contest's metric of both evaluations as JSON, which also stands in
``OUTPUT/result.json``.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instseg.data.build import register_builtin_datasets, register_dataset
from instseg.data.dataset import DataSet, load
from instseg.data.images import read_image
from instseg.errors import DatasetError, InstsegError, ProcessError, one_line
from instseg.evaluation.contest import THRESHOLDS, image_scores, true_label_map
from instseg.processes import end_with, run

WORKER = Path(__file__).with_name("stardist_nuclei.py")
PACKAGES = ("stardist==0.9.2", "tensorflow")


def make_environment(folder: Path) -> Path:
    """An environment with StarDist; returns its Python.  One that is complete is used again."""
    python = folder / "bin" / "python"
    done = folder / ".installed"
    if not done.is_file():
        venv.create(folder, with_pip=True, clear=True)
        run([python, "-m", "pip", "install", "--quiet", *PACKAGES])
        done.touch()
    return python


def write_images(dataset: DataSet, folder: Path, count: int | None = None) -> list[str]:
    """Write grey images and label images as NumPy files; returns their names without ending."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    names = []
    for number, record in enumerate(dataset.records[:count]):
        name = f"{number:04d}"
        image = read_image(record["file_name"])
        np.save(folder / f"{name}.image.npy", image.mean(axis=2, dtype=np.float32))
        np.save(folder / f"{name}.labels.npy", true_label_map(record))
        names.append(name)
    return names


def score(names: Sequence[str], folder: Path) -> dict[str, float]:
    """The contest's metric of ``NAME.predicted.npy``, in per cent.

    Raises:
        DatasetError: a prediction is missing or has another size than its image.
    """
    scores = []
    for name in names:
        gt_labels = np.load(folder / f"{name}.labels.npy")
        file = folder / f"{name}.predicted.npy"
        if not file.is_file():
            raise DatasetError(f"{file} is missing; the peer predicted fewer images than it got")
        predicted = np.load(file)
        if predicted.shape != gt_labels.shape:
            raise DatasetError(f"{file} is {predicted.shape}, its image {gt_labels.shape}")
        scores.append(image_scores(gt_labels, predicted))
    means = 100 * np.mean(scores, axis=0)
    result = {"contest/AP": float(means.mean())}
    for threshold, mean in zip(THRESHOLDS, means, strict=True):
        result[f"contest/AP{round(100 * threshold)}"] = float(mean)
    return {name: round(value, 2) for name, value in result.items()}


def compare(
    output: Path, minutes: float, python: Path | None, data: Sequence[str], count: int | None
) -> dict[str, Any]:
    """Train, predict and score.

    Args:
        output: folder of everything.
        minutes: of the training; choosing thresholds and predicting come on top.
        python: of an environment with StarDist; None makes one.
        data: names of the sets to train and to test on.
        count: images of each; None is all.
    """
    register_builtin_datasets()
    folders = [output / "train", output / "val"]
    names = []
    for name, folder in zip(data, folders, strict=True):
        register_dataset(name)
        names.append(write_images(load(name), folder, count))
    environment = python or make_environment(output / "venv")
    start = time.monotonic()
    command = [environment, WORKER, *folders, output / "model", str(minutes)]
    this_process = os.getpid()
    done = subprocess.run(
        [str(word) for word in command], preexec_fn=lambda: end_with(this_process)
    )
    if done.returncode:
        raise ProcessError(f"the peer ended with status {done.returncode}; see its output above")
    result: dict[str, Any] = {"peer": "StarDist", "minutes": minutes}
    result["minutes_in_all"] = round((time.monotonic() - start) / 60, 2)
    result |= score(names[1], folders[1])
    (output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--minutes", type=float, default=25, help="of training (default %(default)s)")
    add("--output", type=Path, default=Path("output/stardist"), metavar="DIR")
    add("--python", type=Path, metavar="FILE", help="Python of an environment with StarDist")
    add("--data", nargs=2, default=["nuclei_train", "nuclei_val"], metavar="NAME")
    add("--count", type=int, metavar="N", help="images of each set (default: all)")
    args = parser.parse_args(argv)
    try:
        result = compare(args.output, args.minutes, args.python, args.data, args.count)
    except InstsegError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
