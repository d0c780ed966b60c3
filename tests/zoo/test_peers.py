"""``tools/peers_nuclei.py``: a stand-in for StarDist is trained and scored."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from instseg.data.synthetic import shapes
from tests.conftest import ROOT

STAND_IN = """#!/bin/sh
# Takes the place of Python: says that every image but the first is as its labels.
echo "$@" > "{seen}"
for labels in "$3"/*.labels.npy; do cp "$labels" "${{labels%.labels.npy}}.predicted.npy"; done
{more}
"""


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("peers_nuclei")


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Arguments for three images."""
    json_file = shapes.export("shapes_val", tmp_path / "data", limit=3)
    name = f"coco:{json_file}:{tmp_path / 'data' / 'shapes_val'}"
    folder = str(tmp_path / "out")
    return ["--output", folder, "--data", name, name, "--minutes", "2", "--count", "3"]


def stand_in(folder: Path, more: str = "") -> list[str]:
    script = folder / "python"
    script.write_text(STAND_IN.format(seen=folder / "seen", more=more))
    script.chmod(0o755)
    return ["--python", str(script)]


def test_a_peer_gets_the_split_and_is_scored_by_the_contest(
    peers: ModuleType, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert peers.main([*words, *stand_in(tmp_path)]) == 0
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert json.loads(capsys.readouterr().out) == result
    assert (result["contest/AP50"], result["contest/AP"], result["minutes"]) == (100, 100, 2)
    worker, train, test, _, minutes = (tmp_path / "seen").read_text().split()
    assert worker.endswith("tools/stardist_nuclei.py") and Path(worker).is_file()
    assert minutes == "2.0"
    assert len(list(Path(train).glob("*.image.npy"))) == 3
    image, labels = (np.load(Path(test) / f"0000.{kind}.npy") for kind in ("image", "labels"))
    assert image.shape == labels.shape and image.dtype == np.float32 and labels.max() > 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("exit 3", "the peer ended with status 3"),
        ('rm "$3/0001.predicted.npy"', "0001.predicted.npy is missing; the peer predicted fewer"),
    ],
)
def test_a_peer_that_fails_is_one_line(
    peers: ModuleType,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: str,
    message: str,
) -> None:
    assert peers.main([*words, *stand_in(tmp_path, more)]) == 2
    assert message in capsys.readouterr().err


def test_a_wrong_prediction_lowers_the_score(peers: ModuleType, tmp_path: Path) -> None:
    labels = np.zeros((20, 20), np.int32)
    labels[:10, :10], labels[12:, 12:] = 1, 2
    for name in "ab":
        np.save(tmp_path / f"{name}.labels.npy", labels)
        np.save(
            tmp_path / f"{name}.predicted.npy", labels * (labels == 1) if name == "b" else labels
        )
    # Image a: 2 / 2; image b: one of two instances is missed, 1 / 2.
    assert peers.score(["a", "b"], tmp_path)["contest/AP50"] == 75.0


def test_an_environment_is_made_once(
    peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    installed: list[list[object]] = []
    monkeypatch.setattr(
        peers.venv, "create", lambda folder, **_: (made.append(folder), folder.mkdir())
    )
    monkeypatch.setattr(peers, "run", installed.append)
    folder = tmp_path / "venv"
    assert peers.make_environment(folder) == folder / "bin/python"
    assert peers.make_environment(folder) == folder / "bin/python"
    assert made == [folder]
    assert len(installed) == 1 and "stardist==0.9.2" in installed[0]
