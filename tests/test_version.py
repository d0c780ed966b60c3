"""``instseg --version`` and the cost of ``instseg --help``."""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch

import instseg
from instseg import cli
from instseg.commands import version
from tests.conftest import ROOT


def test_version_prints_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    first, python, detectron2, with_cuda, operators, opencv = capsys.readouterr().out.splitlines()
    assert first.startswith(f"instseg {instseg.__version__} in ")
    assert python.startswith(f"Python {sys.version_info.major}.{sys.version_info.minor}.")
    assert detectron2.startswith("detectron2 0.6") and ", commit " in detectron2
    assert with_cuda.startswith(f"torch {torch.__version__}, ") and "CUDA" in with_cuda
    assert operators.startswith(("operators compiled for torch 2.", "operators in Python"))
    assert opencv.startswith("OpenCV ")


@pytest.mark.parametrize(
    ("number", "record", "commit"),
    [
        ("0.6+864913f0", None, "864913f0"),
        ("0.6", json.dumps({"vcs_info": {"commit_id": "abc"}}), "abc"),
        ("0.6+cu118", json.dumps({"url": "file:///tmp/x.whl"}), None),
    ],
)
def test_the_commit_of_detectron2_is_what_its_wheel_or_pip_recorded(
    number: str, record: str | None, commit: str | None
) -> None:
    installed = SimpleNamespace(version=number, read_text=lambda name: record)
    assert version._commit(installed) == commit  # type: ignore[arg-type]


def test_a_torch_for_the_cpu_alone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert version.lines()[3] == f"torch {torch.__version__}, without CUDA"


def test_missing_parts_have_their_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(version, "distribution", absent)
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.setitem(sys.modules, "instseg.ops._library", None)
    _, _, detectron2, _, operators, opencv = version.lines()
    assert detectron2 == f"detectron2 {version.DETECTRON2}"
    assert operators.startswith("operators not usable: ")
    assert opencv.startswith("OpenCV not usable: ")


def test_help_and_import_load_no_heavy_package_and_take_this_time(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Prints processor seconds; times on a shared machine are no test."""
    heavy = "{'torch', 'cv2', 'numpy', 'scipy', 'detectron2', 'PIL', 'matplotlib'}"
    ending = f"import sys; assert not {heavy} & set(sys.modules), sorted(sys.modules)"
    show_help = "from instseg.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    for code in ("pass", "import instseg", show_help):
        before = os.times()
        done = subprocess.run(
            [sys.executable, "-c", f"{code}\n{ending}"], cwd=ROOT, capture_output=True, text=True
        )
        after = os.times()
        assert done.returncode == 0, done.stderr
        seconds = sum(after[2:4]) - sum(before[2:4])
        with capsys.disabled():
            name = code if code != show_help else "instseg --help"
            print(f"\n{name}: {seconds:.2f} s of processor time", end="")
