"""Train StarDist for some minutes and predict; runs in an environment of its own.

    python stardist_nuclei.py TRAIN_FOLDER TEST_FOLDER MODEL_FOLDER MINUTES

Each folder holds ``NAME.image.npy`` (H, W) and ``NAME.labels.npy``.  Writes
``NAME.predicted.npy``, a label image, beside the images to test on, whose labels it never reads.
The settings are those of StarDist's example for 2D images, with flips, quarter turns and changes of
brightness; a tenth of the training images chooses the weights and both thresholds.
"""

import sys
import time
from pathlib import Path

import numpy as np
from csbdeep.utils import normalize
from csbdeep.utils.tf import keras_import
from stardist import fill_label_holes
from stardist.models import Config2D, StarDist2D

Callback = keras_import("callbacks", "Callback")  # of the Keras that StarDist uses


class StopAt(Callback):
    """Ends the training at a time."""

    def __init__(self, end: float) -> None:
        super().__init__()
        self.end = end

    def on_train_batch_end(self, batch: int, logs: object = None) -> None:
        self.model.stop_training = time.monotonic() >= self.end

    def on_epoch_end(self, epoch: int, logs: object = None) -> None:
        self.model.stop_training = time.monotonic() >= self.end


def images_in(folder: Path) -> dict[str, np.ndarray]:
    """Name -> (H, W) image, from the 1st to the 99.8th percentile scaled to 0 ... 1."""
    files = sorted(folder.glob("*.image.npy"))
    return {file.name.split(".")[0]: normalize(np.load(file), 1, 99.8) for file in files}


def augment(image: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A random flip and quarter turn of both, and another brightness and contrast."""
    turns, flip = np.random.randint(4), np.random.rand() < 0.5
    image, labels = np.rot90(image, turns), np.rot90(labels, turns)
    if flip:
        image, labels = image[:, ::-1], labels[:, ::-1]
    return image * np.random.uniform(0.6, 2) + np.random.uniform(-0.2, 0.2), labels


def main(train: Path, test: Path, folder: Path, minutes: float) -> None:
    end = time.monotonic() + 60 * minutes
    np.random.seed(1)
    images = images_in(train)
    labels = {n: fill_label_holes(np.load(train / f"{n}.labels.npy")) for n in images}
    names = sorted(images)
    held_out = names[::10]
    learned = [name for name in names if name not in held_out] or held_out
    config = Config2D(
        n_rays=32,
        grid=(2, 2),
        n_channel_in=1,
        train_patch_size=(256, 256),
        train_batch_size=4,
        train_reduce_lr={"factor": 0.5, "patience": 8, "min_delta": 0},
        train_tensorboard=False,
    )
    model = StarDist2D(config, name=folder.name, basedir=str(folder.parent))
    model.prepare_for_training()
    model.callbacks.append(StopAt(end))
    model.train(
        [images[name] for name in learned],
        [labels[name] for name in learned],
        validation_data=([images[name] for name in held_out], [labels[name] for name in held_out]),
        augmenter=augment,
        epochs=100_000,
        steps_per_epoch=50,
    )
    model.optimize_thresholds(
        [images[name] for name in held_out], [labels[name] for name in held_out]
    )
    for name, image in images_in(test).items():
        predicted, _ = model.predict_instances(image)
        np.save(test / f"{name}.predicted.npy", predicted.astype(np.int32))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4]))
