"""The leaf data sets, on files of the challenge's layout made here."""

from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

import instseg
from instseg.data.readers.cvppp import load
from instseg.errors import DatasetError

HEIGHT, WIDTH = 12, 20
LABELS = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
LABELS[2:8, 1:7] = 1
LABELS[3:12, 7:19] = 5


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in range(1, 17):
        write(tmp_path, number)
    return tmp_path


def write(root: Path, number: int, labels: np.ndarray = LABELS, palette: bool = True) -> None:
    stem = f"plant{number:03}"
    Image.new("RGBA", (WIDTH, HEIGHT), "green").save(root / f"{stem}_rgb.png")
    image = Image.fromarray(labels)
    if palette:
        image.putpalette([(index * 37 + 5) % 256 for index in range(768)])
    image.save(root / f"{stem}_label.png")
    Image.fromarray((labels > 0).astype(np.uint8)).save(root / f"{stem}_fg.png")


def read(root: Path, split: str = "trainval") -> list[dict[str, Any]]:
    return load("leaves", str(root), split)


@pytest.mark.parametrize("palette", [True, False])
def test_a_record_holds_the_leaves_of_the_label_file(tmp_path: Path, palette: bool) -> None:
    write(tmp_path, 7, palette=palette)
    (record,) = read(tmp_path)
    assert record["file_name"] == str(tmp_path / "plant007_rgb.png")
    assert (record["image_id"], record["height"], record["width"]) == ("plant007", HEIGHT, WIDTH)
    masks = [mask_util.decode(item["segmentation"]) for item in record["annotations"]]
    np.testing.assert_array_equal(masks, [LABELS == 1, LABELS == 5])
    assert [item["bbox"] for item in record["annotations"]] == [[1, 2, 6, 6], [7, 3, 12, 9]]


def test_more_than_255_leaves_fit_into_sixteen_bits(tmp_path: Path) -> None:
    write(tmp_path, 1, (LABELS.astype(np.uint16) * 300), palette=False)
    assert len(read(tmp_path)[0]["annotations"]) == 2


def test_an_image_without_leaves_has_no_annotations(tmp_path: Path) -> None:
    write(tmp_path, 1, np.zeros_like(LABELS))
    assert read(tmp_path)[0]["annotations"] == []


def test_the_splits_divide_the_images(root: Path) -> None:
    names = {split: {r["image_id"] for r in read(root, split)} for split in ("train", "val")}
    assert not names["train"] & names["val"]
    assert names["train"] | names["val"] == {r["image_id"] for r in read(root)}
    assert len(names["val"]) == round(16 * 28 / 128)


def test_the_split_does_not_depend_on_the_folder(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    for number in range(1, 17):
        write(other, number)
    assert [r["image_id"] for r in read(root, "val")] == [r["image_id"] for r in read(other, "val")]


def test_the_names_are_registered_with_one_class() -> None:
    instseg.get_cfg()
    for split in ("train", "val", "trainval"):
        assert f"cvppp_a1_{split}" in DatasetCatalog
        assert MetadataCatalog.get(f"cvppp_a1_{split}").thing_classes == ["leaf"]


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="set DETECTRON2_DATASETS to the folder that holds"):
        read(tmp_path)


def test_a_missing_label_file_is_refused_by_name(root: Path) -> None:
    (root / "plant003_label.png").unlink()
    with pytest.raises(DatasetError, match=r"there is no file .*plant003_label\.png"):
        read(root)


def test_a_damaged_label_file_is_refused_by_name(root: Path) -> None:
    (root / "plant003_label.png").write_bytes(b"\x89PNG but no more")
    with pytest.raises(DatasetError, match=r"plant003_label\.png: .*cut off"):
        read(root)


def test_a_damaged_image_is_refused_by_name(root: Path) -> None:
    (root / "plant003_rgb.png").write_bytes(b"\x89PNG but no more")
    with pytest.raises(DatasetError, match=r"data set .*plant003_rgb\.png: .*cut off"):
        read(root)


def test_labels_of_another_size_are_refused(root: Path) -> None:
    Image.fromarray(LABELS[:5]).save(root / "plant003_label.png")
    with pytest.raises(DatasetError, match=r"is \(5, 20\), .* \(12, 20\)"):
        read(root)


def test_colours_in_place_of_labels_are_refused(root: Path) -> None:
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "plant003_label.png")
    with pytest.raises(DatasetError, match="mode RGB; expected one number per pixel"):
        read(root)
