"""The README's commands run as they stand there, in a folder of their own and cut short."""

import re
import shlex
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile

from instseg.benchmark import models, ops
from instseg.data.synthetic import shapes
from instseg.masks import CroppedMasks
from tests.conftest import ROOT
from tests.support import programs
from tests.support.video_common import images, write_clip

# Appended to training commands so that they take seconds.
SHORT = "SOLVER.MAX_ITER 2 SOLVER.IMS_PER_BATCH 2 DATALOADER.NUM_WORKERS 0 SOLVER.WARMUP_ITERS 0"
TINY = """DATASETS.TEST "('coco:{json}:{folder}',)" """
INSTALLING = ("make ", "pip install", "python -m instseg.install_detectron2")
PAGES = ("README.md", "docs/benchmarks.md")
# Converting needs the authors' files: test_convert_*.py run the same command on files they write.
# Exporting needs a trained YOLACT and a minute of tracing: see tests/export/test_export.py.
SKIPPED = (*INSTALLING, "instseg convert", "instseg export")


def blocks(language: str) -> list[str]:
    """Fenced blocks of the README and of what it links to, in ``language``, "" for none."""
    text = "".join((ROOT / name).read_text() for name in PAGES)
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [content for name, content in fenced if name == language]


def commands() -> list[str]:
    """Lines of the blocks without a language that start with one of our programs."""
    lines = [line for block in blocks("") for line in block.splitlines()]
    return [line for line in lines if line.startswith(("python ", "instseg "))]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a checkout, with an image, and no output yet."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("train_net.py", "configs"):
        (folder / name).symlink_to(ROOT / name)
    image = shapes.image("shapes_val", 0, 128)
    cv2.imwrite(str(folder / "photo.png"), image[:, :, ::-1])
    write_clip(folder / "clip.mp4", images(3))
    shapes.export("shapes_val", folder / "tiny", limit=4)
    _write_cells(folder)
    return folder


def _write_cells(folder: Path) -> None:
    """Images of 16 bits with label images, and a large one."""
    for name in ("images", "labels"):
        (folder / "cells" / name).mkdir(parents=True)
    for index in range(2):
        pixels = shapes.image("shapes_val", index, 128).astype(np.uint16) * 16
        tifffile.imwrite(folder / f"cells/images/{index}.tif", pixels)
        (record,) = shapes.load("shapes_val", 128, [index])
        labels = CroppedMasks.from_rles(
            [entry["segmentation"] for entry in record["annotations"]], (128, 128)
        ).to_label_image()
        tifffile.imwrite(folder / f"cells/labels/{index}.tif", labels)
    tifffile.imwrite(folder / "slide.tif", np.tile(pixels, (9, 5, 1)), tile=(128, 128))


def run(command: str, folder: Path) -> None:
    words = shlex.split(command)
    if words[:2] == ["python", "train_net.py"]:
        tiny = folder / "tiny"
        data = TINY.format(json=tiny / "shapes_val.json", folder=tiny / "shapes_val")
        extra = SHORT if "labels:" in command else data + SHORT
        done = programs.train_net(*words[2:], *shlex.split(extra))
    else:
        if words[1] in ("predict", "evaluate"):
            tiny = f"coco:{folder / 'tiny/shapes_val.json'}:{folder / 'tiny/shapes_val'}"
            words = [tiny if word.startswith("coco:") else word for word in words]
        more = {
            ("benchmark", "models"): ["--repeats", "1"],
            # some peers take minutes
            ("benchmark", "ops"): ["--repeats", "1", "--op", "instance_assembling"],
            ("benchmark", "train"): ["--iterations", "1", "SOLVER.IMS_PER_BATCH", "2"],
        }.get(tuple(words[1:3]), [])
        if words[1:3] == ["benchmark", "train"]:
            words = words[:5]  # the first configuration, whose images are made
        done = programs.instseg(*words[1:], *more)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.timeout(900)  # a minute on two idle cores
def test_the_commands_of_the_readme_run_in_order(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout)
    for module in (models, ops):
        monkeypatch.setattr(module, "in_fresh_process", programs.in_this_process)
    lines = [line for line in commands() if not line.startswith(SKIPPED)]
    assert len(lines) >= 5
    # The demo's checkpoint, which prediction uses, is that of the first training command here.
    training = next(line for line in lines if line.startswith("python train_net.py"))
    run(training, checkout)
    lines.remove(training)
    (checkout / "output/demo").symlink_to("shapes")
    for line in lines:
        run(line, checkout)
    assert (checkout / "output/predictions/predictions.json").is_file()
    assert (checkout / "output/video/clip.mp4").is_file()
    assert (checkout / "output/found/evaluation/confusion.png").is_file()
    assert (checkout / "output/slide/slide_labels.tif").is_file()


def test_the_three_lines_of_prediction_run(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks("python")
    assert len(code.splitlines()) == 3
    monkeypatch.chdir(checkout)
    names: dict[str, Any] = {}
    exec(code.replace(', "output/demo/model_final.pth"', ""), names)
    assert names["masks"].shape[1:] == (128, 128)


def test_every_make_target_of_the_readme_exists() -> None:
    targets = re.findall(r"`?make ([a-z-]+)`?", (ROOT / "README.md").read_text())
    defined = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {"demo", "test"} <= set(targets) <= set(defined)
