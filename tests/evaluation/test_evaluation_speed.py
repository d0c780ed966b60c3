"""``tools/evaluation_speed.py``: rows of both values of TEST.COCO_EVAL."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import ROOT


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("evaluation_speed")


def test_memory_that_the_system_does_not_tell_is_no_number(
    tool: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tool, "peak_resident", lambda: None)
    monkeypatch.setattr(tool, "forget_peak", lambda: None)
    tool.write_ground_truth(tmp_path / "instances.json", 1, 8)
    assert tool.measure("standard", str(tmp_path / "instances.json"), 1, 8)
    row = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert (row[0], row[3]) == ("| standard", "-")


@pytest.mark.parametrize(("result", "status"), [(True, 0), (None, 1)])
def test_a_process_that_ends_with_an_error_gives_the_status(
    result: bool | None, status: int, tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "in_fresh_process", lambda *_: result)
    assert tool.main(["--images", "1", "--instances", "8"]) == status


@pytest.mark.parametrize("option", ["--images", "--instances"])
def test_fewer_than_one_is_refused(
    option: str, tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        tool.main([option, "0"])
    assert f"{option} is 0; expected at least 1" in capsys.readouterr().err
