"""Shared by the tests of ``instseg predict``: a tiny model on the command line, its results."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from instseg import cli
from tests.inference.test_predictor import save_weights, tiny_cfg


def arguments_for_tiny_model(folder: Path) -> list[str]:
    """Write the tiny model into ``folder``; return arguments that predict with it at any score."""
    torch.manual_seed(0)
    save_config(folder / "tiny.yaml")
    weights = save_weights(tiny_cfg(), folder / "tiny.pth", class_names=["a", "b/c", "d"])
    config = str(folder / "tiny.yaml")
    return ["predict", "--config-file", config, "--weights", str(weights), "--confidence", "0"]


def save_config(path: Path) -> None:
    """Write the configuration of the tiny model."""
    path.write_text(tiny_cfg().dump())


def results(output: Path) -> list[dict[str, Any]]:
    """Records of ``predictions.json``."""
    loaded = json.loads((output / "predictions.json").read_text())
    assert isinstance(loaded, list)
    return loaded


def assert_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A mistake on the command line is one line on stderr and exit status 2."""
    assert cli.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    (error,) = (line for line in lines if not line.startswith("INFO"))
    assert error.startswith("error: ")
    assert message in error


def as_lines(text: str) -> str:
    """The lines of the ``NAME.jsonl`` that a video's file with this text was joined from."""
    content = json.loads(text)
    frames = content.pop("frames")
    del content["complete"]
    return "".join(f"{json.dumps(line)}\n" for line in (content, *frames))
