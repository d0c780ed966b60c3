"""A forked process predicts or says what to do; it never waits for threads that it lacks."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from instseg import forks
from instseg.errors import ProcessError
from tests.conftest import ROOT
from tests.export.test_export import HAS_ONNX, ONNX
from tests.support.yolact_tiny import PHOTO, tiny_predictor

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="forks with GNU's OpenMP")


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> dict[str, list[Any]]:
    """Output of ``tests.support.forked``, whose operators run on four threads."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.forked"]
    if HAS_ONNX:
        command.append(str(request.getfixturevalue("exported_as")("yolact").path))
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280)
    assert done.returncode == 0, done.stderr
    loaded: dict[str, list[Any]] = json.loads(done.stdout.splitlines()[-1])
    return loaded


@on_linux
def test_a_forked_process_computes_what_its_parent_does(results: dict[str, list[Any]]) -> None:
    cases = {name: result for name, result in results.items() if name != "an exported one"}
    assert len(cases) == (9 if HAS_ONNX else 8)
    assert {k: v for k, v in cases.items() if v != [v[0]] * len(v) or v[0] == 0} == {}


@on_linux
@ONNX
def test_an_exported_predictor_is_refused_in_a_forked_process(
    results: dict[str, list[Any]],
) -> None:
    expected, refusal = results["an exported one"]
    assert expected == 50
    assert refusal.startswith("an exported network was opened before this process was forked")


def test_threads_that_cannot_be_given_up_are_an_error_in_the_child_unless_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    predictor = tiny_predictor("yolact")
    monkeypatch.setattr(forks, "_give_up_threads", lambda file: False)
    monkeypatch.setattr(forks, "_lost", False)
    monkeypatch.setattr(forks, "_kept", False)
    forks._before()
    forks._in_child()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(ProcessError, match=r"'spawn'.*torch.set_num_threads\(1\)"):
        predictor(PHOTO)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    predictor(PHOTO)
