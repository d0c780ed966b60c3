"""``instseg check-data``, and that training and evaluation find the same before they start."""

import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn

import instseg
from instseg import cli
from instseg.check_data import check_data
from instseg.config.classes import check_classes, num_classes_key
from instseg.data import build
from instseg.data.dataset import load, load_all
from instseg.data.findings import Kind
from instseg.data.mappers import ImageMapper, build_test_mapper, build_train_mapper
from instseg.errors import ConfigError, DatasetError, ImageError
from instseg.evaluation import build_evaluator, check_evaluation
from instseg.training.trainer import Trainer
from tests.conftest import ROOT, load_module
from tests.support.coco_data import HEIGHT, SQUARE, WIDTH, changed, content, write_set

CONFIG = "mask_rcnn/mask_rcnn_shapes.yaml"
MASK = ("annotations", 0, "segmentation")


def config(train: str, test: str = "", *overrides: Any) -> CfgNode:
    words = ["DATASETS.TRAIN", (train,), "DATASETS.TEST", (test,) if test else ()]
    words += ["MODEL.ROI_HEADS.NUM_CLASSES", 2, "DATALOADER.NUM_WORKERS", 0, *overrides]
    return instseg.load_cfg(CONFIG, words)


def found(*names: str) -> list[dict[Kind, list[Any]]]:
    return [checked.report.ids for checked in check_data(names)]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200])


def test_a_sound_set_gives_exit_status_zero(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = write_set(tmp_path, content())
    assert cli.main(["check-data", name]) == 0
    summary = f"{name}: images 3, annotations 4, classes 2\nnothing found\n"
    assert capsys.readouterr().out.strip() == summary.strip()


def test_what_no_terminal_can_show_is_printed_with_escapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = changed("images", 2, "file_name", to="\ud800.png")
    assert cli.main(["check-data", write_set(tmp_path, broken)]) == 1
    assert r"\ud800.png" in capsys.readouterr().out


def test_a_set_named_from_the_folder_it_lies_in_has_its_images_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, folder = build.parse_coco_name(write_set(tmp_path, content()))
    shutil.copy(file, Path(folder, "base.json"))
    monkeypatch.chdir(folder)
    assert found("coco:base.json") == [{}]


def test_an_error_gives_exit_status_one_and_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = content()
    for annotation in broken["annotations"][:2]:
        annotation["bbox"] = [9, 9, -2, -2]
    assert cli.main(["check-data", write_set(tmp_path, broken)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["level", "finding", "count", "first", "ids"]
    assert lines[3].split() == ["error", "inverted", "box", "2", "11,", "12"]
    assert "annotation 11 of image 1 (1.png): bbox is [9, 9, -2, -2]" in lines[5]


def test_a_warning_is_an_error_only_if_asked_for(tmp_path: Path) -> None:
    name = write_set(tmp_path, changed(*MASK, to=[[1, 2, 3, 4]]))
    assert cli.main(["check-data", name]) == 0
    assert cli.main(["check-data", "--strict", name]) == 1


def test_an_unknown_name_is_a_mistake_of_the_command_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["check-data", "shape_train"]) == 2
    assert "did you mean shapes_train" in capsys.readouterr().err


@pytest.mark.parametrize("given", [b"{", b"[]", b'{"images": [3], "categories": 7}'])
def test_a_file_of_another_kind_is_an_error_and_the_next_set_is_checked(
    tmp_path: Path, given: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    names = write_set(tmp_path / "a", given), write_set(tmp_path / "b", content())
    assert cli.main(["check-data", *names]) == 1
    output = capsys.readouterr().out
    assert "not in the expected format" in output and "nothing found" in output


def test_built_in_sets_are_checked_too(data_root: Path) -> None:
    assert found("shapes_val", "coco_mini_val", "nuclei_val")[0] == {}
    assert [set(kinds) for kinds in found("coco_mini_train", "coco_mini_val")] == [set(), set()]


def test_a_set_of_another_format_is_read_by_its_own_reader() -> None:
    (checked,) = check_data(["sbd_train"])
    assert "data set sbd_train: there is no file" in checked.report.examples[Kind.FORMAT]


# Images.


@pytest.mark.parametrize(
    ("spoil", "kind", "message"),
    [
        (Path.unlink, Kind.MISSING_IMAGE, r"image 2: there is no file .*2\.png"),
        (truncate, Kind.UNREADABLE_IMAGE, r"image 2: .*2\.png: cannot be decoded: .*truncated"),
        (
            lambda file: file.write_text("<html>"),
            Kind.UNREADABLE_IMAGE,
            r"image 2: .*2\.png: is HTML or XML text, not an image",
        ),
        (
            lambda file: Image.new("RGB", (41, 30)).save(file),
            Kind.IMAGE_SIZE,
            r"image 2 \(.*2\.png\) is 41 x 30 pixels, the data set says 40 x 30",
        ),
    ],
)
def test_an_image_that_cannot_be_used_is_found(
    tmp_path: Path, spoil: Any, kind: Kind, message: str
) -> None:
    name = write_set(tmp_path, content())
    spoil(tmp_path / "images/2.png")
    (checked,) = check_data([name])
    assert checked.report.ids == {kind: [2]}
    assert re.search(message, checked.report.examples[kind])


def test_a_set_that_does_not_say_the_sizes_of_its_images_is_sound(tmp_path: Path) -> None:
    write_set(tmp_path, content())
    name, instance = f"sizeless {tmp_path}", {"category_id": 0, "segmentation": [SQUARE]}
    record = {"file_name": str(tmp_path / "images/1.png"), "annotations": [instance]}
    DatasetCatalog.register(name, lambda: [record])
    MetadataCatalog.get(name).thing_classes = ["cat"]
    assert found(name) == [{}]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (Path.unlink, r"2\.png: no such file"),
        (truncate, r"2\.png: cannot be decoded: .*truncated"),
        (lambda file: file.write_text("<html>"), r"2\.png: is HTML or XML text, not an image"),
        (
            lambda file: Image.new("RGB", (41, 30)).save(file),
            r"2\.png is 41 x 30 pixels, the data set says 40 x 30; correct width and height",
        ),
    ],
)
def test_training_and_evaluation_name_an_image_that_cannot_be_used(
    tmp_path: Path, training: bool, spoil: Any, message: str
) -> None:
    name = write_set(tmp_path, content())
    cfg = config(name)
    spoil(tmp_path / "images/2.png")
    mapper = build_train_mapper(cfg, augment=True) if training else build_test_mapper(cfg)
    with pytest.raises(ImageError, match=message):
        mapper(DatasetCatalog.get(name)[1])


def test_an_error_that_is_not_the_images_stays_what_it_was(tmp_path: Path) -> None:
    name = write_set(tmp_path, content())
    config(name)
    with pytest.raises(ZeroDivisionError):
        ImageMapper(_failing)(DatasetCatalog.get(name)[0])


def _failing(record: dict[str, Any]) -> dict[str, Any]:
    raise ZeroDivisionError


def test_unreadable_images_are_replaced_counted_and_capped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = write_set(tmp_path, content())
    mapper = build_train_mapper(config(name, "", "DATALOADER.MAX_UNREADABLE", 1), augment=True)
    first, second, third = DatasetCatalog.get(name)
    for key in (2, 3):
        truncate(tmp_path / f"images/{key}.png")
    mapper(first)
    with caplog.at_level(logging.WARNING, "instseg"):
        assert [mapper(second)["image_id"] for _ in range(2)] == [1, 1]
    assert "2.png: cannot be decoded" in caplog.messages[0]
    assert "replaced by another image, 1 of at most 1" in caplog.messages[1]
    with pytest.raises(ImageError, match=r"3\.png"):
        mapper(third)


def test_a_loader_process_names_the_image_on_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = write_set(tmp_path, content())
    for key in (1, 2):
        truncate(tmp_path / f"images/{key}.png")
    loader = Trainer.build_train_loader(
        config(name, "", "DATALOADER.NUM_WORKERS", 1, "SOLVER.IMS_PER_BATCH", 1)
    )
    with pytest.raises(ImageError) as caught:
        next(iter(loader))
    load_module(ROOT / "train_net.py").report(caught.value)
    line = r"error: /\S*[12]\.png: cannot be decoded: .*truncated.*\n"
    assert re.fullmatch(line, capsys.readouterr().err)


def test_missing_images_are_found_before_training(tmp_path: Path) -> None:
    name = write_set(tmp_path, content())
    (tmp_path / "images/2.png").unlink()
    with pytest.raises(DatasetError, match=r"1 of 2 .* no file .* first .*2\.png \(no such"):
        Trainer.build_train_loader(config(name))
    Trainer.build_train_loader(config(name, "", "DATALOADER.MAX_UNREADABLE", 1))


@pytest.mark.parametrize("file", ["shapes://shapes_val/32/0", "a\0b/2.png", "\ud800/2.png"])
def test_a_name_that_no_file_can_have_is_that_of_a_missing_image(tmp_path: Path, file: str) -> None:
    name = write_set(tmp_path, changed("images", 1, "file_name", to=file))
    assert found(name) == [{Kind.MISSING_IMAGE: [2]}]
    with pytest.raises(DatasetError, match=r"1 of 2 images have no file that can be read"):
        Trainer.build_train_loader(config(name))
    with pytest.raises(ImageError, match="no such file|cannot be decoded|cannot be read"):
        build_test_mapper(config(name))(DatasetCatalog.get(name)[1])


# Instances.


def test_a_set_without_annotations_says_so_and_how_to_train_on_it(tmp_path: Path) -> None:
    name = write_set(tmp_path, changed("annotations", to=[]))
    text = "0 of 3 images are annotated; to train on images without instances set "
    with pytest.raises(DatasetError, match=f"{text}DATALOADER.FILTER_EMPTY_ANNOTATIONS False"):
        Trainer.build_train_loader(config(name))
    Trainer.build_train_loader(config(name, "", "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False))
    assert list(found(name)[0]) == [Kind.NO_INSTANCE]


def test_a_set_of_crowds_alone_is_explained(tmp_path: Path) -> None:
    name = write_set(tmp_path, changed("annotations", to=content()["annotations"][3:]))
    with pytest.raises(DatasetError, match="1 of 3 images are annotated, but with crowds alone"):
        Trainer.build_train_loader(config(name))
    assert list(found(name)[0]) == [Kind.NO_INSTANCE]


def test_a_set_whose_instances_are_all_left_out_is_explained(tmp_path: Path) -> None:
    broken = content()
    for annotation in broken["annotations"]:
        annotation["image_id"] = 9
    with pytest.raises(DatasetError, match="0 of 3 images are annotated"):
        Trainer.build_train_loader(config(write_set(tmp_path, broken)))


@pytest.mark.parametrize("mask", [KeyError, None, []])
def test_training_names_the_annotation_without_a_mask(tmp_path: Path, mask: Any) -> None:
    name = write_set(tmp_path, changed(*MASK, to=mask))
    with pytest.raises(DatasetError, match=r"1 of 2 images .* first .*1\.png \(annotation 11\)"):
        Trainer.build_train_loader(config(name))


def test_boxes_alone_are_enough_for_a_model_without_masks(tmp_path: Path) -> None:
    name = write_set(tmp_path, changed(*MASK, to=[]))
    batch = next(iter(Trainer.build_train_loader(config(name, "", "MODEL.MASK_ON", False))))
    assert all(len(sample["instances"]) for sample in batch)


def test_rles_need_bit_masks(tmp_path: Path) -> None:
    name = write_set(tmp_path, content())
    with pytest.raises(ConfigError, match=r"annotation 13 of .*2\.png is an RLE"):
        Trainer.build_train_loader(config(name, "", "INPUT.MASK_FORMAT", "polygon"))


def test_test_instances_without_masks_are_found_before_training_and_before_evaluation(
    tmp_path: Path,
) -> None:
    train = write_set(tmp_path / "train", content())
    test = write_set(tmp_path / "test", changed(*MASK, to=[]))
    cfg = config(train, test, "OUTPUT_DIR", str(tmp_path))
    with pytest.raises(DatasetError, match=r"test.*\(annotation 11\)"):
        Trainer(cfg)
    with pytest.raises(DatasetError, match=r"test.*\(annotation 11\)"):
        build_evaluator(cfg, load(test))


def test_missing_test_images_are_found_before_training_and_before_evaluation(
    tmp_path: Path,
) -> None:
    train, test = (write_set(tmp_path / name, content()) for name in ("train", "test"))
    cfg = config(train, test, "OUTPUT_DIR", str(tmp_path), "DATALOADER.MAX_UNREADABLE", 1)
    check_evaluation(cfg, nn.Identity(), load_all(cfg.DATASETS.TEST))
    (tmp_path / "test/images/2.png").unlink()
    with pytest.raises(DatasetError, match=r"test.* 1 of 3 images have no file .*2\.png"):
        check_evaluation(cfg, nn.Identity(), load_all(cfg.DATASETS.TEST))
    with pytest.raises(DatasetError, match=r"test.* 1 of 3 images have no file .*2\.png"):
        Trainer.build_test_loader(cfg, test)


def spoilt_truth(area: Any) -> dict[str, Any]:
    """One instance that can be found, without iscrowd, and others that cannot be drawn."""
    given = content()
    one = given["annotations"][0]
    del one["iscrowd"]
    one["area"] = area
    one.update(id=0, segmentation=[SQUARE[:4], SQUARE, [3, 4]])
    masks = [[SQUARE[:4]], [[float("nan"), *SQUARE[1:]]], [[5, 5, 1e12, 5, 15, 1e12]]]
    for key, mask in enumerate(masks, start=20):
        given["annotations"].append({**given["annotations"][1], "id": key, "segmentation": mask})
    given["annotations"] = [one, *given["annotations"][4:]]
    return given


@pytest.mark.parametrize("area", [None, -1, float("nan"), float("inf"), 1e11])
@pytest.mark.parametrize("metric", ["coco", "proposals"])
def test_a_perfect_prediction_is_worth_everything_on_spoilt_truth(
    tmp_path: Path, metric: str, area: Any
) -> None:
    name = write_set(tmp_path, spoilt_truth(area))
    cfg = config("", name, "OUTPUT_DIR", str(tmp_path), "TEST.METRICS", (metric,))
    evaluator = build_evaluator(cfg, load(name))
    masks = torch.zeros(1, HEIGHT, WIDTH, dtype=torch.bool)
    masks[:, 5:15, 5:15] = True
    instances = Instances(
        (HEIGHT, WIDTH),
        pred_boxes=Boxes(torch.tensor([[5.0, 5, 15, 15]])),
        scores=torch.ones(1),
        pred_classes=torch.zeros(1, dtype=torch.int64),
        pred_masks=masks,
    )
    evaluator.reset()
    evaluator.process([{"image_id": 1}], [{"instances": instances}])
    results = evaluator.evaluate()
    if metric == "proposals":
        assert results["proposals_segm"]["AR@10"] == 100
    else:
        assert results["segm"]["AP"] == results["bbox"]["AP"] == pytest.approx(100)


# Classes and names.


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").rglob("*_shapes.yaml")), ids=lambda path: path.stem
)
def test_every_system_checks_the_number_of_classes(path: Path) -> None:
    cfg = instseg.load_cfg(path)
    key = num_classes_key(cfg)
    if key is None:
        check_classes(cfg, load_all(("shapes_val", "shapes_hard_val")))
        return
    cfg.merge_from_list([key, 80])
    with pytest.raises(ConfigError, match=f"shapes_val has 3 classes, {key} is 80; set {key} 3"):
        check_classes(cfg, load_all(("shapes_val",)))


def test_classes_in_another_order_are_refused(tmp_path: Path) -> None:
    swapped = changed("categories", to=[{"id": 7, "name": "dog"}, {"id": 8, "name": "cat"}])
    names = write_set(tmp_path / "a", content()), write_set(tmp_path / "b", swapped)
    with pytest.raises(ConfigError, match="number 1 is 'cat' in the one, 'dog' in the other"):
        check_classes(config(*names), load_all(names))
    assert list(found(*names)[1]) == [Kind.CLASSES]


def test_a_name_that_is_taken_is_refused_with_what_to_do(tmp_path: Path) -> None:
    source = build.parse_coco_name(write_set(tmp_path, content()))
    build.register_coco(f"taken {tmp_path}", *source)
    for name in (f"taken {tmp_path}", "coco_2017_val"):
        with pytest.raises(DatasetError, match="already; choose another name, or write coco:"):
            build.register_coco(name, *source)


def test_a_file_whose_classes_change_while_python_runs_is_refused(tmp_path: Path) -> None:
    name = write_set(tmp_path, content())
    check_classes(config(name), load_all((name,)))
    write_set(tmp_path, changed("categories", 0, "name", to="cow"))
    with pytest.raises(DatasetError, match="the name is in use for a set with other classes, or"):
        DatasetCatalog.get(name)


# Two sets.


def test_an_image_of_the_training_set_in_the_validation_set_is_told(tmp_path: Path) -> None:
    names = [write_set(tmp_path / folder, content()) for folder in ("train", "val")]
    shutil.copy(tmp_path / "train/images/3.png", tmp_path / "val/images/2.png")
    first, second = found(*names)
    assert (first, second) == ({}, {Kind.LEAKAGE: [2]})
    assert cli.main(["check-data", *names]) == 0


def test_evaluation_never_uses_the_annotations_of_an_earlier_run(tmp_path: Path) -> None:
    """Detectron2 would write them to a file for a set without one, and find them there again."""
    source = write_set(tmp_path, content())
    cfg = config(source, "", "OUTPUT_DIR", str(tmp_path))
    records = DatasetCatalog.get(source)
    name = f"no_file_{tmp_path.name}"
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).thing_classes = ["cat", "dog"]
    for objects in (4, 3):
        assert len(build_evaluator(cfg, load(name))._coco_api.anns) == objects
        records[0]["annotations"].pop()


@pytest.mark.parametrize(
    ("name", "file", "root"),
    [
        ("coco:a.json.d/b.json:c", "a.json.d/b.json", "c"),
        ("coco:a.json:c.json", "a.json", "c.json"),
        ("coco:a.json.d/b.json", "a.json.d/b.json", "a.json.d"),
        ("coco:a:b.json:c:d", "a:b.json", "c:d"),
    ],
)
def test_folders_may_have_the_name_of_a_json_file(name: str, file: str, root: str) -> None:
    assert build.parse_coco_name(name) == (file, root)


def test_a_pipe_for_annotations_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    assert found(f"coco:{tmp_path / 'a.json'}") == [{Kind.FORMAT: [None]}]
