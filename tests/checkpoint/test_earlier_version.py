"""What an earlier version left is used as it is; see ``tests/golden/checkpoint``."""

import json
import shutil
from pathlib import Path

import torch

from instseg import Predictor
from instseg.checkpoint import read_weights
from tests.conftest import GOLDEN, close
from tests.support import programs
from tests.support.yolact_tiny import PHOTO

RUN = GOLDEN / "checkpoint"


def test_a_checkpoint_of_an_earlier_version_gives_its_predictions() -> None:
    predictor = Predictor(str(RUN / "config.yaml"), str(RUN / "model_final.pth"))
    instances = predictor(PHOTO)["instances"]
    expected = json.loads((RUN / "predictions.json").read_text())
    assert predictor.class_names == expected["names"]
    assert instances.pred_classes.tolist() == expected["classes"]
    close(instances.scores.double(), expected["scores"], 1e-4)
    close(instances.pred_boxes.tensor.double(), expected["boxes"], 1e-2)
    pixels = instances.pred_masks.sum(dim=(1, 2))
    assert (pixels - torch.tensor(expected["pixels"])).abs().max() <= 2


def test_a_training_of_an_earlier_version_is_resumed(tmp_path: Path) -> None:
    for name in ("config.yaml", "model_final.pth", "last_checkpoint"):
        shutil.copy(RUN / name, tmp_path)
    words = ["OUTPUT_DIR", str(tmp_path), "MODEL.WEIGHTS", "", "SOLVER.MAX_ITER", "4"]
    done = programs.train_net(
        *("--config-file", str(tmp_path / "config.yaml"), "--resume"),
        *(*words, "DATASETS.TRAIN", "('shapes_val',)", "DATASETS.TEST", "()"),
    )
    assert done.returncode == 0, done.stderr
    assert "Starting training from iteration 3" in done.stdout
    before, after = (read_weights(str(x / "model_final.pth")) for x in (RUN, tmp_path))
    assert after["iteration"] == 3
    start, end = before["model"], after["model"]
    for name in (name for name in start if name.endswith("weight")):
        assert (end[name] - start[name]).abs().max() < 0.01, name
    assert not torch.equal(*(x["backbone.stem.norm.running_mean"] for x in (start, end)))
