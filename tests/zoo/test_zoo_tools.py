"""``tools/zoo_add.py``, ``zoo_table.py``, ``side_by_side.py`` and the beginning of the demo."""

import importlib
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from instseg import shipped
from instseg.checkpoint import read_weights
from instseg.data.synthetic import shapes
from instseg.inference.predictor import Predictor
from instseg.shipped import Measurement, shipped_model, shipped_models
from tests.conftest import ROOT
from tests.support import tiny_zoo


@pytest.fixture(autouse=True)
def _empty_zoo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ship nothing, and let the tools be imported."""
    shipped.write_manifest(tmp_path / "zoo", [])
    tiny_zoo.ship(monkeypatch, tmp_path / "zoo")
    monkeypatch.syspath_prepend(str(ROOT / "tools"))


def tool(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.fixture
def training(tmp_path: Path) -> dict[str, Any]:
    """What a checkpoint of a training holds."""
    model = tiny_zoo.save_tiny(tmp_path / "a.safetensors")
    weights = model.state_dict()
    weights["backbone.bottom_up.stem.conv1.norm.running_var"][0] = 1e6
    return {
        "model": weights,
        "categories": tiny_zoo.CLASSES.as_coco(),
        "largest_instance": 60,
        "iteration": 7,
        "optimizer": {"state": {}},
    }


def words(tmp_path: Path, content: dict[str, Any]) -> list[str]:
    """Arguments that ship a checkpoint with this content, with two images to test on."""
    torch.save(content, tmp_path / "model_final.pth")
    json_file = shapes.export("shapes_val", tmp_path / "data", limit=2)
    test_set = f"('coco:{json_file}:{tmp_path / 'data' / 'shapes_val'}',)"
    return [
        *(str(tmp_path / "model_final.pth"), "--name", "tiny_shapes", "--minutes", "3"),
        *("--config-file", f"configs/{tiny_zoo.CONFIG}", "--trunk", "other_shapes"),
        *(*tiny_zoo.OVERRIDES, "DATASETS.TEST", test_set),
    ]


def test_a_checkpoint_is_rounded_measured_and_listed(
    tmp_path: Path, training: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    zoo_add = tool("zoo_add")
    assert zoo_add.main(words(tmp_path, training)) == 0
    (model,) = shipped_models()
    assert (model.name, model.system, model.trunk) == ("tiny_shapes", "mask_rcnn", "other_shapes")
    assert model.licence == "Apache-2.0 (drawn by instseg)"
    assert model.command.startswith(f"python train_net.py --config-file configs/{tiny_zoo.CONFIG}")
    assert re.fullmatch("[0-9a-f]{40}", model.commit)
    assert model.classes == tiny_zoo.CLASSES.names
    assert model.parameters == sum(p.numel() for p in Predictor(model.address).model.parameters())
    assert {"segm/AP", "bbox/AP"} <= model.check.keys()
    commands = [part.command for part in model.measurements]
    assert commands[0].startswith("python train_net.py --config-file zoo://tiny_shapes --eval-only")
    assert model.value("segm/AP") is not None and model.value("ms") is not None
    content = read_weights(model.address)
    assert content.keys() == {"model", "categories", "largest_instance"}
    kept = {name for name, value in content["model"].items() if value.dtype == torch.float32}
    assert kept == {"backbone.bottom_up.stem.conv1.norm.running_var"}
    told = capsys.readouterr().out
    assert "largest change: " in told
    assert "kept in single precision: backbone.bottom_up.stem.conv1.norm.running_var\n" in told

    # A training with another seed: its numbers alone are shipped.
    first = shipped_model("tiny_shapes")
    arguments = [str(tmp_path / "model_final.pth"), "--other-seed-of", "tiny_shapes"]
    assert zoo_add.main(arguments) == 2
    assert "needs --command TEXT" in capsys.readouterr().err
    assert zoo_add.main([*arguments, "--command", "train again"]) == 0
    again = shipped_model("tiny_shapes")
    assert again.sha256 == first.sha256
    assert [part.command for part in again.other_seeds] == ["train again"]
    assert again.other_seeds[0].values["segm/AP"] == pytest.approx(first.value("segm/AP"), abs=0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"roi_heads.box_predictor.cls_score.bias": torch.full((4,), 1e5)},
            "bias has a value of 1e",
        ),
        ({"roi_heads.box_predictor.cls_score.bias": torch.zeros(9)}, "cls_score.bias"),
        ({"large": torch.zeros(2**21)}, "in half precision; expected at most 3: train a narrower"),
    ],
)
def test_weights_that_cannot_be_shipped_are_one_line_and_change_nothing(
    tmp_path: Path,
    training: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    message: str,
) -> None:
    training["model"] = {**training["model"], **change}
    assert tool("zoo_add").main(words(tmp_path, training)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert [path.name for path in (tmp_path / "zoo").iterdir()] == [shipped.MANIFEST]
    assert shipped_models() == ()


def test_missing_arguments_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert tool("zoo_add").main(["a.pth", "--name", "a"]) == 2
    assert "--config-file, --minutes missing" in capsys.readouterr().err


def test_the_readme_has_the_table_of_the_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    zoo_table = tool("zoo_table")
    text = (ROOT / "README.md").read_text()
    assert zoo_table.written(text, zoo_table.tables(shipped_models())) == text


def test_a_table_has_a_row_for_each_model_in_the_order_of_the_systems(tmp_path: Path) -> None:
    zoo_table = tool("zoo_table")
    (tmp_path / "a").write_bytes(b"a")
    nuclei = tiny_zoo.entry(tmp_path / "a", data="nuclei_train", licence="CC0")
    nuclei = replace(
        nuclei,
        parameters=2_345_678,
        measurements=(Measurement("x", {"contest/AP50": 86.04, "segm/AP": 50.0, "ms": 61.7}),),
        other_seeds=(Measurement("y", {"contest/AP50": 85.0}),),
    )
    proposals = replace(
        nuclei,
        name="proposing",
        system="deepmask",
        trunk="tiny_shapes",
        measurements=(Measurement("x", {"proposals_segm/AR@1000": 66.66}),),
    )
    first = "| AP at 0.5 | at 0.75 | mean | mask AP | AR@1000 | ms an image | parameters |"
    assert zoo_table.tables([proposals, nuclei]).splitlines() == [
        "Trained on `nuclei_train` (CC0):",
        "",
        f"| system | family {first} started from | `--model` |",
        "|" + " --- |" * 11,
        "| [Mask R-CNN](projects/mask_rcnn/README.md) | top-down | 86.0 (85.0) | - | - | 50.0 | - "
        "| 62 | 2.35 M | scratch | `tiny_shapes` |",
        "| [DeepMask](projects/deepmask/README.md) | top-down | - | - | - | - | 66.7 | - | 2.35 M "
        "| `tiny_shapes` | `proposing` |",
    ]
    shapes_too = replace(nuclei, name="b", data="shapes_train")
    assert zoo_table.tables([nuclei, shapes_too]).count("Trained on") == 2
    assert zoo_table.tables([]) == "No models are shipped yet.\n"


def test_a_text_without_the_marks_of_the_table_is_refused() -> None:
    zoo_table = tool("zoo_table")
    text = f"a\n{zoo_table.BEGIN}old\n{zoo_table.END}b\n"
    assert zoo_table.written(text, "new\n") == f"a\n{zoo_table.BEGIN}\nnew\n\n{zoo_table.END}b\n"
    with pytest.raises(ValueError, match="expected one line"):
        zoo_table.written("a", "new")


def test_images_are_drawn_under_all_models_beside_their_truth(tmp_path: Path) -> None:
    side_by_side = tool("side_by_side")
    tiny_zoo.make(tmp_path / "zoo")
    labels = np.zeros((40, 60), np.uint8)
    labels[5:20, 5:20] = 7
    pixels = np.full((40, 60, 3), 99, np.uint8)
    pixels[:2] = 255  # without white it would be made brighter
    known = side_by_side.of_labels(pixels, labels)
    assert len(known.ground_truth) == 1 and known.ground_truth.pred_masks.areas().tolist() == [225]
    unknown = side_by_side.Shown(np.full((64, 64, 3), 50, np.uint8))
    file = tmp_path / "out" / "all.png"
    told = side_by_side.write(file, [known, unknown], shipped_models())
    assert told == f"{file}: 2 images under 1 shipped models"
    drawn = cv2.imread(str(file))
    side = side_by_side.SIDE
    assert drawn.shape == (2 * (side + 26) + 12, 2 * side + 12, 3)  # two rows of two
    assert (drawn == 99).all(axis=2).sum() > 10_000


def test_a_dark_image_is_drawn_brighter_and_a_bright_one_as_it_is() -> None:
    brightened = tool("side_by_side").brightened
    dark = np.array([[[0, 10, 51]] * 10], np.uint8)
    assert brightened(dark)[0, 0].tolist() == [0, 50, 255]
    assert np.array_equal(brightened(dark * 5), dark * 5)


def test_of_several_proposals_for_an_instance_the_best_is_drawn() -> None:
    side_by_side = tool("side_by_side")
    masks = torch.zeros(3, 10, 10, dtype=torch.bool)
    masks[0, :6, :6] = masks[1, :7, :6] = masks[2, 5:, 5:] = True
    instances = side_by_side.as_instances(side_by_side.CroppedMasks.of(masks))
    instances.scores = torch.tensor([0.7, 0.9, 0.8])
    assert side_by_side.disjoint(instances).scores.tolist() == pytest.approx([0.9, 0.8])


def test_without_models_the_demo_says_so_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    told = tool("demo").draw_shipped(tmp_path / "all.png")
    assert told == "no models are shipped, so that there is nothing to draw side by side"
    assert not (tmp_path / "all.png").exists()


def test_the_demo_draws_nuclei_and_coins_with_their_truth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("skimage")
    demo = tool("demo")
    drawn: list[Any] = []
    monkeypatch.setattr(demo, "write", lambda file, images, models: drawn.extend(images) or "told")
    assert demo.draw_shipped(tmp_path / "all.png") == "told"
    assert [len(shown.ground_truth) for shown in drawn] == [56, 24]
    assert [shown.pixels.shape for shown in drawn] == [(256, 256, 3), (303, 384, 3)]
