"""The classes that a converted file carries."""

from pathlib import Path
from typing import Any

import pytest
import torch

from instseg import cli
from instseg.categories import Categories
from instseg.checkpoint import read_weights
from tests.convert.test_convert_maskscoring_rcnn import of_classes

ONE_LAYER = {"backbone.fpn.fpn_inner1.bias": [256]}


@pytest.fixture
def arguments(tmp_path: Path) -> Any:
    """Writes a file of Mask Scoring R-CNN's authors; arguments that convert it."""

    def write(shapes: dict[str, list[int]]) -> list[str]:
        state = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}
        torch.save({"model": state}, tmp_path / "released.pth")
        files = [str(tmp_path / "released.pth"), str(tmp_path / "ours.pth")]
        return ["convert", "maskscoring_rcnn", *files, "--allow-partial"]

    return write


def told(folder: Path) -> Categories | None:
    return Categories.of_checkpoint(read_weights(folder / "ours.pth"))


def test_a_file_for_coco_carries_the_categories_of_coco(arguments: Any, tmp_path: Path) -> None:
    assert cli.main(arguments(of_classes(81))) == 0
    categories = told(tmp_path)
    assert categories is not None
    assert (len(categories), categories.ids[-1], categories.names[0]) == (80, 90, "person")


def test_a_file_for_other_classes_carries_none(arguments: Any, tmp_path: Path) -> None:
    assert cli.main(arguments(of_classes(4))) == 0
    assert told(tmp_path) is None


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_classes_on_the_command_line_are_stored(
    arguments: Any, tmp_path: Path, suffix: str
) -> None:
    words = arguments(of_classes(4))
    words[3] = str(tmp_path / f"ours.{suffix}")
    assert cli.main([*words, "--classes", "bolt,nut,washer"]) == 0
    categories = Categories.of_checkpoint(read_weights(tmp_path / f"ours.{suffix}"))
    assert categories is not None and categories.names == ("bolt", "nut", "washer")


@pytest.mark.parametrize(
    ("shapes", "option", "message"),
    [
        (of_classes(4), [], "--classes names 2 classes, the model has 3"),
        (of_classes(81), ["--leave-out-classes"], "gets no layer for classes; leave --classes out"),
        (ONE_LAYER, [], "gets no layer for classes; leave --classes out"),
    ],
)
def test_classes_that_do_not_fit_the_file_are_refused(
    arguments: Any,
    shapes: dict[str, list[int]],
    option: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = arguments(shapes | ONE_LAYER)
    assert cli.main([*words, *option, "--classes", "bolt,nut"]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "ours.pth").exists()


def test_a_file_without_layers_for_classes_says_nothing_of_them(
    arguments: Any, tmp_path: Path
) -> None:
    assert cli.main(arguments(ONE_LAYER)) == 0
    assert told(tmp_path) is None
