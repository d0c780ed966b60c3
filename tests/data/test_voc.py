"""Reading SBD and VOC 2012 from files in the layout of the downloads, made here."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image
from scipy.io import savemat
from scipy.sparse import csc_matrix

import instseg
from instseg.data.build import register_builtin_datasets
from instseg.data.dataset import load
from instseg.data.readers.voc import CLASSES, load_sbd, load_voc
from instseg.errors import DatasetError
from instseg.evaluation import build_evaluator

NAMES = ("2008_000002", "2007_000027")
HEIGHT, WIDTH = 12, 20
BUILT_IN = (
    *("sbd_train", "sbd_val"),
    *("voc_2012_instances_train", "voc_2012_instances_val"),
)


def labels(numbers: dict[int, tuple[slice, slice]]) -> np.ndarray:
    array = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    for number, region in numbers.items():
        array[region] = number
    return array


LEFT, RIGHT = np.s_[2:8, 1:7], np.s_[3:12, 10:19]
OBJECTS = labels({1: LEFT, 2: RIGHT})
CATEGORIES = np.array([[15], [8]], dtype=np.uint8)
"""A person on the left, a cat on the right."""


def write_mat(file: Path, structure: dict[str, Any], **settings: Any) -> None:
    """As in SBD: a structure with sparse boundaries in a cell array."""
    boundaries = np.empty((2, 1), dtype=object)
    boundaries[:, 0] = [csc_matrix(OBJECTS == 1), csc_matrix(OBJECTS == 2)]
    content = {"Boundaries": boundaries, **structure}
    savemat(file, {"GTinst": content}, do_compression=True, **settings)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """``$DETECTRON2_DATASETS`` with two images in each set."""
    sbd, voc = tmp_path / "sbd", tmp_path / "VOC2012"
    folders = (
        *("sbd/img", "sbd/inst", "VOC2012/JPEGImages", "VOC2012/ImageSets/Segmentation"),
        *("VOC2012/SegmentationObject", "VOC2012/SegmentationClass"),
    )
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    for name in NAMES:
        for folder in ("sbd/img", "VOC2012/JPEGImages"):
            Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / folder / f"{name}.jpg")
        structure = {"Segmentation": OBJECTS, "Categories": CATEGORIES}
        write_mat(sbd / "inst" / f"{name}.mat", structure)
        # The column beside the left instance is its boundary.
        write_png(voc / "SegmentationObject" / f"{name}.png", void_column(OBJECTS))
        classes = labels({15: LEFT, 8: RIGHT})
        write_png(voc / "SegmentationClass" / f"{name}.png", void_column(classes))
    for listing in (sbd, voc / "ImageSets/Segmentation"):
        for split in ("train", "val"):
            (listing / f"{split}.txt").write_text("\n".join(NAMES) + "\n")
    return tmp_path


def void_column(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array[2:8, 7] = 255
    return array


def write_png(file: Path, array: np.ndarray) -> None:
    """Indexed, with a palette that makes numbers and colours differ."""
    image = Image.fromarray(array)
    image.putpalette([(number * 37 + 5) % 256 for number in range(768)])
    assert image.mode == "P"
    image.save(file)


def sbd(root: Path) -> list[dict[str, Any]]:
    return load_sbd("sbd_val", str(root / "sbd"), "val")


def voc(root: Path) -> list[dict[str, Any]]:
    return load_voc("voc_2012_instances_val", str(root / "VOC2012"), "val")


LOADERS = {"sbd": sbd, "voc": voc}
READERS = pytest.mark.parametrize("read", LOADERS.values(), ids=LOADERS)


@READERS
def test_records_hold_the_instances_of_the_files(read: Any, root: Path) -> None:
    records = read(root)
    assert [record["image_id"] for record in records] == list(NAMES)
    for record in records:
        assert Path(record["file_name"]).is_file()
        assert (record["height"], record["width"]) == (HEIGHT, WIDTH)
        kinds = [CLASSES[item["category_id"]] for item in record["annotations"]]
        assert kinds == ["person", "cat"]
        for number, item in enumerate(record["annotations"], start=1):
            mask = mask_util.decode(item["segmentation"])
            np.testing.assert_array_equal(mask, OBJECTS == number)
        boxes = [item["bbox"] for item in record["annotations"]]
        assert boxes == [[1, 2, 6, 6], [10, 3, 9, 9]]


def test_the_classes_are_vocs_in_alphabetical_order() -> None:
    assert len(CLASSES) == 20
    assert list(CLASSES) == sorted(CLASSES)


def test_a_category_without_pixels_gives_no_instance(root: Path) -> None:
    structure = {"Segmentation": OBJECTS, "Categories": np.array([[15], [8], [3]], dtype=np.uint8)}
    write_mat(root / "sbd/inst" / f"{NAMES[0]}.mat", structure)
    assert len(sbd(root)[0]["annotations"]) == 2


def test_an_image_without_instances_has_no_annotations(root: Path) -> None:
    empty = {"Segmentation": np.zeros_like(OBJECTS), "Categories": np.zeros((0, 1), np.uint8)}
    write_mat(root / "sbd/inst" / f"{NAMES[0]}.mat", empty)
    for folder in ("SegmentationObject", "SegmentationClass"):
        write_png(root / "VOC2012" / folder / f"{NAMES[0]}.png", np.zeros_like(OBJECTS))
    assert sbd(root)[0]["annotations"] == voc(root)[0]["annotations"] == []


def test_the_class_of_an_instance_is_that_of_most_of_its_pixels(root: Path) -> None:
    classes = labels({15: LEFT, 8: RIGHT})
    classes[2, 1:3] = 12
    classes[3:7, 1:7] = 255
    write_png(root / f"VOC2012/SegmentationClass/{NAMES[0]}.png", classes)
    assert voc(root)[0]["annotations"][0]["category_id"] == CLASSES.index("person")


def refused(read: Any, root: Path, file: Path, reason: str) -> None:
    with pytest.raises(DatasetError, match=reason) as caught:
        read(root)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("read", "file"),
    [
        (sbd, "sbd/val.txt"),
        (sbd, f"sbd/inst/{NAMES[1]}.mat"),
        (sbd, f"sbd/img/{NAMES[1]}.jpg"),
        (voc, "VOC2012/ImageSets/Segmentation/val.txt"),
        (voc, f"VOC2012/SegmentationObject/{NAMES[1]}.png"),
        (voc, f"VOC2012/SegmentationClass/{NAMES[1]}.png"),
        (voc, f"VOC2012/JPEGImages/{NAMES[1]}.jpg"),
    ],
)
def test_a_missing_file_is_named(read: Any, file: str, root: Path) -> None:
    (root / file).unlink()
    refused(read, root, root / file, "there is no file .*; set DETECTRON2_DATASETS to the folder")


def test_every_truncation_of_a_mat_file_is_refused(root: Path) -> None:
    file = root / f"sbd/inst/{NAMES[0]}.mat"
    content = file.read_bytes()
    for length in range(0, len(content), 11):
        file.write_bytes(content[:length])
        refused(sbd, root, file, "is damaged or has no structure GTinst")


def test_every_truncation_of_a_png_file_is_refused(root: Path) -> None:
    file = root / f"VOC2012/SegmentationObject/{NAMES[0]}.png"
    content = file.read_bytes()
    end = content.index(b"IDAT") + 8
    for length in range(0, end, 7):
        file.write_bytes(content[:length])
        refused(voc, root, file, "is empty|is not an image|cut off|cannot be decoded")


def test_a_damaged_mat_file_is_read_or_refused(root: Path) -> None:
    file = root / f"sbd/inst/{NAMES[0]}.mat"
    content = file.read_bytes()
    rng = np.random.default_rng(0)
    refusals = 0
    for _ in range(150):
        damaged = bytearray(content)
        for position in rng.integers(0, len(content), 3):
            damaged[position] = rng.integers(256)
        file.write_bytes(damaged)
        try:
            sbd(root)
        except DatasetError as error:
            assert str(file) in str(error)
            refusals += 1
    assert refusals > 50


@pytest.mark.parametrize(
    ("structure", "reason"),
    [
        ({"Segmentation": OBJECTS}, "no structure GTinst with Segmentation and Categories"),
        ({"Segmentation": "text", "Categories": CATEGORIES}, "Segmentation is no matrix"),
        ({"Segmentation": csc_matrix(OBJECTS), "Categories": CATEGORIES}, "is no matrix"),
        (
            {"Segmentation": OBJECTS, "Categories": CATEGORIES[:1]},
            "beyond those of its 1 instances",
        ),
        ({"Segmentation": OBJECTS - 1.0, "Categories": CATEGORIES}, "beyond those of its 2"),
        ({"Segmentation": OBJECTS[:0], "Categories": CATEGORIES}, "is empty"),
        ({"Segmentation": OBJECTS, "Categories": CATEGORIES + 13}, r"\[28, 21\]; expected 1 to 20"),
    ],
)
def test_another_structure_is_refused(structure: dict[str, Any], reason: str, root: Path) -> None:
    file = root / f"sbd/inst/{NAMES[0]}.mat"
    write_mat(file, structure)
    refused(sbd, root, file, reason)


def test_a_variable_that_is_no_structure_is_refused(root: Path) -> None:
    file = root / f"sbd/inst/{NAMES[0]}.mat"
    for value in ({"GTinst": OBJECTS}, {"GTcls": {"Segmentation": OBJECTS}}):
        savemat(file, value)
        refused(sbd, root, file, "is damaged or has no structure GTinst")


def test_a_huge_mat_file_is_refused_unread(root: Path) -> None:
    file = root / f"sbd/inst/{NAMES[0]}.mat"
    os.truncate(file, 2**40)
    refused(sbd, root, file, f"has {2**40} bytes; expected some kilobytes")


def test_colours_in_place_of_numbers_are_refused(root: Path) -> None:
    file = root / f"VOC2012/SegmentationClass/{NAMES[0]}.png"
    Image.new("RGB", (WIDTH, HEIGHT)).save(file)
    refused(voc, root, file, "mode RGB; expected one number per pixel")


def test_contradicting_label_files_are_refused(root: Path) -> None:
    file = root / f"VOC2012/SegmentationClass/{NAMES[0]}.png"
    write_png(file, OBJECTS[:5])
    refused(voc, root, file, r"is \(12, 20\), .* \(5, 20\) \(height, width\)")
    write_png(file, np.zeros_like(OBJECTS))
    refused(voc, root, file, "has no class where .* has instance 1; expected 1 to 20")
    write_png(file, labels({15: LEFT, 21: RIGHT}))
    refused(voc, root, file, "has class 21 where .* has instance 2")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty; expected names"),
        (b"\xff\xfe", "is no list of names"),
        (b"../../etc/passwd", "has '../../etc/passwd'; expected each image once"),
        (b"2007_000027 2007_000027", "repeats 1 names"),
    ],
)
@READERS
def test_a_strange_list_is_refused(read: Any, content: bytes, reason: str, root: Path) -> None:
    file = root / ("sbd" if read is sbd else "VOC2012/ImageSets/Segmentation") / "val.txt"
    file.write_bytes(content)
    refused(read, root, file, reason)


@pytest.fixture
def registered(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The built-in names pointing to ``root``, and back where they pointed before."""
    instseg.get_cfg()
    previous = os.environ.get("DETECTRON2_DATASETS")

    def register(folder: str | None) -> None:
        for name in BUILT_IN:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        if folder is None:
            monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
        else:
            monkeypatch.setenv("DETECTRON2_DATASETS", folder)
        register_builtin_datasets()

    register(str(root))
    yield
    register(previous)


def test_classes_are_known_without_reading_anything(registered: Any, root: Path) -> None:
    (root / "sbd/train.txt").unlink()
    assert MetadataCatalog.get("sbd_train").thing_classes == list(CLASSES)
    with pytest.raises(DatasetError, match="data set sbd_train: there is no file"):
        DatasetCatalog.get("sbd_train")


def perfect(record: dict[str, Any]) -> dict[str, Instances]:
    """The instances of a record as if they had been predicted."""
    items = record["annotations"]
    masks = np.array([mask_util.decode(item["segmentation"]) for item in items], dtype=bool)
    corners = [[x, y, x + w, y + h] for x, y, w, h in (item["bbox"] for item in items)]
    return {
        "instances": Instances(
            (HEIGHT, WIDTH),
            pred_boxes=Boxes(torch.tensor(corners)),
            scores=torch.linspace(0.5, 0.9, len(items)),
            pred_classes=torch.tensor([item["category_id"] for item in items]),
            pred_masks=torch.from_numpy(masks),
        )
    }


def evaluate(name: str, folder: Path, metric: str = "coco") -> dict[str, dict[str, float]]:
    keys = ["OUTPUT_DIR", str(folder), "TEST.METRICS", (metric,)]
    cfg = instseg.load_cfg("mask_rcnn/mask_rcnn_shapes.yaml", keys)
    evaluator = build_evaluator(cfg, load(name))
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        evaluator.process([record], [perfect(record)])
    results: dict[str, dict[str, float]] = evaluator.evaluate()
    return results


@pytest.mark.parametrize("name", ["sbd_val", "voc_2012_instances_val"])
def test_all_evaluators_work_on_the_data(name: str, registered: Any, tmp_path: Path) -> None:
    results = evaluate(name, tmp_path / "out")
    assert list(results) == ["bbox", "segm", "voc_segm"]
    assert results["segm"]["AP"] == pytest.approx(100)
    assert results["voc_segm"]["AP50"] == results["voc_segm"]["AP70-cat"] == pytest.approx(100)
    results = evaluate(name, tmp_path / "out", metric="proposals")
    assert list(results) == ["proposals_box", "proposals_segm"]
    assert results["proposals_segm"]["AR@10"] == 100


def test_changed_files_are_evaluated_as_they_are_now(
    registered: Any, root: Path, tmp_path: Path
) -> None:
    """Files of an earlier evaluation in the same folder must not be used again."""
    evaluate("sbd_val", tmp_path / "out")
    (root / "sbd/val.txt").write_text(NAMES[0])
    changed = {"Segmentation": labels({1: RIGHT}), "Categories": CATEGORIES[1:]}
    write_mat(root / f"sbd/inst/{NAMES[0]}.mat", changed)
    assert evaluate("sbd_val", tmp_path / "out")["segm"]["AP"] == pytest.approx(100)


def test_numbers_of_more_than_8_bits_are_refused(root: Path) -> None:
    file = root / f"VOC2012/SegmentationClass/{NAMES[0]}.png"
    Image.fromarray(np.full((HEIGHT, WIDTH), 300, np.uint16)).save(file)
    refused(voc, root, file, "has numbers from 300 to 300; expected 0 to 255")
