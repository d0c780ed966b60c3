"""The benchmark measures what it says, and its rows can be read by programs."""

import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import instseg
from instseg import benchmark, cli
from instseg.benchmark import Row, comparisons, models, ops
from instseg.benchmark.rows import peak_resident
from instseg.modeling import Comparison
from tests.support.programs import in_this_process

TINY = [
    *("INPUT.MIN_SIZE_TEST", "64", "MODEL.DEVICE", "cpu"),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", "4", "MODEL.RESNETS.RES2_OUT_CHANNELS", "8"),
]
CONFIG = "mask_rcnn/mask_rcnn_shapes.yaml"


@pytest.fixture(autouse=True)
def _no_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """``test_processes.py`` has the one that loads torch for ten seconds."""
    for module in (models, ops):
        monkeypatch.setattr(module, "in_fresh_process", in_this_process)


def test_a_model_is_compared_with_the_stock_predictor_and_written_as_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "image.png"
    Image.fromarray(np.full((48, 64, 3), 90, dtype=np.uint8)).save(image)
    rows_file = tmp_path / "rows.json"
    arguments = ["--config-file", CONFIG, "--input", str(image), "--repeats", "1"]
    status = cli.main(["benchmark", "models", *arguments, "--json", str(rows_file), "--", *TINY])
    assert status == 0
    (row,) = json.loads(rows_file.read_text())
    assert (row["name"], row["peer"]) == ("mask_rcnn_shapes", "detectron2 DefaultPredictor")
    assert row["ratio_time"] == pytest.approx(row["peer_ms"] / row["ours_ms"])
    assert row["images_per_second"] == pytest.approx(1000 / row["ours_ms"])
    assert {"backbone", "proposal_generator", "roi_heads", "rest"} == set(row["stages_ms"])
    assert row["ratio_memory"] == pytest.approx(1, abs=0.2)
    assert "| mask_rcnn_shapes |" in capsys.readouterr().out


TINY_TRAINING = [
    *("SOLVER.IMS_PER_BATCH", "1", "DATASETS.SHAPES_SIZE", "64", "MODEL.DEVICE", "cpu"),
    *("DATASETS.TRAIN", "('shapes_val',)", "DATALOADER.NUM_WORKERS", "1"),
]


def test_a_training_is_compared_with_the_stock_trainer_and_written_as_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows_file = tmp_path / "rows.json"
    small = [*TINY_TRAINING, *TINY, "INPUT.MIN_SIZE_TRAIN", "(64,)"]
    arguments = ["--config-file", CONFIG, "--iterations", "2", "--json", str(rows_file)]
    assert cli.main(["benchmark", "train", *arguments, "--", *small]) == 0
    (row,) = json.loads(rows_file.read_text())
    assert (row["name"], row["peer"]) == ("mask_rcnn_shapes", "detectron2 DefaultTrainer")
    assert row["ratio_time"] == pytest.approx(row["peer_ms"] / row["ours_ms"])
    assert row["ratio_cpu"] == pytest.approx(row["peer_cpu_ms"] / row["cpu_ms"])
    assert 0 <= row["data_ms"] and 0 <= row["peer_data_ms"] < row["peer_ms"]
    assert multiprocessing.active_children() == []
    out = capsys.readouterr().out
    assert "| mask_rcnn_shapes |" in out and "ratio_memory" not in out and "Linear" not in out


def test_a_training_that_detectron2_does_not_know_has_no_peer(tmp_path: Path) -> None:
    config = "discriminative_loss/discriminative_loss_shapes.yaml"
    (row,) = benchmark.benchmark_train([config], TINY_TRAINING, 1)
    assert (row.peer, row.peer_ms, row.ratio_time, row.ratio_cpu) == ("-", None, None, None)
    assert row.ours_ms > 0 and row.cpu_ms is not None
    assert "| - " in benchmark.report([row], None)


def test_no_steps_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["benchmark", "train", "--iterations", "0"]) == 2
    assert "--iterations is 0; expected at least 1" in capsys.readouterr().err


def same(ours: Any, theirs: Any) -> None:
    """Results are equal; masks that are one softmax entry apart count as equal at 1e-4."""
    for tensor, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-4, atol=1e-4, check_dtype=False)


@pytest.mark.parametrize("name", ops.COMPARISONS)
def test_an_operator_and_its_peer_compute_the_same(name: str) -> None:
    comparison = ops.COMPARISONS[name]
    if comparison.needs:
        pytest.importorskip(comparison.needs, reason="the extra `test` is not installed")
    inputs = comparison.inputs(torch.device("cpu"), True)
    ours = comparison.ours(*inputs)
    theirs = comparison.theirs(*comparison.their_inputs(*inputs))
    if name == "fcis_head_backward":
        (ours,) = comparisons.maps_in_their_order(ours, inputs[1])[:1]
    same(*((x if isinstance(x, tuple) else (x,)) for x in (ours, theirs)))


def test_operators_are_compared_and_written_as_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "instance_assembling"
    monkeypatch.setattr(ops, "COMPARISONS", {name: ops.COMPARISONS[name]})
    memory = {"ours": 2.0, "theirs": 6.0}  # this process may have enough free memory for both
    monkeypatch.setattr(ops, "in_fresh_process", lambda function, name, kind, device: memory[kind])
    rows_file = tmp_path / "rows.json"
    assert cli.main(["benchmark", "ops", "--repeats", "1", "--json", str(rows_file)]) == 0
    (row,) = json.loads(rows_file.read_text())
    assert (row["name"], row["peer"]) == (name, "index_select")
    assert row["ratio_time"] == pytest.approx(row["peer_ms"] / row["ours_ms"])
    assert row["ratio_own_memory"] == 3 > row["ratio_memory"] > 0 and row["floor_ms"] > 0


@pytest.mark.skipif(peak_resident() is None, reason="reads memory from /proc")
def test_the_memory_of_an_operator_is_what_a_call_takes_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks of this size come from the system and go back to it, whatever ran here before."""
    size = 2**24  # 64 MiB of float32

    def once(x: torch.Tensor) -> torch.Tensor:
        return x.expand(size).clone()

    def four_times(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([once(x), once(x)])[:1]  # its parts are in use beside the whole

    inputs = (torch.zeros(1),)
    comparison = ops.OperatorComparison("peer", lambda device, tiny: inputs, once, four_times)
    monkeypatch.setattr(ops, "COMPARISONS", {"copy": comparison})
    (row,) = ops.benchmark_ops(repeats=1)
    assert row.peak_memory_mib == pytest.approx(64, rel=0.2)
    assert row.ratio_own_memory == pytest.approx(4, rel=0.2)
    assert row.ratio_memory == pytest.approx(4, rel=0.2)


def test_a_row_whose_peer_is_not_installed_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    comparison = ops.OperatorComparison("peer", lambda *_: (), abs, abs, needs="nothing_such")
    monkeypatch.setattr(ops, "COMPARISONS", {"abs": comparison})
    assert ops.benchmark_ops() == []
    assert "abs is left out: its peer needs nothing_such, of the extra `test`" in caplog.text


def test_a_row_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["benchmark", "ops", "--op", "convolution"]) == 2
    assert "--op is convolution; expected one of fcis_head_forward" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["benchmark", "ops", "--device", "tpu"]) == 2
    assert "--device is tpu; expected cpu" in capsys.readouterr().err


class Slow(nn.Module):
    """A part that takes 20 ms."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return x


def test_stages_add_up_over_calls() -> None:
    model = nn.Sequential(Slow(), nn.Identity())
    with models._stage_times(model) as stages:
        model(torch.zeros(1))
        model(torch.zeros(1))
    assert stages["0"] >= 0.04
    assert stages["1"] < 0.02


class Compared(nn.Module):
    """Does at once what its peer, measured on half of the work, takes 20 ms for."""

    def comparisons(self, image: torch.Tensor) -> list[Comparison]:
        assert image.shape == (3, 4, 5)
        return [Comparison("all", "half", lambda: None, lambda: time.sleep(0.02), share=0.5)]


def test_a_model_adds_its_own_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "build_model", lambda cfg: Compared())
    cfg = instseg.get_cfg()
    (row,) = models._declared_comparisons("folder/net.yaml", cfg, np.zeros((4, 5, 3), np.uint8), 2)
    assert (row.name, row.peer) == ("net: all", "half")
    assert row.peer_ms >= 40
    assert row.ratio_time == pytest.approx(row.peer_ms / row.ours_ms)


def test_a_row_without_memory_is_reported() -> None:
    row = Row("net", "peer", ours_ms=2.0, peer_ms=3.0, ratio_time=1.5, ratio_memory=None)
    assert "1.50" in benchmark.report([row], None)


@pytest.mark.parametrize("command", [["ops"], ["models", "--config-file", CONFIG]])
def test_no_repeats_are_refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["benchmark", *command, "--repeats", "0"]) == 2
    assert "--repeats is 0; expected at least 1" in capsys.readouterr().err
