"""Files of an evaluation are named after its data set, whatever its name."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from torch import nn

import instseg
from instseg.data.synthetic import shapes, shapes_video
from instseg.files import file_name
from instseg.training.trainer import Trainer

CONFIG = "mask_rcnn/mask_rcnn_shapes.yaml"
ODD = [
    "coco:/data/leaves/instances_val.json:/data/leaves/val",
    "coco:" + "/a_folder_of_a_long_name" * 40 + "/instances_val.json:/images",
    "/data/leaves",
    "a/b",
    "a_b ",
    r"c:\data\leaves.json",
    "..",
    ".",
    ".hidden",
    "",
    "naïve " + "ü" * 200,
    "undecodable \udcff",
    "two\nlines",
    "a" * 101,
]


@pytest.mark.parametrize("name", ["shapes_val", "coco_2017_val", "a-b.v2", "a" * 100])
def test_a_plain_name_stays_as_it_is(name: str) -> None:
    assert file_name(name) == name


@pytest.mark.parametrize("name", ODD)
def test_any_other_name_gives_one_part_of_a_path_that_every_system_takes(name: str) -> None:
    made = file_name(name)
    assert 0 < len(os.fsencode(made)) <= 100
    assert not set(made) & set('/\\:*?"<>|\n ') and made[0] != "."


def test_names_that_look_alike_stay_apart() -> None:
    alike = {"a/b", "a:b", "a_b", "a b", "a//b", "A/b", *(name + "/images" for name in ODD), *ODD}
    assert len({file_name(name).lower() for name in alike}) == len(alike)


def test_a_name_made_of_a_path_ends_with_its_last_parts() -> None:
    assert file_name("coco:/data/leaves.json:/data/val").startswith(
        "coco_data_leaves.json_data_val"
    )
    long = "coco:" + "/a_folder_of_a_long_name" * 40 + "/instances_val.json:/images"
    assert "instances_val.json_images-" in file_name(long)


class FindsNothing(nn.Module):
    def forward(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"instances": self.nothing(item["height"], item["width"])} for item in inputs]

    def nothing(self, height: int, width: int) -> Instances:
        one = Instances((height, width), pred_boxes=Boxes(torch.tensor([[1.0, 1, 5, 5]])))
        one.scores, one.pred_classes = torch.ones(1), torch.zeros(1, dtype=torch.long)
        one.pred_masks = torch.ones(1, height, width, dtype=torch.bool)
        return one


@pytest.fixture
def registered() -> Iterator[list[str]]:
    """Names to take out of the catalogues afterwards."""
    names: list[str] = []
    yield names
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def evaluate(folder: Path, *names: str, **keys: object) -> dict[str, Any]:
    words = ["DATASETS.TRAIN", (), "DATASETS.TEST", names, "OUTPUT_DIR", str(folder)]
    cfg = instseg.load_cfg(CONFIG, [*words, "DATALOADER.NUM_WORKERS", 0])
    for key, value in keys.items():
        cfg.TEST[key] = value
    return Trainer.test(cfg, FindsNothing())


def written(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("metric", ["coco", "proposals"])
def test_data_sets_with_paths_of_300_characters_are_evaluated(tmp_path: Path, metric: str) -> None:
    deep = tmp_path.joinpath(*["a_folder_with_a_long_name"] * 12)
    deep.mkdir(parents=True)
    json_file = shapes.export("shapes_val", deep, limit=2)
    shutil.copy(json_file, deep / "others.json")
    names = [f"coco:{file}:{deep}/shapes_val" for file in (json_file, deep / "others.json")]
    assert min(map(len, names)) > 600
    results = evaluate(tmp_path / "out", *names, METRICS=(metric, "contest"))
    assert list(results) == names
    if metric == "coco":
        assert len({path.parent for path in written(tmp_path / "out")}) == 2
    for path in written(tmp_path / "out"):
        assert len(path.relative_to(tmp_path / "out").parts) == 3


@pytest.mark.parametrize("shape", ["{root}/elsewhere/set:1", "x" * 300, "../up", "a/b/c"])
def test_what_is_written_for_a_set_without_a_file_stays_in_its_folder(
    tmp_path: Path, registered: list[str], shape: str
) -> None:
    """Detectron2 would write its annotations to a file, which it names after the set."""
    name = shape.format(root=tmp_path)
    records = shapes.load("shapes_val", shapes.DEFAULT_SIZE, range(2))
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).thing_classes = ["circle", "square", "triangle"]
    registered.append(name)
    evaluate(tmp_path / "out", name)
    files = written(tmp_path)
    assert {path.parent.parent for path in files} == {tmp_path / "out" / "inference"}


def test_clips_named_by_a_path_are_evaluated_into_one_folder(
    tmp_path: Path, registered: list[str]
) -> None:
    pytest.importorskip("trackers")
    clips = shapes_video.load("shapes_video_val", shapes.DEFAULT_SIZE, [0])
    name = f"youtubevis:{tmp_path}/{'long/' * 60}videos.json"
    DatasetCatalog.register(name, lambda: clips)
    MetadataCatalog.get(name).thing_classes = ["circle", "square", "triangle"]
    registered.append(name)
    evaluate(tmp_path / "out", name, METRICS=("coco", "tracks"))
    assert {path.parent.parent for path in written(tmp_path)} == {tmp_path / "out" / "inference"}
