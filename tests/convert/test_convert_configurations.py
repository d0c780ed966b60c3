"""``instseg convert`` writes a configuration beside the weights, and the two predict as they are.

Networks are those of the authors with a sixteenth of their channels, so that they run in no time.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import instseg
from instseg.cli import main
from tests.conftest import GOLDEN
from tests.convert.test_convert_deepmask import file_of, weights_for
from tests.convert.test_convert_fcis import keys as fcis_keys
from tests.convert.test_convert_fcis import write_params
from tests.convert.test_convert_maskscoring_rcnn import keys as ms_rcnn_keys
from tests.support.yolact_common import keys as yolact_keys

PLAIN = (64, 128, 256, 512, 1024, 2048)


def narrow(shape: list[int]) -> list[int]:
    special = {12544: 784, 257: 17, 258: 18, 130: 10}  # inputs: regions, and beside other maps
    return [special.get(x, x // 16 if x in PLAIN else x) for x in shape]


def noise(name: str, shape: list[int], dtype: str = "float32") -> torch.Tensor:
    if "_var" in name:  # of a normalisation
        return torch.ones(shape)
    return (torch.randn(shape) * 0.02).to(getattr(torch, dtype))


def yolact(layout: str) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        state = {
            k: noise(k, narrow(shape), dtype) for k, (shape, dtype) in yolact_keys(layout).items()
        }
        torch.save(state, folder / "own.pth")
        return str(folder / "own.pth")

    return write


def ms_rcnn(folder: Path) -> str:
    state = {name: noise(name, narrow(shape)) for name, shape in ms_rcnn_keys().items()}
    torch.save({"model": state}, folder / "own.pth")
    return str(folder / "own.pth")


def fcis(folder: Path) -> str:
    arrays = {k: noise(k, narrow(shape)).numpy() for k, shape in fcis_keys().items()}
    return write_params(folder / "own.params", arrays)


def matterport(folder: Path) -> str:
    h5py = pytest.importorskip("h5py")
    path = GOLDEN / "mask_rcnn" / "keys_matterport_resnet101.json"
    entries = json.loads(path.read_text())
    with h5py.File(folder / "own.h5", "w") as file:
        for entry in entries:
            name = entry["dataset"]
            file[name] = noise(name, narrow(entry["h5_shape"])).numpy()
    return str(folder / "own.h5")


def deepmask(folder: Path) -> str:
    layers = {k: x * 0.01 for k, x in weights_for("deepmask").items() if "running" not in k}
    return file_of(folder / "own.t7", "deepmask", **layers)


def reseg(folder: Path) -> str:
    shapes = json.loads((GOLDEN / "discriminative_loss" / "keys.json").read_text())["reseg"]
    torch.save({k: noise(k, shape) for k, shape in shapes.items()}, folder / "own.pth")
    return str(folder / "own.pth")


SMALL = ["INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "64"]
SQUARE = ["INPUT.SQUARE_SIZE", "128"]
FILES: dict[str, tuple[str, Callable[[Path], str], list[str]]] = {
    "yolact": ("yolact", yolact("yolact_resnet50_pascal"), SQUARE),
    "yolact_plus": ("yolact", yolact("yolact_plus_resnet50"), ["INPUT.SQUARE_SIZE", "256"]),
    "yolact_edge": ("yolact_edge", yolact("yolact_edge_vid_resnet50"), SQUARE),
    "maskscoring_rcnn": ("maskscoring_rcnn", ms_rcnn, SMALL),
    "fcis": ("fcis", fcis, SMALL),
    "matterport": ("matterport", matterport, SMALL),
    "deepmask": ("deepmask", deepmask, ["MODEL.DEEPMASK.OCTAVES_TEST", "(-0.5,)"]),
    "discriminative_loss": ("discriminative_loss", reseg, SMALL),
}


@pytest.mark.parametrize("name", FILES)
def test_the_configuration_beside_the_weights_predicts_as_it_stands(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paper, write, keys = FILES[name]
    torch.manual_seed(0)
    weights = tmp_path / "own_model.safetensors"
    assert main(["convert", paper, write(tmp_path), str(weights), *keys]) == 0
    printed = capsys.readouterr().out
    config = weights.with_suffix(".yaml")
    assert f"\n{config}\n{weights}\n" in printed
    assert f"does not tell {keys[0]}" not in printed
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    command = ["predict", "--config-file", str(config), "--weights", str(weights)]
    out = tmp_path / "out"
    assert main([*command, "--input", str(tmp_path / "a.png"), "--output", str(out)]) == 0
    assert "0 missing, 0 unexpected, 0 of another shape" in capsys.readouterr().err
    assert (out / "predictions.json").is_file()


def small(folder: Path) -> str:
    """A part of a network, which is converted in a moment."""
    state = {k: x for k, x in yolact_keys("yolact_resnet50").items() if k.startswith("fpn.")}
    torch.save({k: noise(k, shape) for k, (shape, _) in state.items()}, folder / "part.pth")
    return str(folder / "part.pth")


def convert(folder: Path, *words: str, target: str = "ours.pth") -> Any:
    return main(
        ["convert", "yolact", small(folder), str(folder / target), "--allow-partial", *words]
    )


def test_the_configuration_holds_what_differs_and_says_what_was_taken(tmp_path: Path) -> None:
    assert convert(tmp_path, "MODEL.YOLACT.NUM_CLASSES", "3") == 0
    text = (tmp_path / "ours.yaml").read_text()
    content = yaml.safe_load(text)
    assert content["MODEL"]["YOLACT"] == {"NUM_CLASSES": 3, "SQUARE_ANCHORS": True}
    assert content["MODEL"]["WEIGHTS"] == str(tmp_path / "ours.pth")
    assert "DEVICE" not in content["MODEL"] and "_BASE_" not in content
    assert "# Written by `instseg convert` for 'part.pth'." in text
    assert "# the file does not tell MODEL.YOLACT.ANCHOR_SCALES (taken: [[24]" in text
    expected = instseg.load_cfg("yolact/yolact_resnet50.yaml", ["MODEL.YOLACT.NUM_CLASSES", 3])
    expected.MODEL.WEIGHTS = str(tmp_path / "ours.pth")
    assert instseg.load_cfg(tmp_path / "ours.yaml") == expected


@pytest.mark.parametrize("order", ["before", "between", "behind"])
def test_keys_may_stand_on_either_side_of_options(tmp_path: Path, order: str) -> None:
    files = ["yolact", small(tmp_path), str(tmp_path / "ours.pth")]
    options = ["--allow-partial", "--config-file", "yolact/yolact_base.yaml"]
    keys = ["MODEL.YOLACT.NUM_CLASSES", "3"]
    words = {
        "before": [*options, *files, *keys],
        "between": [*files, *options, *keys],
        "behind": [*files, *keys, *options],
    }
    assert main(["convert", *words[order]]) == 0
    cfg = instseg.load_cfg(tmp_path / "ours.yaml")
    assert (cfg.MODEL.YOLACT.NUM_CLASSES, cfg.MODEL.RESNETS.DEPTH) == (3, 101)


def test_a_configuration_of_the_users_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config_file = tmp_path / "ours.yaml"
    config_file.write_text("VERSION: 2\nMODEL:\n  META_ARCHITECTURE: YOLACT\n")
    assert convert(tmp_path, "--config-file", str(config_file)) == 2
    assert "ours.yaml is the --config-file; give the result another name" in capsys.readouterr().err
    assert config_file.read_text().startswith("VERSION: 2\n")
    assert not (tmp_path / "ours.pth").exists()


def test_a_second_conversion_replaces_what_the_first_one_wrote(tmp_path: Path) -> None:
    for count in (3, 4):
        assert convert(tmp_path, "MODEL.YOLACT.NUM_CLASSES", str(count)) == 0
        assert instseg.load_cfg(tmp_path / "ours.yaml").MODEL.YOLACT.NUM_CLASSES == count
