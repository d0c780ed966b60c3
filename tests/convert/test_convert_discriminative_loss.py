"""Wizaron's checkpoints: networks that give the authors' numbers, and files that are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

import instseg
from instseg.checkpoint import Checkpointer
from instseg.convert import Options, convert_file
from instseg.errors import CheckpointError
from tests.conftest import GOLDEN, close, load_module

FOLDER = GOLDEN / "discriminative_loss"
KEYS: dict[str, dict[str, list[int]]] = json.loads((FOLDER / "keys.json").read_text())
NODE = "MODEL.DISCRIMINATIVE_LOSS"
Write = Callable[..., str]


@pytest.fixture
def released(tmp_path: Path, golden_weights: ModuleType) -> Write:
    """Writes a file of one of the layouts."""

    def write(net: str, changes: dict[str, Any] | None = None) -> str:
        state = {
            name: torch.from_numpy(golden_weights.fill(name, shape))
            for name, shape in KEYS[net].items()
        }
        for name, value in (changes or {}).items():
            state.pop(name, None)
            if value is not None:
                state[name] = value
        torch.save(state, tmp_path / "released.pth")
        return str(tmp_path / "released.pth")

    return write


@pytest.mark.parametrize(("net", "count"), [("reseg", 2_756_307), ("srh", 1_081_219)])
def test_every_tensor_is_mapped(released: Write, tmp_path: Path, net: str, count: int) -> None:
    path, report = convert_file("discriminative_loss", released(net), tmp_path / "ours.pth")
    state = torch.load(path)["model"]
    assert len(report.mapped) == len(KEYS[net]) and not report.ignored and not report.missing
    assert sum(value.numel() for value in state.values()) == count
    assert report.overrides == ()


@pytest.mark.parametrize("net", KEYS)
def test_the_networks_outputs_equal_the_authors(
    released: Write, tmp_path: Path, golden_weights: ModuleType, net: str
) -> None:
    path, report = convert_file("discriminative_loss", released(net), tmp_path / "ours.safetensors")
    cfg = instseg.load_cfg(report.config, [*report.overrides, "MODEL.DEVICE", "cpu"])
    model = build_model(cfg).eval()
    Checkpointer(model).load(str(path))
    golden = np.load(FOLDER / "golden.npz")
    recipe = load_module(FOLDER / "inputs.py")
    x = torch.from_numpy(recipe.network_input(golden_weights.image(64, 96)))
    with torch.no_grad():
        maps = model.network(x)
    close(maps.semantic[0, :, ::2, ::2], golden[f"{net}_sem"], 1e-4)
    close(maps.embeddings[0, :, ::4, ::4], golden[f"{net}_ins"], 1e-4)
    close(maps.counts, golden[f"{net}_cnt"], 1e-4)


def test_the_model_normalises_as_the_authors_do(golden_weights: ModuleType) -> None:
    recipe = load_module(FOLDER / "inputs.py")
    cfg = instseg.load_cfg(
        "discriminative_loss/discriminative_loss_reseg_cvppp.yaml", ["MODEL.DEVICE", "cpu"]
    )
    image = golden_weights.image(8, 8)
    model = build_model(cfg)
    assert cfg.INPUT.FORMAT == "RGB"
    rgb = torch.from_numpy(image[:, :, ::-1].copy()).permute(2, 0, 1).float()
    close((rgb - model.pixel_mean) / model.pixel_std, recipe.network_input(image)[0], 1e-5)


def test_other_classes_and_dimensions_become_overrides(released: Write, tmp_path: Path) -> None:
    changes = {
        "sem_seg_output.weight": torch.zeros(4, 164, 1, 1),
        "sem_seg_output.bias": torch.zeros(4),
        "ins_seg_output.weight": torch.zeros(16, 164, 1, 1),
        "ins_seg_output.bias": torch.zeros(16),
    }
    _, report = convert_file(
        "discriminative_loss", released("reseg", changes), tmp_path / "ours.pth"
    )
    assert report.overrides == (f"{NODE}.NUM_CLASSES", 3, f"{NODE}.EMBEDDING_DIM", 16)


def test_classes_are_left_out_on_request(released: Write, tmp_path: Path) -> None:
    path, report = convert_file(
        "discriminative_loss", released("srh"), tmp_path / "a.pth", Options(leave_out_classes=True)
    )
    assert set(report.left_out) == {"network.semantic.weight", "network.semantic.bias"}
    assert not set(report.left_out) & set(torch.load(path)["model"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"renet3.rnn_hor.bias_ih_l0": torch.zeros(3)}, r"1 of its 65 .* renet3\.rnn_hor"),
        ({"renet1.rnn_hor.bias_ih_l0": None}, r"missing: network\.renet1\.horizontal\.bias_ih_l0"),
        ({"upsampling1.bias": torch.zeros(7)}, r"upsampling1\.bias has shape \(7,\)"),
        ({"upsampling1.bias": torch.full((100,), torch.nan)}, r"NaN\) for upsampling1\.bias"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    released: Write, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        convert_file("discriminative_loss", released("reseg", changes), tmp_path / "ours.pth")


def test_another_networks_file_is_refused(tmp_path: Path) -> None:
    torch.save({"layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"do not belong .* base_cnn"):
        convert_file(
            "discriminative_loss",
            str(tmp_path / "a.pth"),
            tmp_path / "b.pth",
            Options(allow_partial=True),
        )


class _Payload:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


def test_a_file_that_would_execute_code_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"cnn.model.cnn.0.weight": _Payload()}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError):
        convert_file("discriminative_loss", str(tmp_path / "a.pth"), tmp_path / "b.pth")
    assert "executed" not in capsys.readouterr().out
