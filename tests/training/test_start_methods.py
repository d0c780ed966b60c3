"""Training works however the loader's processes start: forked, spawned or from a server.

``spawn`` is the default on macOS and Windows, ``forkserver`` on Linux from Python 3.14.
"""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from instseg.config.nodes import load_cfg
from instseg.data.build import register_datasets
from instseg.data.dataset import load_all
from instseg.data.loaders import build_train_loader
from instseg.projects import Project
from tests.conftest import ROOT
from tests.support.own_projects import PROJECTS

METHODS = ("spawn", "forkserver")


def run_with(method: str, folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run Python with ``words`` as on a system whose default start method is ``method``."""
    (folder / "sitecustomize.py").write_text(
        f"import multiprocessing\nmultiprocessing.set_start_method({method!r}, force=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(sys.platform == "win32", reason="has no forkserver")
@pytest.mark.parametrize("method", METHODS)
def test_a_training_does_two_iterations_whatever_the_start_method(
    method: str, tmp_path: Path
) -> None:
    done = run_with(
        method,
        tmp_path,
        *("train_net.py", "--config-file", "configs/mask_rcnn/mask_rcnn_shapes.yaml"),
        *("OUTPUT_DIR", tmp_path / "run", "SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 2),
        *("DATASETS.SHAPES_SIZE", 32, "DATASETS.TRAIN", "('shapes_val_apart',)"),
        *("DATASETS.TEST", "()", "DATALOADER.NUM_WORKERS", 1),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "model_final.pth").exists()


@pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.name)
def test_what_a_loader_sends_to_its_processes_can_be_pickled(project: Project) -> None:
    cfg = load_cfg(project.example)
    register_datasets(cfg)
    loader = build_train_loader(cfg, load_all(cfg.DATASETS.TEST[:1]))
    images = getattr(loader, "dataset", loader)
    assert pickle.loads(pickle.dumps(images)) is not None
