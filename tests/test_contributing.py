"""The recipe of CONTRIBUTING.md is followed to the letter, with no line of instseg changed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from instseg.data.synthetic import shapes
from tests.conftest import ROOT

# The code of the page, then commands of train_net.py, in one process that loads torch once.
PROGRAM = """
import json, sys
exec(sys.argv[2])
print("The contract is kept.")
from tests.support.programs import train_net
for words in json.loads(sys.argv[1]):
    done = train_net(*words)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
"""
SHORT = ["SOLVER.MAX_ITER", "3", "DATALOADER.NUM_WORKERS", "0", "MODEL.DEVICE", "cpu"]


def files() -> dict[str, str]:
    """Path → content of what the page tells to write."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return dict(re.findall(r"^`([\w./]+)`\n\n```\w+\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package outside of the repository, installed as pip leaves it."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for name, content in files().items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    project = (folder / "pyproject.toml").read_text()
    name, version = re.findall(r'^(?:name|version) = "(.*)"$', project, re.MULTILINE)
    group, entry, value = re.findall(r'entry-points."(.*)"\]\n(\w+) = "(.*)"', project)[0]
    metadata = folder / f"{name}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{entry} = {value}\n")
    return folder


@pytest.fixture(scope="module")
def printed(folder: Path) -> str:
    """The output of the recipe's commands in ``folder``, whose packages are installed."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(r"^python -c '(.*)'$", page, re.MULTILINE)
    shapes.export("shapes_val", folder / "tiny", limit=4)
    data = f"('coco:{folder}/tiny/shapes_val.json:{folder}/tiny/shapes_val',)"
    overrides = [*SHORT, "DATASETS.TRAIN", data, "DATASETS.TEST", data, "OUTPUT_DIR", "out"]
    longer = ["--resume", *overrides, "SOLVER.MAX_ITER", "5"]
    trainings = [overrides, longer, ["--eval-only", *longer]]
    commands = [["--config-file", "cells.yaml", *words] for words in trainings]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands), code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_the_paper_of_the_recipe_keeps_the_contract(printed: str) -> None:
    assert "The contract is kept." in printed and "left out" not in printed


def test_the_paper_of_the_recipe_trains_goes_on_and_is_evaluated(
    folder: Path, printed: str
) -> None:
    assert printed.count("Starting training from iteration 0") == 1
    assert printed.count("Starting training from iteration 3") == 1
    assert len(re.findall(r"copypaste: Task: segm", printed)) == 3
    assert (folder / "out" / "model_final.pth").is_file()


def test_the_code_of_the_recipe_is_formatted_and_has_no_unused_name(folder: Path) -> None:
    pytest.importorskip("ruff")
    for words in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        options = ["--config", str(ROOT / "pyproject.toml")]
        subprocess.run(
            [sys.executable, "-m", "ruff", *words, *options, "cells"], cwd=folder, check=True
        )
