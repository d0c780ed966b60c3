"""Data sets of label images."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from instseg.check_data import CheckedSet, check_data
from instseg.cli import main
from instseg.data.build import register_dataset
from instseg.data.dataset import DataSet, load
from instseg.data.findings import Kind
from instseg.data.images import read_labels
from instseg.data.label_images import label_rles, labels_in_pieces
from instseg.data.readers.labels import LabelSet, parse_name
from instseg.errors import DatasetError
from instseg.masks import encode

HEIGHT, WIDTH = 24, 32
LABELS = np.zeros((HEIGHT, WIDTH), dtype=np.uint16)
LABELS[2:8, 1:7] = 7
LABELS[3:12, 9:19] = 300
LABELS[20:24, 28:32] = 2


def write_set(
    folder: Path, *, labels: Any = LABELS, suffix: str = "tif", stems: str = "ab", classes: str = ""
) -> str:
    """Write images and their label images; returns the name of the set."""
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    for number, stem in enumerate(stems):
        pixels = np.random.default_rng(number).integers(0, 255, (HEIGHT, WIDTH), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"images/{stem}.png")
        write_labels(folder / f"labels/{stem}.{suffix}", labels)
    name = f"labels:{folder}/images:{folder}/labels"
    if classes:
        (folder / "classes.csv").write_text(classes)
        name += f":{folder}/classes.csv"
    return name


def write_labels(path: Path, labels: Any) -> None:
    if path.suffix == ".png":
        Image.fromarray(labels).save(path)
    else:
        tifffile.imwrite(path, labels, compression="zlib")


def read(name: str) -> DataSet:
    register_dataset(name)
    return load(name)


def check(name: str) -> CheckedSet:
    (checked,) = check_data([name])
    return checked


def masks_of(record: dict[str, Any]) -> list[np.ndarray]:
    return [mask_util.decode(entry["segmentation"]) for entry in record["annotations"]]


@pytest.mark.parametrize("suffix", ["tif", "tiff", "TIF", "png"])
def test_a_record_holds_an_instance_per_label_in_their_order(tmp_path: Path, suffix: str) -> None:
    dataset = read(write_set(tmp_path, suffix=suffix))
    assert [record["image_id"] for record in dataset.records] == ["a", "b"]
    assert dataset.classes == ("object",) and dataset.annotated
    record = dataset.records[0]
    assert record["file_name"] == f"{tmp_path}/images/a.png"
    assert (record["height"], record["width"]) == (HEIGHT, WIDTH)
    assert [entry["id"] for entry in record["annotations"]] == [2, 7, 300]
    np.testing.assert_array_equal(masks_of(record), [LABELS == 2, LABELS == 7, LABELS == 300])
    assert [e["bbox"] for e in record["annotations"]][1:] == [[1, 2, 6, 6], [9, 3, 10, 9]]


@pytest.mark.parametrize(
    "kind", "uint8 int8 uint16 int16 uint32 int32 uint64 int64 float32 float64".split()
)
@pytest.mark.parametrize("with_tifffile", [True, False])
def test_labels_of_any_depth_are_read(
    tmp_path: Path, kind: str, with_tifffile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = (LABELS > 0).astype(kind)
    name = write_set(tmp_path, labels=labels, stems="a")
    if not with_tifffile:
        monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
        if kind.endswith("64"):
            with pytest.raises(DatasetError, match="a TIFF whose kind of pixels cannot be read"):
                read(name)
            return
    np.testing.assert_array_equal(masks_of(read(name).records[0]), [LABELS > 0])


@pytest.mark.parametrize("with_tifffile", [True, False])
def test_a_label_above_two_to_the_31_is_no_negative_one(
    tmp_path: Path, with_tifffile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = write_set(tmp_path, labels=np.where(LABELS == 7, 4_000_000_000, 0).astype(np.uint32))
    if not with_tifffile:
        monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    (annotation,) = read(name).records[0]["annotations"]
    assert annotation["id"] == 4_000_000_000


@pytest.mark.parametrize("kind", ["uint8", "uint16"])
@pytest.mark.parametrize("with_tifffile", [True, False])
def test_labels_of_a_file_whose_zero_is_white_are_the_stored_numbers(
    tmp_path: Path, kind: str, with_tifffile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = np.where(LABELS == 7, 3, 0).astype(kind)
    for compression in (None, "zlib"):
        path = tmp_path / f"{compression}.tif"
        tifffile.imwrite(path, labels, photometric="miniswhite", compression=compression)
        with monkeypatch.context() as patch:
            if with_tifffile:
                patch.setattr("instseg.data.images._is_plain", lambda path: False)
            else:
                patch.setitem(__import__("sys").modules, "tifffile", None)
            np.testing.assert_array_equal(read_labels(path), labels)


def save_stack(path: Path) -> None:
    tifffile.imwrite(path, np.stack([LABELS] * 3), photometric="minisblack")


BAD: dict[str, tuple[Kind, Callable[[Path], object], str]] = {
    "labels in colour": (
        Kind.LABELS,
        lambda p: tifffile.imwrite(p, np.zeros((HEIGHT, WIDTH, 3), np.uint8), photometric="rgb"),
        "has pixels of mode RGB; expected one number per pixel.*colours do not tell the labels",
    ),
    "labels in colour of 16 bits": (
        Kind.LABELS,
        lambda p: tifffile.imwrite(p, np.zeros((HEIGHT, WIDTH, 3), np.uint16), photometric="rgb"),
        "has 3 values per pixel; expected one number per pixel",
    ),
    "fractions": (
        Kind.LABELS,
        lambda p: tifffile.imwrite(p, (LABELS / 1000).astype(np.float32)),
        r"has pixels such as 0\.007; expected whole numbers",
    ),
    "complex numbers": (
        Kind.LABELS,
        lambda p: tifffile.imwrite(p, LABELS.astype(np.complex64)),
        "has pixels of type complex64; expected numbers",
    ),
    "NaN": (
        Kind.LABELS,
        lambda p: tifffile.imwrite(p, np.where(LABELS == 7, np.nan, 1).astype(np.float32)),
        "has pixels that are NaN",
    ),
    "negative labels": (
        Kind.LABELS,
        lambda p: tifffile.imwrite(p, LABELS.astype(np.int16) - 1),
        "has the negative label -1; expected 0 for the background",
    ),
    "labels beyond all numbers": (
        Kind.LABELS,
        lambda p: tifffile.imwrite(p, LABELS * 1e30),
        r"has the label 3e\+32; expected at most",
    ),
    "negative labels of 8 bits": (
        Kind.LABELS,
        lambda p: tifffile.imwrite(p, LABELS.astype(np.int8) - 1),
        "has the negative label -1",
    ),
    "another size": (
        Kind.IMAGE_SIZE,
        lambda p: tifffile.imwrite(p, LABELS[1:]),
        r"b\.tif is 32 x 23 pixels, its image .*b\.png 32 x 24",
    ),
    "a stack": (Kind.LABELS, save_stack, "is a TIFF of 3 images; expected one"),
    "no image": (Kind.LABELS, lambda p: p.write_text("<html>"), "is HTML"),
    "an empty file": (Kind.LABELS, lambda p: p.write_bytes(b""), "the file is empty"),
    "a file cut off": (
        Kind.LABELS,
        lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
        "cannot be decoded",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_label_image_that_cannot_be_used_is_one_line(tmp_path: Path, what: str) -> None:
    kind, write, reason = BAD[what]
    name = write_set(tmp_path)
    write(tmp_path / "labels/b.tif")
    with pytest.raises(DatasetError, match=reason) as caught:
        read(name)
    assert str(caught.value).count("\n") == 0
    checked = check(name)
    assert checked.report.ids == {kind: ["b"]} and len(checked.images) == 1


def test_a_png_of_labels_in_colour_is_refused(tmp_path: Path) -> None:
    name = write_set(tmp_path, suffix="png")
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "labels/b.png")
    with pytest.raises(DatasetError, match="pixels of mode RGB; .* colours do not tell the labels"):
        read(name)


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    name = write_set(tmp_path)
    (tmp_path / "images/a.png").write_text("<html>")
    with pytest.raises(DatasetError, match=r"images/a\.png: is HTML"):
        read(name)
    assert check(name).report.ids == {Kind.UNREADABLE_IMAGE: ["a"]}


def test_two_images_of_one_stem_are_refused(tmp_path: Path) -> None:
    name = write_set(tmp_path)
    Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / "images/a.jpg")
    write_labels(tmp_path / "labels/b.png", LABELS)
    with pytest.raises(DatasetError, match=r"two images have the stem a, a\.jpg and a\.png"):
        read(name)
    assert check(name).report.ids == {Kind.SAME_STEM: ["a", "b"]}


def test_images_without_labels_and_labels_without_image_are_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = write_set(tmp_path, stems="abcd")
    (tmp_path / "labels/b.tif").unlink()
    (tmp_path / "images/c.png").unlink()
    assert [record["image_id"] for record in read(name).records] == ["a", "d"]
    assert "images/b.png has no labels and is left out; expected b.tif or b.png" in caplog.text
    assert "labels/c.tif has no image and is left out; expected one called c" in caplog.text
    assert check(name).report.ids == {Kind.NO_LABELS: ["b"], Kind.NO_IMAGE: ["c"]}


def test_folders_whose_stems_never_agree_are_refused(tmp_path: Path) -> None:
    name = write_set(tmp_path, stems="a")
    os.rename(tmp_path / "labels/a.tif", tmp_path / "labels/a_mask.tif")
    with pytest.raises(DatasetError, match="expected equal stems, found a and a_mask"):
        read(name)
    assert Kind.FORMAT in check(name).report.ids


@pytest.mark.parametrize(("folder", "what"), [("images", "images"), ("labels", "label images")])
def test_an_empty_or_missing_folder_is_refused(tmp_path: Path, folder: str, what: str) -> None:
    name = write_set(tmp_path, stems="")
    other = {"images": "labels", "labels": "images"}[folder]
    Image.fromarray(LABELS.astype(np.uint8)).save(tmp_path / other / "a.png")
    with pytest.raises(DatasetError, match=rf"the folder .*/{folder} holds no {what}"):
        read(name)
    assert list(check(name).report.ids) == [Kind.FORMAT]
    (tmp_path / folder).rmdir()
    with pytest.raises(DatasetError, match=rf"there is no folder .*/{folder}"):
        read(name)


def test_an_image_without_any_label_has_no_instances(tmp_path: Path) -> None:
    name = write_set(tmp_path)
    write_labels(tmp_path / "labels/b.tif", LABELS * 0)
    assert read(name).records[1]["annotations"] == []
    assert check(name).report.ids == {}


def test_a_set_without_any_instance_is_nothing_to_train_on(tmp_path: Path) -> None:
    name = write_set(tmp_path, labels=LABELS * 0)
    assert len(read(name).records) == 2
    assert list(check(name).report.ids) == [Kind.NO_INSTANCE]


def test_labels_in_several_pieces_are_counted_by_check_data(tmp_path: Path) -> None:
    labels = LABELS.copy()
    labels[12, 19] = 300  # a corner touches
    labels[15, 0:9:4] = 9
    name = write_set(tmp_path, stems="a", labels=labels)
    assert len(read(name).records[0]["annotations"]) == 4
    checked = check(name)
    assert checked.report.ids == {Kind.IN_PIECES: ["a:9"]}
    assert "is in 3 pieces" in checked.table()


def test_what_predict_writes_and_ome_files_match_their_images(tmp_path: Path) -> None:
    name = write_set(tmp_path, stems="ab")
    os.rename(tmp_path / "labels/a.tif", tmp_path / "labels/a_labels.tif")
    os.rename(tmp_path / "labels/b.tif", tmp_path / "labels/b.ome.tif")
    assert len(read(name).records) == 2


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("labels:a:b", ("a", "b", None)),
        ("labels:/d/a:/d/b", ("/d/a", "/d/b", None)),
        (r"labels:C:\d\a:D:\d\b", (r"C:\d\a", r"D:\d\b", None)),
        ("labels:c:/a:b", ("c:/a", "b", None)),
        ("labels:a:/d/b", ("a", "/d/b", None)),
        (r"labels:C:\a:b:D:\c\d.CSV", (r"C:\a", "b", r"D:\c\d.CSV")),
        ("labels:a:b:c.csv", ("a", "b", "c.csv")),
        ("labels:~/a:b", (f"{Path.home()}/a", "b", None)),
    ],
)
def test_the_parts_of_a_name_are_told_apart(name: str, parts: tuple[str, ...]) -> None:
    assert parse_name(name) == LabelSet(*parts)


@pytest.mark.parametrize("name", ["labels:", "labels:a", "labels:a:b:c", "labels::b"])
def test_an_incomplete_name_is_refused_with_the_form(name: str) -> None:
    with pytest.raises(DatasetError, match="expected labels:IMAGES:LABELS, two folders"):
        register_dataset(name)


def test_a_set_is_read_again_if_a_file_changes_and_else_not(tmp_path: Path) -> None:
    name = write_set(tmp_path)
    first = read(name)
    assert load(name) is first
    write_labels(tmp_path / "labels/a.tif", np.where(LABELS == 7, 0, LABELS))
    second = load(name)
    assert [len(record["annotations"]) for record in second.records] == [2, 3]
    Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / "images/c.png")
    write_labels(tmp_path / "labels/c.tif", LABELS)
    assert len(load(name).records) == 3


def test_check_data_lists_findings_and_exits_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = write_set(tmp_path)
    assert main(["check-data", name]) == 0
    assert "images 2, annotations 6, classes 1\nnothing found" in capsys.readouterr().out
    BAD["negative labels"][1](tmp_path / "labels/b.tif")
    assert main(["check-data", name]) == 1
    assert "label image that cannot be used" in capsys.readouterr().out


@given(
    arrays(np.int64, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 3))
)
def test_masks_are_those_of_pycocotools_and_pieces_those_of_scikit_image(labels: Any) -> None:
    from skimage.measure import label

    numbers = [number for number in np.unique(labels).tolist() if number]
    assert label_rles(labels) == {number: encode(labels == number) for number in numbers}
    counts = {number: label(labels == number, connectivity=2).max() for number in numbers}
    expected = {number: count for number, count in counts.items() if count > 1}
    assert labels_in_pieces(labels) == expected
