"""Building the nuclei set from files in the layout of the public download."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from instseg import cli
from instseg.data.readers.nuclei import LEFT_OUT, build
from instseg.errors import DatasetError, ImageError


def write_image(
    source: Path, name: str, *, bright_nuclei: bool = True, coloured: bool = False
) -> None:
    """Two squares, the second overlapping the first by one column, in the download's layout."""
    folder = source / name
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    masks = np.zeros((2, 20, 24), dtype=np.uint8)
    masks[0, 2:8, 2:8] = 255
    masks[1, 2:8, 7:12] = 255
    image = np.full((20, 24, 4), 40 if bright_nuclei else 200, dtype=np.uint8)
    image[masks.any(axis=0)] = 120
    image[..., 3] = 255
    if coloured:
        image[..., 0] += 1
    Image.fromarray(image).save(folder / "images" / f"{name}.png")
    for number, mask in enumerate(masks):
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")


def name_of(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def test_a_build_is_read_by_pycocotools_with_disjoint_masks(tmp_path: Path) -> None:
    for number in range(4):
        write_image(tmp_path / "stage1_train", name_of(number))
    assert build(tmp_path / "stage1_train", tmp_path / "nuclei", 3, 1) == {"train": 3, "val": 1}
    coco = COCO(str(tmp_path / "nuclei/instances_train.json"))
    assert len(coco.imgs) == 3
    for image_id, image in coco.imgs.items():
        masks = [coco.annToMask(ann) for ann in coco.loadAnns(coco.getAnnIds(image_id))]
        assert [int(mask.sum()) for mask in masks] == [36, 24]
        assert np.sum(masks, axis=0).max() == 1
        written = Image.open(tmp_path / "nuclei/images" / image["file_name"])
        assert (written.mode, written.size) == ("L", (24, 20))


def test_the_command_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        write_image(tmp_path / "in", name_of(number))
    words = ["nuclei", "build", str(tmp_path / "in"), str(tmp_path / "out"), "--train", "2"]
    assert cli.main([*words, "--val", "1"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: 2 training, 1 validation images\n"


def test_a_folder_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(tmp_path / "in", name_of(0))
    (tmp_path / "out").touch()
    words = ["nuclei", "build", str(tmp_path / "in"), str(tmp_path / "out"), "--train", "1"]
    assert cli.main([*words, "--val", "0"]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'out'} cannot be written" in error and error.count("\n") == 1


def test_the_split_follows_the_hash_of_the_names(tmp_path: Path) -> None:
    names = [name_of(number) for number in range(5)]
    for name in names:
        write_image(tmp_path / "in", name)
    build(tmp_path / "in", tmp_path / "out", 3, 2)
    ordered = sorted(names, key=lambda n: hashlib.sha256(f"nuclei/{n}".encode()).hexdigest())
    for split, expected in (("train", ordered[:3]), ("val", ordered[3:])):
        content = json.loads((tmp_path / f"out/instances_{split}.json").read_text())
        assert [image["file_name"] for image in content["images"]] == [f"{n}.png" for n in expected]


def test_the_order_is_that_of_the_set_in_use(data_root: Path) -> None:
    def keys(split: str) -> list[str]:
        content = json.loads((data_root / f"nuclei/instances_{split}.json").read_text())
        stems = [Path(image["file_name"]).stem for image in content["images"]]
        assert not LEFT_OUT & {stem[:8] for stem in stems}
        return [hashlib.sha256(f"nuclei/{stem}".encode()).hexdigest() for stem in stems]

    assert max(keys("train")) < min(keys("val"))


def test_images_that_are_not_fluorescence_or_badly_labelled_are_left_out(tmp_path: Path) -> None:
    write_image(tmp_path / "in", name_of(0))
    write_image(tmp_path / "in", name_of(1), bright_nuclei=False)
    write_image(tmp_path / "in", name_of(2), coloured=True)
    write_image(tmp_path / "in", sorted(LEFT_OUT)[0] + "0" * 56)
    assert build(tmp_path / "in", tmp_path / "out", 1, 0) == {"train": 1, "val": 0}
    with pytest.raises(DatasetError, match=r"holds 1 usable fluorescence images, 1 \+ 1 are"):
        build(tmp_path / "in", tmp_path / "out", 1, 1)


@pytest.mark.parametrize(("train", "val"), [(-1, 3), (3, -1), (0, 0)])
def test_a_number_of_images_that_cannot_be_is_refused(tmp_path: Path, train: int, val: int) -> None:
    with pytest.raises(DatasetError, match=f"{train} training and {val} validation images are"):
        build(tmp_path, tmp_path / "out", train, val)


def test_another_layout_is_refused_with_the_expected_one(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="expected BBBC038's stage1_train"):
        build(tmp_path, tmp_path / "out")


def test_a_mask_of_another_size_is_refused_with_both_sizes(tmp_path: Path) -> None:
    write_image(tmp_path / "in", name_of(0))
    Image.new("L", (9, 9)).save(tmp_path / "in" / name_of(0) / "masks/9.png")
    with pytest.raises(DatasetError, match=r"9.png is \(9, 9\), its image \(20, 24\)"):
        build(tmp_path / "in", tmp_path / "out", 1, 0)


@pytest.mark.parametrize("file", ["images/{}.png", "masks/0.png"])
@pytest.mark.parametrize("content", [b"", b"<html>", b"\x89PNG\r\n\x1a\n\0\0"])
def test_a_damaged_file_is_named(tmp_path: Path, file: str, content: bytes) -> None:
    write_image(tmp_path / "in", name_of(0))
    damaged = tmp_path / "in" / name_of(0) / file.format(name_of(0))
    damaged.write_bytes(content)
    with pytest.raises(ImageError, match=re.escape(str(damaged))):
        build(tmp_path / "in", tmp_path / "out", 1, 0)
