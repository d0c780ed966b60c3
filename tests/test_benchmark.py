"""The benchmark measures what it says, and its rows can be read by programs."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from instseg import benchmark, cli
from instseg.benchmark import Row

TINY = [
    *("INPUT.MIN_SIZE_TEST", "64", "MODEL.DEVICE", "cpu"),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", "4", "MODEL.RESNETS.RES2_OUT_CHANNELS", "8"),
]
CONFIG = "mask_rcnn/mask_rcnn_shapes.yaml"


def test_a_model_is_compared_with_the_stock_predictor_and_written_as_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "picture.png"
    Image.fromarray(np.full((48, 64, 3), 90, dtype=np.uint8)).save(picture)
    rows_file = tmp_path / "rows.json"
    arguments = ["--config-file", CONFIG, "--input", str(picture), "--repeats", "1"]
    status = cli.main(["benchmark", "models", *arguments, "--json", str(rows_file), "--", *TINY])
    assert status == 0
    (row,) = json.loads(rows_file.read_text())
    assert (row["name"], row["peer"]) == ("mask_rcnn_shapes", "detectron2 DefaultPredictor")
    assert row["ratio_time"] == pytest.approx(row["peer_ms"] / row["ours_ms"])
    assert row["images_per_second"] == pytest.approx(1000 / row["ours_ms"])
    assert {"backbone", "proposal_generator", "roi_heads", "rest"} == set(row["stages_ms"])
    assert row["ratio_memory"] == pytest.approx(1, abs=0.2)
    assert "| mask_rcnn_shapes |" in capsys.readouterr().out


def test_operators_without_rows_are_an_empty_list(tmp_path: Path) -> None:
    rows_file = tmp_path / "rows.json"
    assert cli.main(["benchmark", "ops", "--json", str(rows_file)]) == 0
    assert json.loads(rows_file.read_text()) == []


class Slow(nn.Module):
    """A part that takes 20 ms."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return x


def test_stages_add_up_over_calls() -> None:
    model = nn.Sequential(Slow(), nn.Identity())
    with benchmark._stage_times(model) as stages:
        model(torch.zeros(1))
        model(torch.zeros(1))
    assert stages["0"] >= 0.04
    assert stages["1"] < 0.02


def test_a_row_without_memory_is_reported() -> None:
    row = Row("net", "peer", ours_ms=2.0, peer_ms=3.0, ratio_time=1.5, ratio_memory=None)
    assert "1.50" in benchmark.report([row], None)


def test_no_repeats_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["benchmark", "models", "--config-file", CONFIG, "--repeats", "0"]) == 2
    assert "--repeats is 0; expected at least 1" in capsys.readouterr().err
